"""What all plots share: colours, panels, a figure's style."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

WIDTH, DPI = 8.0, 150
COLOURS = {
    "ours": "#0072B2", "R1": "#D55E00", "R2": "#E69F00", "R3": "#CC79A7", "R4": "#009E73", "compiled": "#009E73",
    "diffusers": "#D55E00", "two_calls": "#E69F00",
}
"""Okabe and Ito's, which the colour-blind can tell apart. A variant has one colour in all plots."""
OTHERS = ("#56B4E9", "#CC79A7", "#E69F00", "#009E73", "#8C564B", "#999999")
INK, FAINT, BAD = "#222222", "#8A8A8A", "#B00020"
STYLE: Mapping[str, Any] = {
    "font.family": "DejaVu Sans", "font.size": 10, "axes.titlesize": 12, "axes.titleweight": "bold",
    "axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": FAINT,
    "axes.labelcolor": INK, "text.color": INK, "xtick.color": INK, "ytick.color": INK, "axes.axisbelow": True,
    "grid.color": "#E6E6E6", "legend.frameon": False, "figure.facecolor": "white", "savefig.facecolor": "white",
}


def canvas(height: float, panels: int = 1, down: bool = False, **options: Any) -> tuple[Any, list[Any]]:
    """A figure of `height` inches, and its panels, side by side or `down`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(WIDTH, height), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12))
    FigureCanvasAgg(figure)
    shape = (panels, 1) if down else (1, panels)
    return figure, list(figure.subplots(*shape, squeeze=False, **options).ravel())
