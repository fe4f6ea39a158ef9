"""What a measurement depends on beside the program: machine, versions, commit, and how fast a copy and a product are here."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from bench.clock import interleaved, kernel_clock
from bench.results import ROOT, Options
from dopsd_fast.errors import UserError


def device_named(name: str) -> torch.device:
    """What --device says; "auto": a GPU if there is one. UserError: it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from None
    return device


def environment(options: Options) -> dict[str, Any]:
    """Machine, versions, commit and the options of the run."""
    facts = {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "commit": commit(),
        "device": str(options.device),
    } | {name: getattr(options, name) for name in ("threads", "clock", "model", "quick", "tour")}
    for package in ("torch", "triton", "diffusers", "transformers", "peft", "deepspeed", "flash-attn"):
        facts[package] = None
        with suppress(PackageNotFoundError):
            facts[package] = version(package)
    if options.device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(options.device)
        facts["compute_capability"] = list(torch.cuda.get_device_capability(options.device))
        facts["cuda"] = torch.version.cuda
        facts["driver"] = said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return facts


def commit() -> str | None:
    """The commit of this checkout, with "+" when a tracked file differs from it; None outside of one."""
    found = said("git", "-C", str(ROOT), "rev-parse", "HEAD")
    return found and found + "+" * bool(said("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no"))


def said(*command: str) -> str | None:
    """What a command prints, None when it cannot run."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def cpu_name() -> str:
    lines = (said("cat", "/proc/cpuinfo") or "").splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())


@dataclass(frozen=True)
class Ceilings:
    """What this machine can do, measured in this process: bytes read and written by a copy that no cache holds, operations of
    one large product `[m, k] x [k, n]` in the given dtype, 2 m k n. No kernel moves more, no product runs faster."""

    bytes_per_second: float
    flops_per_second: float


@functools.cache
def ceilings(device: torch.device, dtype: torch.dtype, quick: bool = False) -> Ceilings:
    """Measured once in a process: the best of several rounds. `quick`: small, its numbers mean nothing."""
    size, side = (1 << 20, 64) if quick else (1 << 30, 8192) if device.type == "cuda" else (1 << 28, 2048)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    calls: dict[str, Callable[[], Any]] = {"copy": partial(target.copy_, source), "gemm": partial(torch.mm, a, b, out=out)}
    seconds = interleaved(calls, 3 if quick else 10, 2, device, kernel_clock(device))
    return Ceilings(2 * size / min(seconds["copy"]), 2 * side**3 / min(seconds["gemm"]))
