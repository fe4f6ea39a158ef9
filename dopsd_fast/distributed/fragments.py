"""Describes which elements of which trained tensor a rank holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from dopsd_fast.pair.student_teacher import Trained

Reader = Callable[[str, str, int, int], Tensor]
"""A function (name, kind, offset, numel) -> flat tensor of that range. For the kind "step" it ignores the range and returns an
int64 scalar."""


@dataclass(frozen=True)
class Fragment:
    """Says that this rank holds the elements [offset, offset + numel) of a trained tensor at [start, start + numel) of `flat`,
    the tensor that the optimizer steps."""

    trained: Trained
    offset: int
    numel: int
    flat: Tensor
    start: int


def persistent_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yields (name, buffer) for each buffer that `state_dict` holds."""
    for prefix, part in module.named_modules():
        for name, buffer in part.named_buffers(recurse=False):
            if name not in part._non_persistent_buffers_set:
                yield f"{prefix}.{name}" if prefix else name, buffer
