"""Grids of prompts x methods, as the paper's Fig. 3 and 4: `plots/reproduce_grid_DOMAIN.png`, and
`reproduce_grid_ablations_DOMAIN.png` of the ablations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from bench.reproduce.arms import ABLATIONS, NAMES, OURS, START, Arm
from bench.reproduce.pictures import DOMAINS, FEW, KEPT, MANY, TEST_SEED, scenes_of
from bench.reproduce.runs import Plan
from dopsd_fast.data.contact_sheet import compose
from dopsd_fast.nano import world
from dopsd_fast.nano.measure import to_pictures
from dopsd_fast.nano.report import images

SHOWN = 6
SIDE = 112
GRID, GRID_OF_ABLATIONS = "reproduce_grid_{}", "reproduce_grid_ablations_{}"
Row = tuple[str, Sequence[Image.Image]]
Kept = Callable[[Path, str, int], Sequence[Image.Image]]
BOTH = (START, "sft", OURS)
"""Shown at both step counts: what the few steps cost them is the point."""


def embedded(plan: Plan, arms: Sequence[Arm], out: Path) -> list[Path]:
    """A row for each method and step count, from the first seed; the same caption and noise in a column."""

    def kept(folder: Path, domain: str, steps: int) -> list[Image.Image]:
        if not (folder / KEPT).exists():
            return []
        with np.load(folder / KEPT) as found:
            return [Image.fromarray(one) for one in found[f"{domain}@{steps}"][:SHOWN]]

    made = []
    for domain in DOMAINS:
        scenes = scenes_of(domain, SHOWN, TEST_SEED)
        heads = [f"{scene.size} {scene.colour} {scene.shape}" for scene in scenes]
        exact = ("exact render", images(to_pictures(world.render(scenes))))
        for name, rows in grids(plan, arms, domain, FEW, kept):
            made.append(saved(out, name, heads, [exact, *rows], SIDE))
    return made


def given(plan: Plan, arms: Sequence[Arm], out: Path, few: int) -> list[Path]:
    """The same of a user's own model, from the pictures that were kept."""

    def kept(folder: Path, domain: str, steps: int) -> list[Image.Image]:
        return [Image.open(file) for file in sorted((folder / "pictures" / f"{domain}@{steps}").glob("*.png"))[:SHOWN]]

    made = []
    for domain in DOMAINS:
        for name, rows in grids(plan, arms, domain, few, kept):
            if rows:
                made.append(saved(out, name, [""] * max(len(pictures) for _, pictures in rows), rows, 2 * SIDE))
    return made


def grids(plan: Plan, arms: Sequence[Arm], domain: str, few: int, kept: Kept) -> Iterator[tuple[str, list[Row]]]:
    """File name and rows of each grid: the methods of the paper's table, and what differs from ours in one thing. `kept`: what
    was drawn of an arm, its folder, the domain and a step count."""
    start, ours = Arm(START, NAMES[START]), [arm for arm in arms if arm.name == OURS]
    ablations = [arm for arm in arms if arm in ABLATIONS]
    tables = [(GRID, [start, *(arm for arm in arms if arm not in ABLATIONS)])]
    tables += [(GRID_OF_ABLATIONS, [start, *ours, *ablations])] if ablations else []
    for name, shown in tables:
        rows = []
        for arm in shown:
            folder = plan.drawn(arm.name, plan.rates.get(arm.rate_from, 0.0), 0)
            for steps in (few, MANY) if name == GRID and arm.name in BOTH else (few,):
                if pictures := kept(folder, domain, steps):
                    rows.append((f"{arm.says}, {steps} steps", pictures))
        yield name.format(domain), rows


def saved(out: Path, name: str, heads: Sequence[str], table: Sequence[Row], side: int) -> Path:
    file = out / "plots" / f"{name}.png"
    file.parent.mkdir(parents=True, exist_ok=True)
    compose(heads, table, side=side).save(file)
    return file
