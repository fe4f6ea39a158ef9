"""What every engine is to the trainer: gradients summed over micro-batches and ranks, one step of AdamW + EMA, and the state of
the optimizer in pieces that another world size or ZeRO stage can read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from dopsd_fast.distributed.fragments import Fragment, Reader, persistent_buffers
from dopsd_fast.distributed.process_group import Ranks
from dopsd_fast.pair.student_teacher import STUDENT, TEACHER, Pair
from dopsd_fast.settings.schema import TeacherSettings, TrainSettings
from dopsd_kernels.adamw_ema import AdamWEMA


class Engine(ABC):
    """`pair` under AdamW + EMA.

        with engine.accumulating():     # any number of backwards: gradients are summed in fp32 on this rank,
            engine.backward(loss)       # then reduced once
        norm = engine.step(lr)          # AdamW, the EMA, the teacher's weights

    The gradient of the step is the mean over ranks of the sum of its backwards: with losses that are means over a
    rank's items, scaled by 1 / accumulation, it is the gradient of the global batch. An exception that leaves
    `accumulating` drops this rank's gradients and reduces nothing. precision=bf16: parameters are bf16; master weights,
    moments, EMA and gradient sums fp32.
    """

    stage: int
    gather: str | None = None
    """How ZeRO-3 holds the weights (see `fetching`)."""

    def __init__(self, pair: Pair, train: TrainSettings, teacher: TeacherSettings, ranks: Ranks) -> None:
        """Raises ValueError where an EMA is to be kept and the pair has no teacher to keep it in."""
        self.pair, self.ranks = pair, ranks
        self.rank, self.world, self.device = ranks.rank, ranks.world, ranks.device
        self.any, self.gather_int, self.mean = ranks.any, ranks.gather_int, ranks.mean
        self._clip = float(train.grad_clip)
        self._trained = pair.trained()
        for trained in self._trained:
            trained.student.grad_dtype = torch.float32
        self.keeps_ema = teacher.kind == "ema"
        if self.keeps_ema and any(trained.teacher is None for trained in self._trained):
            raise ValueError("teacher.kind=ema, but the pair was built without a teacher")
        self.kinds = ("master", "exp_avg", "exp_avg_sq") + (("ema",) if self.keeps_ema else ())
        self.optimizer = AdamWEMA(
            [trained.student for trained in self._trained],
            lr=train.learning_rate,
            betas=(train.betas[0], train.betas[1]),
            eps=train.eps,
            weight_decay=train.weight_decay,
            ema_decay=teacher.ema_decay if self.keeps_ema else None,
            masters=train.masters,
            ema_dtype=torch.bfloat16 if teacher.ema_dtype == "bf16" else torch.float32,
        )
        self._fragments: list[Fragment] = []

    # ---- one step ------------------------------------------------------------------------------------------

    @abstractmethod
    def accumulating(self) -> AbstractContextManager[None]:
        """Inside, `backward` adds to this rank's gradients; leaving reduces them over the ranks."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Adds the gradient of `loss` (scalar, used as it is)."""

    @abstractmethod
    def step(self, lr: float) -> float:
        """One optimizer step; the global gradient norm before clipping, the same on every rank.

        A norm that is not finite (inf or nan) is returned, and nothing changes: weights, moments, EMA and step counts
        stay.
        """

    # ---- state in and out ----------------------------------------------------------------------------------

    def _state(self, fragment: Fragment, kind: str) -> Tensor:
        """Flat fp32, to be read only: "master", "exp_avg", "exp_avg_sq" or "ema" of the fragment."""
        return self.optimizer.read(fragment.flat, kind, fragment.start, fragment.numel)

    def stored_fragments(self) -> list[Fragment]:
        """What this rank is to store. Where all ranks hold the same, rank 0 alone stores it."""
        return self._fragments

    def state_fragments(self) -> Iterator[tuple[str, int, dict[str, Tensor], int]]:
        """(name, offset, {kind: flat fp32 CPU tensor}, optimizer step) for every fragment that this rank is to store;
        no collective calls. Kinds: `self.kinds`."""
        for fragment in self.stored_fragments():
            tensors = {kind: self._state(fragment, kind).cpu() for kind in self.kinds}
            yield fragment.trained.name, fragment.offset, tensors, self.optimizer.state[fragment.flat]["step"]

    def fragment_sizes(self) -> list[tuple[str, int, int]]:
        """(name, offset, numel) of what `state_fragments` yields, in its order."""
        return [(f.trained.name, f.offset, f.numel) for f in self.stored_fragments()]

    @torch.no_grad()
    def load_fragments(self, reader: Reader) -> None:
        """The inverse of `state_fragments`, for any world size and stage: asks `reader` for the ranges of this rank,
        then casts masters into the parameters and the EMA into the teacher."""
        for fragment in self._fragments:
            name = fragment.trained.name
            for kind in self.kinds:
                values = reader(name, kind, fragment.offset, fragment.numel)
                self.optimizer.write(fragment.flat, kind, values, fragment.start)
            self.optimizer.state[fragment.flat]["step"] = int(reader(name, "step", 0, 1))
        self._refresh()

    @abstractmethod
    def _refresh(self) -> None:
        """Casts masters into the parameters and the EMA into the teacher, on every rank."""

    @torch.no_grad()
    def full_tensors(self, which: str) -> Iterator[tuple[str, Tensor]]:
        """(name, whole tensor) of every trained tensor and persistent buffer of "student" (fp32 master) or "teacher"
        (fp32 EMA; frozen: its weights; kind=student: the student's), on the CPU of rank 0. Every rank must iterate to
        the end; the others get empty tensors."""
        if which not in (STUDENT, TEACHER):
            raise ValueError(f"which is {which!r}, must be 'student' or 'teacher'")
        mine: dict[str, list[Fragment]] = {}
        for fragment in self._fragments:
            mine.setdefault(fragment.trained.name, []).append(fragment)
        for trained in self._trained:
            shape = getattr(trained.student, "ds_shape", trained.student.shape)
            whole = torch.zeros(shape.numel(), dtype=torch.float32, device=self.device)
            for fragment in mine.get(trained.name, []):
                whole.narrow(0, fragment.offset, fragment.numel).copy_(self._value(fragment, which))
            if self.stage:
                torch.distributed.reduce(whole.view(torch.int32), dst=0)  # zeros elsewhere: every bit stays, -0.0 too
            yield trained.name, whole.view(shape).cpu() if self.rank == 0 else torch.empty(0)
        if self.pair.lora_config is None:
            for name, buffer in persistent_buffers(self.pair.student):
                yield name, buffer.detach().cpu() if self.rank == 0 else torch.empty(0)

    def _value(self, fragment: Fragment, which: str) -> Tensor:
        teacher = fragment.trained.teacher
        if which == STUDENT or teacher is None:
            return self._state(fragment, "master")
        if self.keeps_ema:
            return self._state(fragment, "ema")
        return self._frozen(fragment, teacher)

    def _frozen(self, fragment: Fragment, teacher: Any) -> Tensor:
        """The fragment's elements of a teacher that does not change."""
        return teacher.detach().view(-1).narrow(0, fragment.offset, fragment.numel)

    # ---- what it is ----------------------------------------------------------------------------------------

    @property
    def trained_parameters(self) -> int:
        """Number of trained numbers in the whole model."""
        return sum(getattr(t.student, "ds_numel", t.student.numel()) for t in self._trained)

    def describe(self) -> dict[str, Any]:
        """What was chosen, for the run's files."""
        return {
            "zero_stage": self.stage,
            **({"gather": self.gather} if self.gather else {}),
            "world": self.world,
            "device": str(self.device),
            "backend": torch.distributed.get_backend(),
            "parameter_dtype": str(self._trained[0].student.dtype).removeprefix("torch."),
            "ema_backend": self.optimizer.ema_backend if self.keeps_ema else "none",
            "masters": self.optimizer.masters,
        }

    @abstractmethod
    def close(self) -> None:
        """Removes what hangs on the pair; the process group stays."""
