"""What a run writes about itself: metrics, TensorBoard, phase times, peak memory, pictures in a grid, the console."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw


class MetricsLog:
    """`metrics.jsonl`, one row a step, and the same scalars for TensorBoard. Rows after `start` (the steps that a resumed
    run is about to repeat, and a line torn by a kill) are dropped, so the file holds each step exactly once."""

    def __init__(self, folder: Path, start: int):
        from torch.utils.tensorboard import SummaryWriter

        self.path = folder / "metrics.jsonl"
        kept = [line for line in read_rows(self.path) if line["step"] <= start]
        part = self.path.with_suffix(".part")
        part.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        part.replace(self.path)
        self.lines = open(self.path, "a", encoding="utf-8")
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)

    def sync(self) -> None:
        """On the disk before the checkpoint that relies on it."""
        os.fsync(self.lines.fileno())

    def append(self, row: dict[str, Any]) -> None:
        self.lines.write(json.dumps(row) + "\n")
        self.lines.flush()
        for name, value in _scalars(row):
            self.board.add_scalar(name, value, row["step"])

    def close(self) -> None:
        self.sync()
        self.lines.close()
        self.board.close()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The whole rows of a metrics file; a torn last line is left out."""
    rows = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                rows.append(json.loads(line))
    return rows


def _scalars(row: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in row.items():
        if isinstance(value, dict):
            yield from ((f"{name}/{key}", v) for key, v in value.items())
        elif isinstance(value, list):
            yield from ((f"{name}/{i}", v) for i, v in enumerate(value))
        elif name != "step" and value is not None:
            yield name, value


class Phases:
    """Seconds spent per named phase since the last `take`. On an accelerator a phase ends when its kernels have."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    def take(self) -> dict[str, float]:
        out, self.seconds = {name: round(s, 4) for name, s in self.seconds.items()}, {}
        return out


def peak_memory(device: torch.device) -> int:
    """Bytes: the allocator's peak on an accelerator, this process's peak resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


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


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch, its allocators or Python failed for want of memory; torch has an exception of its own on GPUs only."""
    said = ("out of memory", "DefaultCPUAllocator", "not enough memory", "ALLOC_FAILED")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in said)
    )


def free_memory(device: torch.device) -> None:
    """Gives back what is no longer used, after an error whose traceback may have held it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


class Deaf:
    """A console stream that outlives its reader: when the launcher dies and the pipe breaks, the run goes on to save."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self.stream.flush()

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


def outlive_console() -> None:
    sys.stdout, sys.stderr = Deaf(sys.stdout), Deaf(sys.stderr)


def quiet_libraries() -> None:
    """No progress bars and no advice from the model libraries: their errors reach the user as this program's."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
