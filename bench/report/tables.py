"""Results for the eye: rows as tables of one line per case and variant, on the terminal.

`grids` decides what stands in which line and column; the terminal and bench/report/page.py draw the same grids.
"""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bench import live
from bench.results import Row

if TYPE_CHECKING:
    from rich.console import Console

WIDTH = 120
"""Columns of output that goes to no terminal."""
CASE_WIDTH = 34
PADDING = 2
SPARSE = 6
"""A column that fewer than one line in so many has something for stands behind the fuller ones."""
DETAIL = 3
DETAILS = ("bytes_per_second", "flops_per_second", "samples_per_second", "bytes_forward", "bytes_backward", "flops_forward",
           "flops_backward")
"""Metrics, by how they begin, that the report shows and the terminal does not."""
PLOTTED = "curve_"
"""How metrics begin that are for plots: points of curves, in no table."""
CEILINGS = ("copy", "gemm")
SUITE_SECONDS = "suite_seconds"
"""The metric of the row that says how long a suite took: it stands in the title."""
MARKS = {"ok": "", "fallback": "*", "failed": ""}
COLOURS = {"ok": "", "fallback": "yellow", "failed": "bold red"}
SCALES = {"T": 1e12, "G": 1e9, "M": 1e6, "k": 1e3}
SCALED = ("B", "FLOP", "B/s", "FLOP/s")
TIMES = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
WORDS = {
    "elementwise_bytes": "bytes", "gigabytes_per_second": "bytes/second", "one_minus_cosine": "1 - cosine",
    "relative_error": "error", "seconds": "time", "_per_token_block": "/token/block", "_per_": "/",
}
"""What a column's heading says for a part of the metric's name."""


# ---- numbers ---------------------------------------------------------------------------------------------------------


def digits(value: float) -> str:
    """Three significant digits, without an exponent where it can be read without."""
    size = abs(value)
    if size == 0:
        return "0"
    if size < 1e-3 or size >= 1e7:
        return f"{value:.1e}"
    if size >= 1000:
        return f"{value:,.0f}"
    return f"{value:.{0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 else 3}f}"


def scale(value: float, metric: str, unit: str) -> tuple[float, str]:
    """(factor, unit) in which a number is read: 0.0123 s as 12.3 ms, 2e9 B as 2 GB (10^9), a share as %."""
    if unit in TIMES:
        seconds = abs(value) * TIMES[unit]
        name = next((name for name in TIMES if seconds >= TIMES[name]), "s" if seconds == 0 else "ns")
        return TIMES[unit] / TIMES[name], name
    base, prefix = unit, 1.0
    if unit[1:] in SCALED and unit[0] in SCALES:
        base, prefix = unit[1:], SCALES[unit[0]]
    if base in SCALED:
        name = next((name for name in SCALES if abs(value) * prefix >= SCALES[name]), "")
        return prefix / SCALES.get(name, 1.0), name + base
    if not unit and {"share", "mfu"} & set(metric.split("_")):
        return 100.0, "%"
    return 1.0, unit


def read(row: Row) -> tuple[str, str]:
    """A row's value with its unit, and its spread, `p20..p80` or else `low..high`, in the same unit, empty where there is
    none."""
    if row.value is None:
        return row.status, ""
    factor, unit = scale(row.value, row.metric, row.unit)
    counted = not unit and float(row.value).is_integer() and abs(row.value) >= 1
    value = f"{row.value:,.0f}" if counted else digits(factor * row.value)
    spread = ""
    if row.n > 1 and row.p20 is not None and row.p80 is not None:
        spread = f"{digits(factor * row.p20)}..{digits(factor * row.p80)}"
    elif row.low is not None and row.high is not None:
        spread = f"{digits(factor * row.low)}..{digits(factor * row.high)}"
    joined = "" if unit in ("", "x", "%") else " "
    return f"{value}{joined}{unit}{MARKS[row.status]}", spread


def heading(metric: str) -> str:
    """What a column says of its metric."""
    for part, word in WORDS.items():
        metric = metric.replace(part, word)
    return metric.replace("_", " ")


# ---- lines and columns -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    row: Row
    text: str
    spread: str


@dataclass(frozen=True)
class Line:
    """What was found of a variant in a case; a cell is None where there is no such row."""

    case: str
    variant: str
    cells: tuple[Cell | None, ...]


