"""`python bench/run.py compare A B [--threshold 5]`: what changed from one result folder to another of one machine.

Versions and commits may differ: they are what is compared. What else a time depends on (`SAME`) must not, and neither folder
may be from --quick. A value is another one when its interval, where both have one (p20..p80 of a measurement, 95 % of a
measure of pictures), does not overlap the other's, and it differs by more than

    the threshold   for times, rates, ratios and peaks of memory
    a factor of 2   for errors: the order of a sum alone moves an error of rounding
    0.1 %           for the rest: counts

Peers' and ceilings' changes are shown and do not decide. Exit code: 0, or 1 when something of ours became worse, fell back to
another path or failed where it had not, or 2 when the folders cannot be compared.
"""

from __future__ import annotations

import argparse
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from bench.report.tables import console_of, read
from bench.results import Row, read_results
from dopsd_fast.errors import UserError

SAME = ("platform", "cpu", "cpu_capability", "cores", "gpu", "compute_capability", "device", "model", "threads", "clock")
"""Facts of the environment that must agree."""
PEER = re.compile(r"(R\d|eager|compiled|diffusers|plain|torch|copy|gemm|floor|encoders|exact|planner)")
"""How the variants begin that are not our program."""
NEUTRAL = re.compile(
    r"(suite|part)_seconds|profiler_overhead|share_.*|encoders_share|floor_share|break_even_steps|planned_ratio"
    r"|learning_rate|score_at_.*|commits|paper_.*|curve_.*|.*_minus_start|.*_over_seed_spread"
)
"""Metrics that say nothing about better or worse by themselves."""
SPEED, MORE = re.compile("speedup|per_second|ceiling_share|mfu"), re.compile("accuracy|claim|clip_score|probes")
"""Metrics of which more is better, beside all that is counted per second; of the others less is."""
ERROR = re.compile(r"error|one_minus_cosine|difference")
MEMORY = re.compile(r"(peak|step)_(bytes|ratio)")
BETTER, WORSE = ("faster", "better", "measured now"), ("slower", "worse", "fell back", "failed")
COLOURS = dict.fromkeys(BETTER, "green") | dict.fromkeys(WORSE, "red")


