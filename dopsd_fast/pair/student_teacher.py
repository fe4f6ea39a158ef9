"""The student and its teacher as one module. Full fine-tuning holds two transformers; LoRA holds one, with an adapter each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dopsd_fast.conditioning.context import Context
from dopsd_fast.method.objective import Forward
from dopsd_fast.pair.contract import PairForward
from dopsd_fast.pair.lora import adapter_layers
from dopsd_fast.pair.passes import FusedForward, Turns, TwoCalls
from dopsd_fast.pair.units import Branch

STUDENT, TEACHER = "student", "teacher"

Sampler = Callable[[Tensor, Tensor], Tensor]
"""(x `[B, C, h, w]`, t `[B]`) -> v, shaped as x."""

Velocity = Callable[[nn.Module, Tensor, Tensor, Sequence[Context]], Tensor]
"""(transformer, x `[B, C, h, w]`, t `[B]`, one context per item) -> v, shaped as x, as `families.base.Family.velocity`."""

Velocities = TypeVar("Velocities")
"""What a call for velocities gives: one tensor, or one a branch."""


@dataclass(frozen=True)
class Trained:
    """One tensor that training changes, and the teacher's tensor of the same name, which is None where there is none.

    `name` is diffusers' own. PEFT puts the adapter's name inside an adapter's name, and `name` leaves it out."""

    name: str
    student: Any  # nn.Parameter; Any because DeepSpeed hangs its own attributes on it
    teacher: Any


class Pair(nn.Module):
    """The student and the teacher. They share one module because ZeRO-3 partitions the parameters of the module that it is
    given, and the teacher's frozen weights need partitioning too.

    Where the teacher's weights are depends on `adapter.kind` and on `teacher.kind`:

             teacher.kind=ema or frozen               teacher.kind=student
        full  `teacher`, a second transformer          in `student` itself: its live weights, run without gradient
        LoRA  adapter "teacher" inside `student`       in `student` itself: its adapter "student", run without gradient

    student: the transformer that trains.
    teacher: a frozen transformer of the same class, or None (see the table).
    velocity: one transformer's forward in the family's convention.
    lora_config: PEFT's LoraConfig; None for full fine-tuning.
    fused: the family's pair forward, which runs both branches at once. Where it is None, each branch runs by itself through
        `velocity`.
    gather: how ZeRO-3 holds the weights (see `distributed.fetching`). The engine sets it; None means that they are whole.
    sweep: `Fetcher.sweep` of the engine, set where gather is "sweep".
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        velocity: Velocity,
        lora_config: Any = None,
        fused: PairForward | None = None,
    ) -> None:
        super().__init__()
        self.fused = fused
        self.student = student
        self.teacher = teacher
        self.velocity = velocity
        self.lora_config = lora_config
        self.gather: str | None = None
        self.sweep: Callable[[Turns], None] | None = None
        self._adapted = adapter_layers(student) if lora_config is not None else []
        self.has_teacher_adapter = any(TEACHER in layer.lora_A for layer in self._adapted)

    def forward(self, x: Tensor, t: Tensor, *, call: Callable[[Tensor, Tensor], Velocities]) -> Velocities:
        """Returns `call(x, t)`. Every state passes through here because ZeRO-3 records the order in which modules run from
        one call of this module to the next."""
        return call(x, t)

    def open(self, student: Sequence[Context], teacher: Sequence[Context], shape: Sequence[int]) -> Forward:
        """Returns the velocities along one trajectory of latents of `shape` = `[B, C, h, w]`, with one context per item. Where
        `teacher` is empty, only the student's velocity is computed."""
        if self.fused is None:
            return TwoCalls(self.student_velocity, student, self.teacher_velocity if teacher else None, teacher)
        branches = {STUDENT: student, TEACHER: teacher} if teacher else {STUDENT: student}
        return self._open_fused(self.fused, branches, shape)

    def _open_fused(self, fused: PairForward, branches: dict[Branch, Sequence[Context]], shape: Sequence[int]) -> FusedForward:
        weight = next(self.student.parameters())
        return FusedForward(fused, self, branches, shape, weight.dtype, weight.device, self.gather, self.sweep)

    def sampler(self, branch: Branch, contexts: Sequence[Context], shape: Sequence[int]) -> Sampler:
        """Returns a function that gives v of one branch without gradient, as `method.trajectory.rollout` takes it."""
        if self.fused is None:
            return lambda x, t: self._alone(branch, x, t, contexts)
        with torch.no_grad():
            forward = self._open_fused(self.fused, {branch: contexts}, shape)
        return lambda x, t: forward(x, t)[0].to(x.dtype)

    @torch.no_grad()
    def _alone(self, branch: Branch, x: Tensor, t: Tensor, contexts: Sequence[Context]) -> Tensor:
        with self.branch(branch) as transformer:
            return self.velocity(transformer, x, t, contexts)

    def student_velocity(self, x: Tensor, t: Tensor, contexts: Sequence[Context]) -> Tensor:
        """Returns v_s `[B, C, h, w]` at x `[B, C, h, w]`, t `[B]`, with gradient."""
        return self(x, t, call=lambda x, t: self.velocity(self.student, x, t, contexts))

    def teacher_velocity(self, x: Tensor, t: Tensor, contexts: Sequence[Context]) -> Tensor:
        """Returns v_t, shaped as x, without gradient. It does not go through `forward`: ZeRO-3's trace must be the sequence
        that repeats, which runs from one call of the student to the next and has the teacher's call inside it."""
        return self._alone(TEACHER, x, t, contexts)

    @contextmanager
    def branch(self, name: str) -> Iterator[nn.Module]:
        """Yields the transformer to call for "student" or "teacher". Afterwards the student's adapter is active again, so that
        a later backward recomputes with it. PEFT's `set_adapter` is not used because it also changes `requires_grad`."""
        if name == TEACHER and self.has_teacher_adapter:
            self._activate(TEACHER)
            try:
                yield self.student
            finally:
                self._activate(STUDENT)
        elif name == TEACHER and self.teacher is not None:
            yield self.teacher
        else:
            yield self.student

    def trained(self) -> list[Trained]:
        """Lists every tensor that training changes, in the order of the module's parameters."""
        if self.lora_config is None:
            teachers = dict(self.teacher.named_parameters()) if self.teacher is not None else {}
            return [Trained(name, param, teachers.get(name)) for name, param in self.student.named_parameters()]
        parameters = dict(self.student.named_parameters())
        mine = f".{STUDENT}."
        return [
            Trained(name.replace(mine, "."), param, parameters.get(name.replace(mine, f".{TEACHER}.")))
            for name, param in parameters.items()
            if param.requires_grad
        ]

    def describe(self) -> dict[str, Any]:
        """Names the backbone and what it chose, for the run's files."""
        if self.fused is None:
            return {"backbone": "diffusers", "attention": "torch scaled_dot_product_attention (diffusers)"}
        return {"backbone": "pair", **self.fused.describe()}

    def _activate(self, adapter: str) -> None:
        for layer in self._adapted:
            layer._active_adapter = [adapter]
