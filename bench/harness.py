"""What all suites do: build the variants of a case, say how exact each is, time them in turns, and make rows of it.

    contest = Contest("rollout", "lora{}@nano", options)       # {}: where a ratio's row names the peer, as "lora/R1@nano"
    for name in ("R1", "ours"):
        yield from contest.build(name, partial(make, name), check)
    yield from contest.time({name: one.step for name, one in contest.alive.items()}, contest.speeds, usual=20, tour=5)

What raises is a row of status "failed", and the others go on. A timing that takes long tells its rows after each round, so that
a run that is stopped leaves what it has measured: of rows of one key, `results.merged` keeps the one with most measurements.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.clock import in_turns, kernel_clock, ratios, summary
from bench.live import say
from bench.references.float64 import wide
from bench.references.reference_eager import STRONGER
from bench.results import Options, Row, Status, failed

TOLD_AGAIN = 5.0
"""Seconds after which the rows of a timing that goes on are told again."""
Seconds = Mapping[str, Sequence[float]]
Exact = Mapping[str, tuple[float, str]]


class Contest:
    """Variants of one case. `notes`: what each fell back to, in one line, empty: nothing. `seconds`, `ratio`: the metrics of a
    time and of a peer's over ours. `peers`: whom ours is compared with, beside R1 ... R4. `remarks`: what else is said of a
    variant's time."""

    def __init__(
        self, suite: str, case: str, options: Options, seconds: str = "seconds_per_step", ratio: str = "speedup"
    ) -> None:
        self.suite, self.case, self.options, self.seconds, self.ratio = suite, case, options, seconds, ratio
        self.notes: dict[str, str] = {}
        self.alive: dict[str, Any] = {}
        self.peers: Sequence[str] = ()
        self.remarks: dict[str, str] = {}
        torch.set_num_threads(options.threads)

    def place(self, peer: str = "") -> str:
        return self.case.format(peer and f"/{peer}")

    def row(self, variant: str, metric: str, unit: str, values: Sequence[float] | float, note: str = "", peer: str = "") -> Row:
        """A number of a variant, or with `peer` of ours against that one. It is a fallback where one of them fell back, and a
        failure where it is not finite."""
        fell = [self.notes.get(variant, ""), f"{peer}: {self.notes[peer]}" if self.notes.get(peer) else ""]
        status: Status = "fallback" if any(fell) else "ok"
        said = "; ".join(dict.fromkeys(filter(None, (*fell, note))))
        key = self.suite, self.place(peer), variant, metric
        several = [values] if isinstance(values, float | int) else values
        if not all(map(math.isfinite, several)):
            return failed(*key, unit, "; ".join(filter(None, ("not finite", said))))
        found = summary(several) if several is values else {"value": values}
        return Row(*key, unit=unit, status=status, note=said, **found)

    def lost(self, variant: str, error: BaseException | str, rounds: int = 0) -> Iterator[Row]:
        """A variant without a time, and what was to be compared with it. rounds: those before it failed, whose rows are taken
        back if they were told."""
        keys = [(self.place(), variant, self.seconds, "s")]
        if variant in STRONGER or variant in self.peers:
            keys.append((self.place(variant), "ours", self.ratio, "x"))
        if variant == "ours" and rounds:
            keys += [(self.place(name), "ours", self.ratio, "x") for name in self.alive if name != "ours"]
        for case, name, metric, unit in keys:
            yield replace(failed(self.suite, case, name, metric, unit, error), n=rounds)

    def speeds(self, found: Seconds, amounts: Mapping[str, tuple[str, float]] = {}) -> Iterator[Row]:
        """Seconds and ratios of all, and for each of `amounts`, metric -> (unit, amount), the amount over the seconds."""
        for name, values in found.items():
            yield self.row(name, self.seconds, "s", values, self.remarks.get(name, ""))
            for metric, (unit, amount) in amounts.items():
                yield self.row(name, metric, unit, [amount / value for value in values])
            if name != "ours" and "ours" in found:
                yield self.row("ours", self.ratio, "x", ratios(values, found["ours"]), peer=name)

    def build(self, name: str, make: Callable[[], Any], check: Callable[[Any], Exact | None] | None = None) -> Iterator[Row]:
        """Puts a variant that has run once into `alive`, and says how exact it was; or why it could not. check: runs it, and
        gives metric -> (error, note)."""
        compiled = bool(STRONGER.get(name, {}).get("compile_blocks")) or name == "compiled"
        say(f"{self.suite}: {self.place()}, {'compiling' if compiled else 'building'} {name}")
        free(self.options.device)
        torch._dynamo.utils.counters.clear()
        try:
            one = make()
            errors = check(one) if check else None
            self.notes[name] = compiled_in_part() if compiled else one.fell_back()
        except Exception as error:
            yield from self.lost(name, error)
            one = None
            free(self.options.device)
            return
        self.alive[name] = one
        for metric, (value, note) in (errors or {}).items():
            yield self.row(name, metric, "", value, note)

    def time(
        self, calls: Mapping[str, Callable[[], Any]], rows: Callable[[Seconds], Iterator[Row]], usual: int = 20, tour: int = 5,
        warmup: int | None = None, kernel: bool = False,
    ) -> Iterator[Row]:
        """`rows` of the seconds of `calls`, in turns. Each is called once before. What fails then, or in a later round, is left
        out, and the others begin anew.

        usual, tour: rounds (`Options.repeats`). warmup: rounds before those that count, 2 and in the tour none if not said.
        kernel: the calls last microseconds."""
        options, able = self.options, {}
        warmup = (0 if options.quick or options.tour else 2) if warmup is None else warmup
        clock = kernel_clock(options.device, options.clock) if kernel else options.clock
        say(f"{self.suite}: {self.place()}, timing {', '.join(calls)}")
        for name, call in calls.items():
            try:
                call()
                able[name] = call
            except Exception as error:
                yield from self.lost(name, error)
        running = ""

        def noted(name: str, call: Callable[[], Any]) -> None:
            nonlocal running
            running = name
            call()

        while able:
            found, told, running = dict[str, list[float]](), time.monotonic(), ""
            turns = {name: partial(noted, name, call) for name, call in able.items()}
            try:
                for found in in_turns(turns, options.repeats(usual, tour), warmup, options.device, clock):
                    running = ""
                    if time.monotonic() - told > TOLD_AGAIN:
                        yield from rows(found)
                        told = time.monotonic()
                yield from rows(found)
                return
            except Exception as error:
                if not running:  # it was no call that failed
                    raise
                yield from self.lost(running, error, min(map(len, found.values()), default=0))
                del able[running]

    def forget(self) -> None:
        for one in self.alive.values():
            one.close()
        self.alive.clear()
        free(self.options.device)