@dataclass(frozen=True)
class Grid:
    """A table. `metrics[i]` is the name of column i of the lines' cells; `inline`: value and spread share a line."""

    metrics: tuple[str, ...]
    lines: tuple[Line, ...]
    inline: bool = True


def grids(rows: Sequence[Row], width: int = WIDTH, details: bool = True) -> list[Grid]:
    """Rows of one suite as tables no wider than `width` characters: a line per case and variant, a column per metric.

    Times, rates and ratios come first, then errors, then the rest and what few lines have; what does not fit beside them
    makes a further table. The ratio of ours to a peer (case "lora/R1") stands in the peer's line. Without `details`, metrics
    of rank `DETAIL` are left out.
    """
    rows = [row for row in rows if row.metric != SUITE_SECONDS and not row.metric.startswith(PLOTTED)]
    deepest = DETAIL + details
    table: dict[tuple[str, str], dict[str, Cell]] = {}
    for place, row in placed(rows):
        table.setdefault(place, {})[row.metric] = Cell(row, *read(row))
    order = {case: index for index, case in enumerate(dict.fromkeys(case for case, _ in table))}
    keys = sorted(table, key=lambda key: (order[key[0]], key[1] != "ours"))
    ranks: dict[str, int] = {}
    for row in rows:
        ranks.setdefault(row.metric, rank(row))
    for metric, rank_of in ranks.items():
        filled = sum(metric in cells for cells in table.values())
        if filled * SPARSE < len(table):
            ranks[metric] = max(rank_of, 2)
    metrics = sorted((metric for metric in ranks if ranks[metric] < deepest), key=lambda metric: ranks[metric])
    made = []
    while metrics:
        taken_now, inline = fitting(metrics, table, width)
        lines = [Line(*key, tuple(table[key].get(metric) for metric in taken_now)) for key in keys]
        made.append(Grid(tuple(taken_now), tuple(line for line in lines if any(line.cells)), inline))
        metrics = [metric for metric in metrics if metric not in taken_now]
    return made


def placed(rows: Sequence[Row]) -> list[tuple[tuple[str, str], Row]]:
    """Each row with the (case, variant) of the line that it stands in."""
    known = {(row.case, row.variant) for row in rows}
    taken = {(row.case, row.variant, row.metric) for row in rows}
    made = []
    for row in rows:
        place = (row.case, row.variant)
        if row.unit == "x" and row.variant == "ours":
            for found in re.finditer(r"/([^/@]+)", row.case):  # every part of it can be the peer's name
                line = (row.case[: found.start()] + row.case[found.end() :], found.group(1))
                if line in known and (*line, row.metric) not in taken:
                    place = line
        made.append((place, row))
    return made


def rank(row: Row) -> int:
    """0 times, ratios and what is reached in a second; 1 errors; 2 the rest; 3 (`DETAIL`) what follows from the others."""
    if row.unit in TIMES or row.unit == "x":
        return 0
    if row.metric.startswith(DETAILS) and row.variant not in CEILINGS:
        return DETAIL
    if row.unit.endswith("/s") or row.metric.endswith("_per_second"):
        return 0
    return 1 if row.metric.endswith(("error", "cosine")) else 2


def fitting(metrics: Sequence[str], table: dict[tuple[str, str], dict[str, Cell]], width: int) -> tuple[list[str], bool]:
    """The first metrics whose columns fit, at least one, and whether the spreads fit beside the values."""
    left = min(CASE_WIDTH, max(len(case) for case, _ in table)) + max(7, *(len(name) for _, name in table)) + 2 * PADDING
    chosen: list[str] = []
    narrow = wide = left
    for metric in metrics:
        cells = [cells[metric] for cells in table.values() if metric in cells]
        narrow += PADDING + column_width(metric, cells, False)
        if chosen and narrow > width:
            break
        wide += PADDING + column_width(metric, cells, True)
        chosen.append(metric)
    return chosen, wide <= width


def title(metric: str, cells: Sequence[Cell | None]) -> str:
    """The heading of a column with these cells."""
    said = heading(metric)
    ours = all(cell.row.variant == "ours" and cell.row.unit == "x" for cell in cells if cell)
    return re.sub("(speedup|ratio)", r"\1 of ours", said, count=1) if ours else said


def column_width(metric: str, cells: Sequence[Cell | None], inline: bool) -> int:
    found = [cell for cell in cells if cell]
    sizes = [len(cell.text) + (1 + len(cell.spread) if cell.spread else 0) if inline else
             max(len(cell.text), len(cell.spread)) for cell in found]
    return max(*sizes, *(len(word) for word in title(metric, cells).split()))


