"""The paper's claims as questions to the measurements. Every answer is a row: 1 supported, 0 undecided, -1 contradicted.

A claim is one or several statements "this number is above (below) that bound". A statement is supported when the whole 95 %
interval of its number is on the claimed side of the bound, contradicted when the whole interval is on the other. A claim is
supported when all its statements are, contradicted when one is contradicted and none is supported, else undecided.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bench.reproduce.arms import MANY, NAMES, OURS, START
from bench.reproduce.resampling import Draws, interval
from bench.results import Row


@dataclass(frozen=True)
class Measures:
    """The names of what stands for quality (a Frechet distance), style (a distance to the target) and what must be kept (higher
    is better; in `unit_of_kept` a point is .01), and of the step count that the model is deployed with."""

    quality: str = "patch_fd"
    style: str = "style_distance"
    kept: str = "accuracy"
    few: int = 4
    points: float = 0.05


@dataclass(frozen=True)
class Statement:
    """That a measure of `one` arm's pictures over that of the `other`'s, or `minus` it, is `above` a bound, or below it.
    `many`: the other's are drawn with MANY steps."""

    one: str
    other: str
    metric: str
    bound: float
    above: bool
    domain: str = "target"
    minus: bool = False
    many: bool = False

    def number(self, draws: Draws, few: int) -> np.ndarray:
        """[1 + draws]. KeyError: it was not measured."""
        one = draws.values((self.one, self.domain, few), self.metric)
        other = draws.values((self.other, self.domain, MANY if self.many else few), self.metric)
        return one - other if self.minus else one / other

    def verdict(self, low: float, high: float) -> int:
        side = int(low > self.bound) - int(high < self.bound) if np.isfinite([low, high]).all() else 0
        return side if self.above else -side

    def __str__(self) -> str:
        steps = f" at {MANY} steps" * self.many
        says = f"{NAMES[self.one]} {'-' if self.minus else '/'} {NAMES[self.other]}{steps}, {self.domain} {self.metric}"
        return f"{says}, claimed {'>' if self.above else '<'} {self.bound:g}"


def claims(m: Measures) -> dict[str, tuple[Statement, ...]]:
    def beats(other: str) -> tuple[Statement, ...]:
        return tuple(Statement(other, OURS, metric, 1.0, above=True) for metric in (m.style, m.quality))

    return {
        "sft_loses_few_step": (Statement("sft", "sft", m.quality, 2.0, above=True, many=True),),
        "dopsd_learns_target": (
            Statement(OURS, START, m.style, 0.7, above=False), Statement(OURS, START, m.quality, 1.0, above=False),
        ),
        "dopsd_keeps_original": (Statement(OURS, START, m.kept, -m.points, above=True, domain="original", minus=True),),
        "dopsd_beats_sft": beats("sft"),
        "live_teacher_collapses": (
            Statement("live_teacher", OURS, m.quality, 2.0, above=True),
            Statement("live_teacher", OURS, m.kept, -m.points, above=False, minus=True),
        ),
        "sft_forgets": (Statement("sft", OURS, m.quality, 1.0, above=True, domain="original"),),
        "dopsd_beats_pso": beats("pso"),
        "ema_at_least_frozen": (Statement(OURS, "frozen_teacher", m.style, 1.05, above=False),),  # at most 5 % worse
        "on_policy_beats_off_policy": beats("off_policy"),
    }


def rows(draws: Draws, measures: Measures, seeds: int) -> list[Row]:
    """One row a claim; its interval is that of its first statement, its note has them all."""
    found = []
    for claim, statements in claims(measures).items():
        try:
            numbers = [interval(statement.number(draws, measures.few)) for statement in statements]
        except KeyError as error:
            note = f"not measured in this run: needs {error.args[0]}"
            found.append(Row("reproduce", claim, "ours", "claim", 0, "", n=0, note=note))
            continue
        verdicts = [one.verdict(low, high) for one, (_, low, high) in zip(statements, numbers)]
        value = 1 if all(v == 1 for v in verdicts) else -1 if -1 in verdicts and 1 not in verdicts else 0
        notes = (f"{one}: {number:.3g} [{low:.3g}, {high:.3g}]" for one, (number, low, high) in zip(statements, numbers))
        _, low, high = numbers[0]
        found.append(Row("reproduce", claim, "ours", "claim", value, "", n=seeds, note="; ".join(notes), low=low, high=high))
    return found
