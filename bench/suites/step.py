"""Suite `step`: a whole training step, ours against the published one and its stronger variants, in one process.

Same weights, noise, prompts and pictures for all; every step holds the K states, clipping, AdamW, the EMA and the
teacher's refresh. R1 runs its encoders in every step, the others have the conditions computed once. Rows of a case, "lora"
or "full" with "@" and what differs from the standard configuration (`MATRIX`, and bench/suites/workload.py):

    each       seconds_per_step, states_per_second (K * batch / seconds), samples_per_second, flops_per_second, mfu, on an H100
               or H200 mfu_nominal, on a GPU peak_bytes: all that it holds and allocates, R1 with its encoders
    each       gradient_relative_error, gradient_one_minus_cosine: of the whole gradient against the exact one
    floor      seconds_per_step, gemm_gflop_per_step: the step's matrix products alone (bench/suites/gemm_floor.py)
    ours, R1   floor_share, encoders_share: of their seconds
    CASE/PEER  ours: speedup, the peer's seconds over ours, round by round where both fit the device

flops are the floor's, which recomputation does not add to, and mfu is their share of a large product's speed in this run. The
exact gradient is float64's for fp32 models, fp32's (no TF32) for bf16 ones. On a GPU `room` says what is measured together and
how deep a model is trained in full; of what does not fit, a row says so.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.clock import ratios
from bench.harness import Contest, Seconds, compare, exact_dtype, exact_note, exactly, free, new_compiler
from bench.live import say
from bench.machine import ceilings
from bench.models import WIDE, Model
from bench.results import Options, Row, failed
from bench.suites import room
from bench.suites.gemm_floor import GemmFloor
from bench.suites.workload import MATRIX_PEERS, Cell, OurStep, PeerStep, Workload, asked_peers, peer, stock_name
from dopsd_fast.errors import UserError

SUITE = "step"
POLICIES = [Cell(activations="selective"), Cell(activations="recompute"), Cell(states=8)]
MATRIX = {
    "wide": [*POLICIES, Cell(batch=4), Cell(pixels=512), Cell(pixels=512, batch=4)],
    "small": [*POLICIES, Cell(batch=1), Cell(batch=4), Cell(pixels=-2)],
}
"""Beside the standard case, by whether the model is as wide as the published ones. pixels=-2: half the standard side."""
NOMINAL = {torch.bfloat16: 989e12}
"""FLOP/s that NVIDIA states for an H100 or H200, dense."""


def cells(options: Options) -> list[Cell]:
    """The standard case, and in the default mode the matrix."""
    if options.tour or options.quick:
        return [Cell()]
    model = Model(options.model, options.device)
    pixels, multiple = model.standard.pixels, model.family.pixel_multiple
    half = replace(Cell(), pixels=max(multiple, pixels // 2 // multiple * multiple))
    found = MATRIX["wide" if model.config["dim"] >= WIDE else "small"]
    return [Cell(), *(half if cell.pixels == -2 else cell for cell in found)]


def measure(
    options: Options, which: Sequence[Cell] = (), peers: Sequence[str] = (), deadline: float | None = None, exact: bool = True
) -> Iterator[Row]:
    """Rows as they are found. which: empty for `cells`. peers: empty for options.peers, of which the cells beside the standard
    one have MATRIX_PEERS. deadline: of time.monotonic(); what would begin after it is left out, with a row that says so.
    exact=False spares the exact gradient, and with it the errors and the floor: what is left are times, ratios and peaks of
    memory."""
    for cell in which or cells(options):
        for kind in options.kinds:
            asked, remark = (list(peers), "") if peers else asked_peers(options, SUITE)
            if not peers and cell != Cell():
                asked = [name for name in asked if name in MATRIX_PEERS]
            try:
                yield from Measurement(kind, cell, options, asked, deadline, remark, exact).rows()
            except UserError as error:  # a size that this model cannot have
                if cell == Cell():
                    raise
                yield failed(SUITE, f"{kind}{cell.name}", "ours", "seconds_per_step", "s", error)


class Measurement:
    """One case: `kind` is "lora" or "full". note: said of ours' time."""

    def __init__(self, kind: str, cell: Cell, options: Options, peers: Sequence[str], deadline: float | None = None,
                 note: str = "", exact: bool = True) -> None:
        self.kind, self.cell, self.options, self.peers, self.deadline = kind, cell, options, list(peers), deadline
        self.standard, self.remark, self.wants_exact = cell == Cell(), note, exact
        self.exact: dict[str, Tensor] = {}
        self.peaks: dict[str, int] = {}
        self.seconds: dict[str, Sequence[float]] = {}
        self.floor: GemmFloor | None = None
        self.errors_only = False
        self.cuda = options.device.type == "cuda"

    def rows(self) -> Iterator[Row]:
        """All rows of the case. UserError: the model is none that can be measured."""
        new_compiler()
        self.work = Workload(self.options, self.cell)
        self.work.forget_encoders()
        self.room = room.Room(self.kind, self.work, self.peers)
        if self.room.layers != self.cell.layers:
            self.cell = replace(self.cell, layers=self.room.layers)
            self.work = Workload(self.options, self.cell)
            self.room = room.Room(self.kind, self.work, self.peers)
        self.contest = Contest(SUITE, f"{self.kind}{{}}{self.work.suffix}", self.options)
        masters = "" if self.room.masters == "fp32" else f"masters={self.room.masters}"
        self.contest.remarks["ours"] = "; ".join(filter(None, (self.remark, masters)))
        if self.wants_exact:
            yield from self.prepare()
        if self.errors_only:
            for name in ("ours", *self.peers):
                yield from self.build(name)
                self.contest.forget()
            return
        alone = [name for name in self.peers if not self.room.beside_ours(name)]
        together = [name for name in self.peers if name not in alone]
        groups = [together] if self.room.all_together else [[name] for name in together]
        yield from self.floor_alone()
        yield from self.build("ours")
        for number, names in enumerate(groups or [[]]):
            yield from self.group(names, with_floor=number == 0)
        self.contest.forget()
        for name in alone:
            yield from self.group([name])
        self.exact.clear()
        free(self.options.device)

    # ---- the exact gradient and the floor ----------------------------------------------------------------------------

    def prepare(self) -> Iterator[Row]:
        """The exact gradient and the floor, or why there is none."""
        say(f"{SUITE}: {self.contest.place()}, the exact gradient")
        try:
            if not self.room.exact_fits:
                raise MemoryError(f"the exact gradient does not fit this device: see {self.kind}@2layers")
            self.find_exact(exact_dtype(self.work.model.dtype))
        except Exception as error:
            for metric in ("gradient_relative_error", "gradient_one_minus_cosine"):
                yield failed(SUITE, self.contest.place(), "ours", metric, "", error)
        free(self.options.device)
        if not self.room.exact_fits and self.work.model.random and self.cell.layers != 2:
            shallow = Measurement(self.kind, replace(self.cell, layers=2), self.options, self.peers, self.deadline)
            shallow.errors_only = True
            yield from shallow.rows()

    def find_exact(self, dtype: torch.dtype) -> None:
        """The exact gradient, kept on the CPU, and the products of the step."""
        noise = self.work.noise.to(dtype)
        with exactly(dtype):
            step = peer("R2", self.kind, self.work, dtype)

            def forward() -> None:
                step.student_prediction(noise, step.sigmas[1], self.work.student)
                step.teacher_prediction(noise, step.sigmas[1], self.work.teacher)

            self.floor = GemmFloor(forward, self.work.states, self.options.device, self.work.model.dtype)
            step.per_state = True  # the same gradient, one graph at a time
            step.backward(noise, self.work.student, self.work.teacher)
        found = step.trainable.items()
        self.exact = {stock_name(name): p.grad.to("cpu") for name, p in found if p.grad is not None}

    def floor_alone(self) -> Iterator[Row]:
        """On a GPU the floor is timed before ours and the peers are built: its operands, 16.3 GB at Z-Image's size, are freed
        before anything else is measured. On a CPU, where memory is no concern, it takes turns with ours (`group`)."""
        if self.floor is not None and self.floor_is_alone:
            yield from self.time({"floor": self.floor.run})
            self.floor.free()
            free(self.options.device)

    @property
    def floor_is_alone(self) -> bool:
        return self.cuda

    # ---- groups ------------------------------------------------------------------------------------------------------

    def group(self, names: Sequence[str], with_floor: bool = False) -> Iterator[Row]:
        """Rows of the peers `names`, measured in turns with ours where that is alive, and of ours where it has none yet."""
        for name in names:
            yield from self.build(name)
        alive = self.contest.alive
        calls: dict[str, Callable[[], Any]] = {name: one.step for name, one in alive.items()}
        if "R1" in alive:
            prompts, images = self.work.prompts, self.work.images
            encoders = self.work.encoders
            calls["encoders"] = lambda: (encoders.student(prompts), encoders.teacher(prompts, images))
        if with_floor and self.floor is not None and "ours" in alive and not self.floor_is_alone:
            calls["floor"] = self.floor.run
        if set(calls) - {"encoders"}:
            yield from self.time(calls)
        calls.clear()
        for name in names:
            alive.pop(name, None)
        if self.floor is not None:
            self.floor.free()
        self.work.forget_encoders()
        free(self.options.device)

    def time(self, calls: Mapping[str, Callable[[], Any]]) -> Iterator[Row]:
        usual, tour = 20 if self.standard else 8, 5 if self.cuda else 3
        warmup = 0 if self.options.quick or self.options.tour else 4 if self.cuda else 2  # beside the call that tries it
        yield from self.contest.time(calls, self.tabulate, usual, tour, warmup)

    def build(self, name: str) -> Iterator[Row]:
        """Puts a variant that has made its first steps among those that are alive, or says why not."""
        if self.deadline is not None and time.monotonic() > self.deadline:
            yield from self.contest.lost(name, "left out: the time was up")
            return
        free(self.options.device)
        before = torch.cuda.memory_allocated(self.options.device) if self.cuda else 0
        make: Callable[[], Any] = partial(PeerStep, name, self.kind, self.work)
        if name == "ours":
            make = partial(OurStep, self.kind, self.work, self.cell.activations, self.room.masters)
        yield from self.contest.build(name, make, partial(self.check, name, before))

    def check(self, name: str, before: int, one: Any) -> dict[str, tuple[float, str]]:
        """Its gradient's errors; then the first whole step, which makes the optimizer's state, and on a GPU the peak of a
        second one."""
        errors: dict[str, tuple[float, str]] = {}
        if self.exact:
            one.backward()
            flaw, error = compare(one.gradients(), self.exact)
            one.clear()
            note = exact_note(self.work.model.dtype)
            errors = {"gradient_one_minus_cosine": (flaw, note), "gradient_relative_error": (error, note)}
        if self.errors_only:
            return errors
        one.step()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats(self.options.device)
            one.step()
            self.peaks[name] = torch.cuda.max_memory_allocated(self.options.device) - before
        return errors

    # ---- rows --------------------------------------------------------------------------------------------------------

    def tabulate(self, found: Seconds) -> Iterator[Row]:
        """Rows of the variants that were timed together; ratios to ours and shares of it also where that was timed before."""
        row, states, batch = self.contest.row, self.work.states, self.work.batch
        beside = found.get("ours", self.seconds.get("ours", ()))
        for name, seconds in found.items():
            yield row(name, "seconds_per_step", "s", seconds, self.contest.remarks.get(name, ""))
            if name not in ("floor", "encoders"):
                yield row(name, "states_per_second", "1/s", [states * batch / s for s in seconds])
                yield row(name, "samples_per_second", "1/s", [batch / s for s in seconds])
            if name != "encoders" and self.floor is not None:
                yield from self.speeds(name, seconds, self.floor.flops)
            if name in self.peaks:
                yield row(name, "peak_bytes", "B", self.peaks[name])
            if name in self.peers and beside:
                note = "" if "ours" in found else "measured one after the other: both do not fit"
                yield row("ours", "speedup", "x", ratios(*even(seconds, beside)), note, name)
        if "floor" in found and self.floor is not None:
            yield row("floor", "gemm_gflop_per_step", "GFLOP", self.floor.flops / 1e9)
        self.seconds = {**self.seconds, **found}
        for name, against in (("floor", "ours"), ("encoders", "R1")):
            if {name, against} & set(found) and {name, against} <= set(self.seconds):
                note = "" if {name, against} <= set(found) else "measured one after the other"
                share = ratios(*even(self.seconds[name], self.seconds[against]))
                yield row(against, f"{name}_share", "", share, note)

    def speeds(self, name: str, seconds: Sequence[float], flops: int) -> Iterator[Row]:
        dtype, device, row = self.work.model.dtype, self.options.device, self.contest.row
        rates = [flops / s for s in seconds]
        ceiling = ceilings(device, dtype, self.options.quick).flops_per_second
        yield row(name, "flops_per_second", "FLOP/s", rates)
        yield row(name, "mfu", "", [rate / ceiling for rate in rates])
        if self.cuda and dtype in NOMINAL and any(card in torch.cuda.get_device_name(device) for card in ("H100", "H200")):
            yield row(name, "mfu_nominal", "", [rate / NOMINAL[dtype] for rate in rates])


def even(some: Sequence[float], others: Sequence[float]) -> tuple[Sequence[float], Sequence[float]]:
    """As many of both: a timing that goes on has fewer rounds than one that has ended."""
    count = min(len(some), len(others))
    return some[:count], others[:count]
