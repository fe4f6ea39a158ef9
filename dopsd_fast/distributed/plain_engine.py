"""Stage 0: every rank holds the whole model, optimizer and average. This is plain data parallelism on torch.distributed,
without DeepSpeed's engine around it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dopsd_fast.distributed.engine import Engine
from dopsd_fast.distributed.fragments import Fragment
from dopsd_fast.distributed.process_group import Ranks
from dopsd_fast.pair.student_teacher import Pair
from dopsd_fast.settings.schema import TeacherSettings, TrainSettings

BUCKET = 500_000_000
"""Number of elements after which a bucket is reduced in one collective: 2 GB of fp32 gradients."""


class PlainEngine(Engine):
    """The engine of stage 0, for one rank or for several.

    Its numbers are those of DeepSpeed's stage 0: gradients are summed over the ranks in fp32, bucket by bucket, and the sum is
    divided by the number of ranks afterwards."""

    stage = 0

    def __init__(self, pair: Pair, train: TrainSettings, teacher: TeacherSettings, ranks: Ranks) -> None:
        super().__init__(pair, train, teacher, ranks)
        if self.world > 1:
            for tensor in [*pair.parameters(), *pair.buffers()]:
                torch.distributed.broadcast(tensor.data, src=0)
        self._fragments = [Fragment(t, 0, t.student.numel(), t.student, 0) for t in self._trained]
        if self.keeps_ema:
            for trained in self._trained:
                self.optimizer.set_teacher(trained.student, trained.teacher)
        for trained in self._trained:
            self.optimizer.init_state(trained.student, self.keeps_ema)

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._drop_gradients()
            raise
        for trained in self._trained:
            if trained.student.grad is None:
                trained.student.grad = torch.zeros_like(trained.student, dtype=torch.float32)
        if self.world > 1:
            # In the module's own order, as DeepSpeed lays them out: which rank's share a gradient falls into decides the order
            # in which gloo and NCCL sum it.
            self._reduce([param.grad for param in self.pair.parameters() if param.grad is not None])

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, lr: float) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        norm = self._clip_gradients()
        if math.isfinite(norm):
            self.optimizer.step()
        self._drop_gradients()
        return norm

    def _reduce(self, gradients: Sequence[Tensor]) -> None:
        """Replaces each gradient by its mean over the ranks."""
        bucket: list[Tensor] = []
        size = 0
        for i, gradient in enumerate(gradients):
            bucket.append(gradient)
            size += gradient.numel()
            if i + 1 == len(gradients) or size > BUCKET:
                flat = torch.cat([g.reshape(-1) for g in bucket])
                torch.distributed.all_reduce(flat)
                flat.mul_(1.0 / self.world)
                for g, part in zip(bucket, flat.split([g.numel() for g in bucket])):
                    g.copy_(part.view(g.shape))
                bucket, size = [], 0

    def _clip_gradients(self) -> float:
        """Returns the gradients' global norm, and tells the optimizer to multiply each gradient by clip / (norm + 1e-6) where
        that is less than 1, as DeepSpeed's ZeRO optimizers do."""
        grads = side_by_side([trained.student.grad for trained in self._trained])
        norm = torch.stack([torch.linalg.vector_norm(grad) for grad in grads]).norm()
        if self._clip > 0:
            self.optimizer.grad_scale = float(1.0 / ((norm + 1e-6) / self._clip).clamp(min=1.0))
        return float(norm)

    def _drop_gradients(self) -> None:
        for trained in self._trained:
            trained.student.grad = None

    def stored_fragments(self) -> list[Fragment]:
        return self._fragments if self.rank == 0 else []

    def _refresh(self) -> None:
        """Does nothing, because the optimizer has written the parameters and the teacher already."""

    def close(self) -> None:
        """Does nothing, because this engine has changed nothing in the pair's modules."""


def side_by_side(tensors: list[Tensor]) -> list[Tensor]:
    """Returns the same elements in fewer tensors: tensors that lie side by side in one storage become one flat tensor. The
    order depends on the given order and on offsets only, never on addresses, so that a norm over them has the same bits in
    every run."""
    merged: list[Tensor] = []
    end: Any = None
    first: dict[int, int] = {}
    for i, tensor in enumerate(tensors):
        first.setdefault(tensor.untyped_storage()._cdata, i)
    for tensor in sorted(tensors, key=lambda t: (first[t.untyped_storage()._cdata], t.storage_offset())):
        storage, offset = tensor.untyped_storage()._cdata, tensor.storage_offset()
        if end == (storage, offset) and tensor.is_contiguous() and tensor.dtype == merged[-1].dtype:
            last = merged[-1]
            merged[-1] = last.as_strided((last.numel() + tensor.numel(),), (1,), last.storage_offset())
        else:
            merged.append(tensor.view(-1) if tensor.is_contiguous() else tensor)
        end = (storage, offset + tensor.numel()) if tensor.is_contiguous() else None
    return merged
