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

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bench.clock import interleaved, ratios, summary
from bench.live import say
from bench.machine import ceilings
from bench.models import WIDE, Model
from bench.references.float64 import wide
from bench.references.reference_eager import STRONGER
from bench.results import Options, Row, Status, failed
from bench.suites import room
from bench.suites.gemm_floor import GemmFloor
from bench.suites.workload import Cell, OurStep, PeerStep, Workload, peer, runner, stock_name
from dopsd_fast.errors import UserError

__all__ = ["MATRIX", "Cell", "Measurement", "OurStep", "PeerStep", "Workload", "cells", "measure", "peer", "run", "runner"]

SUITE = "step"
POLICIES = [Cell(activations="selective"), Cell(activations="recompute"), Cell(states=8)]
MATRIX = {
    "wide": [*POLICIES, Cell(batch=4), Cell(pixels=512), Cell(pixels=512, batch=4)],
    "small": [*POLICIES, Cell(batch=1), Cell(batch=4), Cell(pixels=-2)],
}
"""Beside the standard case, by whether the model is as wide as the published ones. pixels=-2: half the standard side."""
MATRIX_PEERS = ("R1", "R4")
NOMINAL = {torch.bfloat16: 989e12}
"""FLOP/s that NVIDIA states for an H100 or H200, dense."""
LEFT_TO_SUITE = "R3 is measured by `bench/run.py step`"


def run(options: Options) -> list[Row]:
    return list(measure(options, cells(options)))


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
    options: Options, which: Sequence[Cell], peers: Sequence[str] = (), deadline: float | None = None, exact: bool = True
) -> Iterator[Row]:
    """Rows as they are found. peers: empty for options.peers, of which the cells beside the standard one have MATRIX_PEERS.
    deadline: of time.monotonic(); what would begin after it is left out, with a row that says so. exact=False spares the exact
    gradient, and with it the errors and the floor: what is left are times, ratios and peaks of memory."""
    torch.set_num_threads(options.threads)
    for cell in which:
        for kind in options.kinds:
            ours = [name for name in peers or options.peers if peers or cell == Cell() or name in MATRIX_PEERS]
            note = ""
            if options.tour and not peers and "R3" in ours:
                ours.remove("R3")
                note = LEFT_TO_SUITE
            try:
                yield from Measurement(kind, cell, options, ours, deadline, note, exact).rows()
            except UserError as error:  # a size that this model cannot have
                if cell == Cell():
                    raise
                yield failed(SUITE, f"{kind}{cell.name}", "ours", "seconds_per_step", "s", error)


