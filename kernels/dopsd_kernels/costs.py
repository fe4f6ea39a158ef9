"""What an op costs on a GPU: each op declares the kernels it launches and the bytes that they move.

Used by the meta-device trace (`python bench/run.py cost`) and checked against the launches counted by a test.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Cost:
    """`launches`: device kernels, GEMMs included. `elementwise_bytes`: read + written by kernels that are neither GEMM
    nor attention. `flops`: 2 * m * n * k of the GEMMs and of attention's two (backward: five) products."""

    launches: int = 0
    gemms: int = 0
    elementwise_bytes: int = 0
    flops: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(a + b for a, b in zip(self._tuple(), other._tuple())))

    def _tuple(self) -> tuple[int, int, int, int]:
        return self.launches, self.gemms, self.elementwise_bytes, self.flops


COSTS: dict[str, Callable[..., Cost]] = {}
"""Custom op's qualified name, such as "dopsd::swiglu_fwd" -> cost of a call, given the call's arguments and, as
`out`, its result."""


def declares(name: str) -> Callable[[Callable[..., Cost]], Callable[..., Cost]]:
    """Decorator: the function states the cost of the custom op `name`; it is called with the op's positional arguments
    and keyword `out`."""

    def register(function: Callable[..., Cost]) -> Callable[..., Cost]:
        COSTS[name] = function
        return function

    return register


def size(*tensors: Any) -> int:
    """Bytes of the given tensors; anything that is no tensor (None, too) is 0."""
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))
