"""Plots of a run's rows: one PNG each, 1200 pixels wide and made to be read at 800; a plot without rows is not made.

    ratios.png       how much faster ours is than each peer: step, rollout, forward; docs/results.md shows it
    reproduce_curves.png, reproduce_teachers.png, reproduce_states.png   see bench/reproduce/curves.py

An error bar is p20 .. p80. A hollow dot is of a row that fell back; "failed" stands where a number is missing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.report.drawing import BAD, COLOURS, DPI, INK, OTHERS, STYLE, canvas
from bench.report.tables import read
from bench.reproduce.curves import curves, states, teachers
from bench.results import Row

RATIO_SUITES = ("step", "rollout", "forward")
BEHIND = {"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.85}


def draw(rows: Sequence[Row], environment: Mapping[str, Any], folder: Path) -> list[Path]:
    """Writes the plots that `rows` have something for into `folder`; the same rows give the same pictures."""
    import matplotlib

    folder.mkdir(parents=True, exist_ok=True)
    made = []
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **STYLE, "backend": "agg"}):
        for name, plot in PLOTS.items():
            if (figure := plot(rows, environment)) is not None:
                made.append(folder / f"{name}.png")
                figure.savefig(made[-1], dpi=DPI, metadata={"Software": None})
    return made


def groups(rows: Sequence[Row], environment: Mapping[str, Any]) -> dict[str, list[tuple[str, Row]]]:
    """What is measured -> each peer and ours' ratio to it, in the standard configuration of the run's model."""
    found: dict[str, list[tuple[str, Row]]] = {}
    for row in sorted((row for row in rows if row.suite in RATIO_SUITES), key=lambda row: RATIO_SUITES.index(row.suite)):
        stem, *options = row.case.split("@")
        name, _, peer = stem.partition("/")
        if row.metric.startswith("speedup") and peer and set(options) <= {Path(str(environment.get("model"))).name}:
            phase = row.metric.removeprefix("speedup").removeprefix("_") or row.suite
            found.setdefault(f"{phase}, {name}", []).append((peer, row))
    return found


def ratios(rows: Sequence[Row], environment: Mapping[str, Any]) -> Any:
    found = groups(rows, environment)
    lines = [(f"{'' if index else what}   vs {peer}", peer, row)
             for what, members in found.items() for index, (peer, row) in enumerate(members)]
    if not lines:
        return None
    figure, (axes,) = canvas(1.4 + 0.29 * len(lines))
    free = iter(OTHERS * 9)
    colour = {peer: COLOURS.get(peer) or next(free) for peer in dict.fromkeys(peer for _, peer, _ in lines)}
    for y, (label, peer, row) in enumerate(lines):
        if y and label[0] != " ":
            axes.axhline(y - 0.5, color="#C8C8C8", linewidth=0.8)
        dot(axes, row, y, colour[peer])
    axes.set_yticks(range(len(lines)), [label for label, _, _ in lines])
    axes.set_ylim(len(lines) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
    values = [value for _, _, row in lines for value in (row.value, row.p20, row.p80) if value]
    low, high = min([0.8, *values]) * 0.9, max([1.25, *values])
    high *= max(1.45, (high / low) ** 0.2)  # the value of the rightmost dot stands to its right
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    ticks = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if high / low > 8 else (0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4, 6)
    shown = [tick for tick in ticks if low <= tick <= high]
    axes.set_xticks(shown, [f"{tick:g}x" for tick in shown])
    axes.set_xticks([], minor=True)
    axes.axvline(1, color=INK, linewidth=1, zorder=1)
    axes.set_xlabel("peer's seconds / ours; right of 1 ours is faster; hollow: fell back")
    axes.set_title("How much faster ours is than each peer")
    return figure


def dot(axes: Any, row: Row, y: float, colour: str) -> None:
    """A ratio on its line, with its error bar and its value."""
    if row.value is None:
        axes.annotate("failed", (1, y), (6, 0), textcoords="offset points", color=BAD, va="center")
        return
    low, high = (row.value if end is None else end for end in (row.p20, row.p80))
    reach = [[max(0.0, row.value - low)], [max(0.0, high - row.value)]]
    axes.errorbar(row.value, y, xerr=reach, fmt="o", markersize=7, color=colour, ecolor=colour, elinewidth=2, capsize=3,
                  markerfacecolor="white" if row.status == "fallback" else colour, zorder=3)
    axes.annotate(read(row)[0], (max(row.value, high), y), (8, 0), textcoords="offset points", color=INK, va="center",
                  fontsize=9, bbox=BEHIND, zorder=2)


PLOTS: Mapping[str, Callable[[Sequence[Row], Mapping[str, Any]], Any]] = {
    "ratios": ratios, "reproduce_curves": curves, "reproduce_teachers": teachers, "reproduce_states": states,
}
