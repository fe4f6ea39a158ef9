"""The gradients of parameters, summed over the states of a trajectory and handed to autograd once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from dopsd_kernels.pair_linear_accumulate import pair_linear_accumulate

PIECE = 1 << 27
"""Elements of one allocation of sharded parameters' sums."""


class GradientSums:
    """fp32 (float64 for float64 parameters) sums of `parameters`' gradients, zero at first.

    Functions that know their gradients add them here, inside a GEMM where they can, and return None for the parameter;
    the backward of what `finish` returns then gives each sum to its parameter as its gradient. So K states cost one
    accumulation, one hook and no rounding to the parameter's dtype. Under ZeRO-3 only where the parameters stay gathered:
    elsewhere one has no data, and can take no gradient, outside the backward of its own unit."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self._sums: dict[int, Tensor] = {}
        self.used = False
        self.modulations = Modulations(self)

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

    def finish(self) -> list[Tensor]:
        """Scalars whose backward is all that is left to do."""
        times = self.modulations.finish()
        delivery = self._delivery() if self.used else None
        return [part for part in (times, delivery) if part is not None]

    def _delivery(self) -> Tensor:
        sums = [self._sums[id(parameter)] for parameter in self.parameters]
        self._sums, self.used = {}, False
        return _Delivery.apply(sums, *self.parameters)

    def _begin(self) -> None:
        """What an earlier micro-batch of the step has left, to go on with; the rest in one allocation, set to zero at once, or
        for sharded parameters in several, which are freed as they are reduced."""
        first = self.parameters[0]
        wide = torch.promote_types(first.dtype, torch.float32)
        self._sums = {id(p): grad for p in self.parameters if (grad := _taken(p, wide)) is not None}
        new = [p for p in self.parameters if id(p) not in self._sums]
        for parameters in _pieces(new, PIECE if hasattr(first, "ds_id") else None):
            sizes = [parameter.numel() for parameter in parameters]
            flat = torch.zeros(sum(sizes), dtype=wide, device=first.device)
            for parameter, part in zip(parameters, flat.split(sizes)):
                self._sums[id(parameter)] = part.view(parameter.shape)


def _taken(parameter: Any, dtype: torch.dtype) -> Tensor | None:
    """The gradient that a parameter holds, if its sum can go on in it: the parameter then holds none. `grad_accum`: where
    DeepSpeed's stages 1 and 2 keep fp32 sums of bf16 parameters' gradients."""
    for name in ("grad", "grad_accum"):
        grad = getattr(parameter, name, None)
        if grad is not None and grad.dtype == dtype and grad.shape == parameter.shape and grad.is_contiguous():
            setattr(parameter, name, None)
            return grad
    return None


def _pieces(parameters: Sequence[Tensor], limit: int | None) -> Iterator[list[Tensor]]:
    """Runs of parameters with up to `limit` elements each, or with one."""
    piece: list[Tensor] = []
    size = 0
    for parameter in parameters:
        if piece and limit is not None and size + parameter.numel() > limit:
            yield piece
            piece, size = [], 0
        piece.append(parameter)
        size += parameter.numel()
    if piece:
        yield piece


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


class Modulations:
    """Linear layers of a time's embedding, c `[S, E]` -> `[S, 4 D]`, whose gradients come in pieces at every state, and
    which are back-propagated once for all states.

        dW = sum_k m_k^T c_k,   db = sum_k sum_S m_k,   dc_k = sum over the layers of m_k W,   m_k = [dy_1 .. dy_4] at state k
    """

    def __init__(self, sums: GradientSums) -> None:
        self.sums = sums
        self.times: list[tuple[Tensor, Tensor]] = []
        self.pieces: dict[int, tuple[Any, list[tuple[Tensor, ...]]]] = {}

    def time(self, c: Tensor) -> Tensor:
        """c without its graph, to be used at this state."""
        given = _leaf(c)
        self.times.append((c, given))
        return given

    def apply(self, linear: Any, c: Tensor) -> tuple[Tensor, ...]:
        """Four slices `[S, D]` of linear(c), each a leaf that waits for its gradient."""
        with torch.no_grad():
            slices = linear(c).unflatten(1, (4, -1)).unbind(1)
        leaves = tuple(_leaf(piece) for piece in slices)
        self.pieces.setdefault(id(linear), (linear, []))[1].append(leaves)
        return leaves

    def finish(self) -> Tensor | None:
        """A scalar whose backward is that of the times' embeddings; the layers' gradients go to the sums."""
        if not self.times:
            return None
        given = torch.cat([leaf for _, leaf in self.times]).detach()
        into = torch.zeros_like(given)
        if any(leaf.grad is not None for _, leaf in self.times):
            into = torch.cat([_gradient(leaf) for _, leaf in self.times]).to(given.dtype)
        for linear, states in self.pieces.values():
            parts = torch.stack([_gradient(leaf) for leaves in states for leaf in leaves])
            m = parts.unflatten(0, (len(states), 4)).transpose(1, 2).reshape(len(given), -1)
            self.sums.of(linear.bias).add_(m.sum(0))
            m, nothing = m.to(given.dtype), given.new_empty(0)
            pair_linear_accumulate([self.sums.of(linear.weight)], [], [], [m], given, [1.0], nothing, nothing)
            into.addmm_(m, linear.weight.detach())
        scalar = (torch.cat([c for c, _ in self.times]) * into).sum()
        self.times, self.pieces = [], {}
        return scalar


def _leaf(value: Tensor) -> Tensor:
    leaf = value.detach().requires_grad_()
    leaf.grad_dtype = torch.promote_types(value.dtype, torch.float32)
    return leaf


def _gradient(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf, dtype=leaf.grad_dtype) if leaf.grad is None else leaf.grad