@dataclass(frozen=True)
class Note:
    """What is to be known of lines: `status` and `text` as in their rows; `places`: case -> variant -> metrics."""

    status: str
    text: str
    places: dict[str, dict[str, list[str]]]

    def where(self, most: int = 6) -> str:
        """The lines, no more than `most` cases by name; of what failed also the metrics."""
        said = []
        for case, variants in self.places.items():
            names = [f"{variant} ({', '.join(map(heading, metrics))})" if self.status == "failed" else variant
                     for variant, metrics in variants.items()]
            said.append(f"{case}: {', '.join(names)}")
        return "; ".join(said[:most]) + (f"; and {len(said) - most} more cases" if len(said) > most else "")

    def __str__(self) -> str:
        word = {"failed": "failed", "fallback": "* fallback", "ok": "note"}[self.status]
        return f"{word}: {self.text or 'no reason was given'}  [{self.where()}]"


def notes(rows: Sequence[Row]) -> list[Note]:
    """Every row that failed, fell back or has a note, those of one reason together; the worst first."""
    found: dict[tuple[str, str], Note] = {}
    for (case, variant), row in placed(rows):
        if row.status != "ok" or row.note:
            note = found.setdefault((row.status, row.note), Note(row.status, row.note, {}))
            note.places.setdefault(case, {}).setdefault(variant, []).append(row.metric)
    return sorted(found.values(), key=lambda note: ("failed", "fallback", "ok").index(note.status))


def took(rows: Sequence[Row]) -> str:
    """How long the suite took, if it says so."""
    return next((f"in {read(row)[0]}" for row in rows if row.metric == SUITE_SECONDS), "")


def counts(rows: Sequence[Row]) -> str:
    """How many measurements the values with a spread are the median of."""
    numbers = sorted({row.n for row in rows if row.n > 1})
    if not numbers:
        return ""
    many = str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"
    return f"median and p20..p80 of {many} measurements"


# ---- the terminal ----------------------------------------------------------------------------------------------------


def show(suite: str, rows: Sequence[Row], width: int | None = None) -> None:
    """The rows of a suite as tables, and what must be known of them. `width`: of the output, where it is no terminal."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    console = live.console() or console_of(width)
    console.print()
    console.print(Text(suite, style="bold"), Text(f"  {took(rows)}" if rows else "  no results", style="dim"), sep="")
    for grid in grids(rows, console.width, details=False):
        table = Table(box=box.SIMPLE_HEAD, padding=(0, PADDING - 1, 0, 0), pad_edge=False, show_edge=False)
        table.add_column("case", overflow="fold", max_width=CASE_WIDTH)
        table.add_column("variant", no_wrap=True)
        for index, metric in enumerate(grid.metrics):
            column = [line.cells[index] for line in grid.lines]
            size = column_width(metric, column, grid.inline)
            lines = textwrap.wrap(title(metric, column), size, break_long_words=False, break_on_hyphens=False)
            table.add_column("\n".join(lines), justify="right", no_wrap=True)
        before = None
        for line in grid.lines:
            if before not in (None, line.case) and any(one.case == line.case for one in grid.lines if one is not line):
                table.add_section()
            cells = [_drawn(cell, grid.inline) for cell in line.cells]
            style = "bold" if line.variant == "ours" else ""
            table.add_row(Text("" if line.case == before else line.case), Text(line.variant, style=style), *cells)
            before = line.case
        console.print(table)
        console.print()
    for note in notes(rows):
        console.print(Text(str(note), style=COLOURS[note.status] or "dim"))
    hidden = dict.fromkeys(heading(row.metric) for row in rows if rank(row) == DETAIL)
    for text in (counts(rows), hidden and f"in the report, too: {', '.join(hidden)}"):
        if text:
            console.print(Text(text, style="dim"))


def _drawn(cell: Cell | None, inline: bool) -> Any:
    from rich.text import Text

    if cell is None:
        return ""
    text = Text(cell.text, style=COLOURS[cell.row.status])
    return text.append(f"{' ' if inline else chr(10)}{cell.spread}", style="dim") if cell.spread else text


def console_of(width: int | None = None) -> Console:
    """Standard output; `width` columns, WIDTH where it is no terminal."""
    from rich.console import Console

    return Console(width=width or (None if sys.stdout.isatty() else WIDTH), highlight=False)
