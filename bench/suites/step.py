"""Suite `step`: a whole training step, ours against the published one and its stronger variants, in one process.

Same weights, noise, prompts and pictures for all; every step holds the K states, clipping, AdamW, the EMA and the
teacher's refresh. R1 runs its encoders in every step, the others have the conditions computed once. Rows of a case, "lora"
or "full" with "@" and what differs from the standard configuration (`WIDE`, `NARROW`):

    each       seconds_per_step, states_per_second (K * batch / seconds), flops_per_second, mfu, on a GPU peak_bytes: all that
               it holds and allocates, R1 with its encoders
    each       gradient_relative_error: of the whole gradient, against float64 (for bf16 models against fp32 without TF32)
    CASE/PEER  ours: speedup, the peer's seconds over ours, round by round where both fit the device

flops are those of the step's matrix products, to which recomputation does not add (products.py), and mfu is their share of a
large product's speed in this run. On a GPU `room` says how deep a model is trained in full and who is measured beside ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bench.harness import Exact, Seconds, exact_note, gradient_error
from bench.machine import ceilings
from bench.results import Options, Row
from bench.suites import room
from bench.suites.measurement import Measurement, cells
from bench.suites.products import Products
from bench.suites.workload import STANDARD, Cell, OurStep, PeerStep, Workload

POLICIES = [Cell(activations="selective"), Cell(activations="recompute"), Cell(states=8)]
WIDE = [*POLICIES, Cell(batch=4), Cell(pixels=512), Cell(pixels=512, batch=4)]
NARROW = [*POLICIES, Cell(batch=1), Cell(batch=4)]
"""Beside the standard configuration: other batches and pictures by the model's width."""


def measure(options: Options) -> Iterator[Row]:
    for cell in cells(options, WIDE, NARROW):
        for kind in options.kinds:
            yield from Step(kind, options, cell).rows()


class Step(Measurement):
    suite, error = "step", "gradient_relative_error"

    def workload(self) -> Workload:
        work = super().workload()
        self.room = room.Room(self.kind, work)
        if self.room.layers != self.cell.layers:
            self.cell = replace(self.cell, layers=self.room.layers)
            return self.workload()
        if self.room.masters != "fp32":
            self.remark = "; ".join(filter(None, (self.remark, f"masters={self.room.masters}")))
        self.alone = [name for name in self.peers if not self.room.beside_ours(name)]
        self.exact: dict[str, Tensor] = {}
        self.peaks: dict[str, int] = {}
        self.flops = 0.0
        self.ours: Sequence[float] = ()
        return work

    def find_exact(self, dtype: torch.dtype) -> None:
        """The exact gradient, kept on the CPU, and the products of the step."""
        work, step = self.work, PeerStep("R2", self.kind, self.work, dtype)
        reference = step.reference
        with Products() as products:
            reference.student_prediction(step.noise, reference.sigmas[1], work.student)
            reference.teacher_prediction(step.noise, reference.sigmas[1], work.teacher)
        self.flops = float(work.states * products.flops)
        reference.per_state = True  # the same gradient, one graph at a time
        step.backward()
        self.exact = {name: gradient.to("cpu") for name, gradient in step.gradients().items()}

    def make(self, name: str) -> Any:
        self.before = torch.cuda.memory_allocated(self.options.device) if self.options.device.type == "cuda" else 0
        if name == "ours":
            return OurStep(self.kind, self.work, self.cell.activations, self.room.masters)
        return PeerStep(name, self.kind, self.work)

    def check(self, name: str, one: Any) -> Exact:
        """Its gradient's error; then the first whole step, which makes the optimizer's state, and on a GPU the peak of a
        second one."""
        errors, device = {}, self.options.device
        if self.exact:
            one.backward()
            errors[self.error] = gradient_error(one.gradients(), self.exact), exact_note(self.work.model.dtype)
            one.clear()
        one.step()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            one.step()
            self.peaks[name] = torch.cuda.max_memory_allocated(device) - self.before
        return errors

    def time(self) -> Iterator[Row]:
        calls = {name: one.step for name, one in self.contest.alive.items()}
        usual, tour = 20 if self.cell == STANDARD else 8, 5 if self.one_by_one else 3
        yield from self.contest.time(calls, self.tabulate, usual, tour)

    def tabulate(self, found: Seconds) -> Iterator[Row]:
        amounts = {"states_per_second": ("1/s", float(self.work.states * self.work.batch))}
        if self.flops:
            ceiling = ceilings(self.options.device, self.work.model.dtype, self.options.quick).flops_per_second
            amounts |= {"flops_per_second": ("FLOP/s", self.flops), "mfu": ("", self.flops / ceiling)}
        yield from self.contest.speeds(found, amounts)
        for name in found.keys() & self.peaks.keys():
            yield self.contest.row(name, "peak_bytes", "B", self.peaks[name])
        self.ours = found.get("ours", self.ours)
        for name in found if self.ours and "ours" not in found else ():
            both = [theirs / ours for theirs, ours in zip(found[name], self.ours)]  # of as many rounds as both have
            yield self.contest.row("ours", "speedup", "x", both, "measured one after the other: both do not fit", name)
