"""Results for the eye: rows as tables of one line per case and variant. `grids` decides what stands in which line and column;
`show`, on the terminal, and bench/report/page.py draw the same grids."""

from __future__ import annotations

import re
import sys
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from bench.results import Row

if TYPE_CHECKING:
    from rich.console import Console

CASE_WIDTH, PADDING = 34, 2
PLOTTED = "curve_"
"""How metrics begin that are for plots: points of curves, in no table."""
SUITE_SECONDS = "suite_seconds"
"""The metric of the row that says how long a suite took: it stands in the title."""
SIGNS = {"failed": ("failed", "bold red"), "fallback": ("* fallback", "yellow"), "ok": ("note", "")}
"""Status, the worst first -> what stands before a reason, and the colour."""
SCALES = {"T": 1e12, "G": 1e9, "M": 1e6, "k": 1e3, "": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}
SCALED = ("s", "B", "FLOP", "B/s", "FLOP/s")


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
    if not unit and {"share", "mfu"} & set(metric.split("_")):
        return 100.0, "%"
    prefix, base = (unit[0], unit[1:]) if unit[1:] in SCALED and unit[0] in SCALES else ("", unit)
    if base not in SCALED:
        return 1.0, unit
    size = abs(value) * SCALES[prefix]
    names = [name for name in SCALES if (SCALES[name] <= 1 if base == "s" and size else SCALES[name] >= 1)]
    name = next((name for name in names if size >= SCALES[name]), names[-1])
    return SCALES[prefix] / SCALES[name], name + base


def read(row: Row) -> tuple[str, str]:
    """A row's value with its unit, and its spread, `p20..p80` or else `low..high`, in the same unit; empty: there is none."""
    if row.value is None:
        return row.status, ""
    factor, unit = scale(row.value, row.metric, row.unit)
    counted = not unit and float(row.value).is_integer() and abs(row.value) >= 1
    value = f"{row.value:,.0f}" if counted else digits(factor * row.value)
    low, high = (row.p20, row.p80) if row.n > 1 and row.p20 is not None else (row.low, row.high)
    spread = "" if low is None or high is None else f"{digits(factor * low)}..{digits(factor * high)}"
    return f"{value}{'' if unit in ('', 'x', '%') else ' '}{unit}{'*' if row.status == 'fallback' else ''}", spread


class Grid(NamedTuple):
    """A table. A line is (case, variant, a row or None for each of `metrics`)."""

    metrics: tuple[str, ...]
    lines: tuple[tuple[str, str, tuple[Row | None, ...]], ...]


def grids(rows: Sequence[Row], width: int) -> list[Grid]:
    """Rows of one suite as tables no wider than `width` characters: a line per case and variant, a column per metric. Times,
    rates and ratios come first, then errors, then the rest; what does not fit beside them makes a further table."""
    table: dict[tuple[str, str], dict[str, Row]] = {}
    ranks: dict[str, int] = {}
    for place, row in placed(rows):
        if row.metric != SUITE_SECONDS and not row.metric.startswith(PLOTTED):
            table.setdefault(place, {})[row.metric] = row
            ranks.setdefault(row.metric, rank(row))
    cases = list(dict.fromkeys(case for case, _ in table))
    keys = sorted(table, key=lambda key: (cases.index(key[0]), key[1] != "ours"))
    room = width - min(CASE_WIDTH, max(map(len, cases), default=0)) - max([7, *(len(name) for _, name in table)]) - 2 * PADDING
    columns: list[list[str]] = []
    left = 0
    for metric in sorted(ranks, key=lambda metric: ranks[metric]):
        size = PADDING + column_width(metric, [line.get(metric) for line in table.values()])
        if size > left:
            columns.append([])
            left = room
        columns[-1].append(metric)
        left -= size
    found = []
    for metrics in columns:
        lines = ((*key, tuple(table[key].get(metric) for metric in metrics)) for key in keys)
        found.append(Grid(tuple(metrics), tuple(line for line in lines if any(line[2]))))
    return found


