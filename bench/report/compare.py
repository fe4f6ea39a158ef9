"""`python bench/run.py compare A B [--threshold 5] [--all]`: what changed from one result folder to another of one machine.

Versions and commits may differ: they are what is compared. What else a time depends on (`SAME`) must not, and neither folder
may be from --quick. Rows are matched by suite, case, variant and metric. How two values are judged depends on what they are:

    times, rates, ratios  a change counts when it is more than the threshold and the intervals p20..p80 do not overlap (without
                          a spread: when it is more than the threshold)
    peak memory           when it is more than the threshold
    errors                when it more than doubles or halves: the order of a sum alone moves an error of rounding
    counts                when they differ by more than 0.1 %
    measures of pictures  when their 95 % intervals do not overlap; a claim when its verdict is another one

The verdict is about our program, so the peers' and ceilings' changes are shown and do not decide. Exit code: 0, or 1 when
something of ours became worse, fell back to another path or failed where it had not, or 2 when the folders cannot be compared.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from bench.report.tables import TIMES, WIDTH, digits, read
from bench.results import Row, Status, read_results
from dopsd_fast.errors import UserError

if TYPE_CHECKING:
    from rich.table import Table

THRESHOLD = 5.0
SAME = ("platform", "cpu", "cpu_capability", "cores", "gpu", "compute_capability", "device", "model", "threads", "clock")
"""Facts of the environment that must agree."""
OF_A_GPU = ("gpu", "compute_capability")
"""Of these, those that a run without one does not have."""
PROGRAM = ("commit", "python", "torch", "triton", "diffusers", "transformers", "peft", "deepspeed", "flash-attn", "cuda",
           "driver")
"""Facts that are compared, and printed first."""
PEER = re.compile(r"(R\d|eager|compiled|diffusers|plain|torch|copy|gemm|floor|encoders|exact|planner)")
"""How the variants begin that are not our program."""
NEUTRAL = re.compile(
    r"(suite|part)_seconds|profiler_overhead|share_.*|encoders_share|floor_share|break_even_steps|planned_ratio"
    r"|learning_rate|score_at_.*|commits|paper_.*|curve_.*|.*_minus_start|.*_over_seed_spread"
)
"""Metrics that say nothing about better or worse by themselves."""
HIGHER = re.compile(r"speedup|per_second|ceiling_share|mfu")
KEPT = re.compile(r"accuracy|claim|clip_score|probes")
"""Measures of pictures of which more is better; of the others less is."""
ERROR = re.compile(r"error|one_minus_cosine|difference")
MEMORY = re.compile(r"(peak|step)_(bytes|ratio)")
ERROR_FACTOR, COUNT_SHARE = 2.0, 1e-3
BETTER = ("faster", "better", "measured now")
WORSE = ("slower", "worse", "fell back", "failed")
ONLY = ("only in A", "only in B")
COLOURS = dict.fromkeys(BETTER, "green") | dict.fromkeys(WORSE, "red") | dict.fromkeys(ONLY, "dim")


def main(argv: list[str]) -> int:
    """The subcommand. UserError as `compare`."""
    parser = argparse.ArgumentParser(prog="bench/run.py compare", description="What changed from result folder A to B; exit "
                                     "code 1 when something of ours became worse.")
    parser.add_argument("a", metavar="A", type=Path, help="folder with results.json, before")
    parser.add_argument("b", metavar="B", type=Path, help="the same, after")
    parser.add_argument("--threshold", type=float, default=THRESHOLD, metavar="PERCENT",
                        help="smallest change of a time or a speed that counts (default: 5)")
    parser.add_argument("--all", action="store_true", help="show also what is the same or in one of them only")
    arguments = parser.parse_args(argv)
    return compare(arguments.a, arguments.b, arguments.threshold, arguments.all)


def compare(a: Path, b: Path, threshold: float = THRESHOLD, everything: bool = False) -> int:
    """Prints versions, changes and a summary; the exit code. UserError, one line: a folder that holds no result, two machines,
    or a quick run. `threshold`: percent."""
    from rich.console import Console

    if not 0 <= threshold < math.inf:
        raise UserError(f"--threshold {threshold}: percent, 0 or more")
    facts_a, rows_a = checked(a)
    facts_b, rows_b = checked(b)
    same_machine(a, facts_a, b, facts_b)
    changes = matched(rows_a, rows_b, threshold)
    console = Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)
    console.print(f"A: {a}\nB: {b}", markup=False)
    console.print(versions(facts_a, facts_b))
    shown = [change for change in changes if everything or change.verdict not in ("same", *ONLY)]
    if shown:
        console.print(table(shown))
    console.print(summary(changes, threshold), style="bold", markup=False, soft_wrap=True)
    return int(any(change.verdict in WORSE and change.decides for change in changes))


# ---- what may be compared --------------------------------------------------------------------------------------------


def checked(folder: Path) -> tuple[dict[str, Any], list[Row]]:
    """A result folder whose every row is as the schema says. UserError, one line, for any other."""
    try:
        facts, rows = read_results(folder)
    except ValueError as error:
        raise UserError(str(error)) from error
    keys = [row.key for row in rows]
    for row, count in zip(rows, map(Counter(keys).__getitem__, keys)):
        if said := (f"{count} rows of this key" if count > 1 else fault(row)):
            raise UserError(f"{folder}: row {' '.join(map(str, row.key))}: {said}; measure it anew with bench/run.py --out")
    return facts, rows


def fault(row: Row) -> str:
    """What is wrong with it; nothing, mostly."""
    numbers = [value for value in (row.value, row.p20, row.p80, row.low, row.high) if value is not None]
    if not all(isinstance(text, str) for text in (*row.key, row.unit, row.note)):
        return "a name is no text"
    if row.status not in get_args(Status):
        return f"status {row.status!r} is none of {', '.join(get_args(Status))}"
    if not all(type(value) in (int, float) and math.isfinite(value) for value in numbers):
        return "a number is none"
    if (row.value is None) != (row.status == "failed") or (row.p20 is None) != (row.p80 is None):
        return "a number is missing"
    return ""


def same_machine(a: Path, facts_a: Mapping[str, Any], b: Path, facts_b: Mapping[str, Any]) -> None:
    """UserError unless times of these two folders can be compared."""
    for folder, facts in ((a, facts_a), (b, facts_b)):
        missing = [name for name in (*SAME, "quick") if name not in facts and name not in OF_A_GPU]
        if missing:
            raise UserError(f"{folder}: its environment lacks {', '.join(missing)}: of another version; measure it anew")
        if facts["quick"]:
            raise UserError(f"{folder} is from --quick, whose numbers mean nothing: measure without it")
    other = [name for name in SAME if facts_a.get(name) != facts_b.get(name)]
    if other:
        said = "; ".join(f"{name} {facts_a.get(name)} and {facts_b.get(name)}" for name in other)
        raise UserError(f"{a} and {b} are not of one machine and set-up: {said}: measure both on one")


# ---- two rows --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Change:
    a: Row | None
    b: Row | None
    verdict: str

    @property
    def row(self) -> Row:
        found = self.b or self.a
        assert found is not None
        return found

    @property
    def decides(self) -> bool:
        """Whether it is about our program."""
        if self.row.suite == "reproduce":
            return self.row.variant in ("ours", "dopsd")
        return not PEER.match(self.row.variant)

    @property
    def percent(self) -> str:
        if not (self.a and self.b) or self.a.value is None or self.b.value is None:
            return ""
        if self.a.value == 0:
            return "" if self.b.value == 0 else "from 0"
        change = 100 * (self.b.value - self.a.value) / abs(self.a.value)
        return f"{change:+,.1f} %" if abs(change) < 1e4 else f"x {digits(self.b.value / self.a.value)}"


def matched(rows_a: Sequence[Row], rows_b: Sequence[Row], threshold: float) -> list[Change]:
    """In the order of B, with what is only in A at the end."""
    before = {row.key: row for row in rows_a}
    changes = []
    for row in rows_b:
        old = before.pop(row.key, None)
        changes.append(Change(old, row, "only in B" if old is None else verdict(old, row, threshold)))
    return changes + [Change(row, None, "only in A") for row in before.values()]


def verdict(a: Row, b: Row, threshold: float) -> str:
    """Of one row measured twice: same, faster, slower, better, worse, fell back, failed, measured now."""
    if b.value is None:
        return "same" if a.value is None else "failed"
    if a.value is None:
        return "measured now"
    if (a.status, b.status) == ("ok", "fallback"):
        return "fell back"
    if NEUTRAL.fullmatch(b.metric) or not differs(a, b, threshold):
        return "same"
    gained = (b.value > a.value) == bool(HIGHER.search(b.metric) or KEPT.fullmatch(b.metric) or b.unit.endswith("/s"))
    if timed(b):
        return "faster" if gained else "slower"
    return "better" if gained else "worse"


def timed(row: Row) -> bool:
    """Whether it is a time or made of times."""
    if MEMORY.fullmatch(row.metric) or ERROR.search(row.metric):
        return False
    return row.unit in (*TIMES, "x") or row.unit.endswith("/s") or bool(HIGHER.search(row.metric))


def differs(a: Row, b: Row, threshold: float) -> bool:
    """Whether the second value is another one."""
    assert a.value is not None and b.value is not None
    low, high = sorted((abs(a.value), abs(b.value)))
    if a.value == b.value:
        return False
    if b.metric != "claim" and a.low is not None and a.high is not None and b.low is not None and b.high is not None:
        return a.high < b.low or b.high < a.low
    if low == 0 or (a.value < 0) != (b.value < 0):
        return True
    if ERROR.search(b.metric):
        return high > ERROR_FACTOR * low
    if not (timed(b) or MEMORY.fullmatch(b.metric)):
        return high - low > COUNT_SHARE * abs(a.value)
    if 100 * (high - low) <= threshold * abs(a.value):
        return False
    if a.p20 is None or a.p80 is None or b.p20 is None or b.p80 is None:
        return True
    return a.p80 < b.p20 or b.p80 < a.p20


# ---- what is printed -------------------------------------------------------------------------------------------------


def versions(facts_a: Mapping[str, Any], facts_b: Mapping[str, Any]) -> Table:
    """Commit and versions; what is the same on one line."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    found = Table(box=box.SIMPLE_HEAD, show_edge=False)
    for name in ("", "A", "B"):
        found.add_column(name, overflow="fold")
    names = [name for name in PROGRAM if facts_a.get(name) or facts_b.get(name)]
    for name in names:
        old, new = (str(facts.get(name) or "none") for facts in (facts_a, facts_b))
        found.add_row(name, Text(old), Text("the same" if old == new else new, style="dim" if old == new else "bold"))
    loads = [facts.get("load") for facts in (facts_a, facts_b)]
    if all(isinstance(load, list) and load for load in loads):
        found.add_row("load at the start", *(f"{load[0]:.1f}" for load in loads if load))
    return found


