"""Which elements of which trained tensor a rank holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from dopsd_fast.pair.student_teacher import Trained

Reader = Callable[[str, str, int, int], Tensor]
"""(name, kind, offset, numel) -> flat tensor; kind "step" ignores the range and gives an int64 scalar."""


@dataclass(frozen=True)
class Fragment:
    """Elements [offset, offset + numel) of a trained tensor, held by this rank at [start, start + numel) of `flat`, the
    tensor that the optimizer knows."""

    trained: Trained
    offset: int
    numel: int
    flat: Tensor
    start: int


def persistent_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, buffer) of what `state_dict` holds besides parameters."""
    for prefix, part in module.named_modules():
        for name, buffer in part.named_buffers(recurse=False):
            if name not in part._non_persistent_buffers_set:
                yield f"{prefix}.{name}" if prefix else name, buffer
