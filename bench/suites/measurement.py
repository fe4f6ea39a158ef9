"""How the suites step, rollout and forward measure a case: what is exact, then ours in turns with its peers.

On a GPU ours takes turns with one peer at a time, since not all fit together; on a CPU all do. A peer that does not fit beside
ours is measured by itself afterwards. Ours is built once, and first, so that a run which is stopped has its rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

from bench.harness import Contest, Exact, exact_dtype, exactly, free, new_compiler
from bench.live import say
from bench.models import WIDE, Model
from bench.results import Options, Row, failed
from bench.suites.workload import STANDARD, Cell, Workload

MATRIX_PEERS = ("R1", "R4")
"""Who is compared with away from the standard configuration, too."""


def cells(options: Options, wide: Sequence[Cell], narrow: Sequence[Cell]) -> list[Cell]:
    """The standard configuration, and unless it is the tour or a test `wide`, of models as wide as the published ones, or
    `narrow`."""
    if options.tour or options.quick:
        return [STANDARD]
    return [STANDARD, *(wide if Model(options.model, options.device).config["dim"] >= WIDE else narrow)]


class Measurement:
    """One case: `kind`, which is "lora" or "full", in the configuration `cell`. peers: empty for those of the options, without
    R3 in the tour, whose compilation takes longest, and beside the standard configuration MATRIX_PEERS only. A suite says
    what is exact, how a variant is made and checked, and what is timed; `alone` are the peers that do not fit beside ours, and
    `error` is the metric that is lost, with the reason, where the exact result cannot be computed."""

    suite, seconds, ratio, error = "", "seconds_per_step", "speedup", ""
    alone: Sequence[str] = ()
    find_exact: Callable[[torch.dtype], None]
    """Computes in that dtype what `check` compares with."""
    make: Callable[[str], Any]
    check: Callable[[str, Any], Exact]
    """Runs a variant for the first time; its errors."""
    time: Callable[[], Iterator[Row]]
    """Rows of what is in `contest.alive`, timed in turns."""

    def __init__(self, kind: str, options: Options, cell: Cell = STANDARD, peers: Sequence[str] = ()) -> None:
        self.kind, self.options, self.cell, self.remark = kind, options, cell, ""
        self.one_by_one = options.device.type == "cuda"
        self.peers = list(peers) or [name for name in options.peers if cell == STANDARD or name in MATRIX_PEERS]
        if options.tour and "R3" in self.peers:
            self.peers.remove("R3")
            self.remark = f"R3 is measured by `bench/run.py {self.suite}`"

    def workload(self) -> Workload:
        return Workload(self.options, self.cell)

    def rows(self) -> Iterator[Row]:
        """All rows of the case. UserError: the model is none that can be measured."""
        new_compiler()
        self.work = self.workload()
        self.work.forget_encoders()
        self.contest = Contest(self.suite, f"{self.kind}{{}}{self.work.suffix}", self.options, self.seconds, self.ratio)
        self.contest.peers, self.contest.remarks["ours"] = self.peers, self.remark
        say(f"{self.suite}: {self.contest.place()}, what is exact")
        dtype = exact_dtype(self.work.model.dtype)
        try:
            with exactly(dtype):
                self.find_exact(dtype)
        except Exception as error:
            yield failed(self.suite, self.contest.place(), "exact", self.error, "", error)
        yield from self.build("ours")
        beside = [name for name in self.peers if name not in self.alone]
        for names in [[name] for name in beside] if self.one_by_one and beside else [beside]:
            yield from self.group(names)
        self.contest.forget()
        for name in self.alone:
            yield from self.group([name])

    def build(self, name: str) -> Iterator[Row]:
        yield from self.contest.build(name, partial(self.make, name), partial(self.check, name))

    def group(self, names: Sequence[str]) -> Iterator[Row]:
        """The peers `names`, in turns with ours where that is alive."""
        for name in names:
            yield from self.build(name)
        if self.contest.alive:
            yield from self.time()
        for name in names:
            self.contest.alive.pop(name, None)
        self.work.forget_encoders()
        free(self.options.device)