def table(changes: Sequence[Change]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    found = Table(box=box.SIMPLE_HEAD, show_edge=False)
    for name in ("suite", "case", "variant", "metric"):
        found.add_column(name, overflow="fold")
    for name in ("A", "B", "change", "verdict"):
        found.add_column(name, justify="right", overflow="fold")
    for change in changes:
        cells = ["" if row is None else "\n".join(filter(None, read(row))) for row in (change.a, change.b)]
        said = Text(change.verdict, style=COLOURS.get(change.verdict, "") if change.decides else "dim")
        found.add_row(*map(Text, (*change.row.key, *cells, change.percent)), said)
        notes = [row.note for row in (change.b, change.a) if row and row.status != "ok" and row.note]
        if notes and change.verdict != "same":
            found.add_row("", Text(notes[0], style="dim"))
    return found


def summary(changes: Sequence[Change], threshold: float) -> str:
    """One line."""
    ours = Counter(change.verdict for change in changes if change.decides)
    others = sum(change.verdict in BETTER + WORSE for change in changes if not change.decides)
    counts = [f"{ours[name]} {name}" for name in (*WORSE, *BETTER, "same", *ONLY) if ours[name]]
    peers = f"; of peers and ceilings {others} changed" if others else ""
    return f"ours, beyond {threshold:g} % and the spread: {', '.join(counts) or 'no rows'}{peers}"
