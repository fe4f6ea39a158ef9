"""Plots of a run's rows: one PNG each, 1200 pixels wide and made to be read at 800; a plot without rows is not made.

    ratios.png       how much faster ours is than each peer: step, rollout, forward; README shows it
    reproduce_curves.png, reproduce_teachers.png, reproduce_states.png   see bench/reproduce/curves.py

An error bar is p20 .. p80. A hollow dot is of a row that fell back; "failed" stands where a number is missing. All
other numbers are in the report's tables.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.report.drawing import DPI, INK, STYLE, canvas, colours, dot, lines_of, split, times_axis
from bench.reproduce.curves import curves, states, teachers
from bench.results import Row

PEER_OVER_OURS = "peer's seconds / ours; right of 1 ours is faster"
RATIO_SUITES = ("step", "rollout", "forward")
SOLID = {
    ("nano", ""): {"lora/R1": 1.3, "full/R1": 1.5, "lora/R4": 0.95, "full/R4": 0.95},
    ("zimage-turbo", "H100"): {"lora/R1": 2.25, "lora/R1@512px@batch4": 2.3},
}
"""Model and, in its name, the GPU -> case of the suite step -> the speedup to reach."""


def draw(rows: Sequence[Row], environment: Mapping[str, Any], folder: Path) -> list[Path]:
    """Writes the plots that `rows` have something for into `folder`; the same rows give the same pictures."""
    import matplotlib

    folder.mkdir(parents=True, exist_ok=True)
    made = []
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **STYLE, "backend": "agg"}):
        for name, plot in PLOTS.items():
            figure = plot(rows, environment)
            if figure is not None:
                made.append(folder / f"{name}.png")
                figure.savefig(made[-1], dpi=DPI, metadata={"Software": None})
    return made


def _ratio_rows(rows: Sequence[Row]) -> dict[tuple[str, str, tuple[str, ...]], list[Row]]:
    """(suite, what, "@" options) -> the ratios to its peers."""
    found: dict[tuple[str, str, tuple[str, ...]], list[Row]] = {}
    for row in rows:
        name, peer, options = split(row.case)
        if row.suite in RATIO_SUITES and row.metric.startswith("speedup") and peer:
            phase = row.metric.removeprefix("speedup").removeprefix("_") or row.suite
            found.setdefault((row.suite, f"{phase}, {name}", options), []).append(row)
    return dict(sorted(found.items(), key=lambda one: RATIO_SUITES.index(one[0][0])))


def ratios(rows: Sequence[Row], environment: Mapping[str, Any]) -> Any:
    found = {place: members for place, members in _ratio_rows(rows).items() if not other(members[0], environment)}
    every = [row for members in found.values() for row in members]
    if not every:
        return None
    figure, (axes,) = canvas(1.4 + 0.29 * len(every))
    labels: list[str] = []
    goals = goals_of(environment)
    colour = colours(split(row.case)[1] for row in every)
    values, aimed = [1.0], False
    for (_, what, _), members in found.items():
        if labels:
            axes.axhline(len(labels) - 0.5, color="#C8C8C8", linewidth=0.8)
        for index, row in enumerate(members):
            y, peer = len(labels), split(row.case)[1]
            labels.append(f"{'' if index else what}   vs {peer}")
            dot(axes, row, y, colour[peer])
            values += [value for value in (row.value, row.p20, row.p80) if value]
            goal = goals.get(row.case) if row.suite == "step" else None
            if goal:
                axes.plot([goal, goal], [y - 0.38, y + 0.38], color=INK, linewidth=2.5, zorder=2)
                values.append(goal)
                aimed = True
    lines_of(axes, labels)
    times_axis(axes, values, PEER_OVER_OURS + (".  Thick bar: target" if aimed else "") + hollow(every))
    axes.set_title("How much faster ours is than each peer")
    return figure


def goals_of(environment: Mapping[str, Any]) -> Mapping[str, float]:
    """Case of the suite step -> the speedup to reach on this machine."""
    gpu = str(environment.get("gpu") or "")
    found = (goals for (model, name), goals in SOLID.items() if model == environment.get("model") and
             (name in gpu if name else not gpu))
    return next(found, {})


def hollow(rows: Sequence[Row]) -> str:
    return ".  Hollow: fell back" if any(row.status == "fallback" for row in rows) else ""


def other(row: Row, environment: Mapping[str, Any]) -> bool:
    """Not the standard configuration of the run's model."""
    model = Path(str(environment.get("model"))).name
    return bool(set(split(row.case)[2]) - {model})


PLOTS: Mapping[str, Callable[[Sequence[Row], Mapping[str, Any]], Any]] = {
    "ratios": ratios, "reproduce_curves": curves, "reproduce_teachers": teachers, "reproduce_states": states,
}
