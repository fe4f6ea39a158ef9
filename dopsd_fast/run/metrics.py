"""Measures a run and writes its metrics: rows of metrics.jsonl, TensorBoard, seconds per phase, and peak memory."""

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

from dopsd_fast.storage.atomic import write_text


class MetricsLog:
    """Writes one row a step to `metrics.jsonl`, and the same scalars for TensorBoard.

    A continued run repeats the steps after its checkpoint, `start`. Their old rows are dropped, and so is a line that a kill
    has torn; so the file holds each step exactly once."""

    def __init__(self, folder: Path, start: int):
        from torch.utils.tensorboard import SummaryWriter

        self.path = folder / "metrics.jsonl"
        kept = [line for line in read_rows(self.path) if line["step"] <= start]
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        self.lines = open(self.path, "a", encoding="utf-8")
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)

    def sync(self) -> None:
        """Makes sure that the rows are on the disk. It is called before a checkpoint is saved, because a run that continues
        from the checkpoint relies on them."""
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
    """Returns the rows of a metrics file. A torn line is left out."""
    rows = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                rows.append(json.loads(line))
    return rows


def _scalars(row: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Yields the numbers of a row under TensorBoard's names; entries of tables and lists are named parent/child."""
    for name, value in row.items():
        if isinstance(value, dict):
            yield from ((f"{name}/{key}", v) for key, v in value.items())
        elif isinstance(value, list):
            yield from ((f"{name}/{i}", v) for i, v in enumerate(value))
        elif name != "step" and value is not None:
            yield name, value


class Phases:
    """Counts the seconds spent in each named phase since the last `take`. On a GPU a phase ends when its kernels have ended."""

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
    """Returns the peak in bytes: of the allocator on a GPU, of this process's resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def is_out_of_memory(error: BaseException) -> bool:
    """Tells whether torch, its allocators or Python failed for lack of memory. Messages are searched because torch raises an
    exception of its own for this only on GPUs."""
    said = ("out of memory", "DefaultCPUAllocator", "not enough memory", "ALLOC_FAILED")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in said)
    )


def free_memory(device: torch.device) -> None:
    """Frees memory that is no longer used. It is called after an error, whose traceback may have kept tensors alive."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