def free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def new_compiler() -> None:
    """Nothing is compiled yet, and there is room for one graph per length, branch and mode; all blocks share the code."""
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = 64


def compiled_in_part() -> str:
    """What torch.compile did not compile since its counters were cleared, in one line; empty: nothing."""
    breaks, frames = (torch._dynamo.utils.counters[name] for name in ("graph_break", "frames"))
    if breaks:
        return f"torch.compile broke the graph: {' '.join(str(next(iter(breaks))).split())[:120]}"
    if not frames["ok"]:
        return "torch.compile compiled nothing"
    lost = frames["total"] - frames["ok"]
    return f"torch.compile gave up on {lost} of {frames['total']} frames" if lost else ""


def exact_dtype(dtype: torch.dtype) -> torch.dtype:
    """What results in `dtype` are compared with: float64 for fp32, fp32 without TF32 for bf16."""
    return torch.float64 if dtype == torch.float32 else torch.float32


def exact_note(dtype: torch.dtype) -> str:
    """The note of such an error; float64 is the rule and needs none."""
    return "" if dtype == torch.float32 else "against fp32 without TF32"


@contextmanager
def exactly(dtype: torch.dtype) -> Iterator[None]:
    """Inside, `dtype` is what products are computed in: no TF32, and no casts from float64 to fp32 in diffusers."""
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, False
    try:
        with wide(dtype):
            yield
    finally:
        matmul.allow_tf32 = before


def relative(value: Tensor, true: Tensor) -> float:
    """|value - true| / |true|, in the 2-norm."""
    return float((value.double() - true.double()).norm() / true.double().norm())


def gradient_error(gradients: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> float:
    """|g - g*| / |g*| of the whole gradient g against the exact g*, in the 2-norm; a tensor without gradient counts as zero.
    nan where either is all zero, which no step makes."""
    ours, whole, apart = 0.0, 0.0, 0.0
    for name, true in exact.items():
        value = (gradients[name] if name in gradients else torch.zeros_like(true)).double()
        true = true.to(value.device).double()
        ours, whole = ours + float(value.square().sum()), whole + float(true.square().sum())
        apart += float((value - true).square().sum())
    return (apart / whole) ** 0.5 if ours and whole else math.nan
