"""The clock of all suites: interleaved measurements, and what is said of them."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict

import torch


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


def interleaved(
    calls: Mapping[str, Callable[[], Any]],
    rounds: int,
    warmup: int,
    device: torch.device | str = "cpu",
    clock: str = "wall",
) -> dict[str, list[float]]:
    """Seconds of each call in each of `rounds` rounds; entry i of every list is from the same round. `clock`: as in Options.

    A round runs every call once, beginning one further each time, so that a slow spell of the machine and what a call
    leaves in the caches fall on all alike. `warmup` rounds are not counted; the garbage collector runs between rounds.
    """
    device = torch.device(device)
    names = list(calls)
    now = {"wall": time.perf_counter, "cpu": time.process_time}[clock]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.disable()
    gc.freeze()  # what is alive already need not be searched in every round
    try:
        for number in range(warmup + rounds):
            gc.collect()
            first = number % len(names)
            for name in names[first:] + names[:first]:
                synchronize(device)
                started = now()
                calls[name]()
                synchronize(device)
                if number >= warmup:
                    seconds[name].append(now() - started)
    finally:
        gc.unfreeze()
        if collecting:
            gc.enable()
    return seconds


def ratios(slow: Sequence[float], fast: Sequence[float]) -> list[float]:
    """slow / fast, round by round: what slows a whole round cancels."""
    return [a / b for a, b in zip(slow, fast, strict=True)]
