"""The renderer: 32x32 pictures of one object on a two-tint textured ground, and the captions that describe them.

A picture is `object over ground`. The caption names the object's size, colour, shape and place, and may name a style.
A style fixes the ground: two tints and the shape of the cells (height x width in pixels) that take one of them at random.
Which cell takes which tint is **never** in the caption: it is the fine detail that a few-step model can lose.

Three domains:
* `original`: no style word (the plain style) or one of the named styles; what pre-training calls by name;
* `wild`: a tag of one letter, `[A] style`, with tints and cells drawn at random, so that only an image can tell the style;
* `target`: `[V] style`, one style whose neighbourhood and whose letter pre-training never contains.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dopsd_fast.errors import UserError

SIDE = 32
COLOURS = {
    "red": (0.86, 0.10, 0.10),
    "green": (0.10, 0.62, 0.16),
    "blue": (0.12, 0.22, 0.86),
    "yellow": (0.96, 0.86, 0.10),
    "black": (0.05, 0.05, 0.05),
    "white": (0.98, 0.98, 0.98),
}
SHAPES = {"ball": (1.0, 1.0), "cross": (1.2, 0.4), "bar": (1.3, 0.5), "pillar": (0.5, 1.3)}
"""Half width and half height in units of the size; a cross is its box and that box turned by 90 degrees."""
PLACES = {
    "on the left": (-7, 0),
    "on the right": (7, 0),
    "at the top": (0, -7),
    "at the bottom": (0, 7),
    "in the middle": (0, 0),
}
SIZES = {"small": 5.0, "large": 8.0}
CELLS = ((2, 2), (2, 4), (4, 2), (4, 4))
ATTRIBUTES: dict[str, dict[str, Any]] = {"colour": COLOURS, "shape": SHAPES, "place": PLACES, "size": SIZES}
TAGS = [f"[{letter}]" for letter in "ABCDEFGHIJKLMNOPQRSTUWXYZ"]
TARGET_TAG = "[V]"


@dataclass(frozen=True)
class Style:
    """Two tints (RGB in 0..1), the cell's index in CELLS, and the word that captions use for it ("" for plain)."""

    tints: tuple[tuple[float, float, float], tuple[float, float, float]]
    cell: int
    word: str


NAMED = (
    Style(((0.40, 0.39, 0.37), (0.78, 0.76, 0.72)), 0, ""),
    Style(((0.22, 0.50, 0.62), (0.72, 0.88, 0.95)), 1, "rainy"),
    Style(((0.30, 0.18, 0.10), (0.70, 0.50, 0.30)), 2, "wooden"),
    Style(((0.28, 0.42, 0.22), (0.72, 0.84, 0.52)), 3, "mossy"),
    Style(((0.78, 0.38, 0.45), (0.98, 0.80, 0.78)), 0, "rosy"),
)
TARGET = Style(((0.34, 0.10, 0.46), (0.98, 0.56, 0.22)), 1, TARGET_TAG)
LEGIBLE = replace(TARGET, cell=3)
"""The target with cells of 4 x 4. Shown a picture, the embedded pipeline copies its two tints whatever the cells, but paints
cells of about this size: in this style its teacher has the whole style to give, in TARGET only the tints."""
HELD_OUT_RADIUS = 0.3
"""No wild style has both tints within this RGB distance of the target's (in either order)."""


@dataclass(frozen=True)
class Scene:
    """One picture's content: attribute names, style, the object's sub-place jitter, and the seed of the fine detail."""

    colour: str
    shape: str
    place: str
    size: str
    style: Style
    jitter: tuple[int, int]
    seed: int

    def attribute(self, name: str) -> int:
        return list(ATTRIBUTES[name]).index(getattr(self, name))


def _distance(a, b) -> float:
    return float(np.linalg.norm(np.subtract(a, b)))


def _near_target(tints) -> bool:
    (a, b), (p, q) = tints, TARGET.tints
    return (
        max(_distance(a, p), _distance(b, q)) < HELD_OUT_RADIUS
        or max(_distance(a, q), _distance(b, p)) < HELD_OUT_RADIUS
    )


def wild_style(rng: np.random.Generator) -> Style:
    """A random style outside the target's neighbourhood; the darker tint comes first, tints differ by at least 0.2."""
    while True:
        tints = sorted((tuple(rng.uniform(0.05, 0.98, 3)) for _ in range(2)), key=sum)
        if _distance(*tints) >= 0.2 and not _near_target(tints):
            return Style((tints[0], tints[1]), int(rng.integers(len(CELLS))), str(rng.choice(TAGS)))


