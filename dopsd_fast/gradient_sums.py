"""The gradients of parameters, summed over the states of a trajectory and handed to autograd once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor


class GradientSums:
    """fp32 (float64 for float64 parameters) sums of `parameters`' gradients, zero at first.

    Functions that know their gradients add them here, inside a GEMM where they can, and return None for the parameter;
    `delivery` is a scalar whose backward then gives each sum to its parameter as its gradient. So K states cost one
    accumulation, one hook and no rounding to the parameter's dtype. Not for ZeRO-3: there a parameter has no data, and
    can take no gradient, outside the backward of its own unit."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self._sums: dict[int, Tensor] = {}
        self.used = False

    def __contains__(self, parameter: Tensor | None) -> bool:
        return parameter is not None and parameter.requires_grad

    def of(self, parameter: Tensor) -> Tensor:
        """The running sum, shaped like `parameter`, to be added to."""
        if not self._sums:
            self._begin()
        self.used = True
        return self._sums[id(parameter)]

    def add(self, gradients: Sequence[tuple[Tensor, Tensor]]) -> None:
        """(parameter, gradient) each."""
        if gradients:
            sums = [self.of(parameter) for parameter, _ in gradients]
            torch._foreach_add_(sums, [gradient.to(total.dtype) for total, (_, gradient) in zip(sums, gradients)])

    def delivery(self) -> Tensor | None:
        """None where nothing was added."""
        if not self.used:
            return None
        sums = [self._sums[id(parameter)] for parameter in self.parameters]
        self._sums, self.used = {}, False
        return _Delivery.apply(sums, *self.parameters)

    def _begin(self) -> None:
        """One allocation for all, set to zero at once."""
        sizes = [parameter.numel() for parameter in self.parameters]
        first = self.parameters[0]
        wide = torch.promote_types(first.dtype, torch.float32)
        flat = torch.zeros(sum(sizes), dtype=wide, device=first.device)
        for parameter, part in zip(self.parameters, flat.split(sizes)):
            self._sums[id(parameter)] = part.view(parameter.shape)


class _Delivery(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sums: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.sums = sums
        return parameters[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        """The sums themselves: `scale`, the gradient of the scalar, is 1."""
        sums, ctx.sums = ctx.sums, None
        return None, *sums
