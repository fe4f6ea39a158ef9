"""The paper's claims as questions to the measurements. Every answer is a row: 1 supported, 0 undecided, -1 contradicted.

A claim is one or several statements "this number is above (below) that bound". A statement is supported when the whole 95 %
interval of its number is on the claimed side of the bound, contradicted when the whole interval is on the other. A claim is
supported when all its statements are, contradicted when one is contradicted and none is supported, else undecided.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from bench.reproduce.arms import OURS, START
from bench.reproduce.resampling import Draws, interval
from bench.results import Row

MANY = 32


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
    """`number` [1 + draws] of the draws; `above`: which side of `bound` is claimed."""

    says: str
    number: Callable[[Draws], np.ndarray]
    bound: float
    above: bool

    def verdict(self, low: float, high: float) -> int:
        if not (np.isfinite(low) and np.isfinite(high)):
            return 0
        right = low > self.bound if self.above else high < self.bound
        wrong = high < self.bound if self.above else low > self.bound
        return int(right) - int(wrong)


@dataclass(frozen=True)
class Claim:
    """`required`: a reproduction that does not support it has not reproduced the paper's result."""

    name: str
    arms: tuple[str, ...]
    statements: tuple[Statement, ...]
    required: bool = False


def claims(m: Measures) -> list[Claim]:
    def ratio(a: str, b: str, metric: str, domain: str = "target", steps: tuple[int, int] = (m.few, m.few)):
        return lambda d: d.values((a, domain, steps[0]), metric) / d.values((b, domain, steps[1]), metric)

    def minus(a: str, b: str, metric: str, domain: str = "target"):
        return lambda d: d.values((a, domain, m.few), metric) - d.values((b, domain, m.few), metric)

    def beats(other: str) -> tuple[Statement, ...]:
        return tuple(
            Statement(f"{other} / D-OPSD, target {metric}", ratio(other, OURS, metric), 1.0, above=True)
            for metric in (m.style, m.quality)
        )

    start = (
        Statement("D-OPSD / start, target " + m.style, ratio(OURS, START, m.style), 0.7, above=False),
        Statement("D-OPSD / start, target " + m.quality, ratio(OURS, START, m.quality), 1.0, above=False),
    )
    collapse = (
        Statement("live teacher / D-OPSD, target " + m.quality, ratio("live_teacher", OURS, m.quality), 2.0, above=True),
        Statement("live teacher - D-OPSD, target " + m.kept, minus("live_teacher", OURS, m.kept), -m.points, above=False),
    )
    few = ratio("sft", "sft", m.quality, steps=(m.few, MANY))
    kept = minus(OURS, START, m.kept, "original")
    forgets = ratio("sft", OURS, m.quality, "original")
    frozen = ratio(OURS, "frozen_teacher", m.style)
    return [
        Claim("sft_loses_few_step", ("sft",),
              (Statement(f"SFT, target {m.quality} at {m.few} / at {MANY} steps", few, 2.0, above=True),), True),
        Claim("dopsd_learns_target", (OURS,), start, True),
        Claim("dopsd_keeps_original", (OURS,),
              (Statement(f"D-OPSD - start, original {m.kept}", kept, -m.points, above=True),), True),
        Claim("dopsd_beats_sft", ("sft", OURS), beats("sft"), True),
        Claim("live_teacher_collapses", ("live_teacher", OURS), collapse, True),
        Claim("sft_forgets", ("sft", OURS),
              (Statement(f"SFT / D-OPSD, original {m.quality}", forgets, 1.0, above=True),)),
        Claim("dopsd_beats_pso", ("pso", OURS), beats("pso")),
        Claim("ema_at_least_frozen", ("frozen_teacher", OURS),
              (Statement(f"EMA / frozen, target {m.style} (at most 5 % worse)", frozen, 1.05, above=False),)),
        Claim("on_policy_beats_off_policy", ("off_policy", OURS), beats("off_policy")),
    ]


def rows(draws: Draws, measures: Measures, seeds: int) -> list[Row]:
    """One row a claim; its interval is that of its first statement, its note has them all."""
    found = []
    for claim in claims(measures):
        missing = [arm for arm in claim.arms if not any(key[0] == arm for key in draws.samples)]
        if missing:
            note = f"not measured in this run: needs {', '.join(missing)}"
            found.append(Row("reproduce", claim.name, "ours", "claim", 0, "", n=0, note=note))
            continue
        try:
            numbers = [interval(statement.number(draws)) for statement in claim.statements]
        except KeyError as error:
            found.append(Row("reproduce", claim.name, "ours", "claim", 0, "", n=0, note=f"not measured: no {error.args[0]}"))
            continue
        verdicts = [one.verdict(low, high) for one, (_, low, high) in zip(claim.statements, numbers)]
        value = 1 if all(v == 1 for v in verdicts) else -1 if -1 in verdicts and 1 not in verdicts else 0
        note = "; ".join(
            f"{one.says}: {number:.3g} [{low:.3g}, {high:.3g}], claimed {'>' if one.above else '<'} {one.bound:g}"
            for one, (number, low, high) in zip(claim.statements, numbers)
        )
        _, low, high = numbers[0]
        found.append(Row("reproduce", claim.name, "ours", "claim", value, "", n=seeds, note=note, low=low, high=high))
    return found


def lost(found: list[Row], measures: Measures = Measures()) -> list[str]:
    """The required claims that these rows do not support."""
    verdicts = {row.case: row.value for row in found if row.metric == "claim"}
    return [claim.name for claim in claims(measures) if claim.required and verdicts.get(claim.name) != 1]
