"""The clock of all suites: interleaved measurements, and what is said of them. A call that lasts a whole step is timed from
outside, by "wall"; a kernel that lasts microseconds on a GPU by "events": else the host's time to launch it would count."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from bench.live import tick


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Median, 20th and 80th percentile (linear between neighbours) and count, named as in `Row`."""
    if len(values) == 1:
        return {"value": values[0], "p20": values[0], "p80": values[0], "n": 1}
    fifths = statistics.quantiles(values, n=5, method="inclusive")
    return {"value": statistics.median(values), "p20": fifths[0], "p80": fifths[3], "n": len(values)}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


FILL_BYTES, FEWEST_FILLS, MOST_FILLS = 1 << 29, 4, 64
"""Of the buffer that is filled before a kernel is timed: several times the L2 cache of any GPU, a tenth of a millisecond."""


class Events:
    """Seconds that a GPU spends on a call, measured by CUDA events behind fills of a large buffer.

    The fills flush the L2 cache, and they keep the GPU busy until the host has launched everything that the call launches, so
    that neither counts. Their number follows from the time that the host took for the same call before; the first time of a
    call is to be thrown away. A host that takes more than MOST_FILLS (8 ms on an H200) is measured after all."""

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


def timer(clock: str, device: torch.device) -> Callable[[Callable[[], Any]], float]:
    """Of a call: the seconds that it takes. `clock`: "wall", "cpu" (as in Options), or "events", which on a CPU is "wall"."""
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


Calls = Mapping[str, Callable[[], Any]]
Seconds = dict[str, list[float]]


def interleaved(calls: Calls, rounds: int, warmup: int, device: torch.device | str = "cpu", clock: str = "wall") -> Seconds:
    """Seconds of each call in each of `rounds` rounds: what `in_turns` gives at last."""
    return list(in_turns(calls, rounds, warmup, device, clock))[-1]


def in_turns(
    calls: Calls, rounds: int, warmup: int, device: torch.device | str = "cpu", clock: str = "wall"
) -> Iterator[Seconds]:
    """After each round the seconds of each call in each round so far; entry i of every list is from the same round. `clock`: as
    in `timer`. `live.tick` is told of every call before it is made. A round runs every call once, beginning one further each
    time, so that a slow spell of the machine and what a call leaves in the caches fall on all alike. `warmup` rounds are not
    counted; the garbage collector runs between rounds."""
    names, measure = list(calls), timer(clock, torch.device(device))
    seconds: Seconds = {name: [] for name in names}
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
                left = sum(last.values()) * (warmup + rounds - number - place / len(names)) if len(last) == len(names) else None
                tick(name, said, left)
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
