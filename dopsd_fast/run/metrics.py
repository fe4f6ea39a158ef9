"""What a run writes about itself: metrics, TensorBoard, phase times, peak memory, pictures in a grid, the console."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch


class MetricsLog:
    """`metrics.jsonl`, one row a step, and the same scalars for TensorBoard. Rows after `start` (the steps that a resumed
    run is about to repeat, and a line torn by a kill) are dropped, so the file holds each step exactly once."""

    def __init__(self, folder: Path, start: int):
        from torch.utils.tensorboard import SummaryWriter

        self.path = folder / "metrics.jsonl"
        kept = [line for line in read_rows(self.path) if line["step"] <= start]
        part = self.path.with_suffix(".part")
        part.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        part.replace(self.path)
        self.lines = open(self.path, "a", encoding="utf-8")
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)

    def sync(self) -> None:
        """On the disk before the checkpoint that relies on it."""
        os.fsync(self.lines.fileno())

    def append(self, row: dict[str, Any]) -> None:
        self.lines.write(json.dumps(row) + "\n")
        self.lines.flush()
        for name, value in _scalars(row):
            self.board.add_scalar(name, value, row["step"])

    def close(self) -> None:
        self.sync()
        self.lines.close()
        self.board.close()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The whole rows of a metrics file; a torn last line is left out."""
    rows = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                rows.append(json.loads(line))
    return rows


def _scalars(row: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in row.items():
        if isinstance(value, dict):
            yield from ((f"{name}/{key}", v) for key, v in value.items())
        elif isinstance(value, list):
            yield from ((f"{name}/{i}", v) for i, v in enumerate(value))
        elif name != "step" and value is not None:
            yield name, value


class Phases:
    """Seconds spent per named phase since the last `take`. On an accelerator a phase ends when its kernels have."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    def take(self) -> dict[str, float]:
        out, self.seconds = {name: round(s, 4) for name, s in self.seconds.items()}, {}
        return out


def peak_memory(device: torch.device) -> int:
    """Bytes: the allocator's peak on an accelerator, this process's peak resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch, its allocators or Python failed for want of memory; torch has an exception of its own on GPUs only."""
    said = ("out of memory", "DefaultCPUAllocator", "not enough memory", "ALLOC_FAILED")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in said)
    )


def free_memory(device: torch.device) -> None:
    """Gives back what is no longer used, after an error whose traceback may have held it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
