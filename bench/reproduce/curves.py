"""Curves over optimizer steps, as the paper's Fig. 5: `plots/reproduce_curves.png`, `..._teachers.png`, `..._states.png`; grids
of prompts x methods, as its Fig. 3 and 4: `plots/reproduce_grid_DOMAIN.png`, `reproduce_grid_ablations_DOMAIN.png`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.report.drawing import COLOURS, FAINT, OTHERS, canvas
from bench.reproduce.arms import ABLATIONS, BEFORE, DOMAINS, MAIN, MANY, NAMES, OURS, START, Arm
from bench.results import Row
from dopsd_fast.data.contact_sheet import compose

if TYPE_CHECKING:
    from bench.reproduce.runs import Plan

TEACHERS = (OURS, "frozen_teacher", "live_teacher", "ema_0.999", "ema_0.99")
STATES = (OURS, "off_policy", "sft_on_teacher_samples")
PANELS = (
    ("target", "style_distance", "target: style distance"), ("target", "patch_fd", "target: patch Frechet distance"),
    ("original", "patch_fd", "original: patch Frechet distance"), ("original", "accuracy", "original: attribute accuracy"),
)
EAGER = "dopsd_eager"
HIDING: Mapping[str, Any] = {"linestyle": (0, (1, 3)), "linewidth": 2.5}
"""How a curve is drawn that lies on another."""
SHOWN = 6
BOTH = (START, "sft", OURS)
"""Shown in a grid at both step counts: what the few steps cost them is the point."""


def curves(rows: Sequence[Row], environment: Mapping[str, Any]) -> Any:
    """The methods: mean of the seeds, lowest to highest shaded."""
    return _curves(rows, [arm.name for arm in MAIN], "Methods", fewest=1)


def teachers(rows: Sequence[Row], environment: Mapping[str, Any]) -> Any:
    return _curves(rows, TEACHERS, "Teachers", fewest=2)


def states(rows: Sequence[Row], environment: Mapping[str, Any]) -> Any:
    return _curves(rows, STATES, "States: on-policy, off-policy, teacher samples", fewest=2)


def _curves(rows: Sequence[Row], arms: Sequence[str], title: str, fewest: int) -> Any:
    """None: there are fewer of these arms."""
    points: dict[tuple[str, str, str], list[tuple[int, Row]]] = {}
    for row in rows:
        if row.metric.startswith("curve_"):
            domain, _, step = row.case.partition("@step_")
            points.setdefault((row.variant, domain, row.metric.removeprefix("curve_")), []).append((int(step), row))
    arms = [arm for arm in arms if any(key[0] == arm for key in points)]
    if len(arms) < fewest:
        return None
    figure, panels = canvas(9.5, panels=4, down=True, sharex=True)
    free = iter(OTHERS * 3)
    colour = {arm: COLOURS["ours"] if arm == OURS else next(free) for arm in arms}
    for axes, (domain, metric, says) in zip(panels, PANELS):
        for arm in arms:
            line = sorted(points.get((arm, domain, metric), []), key=lambda point: point[0])
            steps, found = [step for step, _ in line], [row for _, row in line]
            shape = HIDING if arm == EAGER else {"marker": "o", "markersize": 3.5}
            axes.plot(steps, [row.value for row in found], color=colour[arm], label=NAMES.get(arm, arm), **shape)
            axes.fill_between(steps, [row.low for row in found], [row.high for row in found], color=colour[arm], alpha=0.18,
                              linewidth=0)
        if start := points.get((START, domain, metric)):
            axes.axhline(start[0][1].value, color=FAINT, linestyle="--", linewidth=1)
        if metric == "patch_fd":
            axes.set_yscale("log")
        axes.set_title(says)
        axes.grid(axis="y")
    panels[0].legend(loc="lower left", bbox_to_anchor=(0, 1.1), ncols=3, fontsize=9)
    panels[-1].set_xlabel("optimizer steps (validation captions, 4 function evaluations a picture; dashed: the start)")
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    return figure


def grids(plan: Plan, arms: Sequence[Arm], out: Path) -> None:
    """Two tables: the methods of the paper's, and what differs from ours in one thing. A row for each method and step count,
    from the first seed; the same prompt and noise in a column."""
    few, changed = plan.subject.few, [arm for arm in arms if arm in ABLATIONS]
    methods = [BEFORE, *(arm for arm in arms if arm not in ABLATIONS)]
    tables = {"reproduce_grid": [(arm, steps) for arm in methods for steps in (few, MANY)[: 1 + (arm.name in BOTH)]]}
    if changed:
        ours = [arm for arm in arms if arm.name == OURS]
        tables["reproduce_grid_ablations"] = [(arm, few) for arm in (BEFORE, *ours, *changed)]
    for domain in DOMAINS:
        for name, shown in tables.items():
            rows: list[tuple[str, Sequence[Any]]] = []
            for arm, steps in shown:
                for rate, seed in plan.seeds(arm)[:1]:
                    pictures = plan.subject.shown(plan.drawn(arm, rate, seed), domain, steps, SHOWN)
                    rows += [(f"{arm.says}, {steps} steps", pictures)] if pictures else []
            if rows:
                heads, first = plan.subject.heading(domain, max(len(pictures) for _, pictures in rows))
                file = out / "plots" / f"{name}_{domain}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                compose(heads, [*first, *rows], side=plan.subject.side).save(file)