class Measurement:
    """One case: `kind` is "lora" or "full". note: said of ours' time."""

    def __init__(self, kind: str, cell: Cell, options: Options, peers: Sequence[str], deadline: float | None = None,
                 note: str = "", exact: bool = True) -> None:  # fmt: skip
        self.kind, self.cell, self.options, self.peers, self.deadline = kind, cell, options, list(peers), deadline
        self.standard = cell == Cell()
        self.remark, self.wants_exact = note, exact
        self.room: room.Room
        self.errors: dict[str, tuple[float, float]] = {}
        self.exact: dict[str, Tensor] = {}
        self.exact_note = ""
        self.notes: dict[str, str] = {}
        self.peaks: dict[str, int] = {}
        self.seconds: dict[str, list[float]] = {}
        self.floor: GemmFloor | None = None

    @property
    def cuda(self) -> bool:
        return self.options.device.type == "cuda"

    def case(self, name: str = "") -> str:
        return f"{self.kind}{name and '/' + name}{self.work.suffix}"

    def rows(self) -> Iterator[Row]:
        """All rows of the case. UserError: the model is none that can be measured."""
        torch._dynamo.reset()
        torch._dynamo.config.recompile_limit = 64  # one graph per length, branch and mode; all blocks share the code
        self.work = Workload(self.options, self.cell)
        self.work.forget_encoders()
        self.room = room.Room(self.kind, self.work, self.peers)
        if self.room.layers != self.cell.layers:
            self.cell = replace(self.cell, layers=self.room.layers)
            self.work = Workload(self.options, self.cell)
            self.room = room.Room(self.kind, self.work, self.peers)
        if self.wants_exact:
            yield from self.prepare()
        alone = [name for name in self.peers if not self.room.beside_ours(name)]
        together = [name for name in self.peers if name not in alone]
        groups = [together] if self.room.all_together else [[name] for name in together]
        yield from self.measure_with_ours(groups or [[]], alone)
        for name in alone:
            yield from self.group([name])
        self.exact.clear()
        self.free()

    # ---- the exact gradient and the floor ----------------------------------------------------------------------------

    def prepare(self) -> Iterator[Row]:
        """The exact gradient and the floor, or why there is none."""
        say(f"step: {self.case()}, the exact gradient")
        try:
            if not self.room.exact_fits:
                raise MemoryError(f"the exact gradient does not fit this device: see {self.kind}@2layers")
            self.find_exact(torch.float64 if self.work.model.dtype == torch.float32 else torch.float32)
        except Exception as error:
            for metric in ("gradient_relative_error", "gradient_one_minus_cosine"):
                yield failed(SUITE, self.case(), "ours", metric, "", error)
        self.free()
        if not self.room.exact_fits and self.work.model.random and self.cell.layers != 2:
            yield from ErrorsOnly(self.kind, replace(self.cell, layers=2), self.options, self.peers, self.deadline).rows()

    def find_exact(self, dtype: torch.dtype) -> None:
        """The exact gradient, kept on the CPU, and the products of the step."""
        self.exact_note = "against fp32 without TF32" if dtype == torch.float32 else ""
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
            yield from self.time({"floor": self.floor.run}, {})
            self.floor.free()
            self.free()

    @property
    def floor_is_alone(self) -> bool:
        return self.cuda

    # ---- groups ------------------------------------------------------------------------------------------------------

    def measure_with_ours(self, groups: Sequence[Sequence[str]], alone: Sequence[str]) -> Iterator[Row]:
        """The floor if it is timed alone, then ours beside each group of peers in turn, the first group with the floor else."""
        yield from self.floor_alone()
        alive: dict[str, Any] = {}
        try:
            yield from self.build("ours", alive)
            for number, group in enumerate(groups):
                yield from self.group(group, alive, with_floor=number == 0)
        finally:
            for one in alive.values():
                one.close()
            alive.clear()
            self.free()

    def group(self, names: Sequence[str], ours: Mapping[str, Any] = {}, with_floor: bool = False) -> Iterator[Row]:
        """Rows of the peers `names`, measured in turns with what is alive of ours, and of ours where it has none yet."""
        alive: dict[str, Any] = {}
        for name in names:
            yield from self.build(name, alive)
        calls: dict[str, Callable[[], Any]] = {name: one.step for name, one in {**ours, **alive}.items()}
        if "R1" in alive:
            prompts, images = self.work.prompts, self.work.images
            encoders = self.work.encoders
            calls["encoders"] = lambda: (encoders.student(prompts), encoders.teacher(prompts, images))
        if with_floor and self.floor is not None and ours and not self.floor_is_alone:
            calls["floor"] = self.floor.run
        if set(calls) - {"encoders"}:
            yield from self.time(calls, alive)
        for one in alive.values():
            one.close()
        alive.clear()
        calls.clear()
        if self.floor is not None:
            self.floor.free()
        self.work.forget_encoders()
        self.free()

    def time(self, calls: Mapping[str, Callable[[], Any]], peers: Mapping[str, Any]) -> Iterator[Row]:
        """In turns; where that fails, for want of memory mostly, one after the other."""
        say(f"step: {self.case()}, timing {', '.join(calls)}")
        before, note = set(self.seconds), ""
        found: dict[str, list[float]] = {}
        try:
            found = self.interleaved(calls)
        except Exception as error:
            note = f"measured one after the other: {failed(SUITE, '', '', '', '', error).note}"
        for name, call in calls.items() if note else ():
            self.free()
            try:
                found |= self.interleaved({name: call})
            except Exception as error:
                yield from self.lost(name, error)
        self.seconds = {**found, **self.seconds}  # ours as first measured
        yield from self.tabulate([name for name in found if name not in before])
        for name in peers:
            if name in found and "ours" in self.seconds:
                beside = found.get("ours", self.seconds["ours"])
                if "ours" not in calls:
                    note = "measured one after the other: both do not fit"
                yield self.row("ours", "speedup", "x", ratios(found[name], beside), self.case(name), note)

    def interleaved(self, calls: Mapping[str, Callable[[], Any]]) -> dict[str, list[float]]:
        rounds = self.options.repeats(20 if self.standard else 8, 5 if self.cuda else 3)
        warmup = 1 if self.options.quick or self.options.tour else 5 if self.cuda else 3
        return interleaved(calls, rounds, warmup, self.options.device, self.options.clock)

    def build(self, name: str, alive: dict[str, Any]) -> Iterator[Row]:
        """Puts a variant that has made its first steps into `alive`, or says why not."""
        if self.deadline is not None and time.monotonic() > self.deadline:
            yield from self.lost(name, "left out: the time was up")
            return
        compiled = bool(name != "ours" and STRONGER[name].get("compile_blocks"))
        say(f"step: {self.case()}, {'compiling' if compiled else 'building'} {name}")
        device = self.options.device
        self.free()
        before = torch.cuda.memory_allocated(device) if self.cuda else 0
        one: Any = None
        note = ""
        try:
            torch._dynamo.utils.counters.clear()
            if name == "ours":
                one = OurStep(self.kind, self.work, self.cell.activations, self.room.masters)
            else:
                one = PeerStep(name, self.kind, self.work)
            if self.exact:
                one.backward()
                self.errors[name] = compare(one.gradients(), self.exact)
                one.clear()
            self.after_errors(one)
            if self.cuda:
                torch.cuda.reset_peak_memory_stats(device)
                one.step()
                self.peaks[name] = torch.cuda.max_memory_allocated(device) - before
            note = compiled_in_part() if compiled else one.fell_back()
        except Skip:
            yield from self.error_rows(name)
            one.close()
            one = None
        except Exception as error:
            yield from self.lost(name, error)
            one = None
        if one is None:
            self.free()
            return
        self.notes[name] = note
        alive[name] = one

    def after_errors(self, one: Any) -> None:
        """The first whole step, which makes the optimizer's state."""
        one.step()

    def lost(self, name: str, error: BaseException | str) -> Iterator[Row]:
        yield failed(SUITE, self.case(), name, "seconds_per_step", "s", error)
        if name in self.peers:
            yield failed(SUITE, self.case(name), "ours", "speedup", "x", error)

    def free(self) -> None:
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()

    # ---- rows --------------------------------------------------------------------------------------------------------

    def row(self, variant: str, metric: str, unit: str, values: Sequence[float] | float, case: str = "", note: str = "") -> Row:
        """Status and note say what the variant fell back to. A number that is not finite is a failure."""
        fallback = self.notes.get(variant, "")
        status: Status = "fallback" if fallback else "ok"
        said = "; ".join(filter(None, (fallback, note)))
        numbers: list[float] = [values] if isinstance(values, float | int) else list(values)
        if not all(map(math.isfinite, numbers)):
            return failed(SUITE, case or self.case(), variant, metric, unit, "; ".join(filter(None, ("not finite", said))))
        if isinstance(values, float | int):
            return Row(SUITE, case or self.case(), variant, metric, values, unit, status=status, note=said)
        return Row(SUITE, case or self.case(), variant, metric, unit=unit, status=status, note=said, **summary(numbers))

    def tabulate(self, names: Sequence[str]) -> Iterator[Row]:
        """Rows of the variants `names`, as far as they have been measured; no ratios."""
        states, batch = self.work.states, self.work.batch
        for name in names:
            seconds = self.seconds[name]
            note = self.remark if name == "ours" else ""
            if name == "ours" and self.room.masters != "fp32":
                note = "; ".join(filter(None, (note, f"masters={self.room.masters}")))
            yield self.row(name, "seconds_per_step", "s", seconds, note=note)
            if name not in ("floor", "encoders"):
                yield self.row(name, "states_per_second", "1/s", [states * batch / s for s in seconds])
                yield self.row(name, "samples_per_second", "1/s", [batch / s for s in seconds])
            if name != "encoders" and self.floor is not None:
                yield from self.speeds(name, seconds, self.floor.flops)
            if name in self.peaks:
                yield self.row(name, "peak_bytes", "B", self.peaks[name])
            yield from self.error_rows(name)
        if "floor" in names and self.floor is not None:
            yield self.row("floor", "gemm_gflop_per_step", "GFLOP", self.floor.flops / 1e9)
        for name, against in (("floor", "ours"), ("encoders", "R1")):
            if {name, against} & set(names) and {name, against} <= set(self.seconds):
                note = "" if {name, against} <= set(names) else "measured one after the other"
                share = ratios(self.seconds[name], self.seconds[against])
                yield self.row(against, f"{name}_share", "", share, note=note)

    def speeds(self, name: str, seconds: Sequence[float], flops: int) -> Iterator[Row]:
        dtype, device = self.work.model.dtype, self.options.device
        rates = [flops / s for s in seconds]
        ceiling = ceilings(device, dtype, self.options.quick).flops_per_second
        yield self.row(name, "flops_per_second", "FLOP/s", rates)
        yield self.row(name, "mfu", "", [rate / ceiling for rate in rates])
        if self.cuda and dtype in NOMINAL and any(card in torch.cuda.get_device_name(device) for card in ("H100", "H200")):
            yield self.row(name, "mfu_nominal", "", [rate / NOMINAL[dtype] for rate in rates])

    def error_rows(self, name: str) -> Iterator[Row]:
        if name in self.errors:
            flaw, error = self.errors[name]
            yield self.row(name, "gradient_one_minus_cosine", "", flaw, note=self.exact_note)
            yield self.row(name, "gradient_relative_error", "", error, note=self.exact_note)