def placed(rows: Sequence[Row]) -> list[tuple[tuple[str, str], Row]]:
    """Each row with the (case, variant) of the line that it stands in: a ratio of ours ("lora/R1@K8") in its peer's."""
    known = {(row.case, row.variant) for row in rows}
    made = []
    for row in rows:
        before, peer, after, *_ = [*re.split("/([^/@]+)", row.case, maxsplit=1), "", ""]
        line = (before + after, peer)
        made.append((line if row.unit == "x" and row.variant == "ours" and line in known else (row.case, row.variant), row))
    return made


def rank(row: Row) -> int:
    """0 times, ratios and what is reached in a second; 1 errors; 2 the rest."""
    return 0 if row.unit in ("s", "x", "1/s") else 1 if row.metric.endswith(("error", "cosine")) else 2


def column_width(metric: str, rows: Sequence[Row | None]) -> int:
    return max(*(len(" ".join(read(row)).rstrip()) for row in rows if row), *map(len, metric.split("_")))


class Note(NamedTuple):
    """What is to be known of lines: `status` and `text` as in their rows; of what failed the `places` name the metrics, too."""

    status: str
    text: str
    places: list[str]

    def __str__(self) -> str:
        return f"{SIGNS[self.status][0]}: {self.text}  [{textwrap.shorten('; '.join(self.places), 200, placeholder=' ...')}]"


def notes(rows: Sequence[Row]) -> list[Note]:
    """Every row that failed, fell back or has a note, those of one reason together; the worst first."""
    found: dict[tuple[str, str], dict[str, list[str]]] = {}
    for (case, variant), row in placed(rows):
        if row.status != "ok" or row.note:
            places = found.setdefault((row.status, row.note or "no reason was given"), {})
            places.setdefault(f"{case}: {variant}", []).append(row.metric)
    made = []
    for (status, text), lines in found.items():
        said = (f"{line} ({', '.join(metrics)})" if status == "failed" else line for line, metrics in lines.items())
        made.append(Note(status, text, list(said)))
    return sorted(made, key=lambda note: list(SIGNS).index(note.status))


def took(rows: Sequence[Row]) -> str:
    """How long the suite took, if it says so, and what the second numbers are."""
    said = (f"in {read(row)[0]}; medians, p20..p80" for row in rows if row.metric == SUITE_SECONDS)
    return next(said, "" if rows else "no results")


def show(suite: str, rows: Sequence[Row], console: Console) -> None:
    """The rows of a suite as tables, and what must be known of them."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    console.print()
    console.print(Text(suite, style="bold"), Text(f" {took(rows)}", style="dim"))
    for grid in grids(rows, console.width):
        table = Table(box=box.SIMPLE_HEAD, padding=(0, PADDING - 1, 0, 0), pad_edge=False, show_edge=False)
        table.add_column("case", overflow="fold", max_width=CASE_WIDTH)
        table.add_column("variant", no_wrap=True)
        for metric, column in zip(grid.metrics, zip(*(cells for _, _, cells in grid.lines))):
            table.add_column(metric.replace("_", " "), justify="right", width=column_width(metric, column))
        before = ""
        for case, variant, cells in grid.lines:
            drawn = (("", "", "") if row is None else (*read(row), SIGNS[row.status][1]) for row in cells)
            texts = [Text.assemble((value, colour), (f" {spread}".rstrip(), "dim")) for value, spread, colour in drawn]
            table.add_row(Text("" if case == before else case), variant, *texts, style="bold" if variant == "ours" else "")
            before = case
        console.print(table)
        console.print()
    for note in notes(rows):
        console.print(Text(str(note), style=SIGNS[note.status][1] or "dim"))


def console_of(width: int = 120) -> Console:
    """Standard output; `width`: where it is no terminal."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else width, highlight=False)
