"""A picture of pictures."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw


def compose(headings: Sequence[str], rows: Sequence[tuple[str, Sequence[Image.Image | None]]], side: int = 160) -> Image.Image:
    """A picture of pictures: one labelled row each, cells of `side` pixels, small pictures enlarged without smoothing."""
    label, gap = 26, 6
    width = gap + len(headings) * (side + gap)
    sheet = Image.new("RGB", (width, label + len(rows) * (side + label + gap)), "white")
    draw = ImageDraw.Draw(sheet)
    for column, heading in enumerate(headings):
        draw.text((gap + column * (side + gap), 7), heading, fill="black")
    for i, (text, pictures) in enumerate(rows):
        top = label + i * (side + label + gap)
        for column, picture in enumerate(pictures):
            if picture is not None:
                scale = min(side / picture.width, side / picture.height)
                size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
                filtering = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS
                sheet.paste(picture.resize(size, filtering), (gap + column * (side + gap), top))
        draw.text((gap, top + side + 5), _fit(draw, text, width - 2 * gap), fill="black")
    return sheet


def _fit(draw: ImageDraw.ImageDraw, text: str, width: int) -> str:
    """One line of at most `width` pixels: line breaks, tabs and other characters that are not printed become spaces, and what
    is too long ends in dots. The longest beginning that fits is found by halving, so a caption of any length takes no time."""
    text = " ".join("".join(c if c.isprintable() else " " for c in text[: 8 * width]).split())
    text = text.encode("latin-1", "replace").decode("latin-1")
    if draw.textlength(text[:width]) <= width and len(text) <= width:
        return text
    fits, too_long = 0, min(len(text), width)  # no character is narrower than a pixel
    while too_long - fits > 1:
        middle = (fits + too_long) // 2
        if draw.textlength(text[:middle].rstrip() + "...") <= width:
            fits = middle
        else:
            too_long = middle
    return text[:fits].rstrip() + "..."