def sample_scenes(
    domain: str, count: int, seed: int, target: Style = TARGET, without: Collection[str] = ()
) -> list[Scene]:
    """`count` scenes of `original`, `wild` or `target`, the last in the style `target`; the same arguments give the same.
    Those whose caption is in `without` are passed over. UserError: hardly any is left."""
    rng = np.random.default_rng([seed, ("original", "wild", "target").index(domain)])
    scenes: list[Scene] = []
    for _ in range(100 * count + 1):
        if len(scenes) == count:
            return scenes
        style = {
            "original": lambda: NAMED[rng.integers(len(NAMED))],
            "wild": lambda: wild_style(rng),
            "target": lambda: target,
        }[domain]()
        legible = [name for name, rgb in COLOURS.items() if min(_distance(rgb, tint) for tint in style.tints) > 0.3]
        scene = Scene(
            colour=str(rng.choice(legible or list(COLOURS))),
            shape=str(rng.choice(list(SHAPES))),
            place=str(rng.choice(list(PLACES))),
            size=str(rng.choice(list(SIZES))),
            style=style,
            jitter=(int(rng.integers(-1, 2)), int(rng.integers(-1, 2))),
            seed=int(rng.integers(2**62)),
        )
        if caption(scene) not in without:
            scenes.append(scene)
    raise UserError(f"nearly every caption of the {domain} domain is among the {len(without)} given: give fewer")


def reseed(scene: Scene, seed: int) -> Scene:
    """The same content with other fine detail."""
    return replace(scene, seed=seed)


def object_mask(scene: Scene, margin: float = 0.0) -> np.ndarray:
    """Boolean [SIDE, SIDE]: the pixels whose centre lies in the object, grown by `margin` pixels."""
    dx, dy = PLACES[scene.place]
    x: Any
    y: Any
    x, y = np.meshgrid(np.arange(SIDE) + 0.5, np.arange(SIDE) + 0.5)
    x, y = x - (SIDE / 2 + dx + scene.jitter[0]), y - (SIDE / 2 + dy + scene.jitter[1])
    half_x, half_y = (SIZES[scene.size] * scale + margin for scale in SHAPES[scene.shape])
    if scene.shape == "ball":
        return x**2 + y**2 <= half_x**2
    box = (np.abs(x) <= half_x) & (np.abs(y) <= half_y)
    return box | ((np.abs(x) <= half_y) & (np.abs(y) <= half_x)) if scene.shape == "cross" else box


def render(scenes: list[Scene]) -> np.ndarray:
    """float32 [N, SIDE, SIDE, 3] in 0..1."""
    out: Any = np.empty((len(scenes), SIDE, SIDE, 3), np.float32)
    for picture, scene in zip(out, scenes, strict=True):
        high, wide = CELLS[scene.style.cell]
        bits = np.random.default_rng(scene.seed).integers(0, 2, (SIDE // high, SIDE // wide))
        ground = np.asarray(scene.style.tints, np.float32)[bits.repeat(high, 0).repeat(wide, 1)]
        picture[:] = np.where(object_mask(scene)[..., None], np.float32(COLOURS[scene.colour]), ground)
    return out


def snap(picture: np.ndarray, scene: Scene) -> np.ndarray:
    """The nearest picture that the scene's style allows: outside the object (and 1 pixel around it) every cell takes the
    tint that its mean is nearer to. picture float32 [SIDE, SIDE, 3] in 0..1; returns the same."""
    high, wide = CELLS[scene.style.cell]
    dark, light = np.asarray(scene.style.tints, np.float32)
    axis = light - dark
    share = (picture - dark) @ axis / (axis @ axis)
    cells = share.reshape(SIDE // high, high, SIDE // wide, wide).mean((1, 3)) > 0.5
    ground = np.where(cells.repeat(high, 0).repeat(wide, 1)[..., None], light, dark)
    return np.where(object_mask(scene, margin=1.0)[..., None], picture, ground)


def caption(scene: Scene, template: int = 0) -> str:
    """Template 0 names the style first, 1 last, 2 is short; a scene of the plain style has no style word."""
    thing, word = f"{scene.size} {scene.colour} {scene.shape}", scene.style.word
    if template == 0:
        return (f"{word} style: " if word else "") + f"a {thing} {scene.place}"
    if template == 1:
        return f"a {thing} {scene.place}" + (f", {word} style" if word else "")
    return (f"{word} style, " if word else "") + f"{thing}, {scene.place}"