def main(argv: list[str]) -> int:
    """The subcommand. UserError: a folder that holds no result, two machines, or a quick run."""
    parser = argparse.ArgumentParser(prog="bench/run.py compare", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("a", metavar="A", type=Path, help="folder with results.json, before")
    parser.add_argument("b", metavar="B", type=Path, help="the same, after")
    parser.add_argument("--threshold", type=float, default=5.0, metavar="PERCENT",
                        help="smallest change of a time or a speed that counts (default: 5)")
    given = parser.parse_args(argv)
    if not 0 <= given.threshold < math.inf:
        raise UserError(f"--threshold {given.threshold}: percent, 0 or more")
    (facts_a, rows_a), (facts_b, rows_b) = read_results(given.a), read_results(given.b)
    same_machine(given.a, facts_a, given.b, facts_b)
    changes = matched(rows_a, rows_b, given.threshold)
    show = partial(console_of().print, markup=False, soft_wrap=True)
    show(f"A: {given.a}\nB: {given.b}")
    for name in (name for name in facts_a | facts_b if facts_a.get(name) != facts_b.get(name)):
        show(f"{name}: {facts_a.get(name)}, now {facts_b.get(name)}")
    for change in changes:
        if change.verdict in COLOURS:
            show(str(change), style=COLOURS[change.verdict] if change.decides else "dim")
    show(summary(changes, given.threshold), style="bold")
    return int(any(change.verdict in WORSE and change.decides for change in changes))


def same_machine(a: Path, facts_a: Mapping[str, Any], b: Path, facts_b: Mapping[str, Any]) -> None:
    """UserError unless times of these two folders can be compared."""
    for folder, facts in ((a, facts_a), (b, facts_b)):
        if facts.get("quick"):
            raise UserError(f"{folder} is from --quick, whose numbers mean nothing: measure without it")
    other = [f"{name} {facts_a.get(name)} and {facts_b.get(name)}" for name in SAME if facts_a.get(name) != facts_b.get(name)]
    if other:
        raise UserError(f"{a} and {b} are not of one machine and set-up: {'; '.join(other)}: measure both on one")


class Change(NamedTuple):
    """`row`: b's, or a's where it is only there."""

    a: Row | None
    b: Row | None
    row: Row
    verdict: str

    @property
    def decides(self) -> bool:
        """Whether it is about our program."""
        variant = self.row.variant
        return variant in ("ours", "dopsd") if self.row.suite == "reproduce" else not PEER.match(variant)

    def __str__(self) -> str:
        before, after = (" ".join(read(row)).rstrip() if row else "" for row in (self.a, self.b))
        a, b = (row.value if row else None for row in (self.a, self.b))
        percent = f" ({100 * (b - a) / abs(a):+,.1f} %)" if a and b is not None else ""
        why = f": {self.row.note}" if self.row.status != "ok" else ""
        return f"{self.verdict}: {' '.join(self.row.key)}: {before}, now {after}{percent}{why}"


def matched(rows_a: Sequence[Row], rows_b: Sequence[Row], threshold: float) -> list[Change]:
    """In the order of B, with what is only in A at the end."""
    before = {row.key: row for row in rows_a}
    changes = []
    for row in rows_b:
        old = before.pop(row.key, None)
        changes.append(Change(old, row, row, "only in B" if old is None else verdict(old, row, threshold)))
    return changes + [Change(row, None, row, "only in A") for row in before.values()]


def verdict(a: Row, b: Row, threshold: float) -> str:
    """Of one row measured twice; `threshold` in percent."""
    if a.value is None or b.value is None:
        return "same" if a.value == b.value else "failed" if b.value is None else "measured now"
    if (a.status, b.status) == ("ok", "fallback"):
        return "fell back"
    what = kind(b)
    limit = {"error": 1.0, "count": 1e-3}.get(what, threshold / 100)
    far = abs(b.value - a.value) > limit * min(abs(a.value), abs(b.value))
    if NEUTRAL.fullmatch(b.metric) or not far or overlap(a, b):
        return "same"
    gained = (b.value > a.value) == bool(b.unit.endswith("/s") or SPEED.search(b.metric) or MORE.fullmatch(b.metric))
    return ("slower", "faster")[gained] if what == "speed" else ("worse", "better")[gained]


def kind(row: Row) -> str:
    """Of "error", "memory", "speed" and "count": how far its values are from each other when they are not the same."""
    if ERROR.search(row.metric):
        return "error"
    if MEMORY.fullmatch(row.metric):
        return "memory"
    return "speed" if row.unit in ("s", "x") or row.unit.endswith("/s") or SPEED.search(row.metric) else "count"


def overlap(*rows: Row) -> bool:
    """Whether both have an interval, and these meet. A claim's is that of a ratio, not of its verdict."""
    ends: Any = [(row.low, row.high) if row.p20 is None else (row.p20, row.p80) for row in rows if row.metric != "claim"]
    known = bool(ends) and not any(None in pair for pair in ends)
    return known and max(low for low, _ in ends) <= min(high for _, high in ends)


def summary(changes: Sequence[Change], threshold: float) -> str:
    ours = Counter(change.verdict for change in changes if change.decides)
    others = sum(change.verdict in BETTER + WORSE for change in changes if not change.decides)
    counts = [f"{ours[name]} {name}" for name in (*WORSE, *BETTER, "same", "only in A", "only in B") if ours[name]]
    peers = f"; of peers and ceilings {others} changed" if others else ""
    return f"ours, beyond {threshold:g} % and the spread: {', '.join(counts) or 'no rows'}{peers}"
