"""What all plots share: colours, panels, labels, the dot with its error bar."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bench.report.tables import read
from bench.results import Row

WIDTH, DPI = 8.0, 150
COLOURS = {
    "ours": "#0072B2", "R1": "#D55E00", "R2": "#E69F00", "R3": "#CC79A7", "R4": "#009E73", "eager": "#D55E00",
    "compiled": "#009E73", "plain": "#D55E00", "diffusers": "#D55E00", "two_calls": "#E69F00",
}
"""Okabe and Ito's, which the colour-blind can tell apart. A variant has one colour in all plots."""
OTHERS = ("#56B4E9", "#CC79A7", "#E69F00", "#009E73", "#8C564B", "#999999")
INK, FAINT, BAD = "#222222", "#8A8A8A", "#B00020"
TICKS: tuple[tuple[float, ...], ...] = (
    (0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4, 6), (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100), tuple(10.0**i for i in range(-9, 10)),
)
"""Of an axis of ratios, by how far it reaches."""
BEHIND = {"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.85}
STYLE: Mapping[str, Any] = {
    "font.family": "DejaVu Sans", "font.size": 10, "axes.titlesize": 12, "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": FAINT, "axes.labelcolor": INK, "text.color": INK,
    "xtick.color": INK, "ytick.color": INK, "axes.axisbelow": True, "grid.color": "#E6E6E6", "legend.frameon": False,
    "figure.facecolor": "white", "savefig.facecolor": "white",
}


def split(case: str) -> tuple[str, str, tuple[str, ...]]:
    """ "lora/R1@K8@recompute" -> ("lora", "R1", ("K8", "recompute"))."""
    stem, *options = case.split("@")
    name, _, peer = stem.partition("/")
    return name, peer, tuple(options)


def canvas(height: float, panels: int = 1, down: bool = False, **options: Any) -> tuple[Any, list[Any]]:
    """A figure of `height` inches, and its panels, side by side or `down`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(WIDTH, height), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12))
    FigureCanvasAgg(figure)
    shape = (panels, 1) if down else (1, panels)
    return figure, list(figure.subplots(*shape, squeeze=False, **options).ravel())


def colours(variants: Iterable[str]) -> dict[str, str]:
    free = iter(OTHERS * 9)
    return {name: COLOURS.get(name) or next(free) for name in dict.fromkeys(variants)}


def errors(row: Row) -> Any:
    """An error bar's lengths below and above the value."""
    assert row.value is not None
    low, high = (row.value if p is None else p for p in (row.p20, row.p80))
    return [[max(0.0, row.value - low)], [max(0.0, high - row.value)]]


def lines_of(axes: Any, labels: Sequence[str], room: float = 0.6) -> None:
    """One horizontal line of the plot for each label, the first on top."""
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 1 + room, -room)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")


def times_axis(axes: Any, values: Iterable[float], title: str) -> None:
    """A logarithmic axis of ratios, with a line at 1."""
    values = [value for value in values if value > 0] or [1.0]
    low, high = min(0.8, *values) * 0.9, max(1.25, *values)
    high *= max(1.45, (high / low) ** 0.2)  # the value of the rightmost dot stands to its right
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    ticks = [tick for tick in TICKS[sum(high / low > limit for limit in (8, 60))] if low <= tick <= high]
    axes.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.axvline(1, color=INK, linewidth=1, zorder=1)
    axes.set_xlabel(title)


def label(row: Row) -> str:
    return read(row)[0]


def dot(axes: Any, row: Row, y: float, colour: str, text: bool = True) -> None:
    """A ratio on its line: a dot with its error bar and its value."""
    if row.value is None:
        axes.annotate("failed", (1, y), (6, 0), textcoords="offset points", color=BAD, va="center")
        return
    hollow = row.status == "fallback"
    axes.errorbar(row.value, y, xerr=errors(row), fmt="o", markersize=7, color=colour, ecolor=colour, elinewidth=2, capsize=3,
                  markerfacecolor="white" if hollow else colour, zorder=3)
    if text:
        end = max(row.value, row.p80 or row.value)
        axes.annotate(label(row), (end, y), (8, 0), textcoords="offset points", color=INK, va="center", fontsize=9,
                      bbox=BEHIND, zorder=2)
