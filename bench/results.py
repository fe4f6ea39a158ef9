"""Rows of a benchmark, their file and table, and the clock that takes them."""

from __future__ import annotations

import gc
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypedDict

import torch

ROOT = Path(__file__).resolve().parent.parent
FILE = "results.json"


@dataclass(frozen=True)
class Row:
    """One number. `variant`: "ours" or a peer, "R1" ... "R4". `value` is the median of `n` measurements where there
    were several, `p20` and `p80` their percentiles (None for what was counted or computed)."""

    suite: str
    case: str
    variant: str
    metric: str
    value: float
    unit: str
    p20: float | None = None
    p80: float | None = None
    n: int = 1


@dataclass(frozen=True)
class Options:
    """What the command line gives to every suite. `model`: folder of a pipeline in diffusers' layout. `quick`: the
    fewest repetitions that exercise everything, for tests; its numbers mean nothing."""

    model: Path
    device: torch.device
    quick: bool = False
    threads: int = 2
    rounds: int = 0
    """Measurements of each variant; 0 leaves it to the suite."""
    clock: str = "wall"
    """"wall", or "cpu": this process's CPU time, which other programs on the machine disturb less; for one thread."""
    peers: tuple[str, ...] = ("R1", "R2", "R3", "R4")
    kinds: tuple[str, ...] = ("lora", "full")


# ---- the clock -------------------------------------------------------------------------------------------------------


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


# ---- the file --------------------------------------------------------------------------------------------------------


def environment(options: Options) -> dict[str, Any]:
    """Machine, versions, commit and the options of the run."""
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "threads": options.threads,
        "clock": options.clock,
        "commit": commit(),
        "model": options.model.name,
        "device": str(options.device),
        "quick": options.quick,
    }
    for package in ("torch", "triton", "diffusers", "transformers", "peft", "deepspeed", "flash-attn"):
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = None
    if options.device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(options.device)
        facts["compute_capability"] = list(torch.cuda.get_device_capability(options.device))
        facts["cuda"] = torch.version.cuda
        facts["driver"] = said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return facts


def commit() -> str | None:
    """The commit of this checkout, with "+" when a tracked file differs from it; None outside of one."""
    found = said("git", "-C", str(ROOT), "rev-parse", "HEAD")
    changed = found and said("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no")
    return f"{found}+" if found and changed else found


def said(*command: str) -> str | None:
    """What a command prints, None when it cannot run."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())


def write_results(folder: Path, facts: Mapping[str, Any], rows: Iterable[Row]) -> Path:
    """`{"environment": {...}, "rows": [...]}` in `folder`/results.json, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / FILE
    content = {"environment": dict(facts), "rows": [asdict(row) for row in rows]}
    part = file.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n")
    part.replace(file)
    return file


def read_results(folder: Path) -> tuple[dict[str, Any], list[Row]]:
    """The inverse of `write_results`. Raises ValueError when the file does not hold what it writes."""
    file = folder / FILE
    content = json.loads(file.read_text())
    try:
        return content["environment"], [Row(**row) for row in content["rows"]]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{file} is no benchmark result: {error}; write it with bench/run.py --out") from error


# ---- the table -------------------------------------------------------------------------------------------------------


def show(suite: str, rows: Sequence[Row]) -> None:
    """The rows as a table on the terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=suite, title_justify="left")
    for name in ("case", "variant", "metric"):
        table.add_column(name, overflow="fold")
    for name in ("value", "p20 .. p80", "n"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        spread = "" if row.p20 is None or row.p80 is None else f"{number(row.p20)} .. {number(row.p80)}"
        count = str(row.n) if row.n > 1 else ""
        table.add_row(row.case, row.variant, row.metric, f"{number(row.value)} {row.unit}".strip(), spread, count)
    Console(width=None if os.isatty(1) else 120).print(table)


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
