"""Curves over optimizer steps, as the paper's Fig. 5: `plots/reproduce_curves.png`, `..._teachers.png`, `..._states.png`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bench.report.drawing import COLOURS, FAINT, OTHERS, canvas
from bench.reproduce.arms import MAIN, NAMES, OURS, START
from bench.results import Row

TEACHERS = (OURS, "frozen_teacher", "live_teacher", "ema_0.999", "ema_0.99")
STATES = (OURS, "off_policy", "sft_on_teacher_samples")
PANELS = (
    ("target", "style_distance", "target: style distance"), ("target", "patch_fd", "target: patch Frechet distance"),
    ("original", "patch_fd", "original: patch Frechet distance"), ("original", "accuracy", "original: attribute accuracy"),
)
LOGARITHMIC = ("patch_fd",)
EAGER = "dopsd_eager"
HIDING: Mapping[str, Any] = {"linestyle": (0, (1, 3)), "linewidth": 2.5}
"""How a curve is drawn that lies on another."""


def curves(rows: Sequence[Row], environment: Mapping[str, Any]) -> Any:
    """The methods: mean of the seeds, lowest to highest shaded."""
    return _curves(rows, [arm.name for arm in MAIN if arm.name in _arms(rows)], "Methods")


def teachers(rows: Sequence[Row], environment: Mapping[str, Any]) -> Any:
    return _some_curves(rows, TEACHERS, "Teachers")


def states(rows: Sequence[Row], environment: Mapping[str, Any]) -> Any:
    return _some_curves(rows, STATES, "States: on-policy, off-policy, teacher samples")


def _some_curves(rows: Sequence[Row], arms: Sequence[str], title: str) -> Any:
    found = [name for name in arms if name in _arms(rows)]
    return _curves(rows, found, title) if len(found) > 1 else None


def _arms(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row.variant for row in rows if row.metric.startswith("curve_") and row.variant != START))


def _curves(rows: Sequence[Row], arms: Sequence[str], title: str) -> Any:
    points: dict[tuple[str, str, str], list[tuple[int, Row]]] = {}
    for row in rows:
        if row.metric.startswith("curve_"):
            domain, _, step = row.case.partition("@step_")
            points.setdefault((row.variant, domain, row.metric.removeprefix("curve_")), []).append((int(step), row))
    if not points or not arms:
        return None
    figure, panels = canvas(9.5, panels=4, down=True, sharex=True)
    free = iter(OTHERS * 3)
    colour = {arm: COLOURS["ours"] if arm == OURS else next(free) for arm in arms}
    for axes, (domain, metric, says) in zip(panels, PANELS):
        for arm in arms:
            line = sorted(points.get((arm, domain, metric), []), key=lambda point: point[0])
            if not line:
                continue
            steps, found = [step for step, _ in line], [row for _, row in line]
            values, says_arm = [row.value for row in found], NAMES.get(arm, arm)
            shape = HIDING if arm == EAGER else {"marker": "o", "markersize": 3.5}
            axes.plot(steps, values, color=colour[arm], label=says_arm, **shape)
            axes.fill_between(steps, [row.low for row in found], [row.high for row in found], color=colour[arm], alpha=0.18,
                              linewidth=0)
        start = points.get((START, domain, metric))
        if start:
            axes.axhline(start[0][1].value, color=FAINT, linestyle="--", linewidth=1)
        if metric in LOGARITHMIC:
            axes.set_yscale("log")
        axes.set_title(says)
        axes.grid(axis="y")
    panels[0].legend(loc="lower left", bbox_to_anchor=(0, 1.1), ncols=3, fontsize=9)
    panels[-1].set_xlabel("optimizer steps (validation captions, 4 function evaluations a picture; dashed: the start)")
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    return figure
