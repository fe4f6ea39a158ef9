"""The clock of all suites: interleaved measurements, and what is said of them.

A call that lasts a whole step is timed from outside, by "wall". A kernel that lasts microseconds on a GPU is timed by
"events": from outside, the host's time to launch it would be measured.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypedDict

import torch

from bench.live import tick


class Summary(TypedDict):
    value: float
    p20: float
    p80: float
    n: int


def summary(values: Sequence[float]) -> Summary:
    """Median, 20th and 80th percentile (linear between neighbours) and count, named as in `Row`."""
    if len(values) == 1:
        return {"value": values[0], "p20": values[0], "p80": values[0], "n": 1}
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return {"value": statistics.median(values), "p20": fifths[0], "p80": fifths[3], "n": len(values)}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


Timer = Callable[[Callable[[], Any]], float]
"""call -> seconds that it took."""
FILL_BYTES = 1 << 29
"""Of the buffer that is filled before a kernel is timed: several times the L2 cache of any GPU, a tenth of a millisecond."""
FEWEST_FILLS, MOST_FILLS = 4, 64


class Events:
    """Seconds that a GPU spends on a call, measured by CUDA events behind fills of a large buffer.

    The fills flush the L2 cache, and they keep the GPU busy until the host has launched everything that the call launches, so
    that neither counts. Their number follows from the time that the host took for the same call before; the first time of a
    call is to be thrown away. A host that takes more than MOST_FILLS (8 ms on an H200) is measured after all.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.buffer = torch.empty(FILL_BYTES, dtype=torch.uint8, device=device)
        self.host: dict[Callable[[], Any], float] = {}
        self.fill_seconds = 1e-4
        self.fill_seconds = self._time(self.buffer.zero_, FEWEST_FILLS)

    def __call__(self, call: Callable[[], Any]) -> float:
        wanted = math.ceil(2 * self.host.get(call, 0.0) / self.fill_seconds)
        return self._time(call, min(max(wanted, FEWEST_FILLS), MOST_FILLS))

    def _time(self, call: Callable[[], Any], fills: int) -> float:
        stream = torch.cuda.current_stream(self.device)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        synchronize(self.device)
        for _ in range(fills):
            self.buffer.zero_()
        begin.record(stream)
        started = time.perf_counter()
        call()
        self.host[call] = time.perf_counter() - started
        end.record(stream)
        synchronize(self.device)
        return max(begin.elapsed_time(end), 1e-6) / 1e3  # a millionth of a millisecond: it is divided by


def timer(clock: str, device: torch.device) -> Timer:
    """`clock`: "wall", "cpu" (as in Options), or "events", which on a CPU is "wall"."""
    if clock == "events" and device.type == "cuda":
        return Events(device)
    now = time.process_time if clock == "cpu" else time.perf_counter

    def from_outside(call: Callable[[], Any]) -> float:
        synchronize(device)
        started = now()
        call()
        synchronize(device)
        return now() - started

    return from_outside


def kernel_clock(device: torch.device, clock: str = "wall") -> str:
    """The clock of a suite whose calls last microseconds: "events" on a GPU, on a CPU as in Options."""
    return "events" if device.type == "cuda" else clock


LONG = 0.2
"""Seconds from which on a call is shown while it lasts."""


def interleaved(
    calls: Mapping[str, Callable[[], Any]],
    rounds: int,
    warmup: int,
    device: torch.device | str = "cpu",
    clock: str = "wall",
) -> dict[str, list[float]]:
    """Seconds of each call in each of `rounds` rounds: what `in_turns` gives at last."""
    seconds: dict[str, list[float]] = {}
    for found in in_turns(calls, rounds, warmup, device, clock):
        seconds = found
    return seconds


def in_turns(
    calls: Mapping[str, Callable[[], Any]],
    rounds: int,
    warmup: int,
    device: torch.device | str = "cpu",
    clock: str = "wall",
) -> Iterator[dict[str, list[float]]]:
    """After each round the seconds of each call in each round so far; entry i of every list is from the same round. `clock`: as
    in `timer`. `live.tick` is told of every call before it is made.

    A round runs every call once, beginning one further each time, so that a slow spell of the machine and what a call
    leaves in the caches fall on all alike. `warmup` rounds are not counted; the garbage collector runs between rounds.
    """
    device = torch.device(device)
    names = list(calls)
    measure = timer(clock, device)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    last: dict[str, float] = {}
    collecting = gc.isenabled()
    gc.disable()
    gc.freeze()  # what is alive already need not be searched in every round
    try:
        for number in range(warmup + rounds):
            gc.collect()
            first = number % len(names)
            said = f"warm-up {number + 1} of {warmup}" if number < warmup else f"round {number - warmup + 1} of {rounds}"
            for place, name in enumerate(names[first:] + names[:first]):
                whole = sum(last.values()) if len(last) == len(names) else None
                left = None if whole is None else whole * (warmup + rounds - number - place / len(names))
                tick(name, said, left, last.get(name, LONG) >= LONG)
                began = time.perf_counter()
                taken = measure(calls[name])
                last[name] = time.perf_counter() - began
                if number >= warmup:
                    seconds[name].append(taken)
            if number >= warmup:
                yield seconds
    finally:
        gc.unfreeze()
        if collecting:
            gc.enable()


def ratios(slow: Sequence[float], fast: Sequence[float]) -> list[float]:
    """slow / fast, round by round: what slows a whole round cancels."""
    return [a / b for a, b in zip(slow, fast, strict=True)]