class Skip(Exception):
    """Nothing more is wanted of a variant."""


class ErrorsOnly(Measurement):
    """The gradients' errors where the standard depth leaves no room for the exact one: at less depth."""

    def after_errors(self, one: Any) -> None:
        raise Skip

    def measure_with_ours(self, groups: Sequence[Sequence[str]], alone: Sequence[str]) -> Iterator[Row]:
        for name in ("ours", *(name for group in groups for name in group)):
            yield from self.build(name, {})

    def group(self, names: Sequence[str], ours: Mapping[str, Any] = {}, with_floor: bool = False) -> Iterator[Row]:
        for name in names:
            yield from self.build(name, {})


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


def compare(gradients: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> tuple[float, float]:
    """(1 - cosine, relative error) of the whole gradient against the exact one; a tensor without gradient counts as zero."""
    sums = torch.zeros(4, dtype=torch.float64)
    for name, true in exact.items():
        if name in gradients:
            value = gradients[name].double()
            true = true.to(value.device).double()
            parts = [(value * true).sum(), value.square().sum(), true.square().sum(), (value - true).square().sum()]
            sums += torch.stack(parts).cpu()
        else:
            size = true.double().square().sum()
            sums[2:] += size
    dot, squares, exact_squares, difference = sums.tolist()
    if not squares or not exact_squares:
        return math.nan, math.nan
    return 1.0 - dot / (squares * exact_squares) ** 0.5, (difference / exact_squares) ** 0.5


def compiled_in_part() -> str:
    """What torch.compile did not compile since its counters were cleared, in one line; empty: nothing."""
    counters = torch._dynamo.utils.counters
    if counters["graph_break"]:
        reason = " ".join(str(next(iter(counters["graph_break"]))).split())
        return f"torch.compile broke the graph: {reason[:120]}"
    frames = counters["frames"]
    if not frames["ok"]:
        return "torch.compile compiled nothing"
    if frames["total"] > frames["ok"]:
        return f"torch.compile gave up on {frames['total'] - frames['ok']} of {frames['total']} frames"
    return ""
