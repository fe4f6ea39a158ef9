"""Sums the gradients of parameters over the states of a trajectory, and hands each sum to autograd once.

Shapes: S sequences, D width of the model, E width of a time's embedding."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from dopsd_kernels.pair_linear_accumulate import pair_linear_accumulate

PIECE = 1 << 27
"""Most elements in one allocation for the sums of sharded parameters: 0.5 GB of fp32."""


class GradientSums:
    """Holds one sum per parameter, fp32 (float64 for float64 parameters), zero at first.

    An autograd function that knows a parameter's gradient adds it here, inside the GEMM where it can, and returns None for
    the parameter. Later the backward of the scalars that `finish` returns gives each sum to its parameter as its gradient. So
    K states cost one accumulation and one hook call per parameter, and no gradient is rounded to the parameter's dtype in
    between.

    Under ZeRO-3 this works only where the parameters stay gathered: a released parameter has no data outside the backward of
    its own unit, and torch gives no gradient to a parameter without data."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self.parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self._sums: dict[int, Tensor] = {}
        self.used = False
        self.modulations = Modulations(self)

    def __contains__(self, parameter: Tensor | None) -> bool:
        return parameter is not None and parameter.requires_grad

    def of(self, parameter: Tensor) -> Tensor:
        """Returns the running sum of `parameter`, in its shape. The caller adds to it in place."""
        if not self._sums:
            self._begin()
        self.used = True
        return self._sums[id(parameter)]

    def add(self, gradients: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Adds gradients, given as pairs (parameter, gradient), to their sums."""
        if gradients:
            sums = [self.of(parameter) for parameter, _ in gradients]
            torch._foreach_add_(sums, [gradient.to(total.dtype) for total, (_, gradient) in zip(sums, gradients)])

    def finish(self) -> list[Tensor]:
        """Returns scalars whose backward does the rest: it back-propagates the times' embeddings and delivers the sums."""
        times = self.modulations.finish()
        delivery = self._delivery() if self.used else None
        return [part for part in (times, delivery) if part is not None]

    def _delivery(self) -> Tensor:
        sums = [self._sums[id(parameter)] for parameter in self.parameters]
        self._sums, self.used = {}, False
        return _Delivery.apply(sums, *self.parameters)

    def _begin(self) -> None:
        """Provides every sum. A gradient that an earlier micro-batch of the step left in its parameter becomes the sum and is
        added to. The other sums are zero and share one allocation, so that one kernel sets them. Sums of sharded parameters
        share several smaller ones, so that memory is freed as the parameters are reduced one after the other."""
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
    """Takes the gradient away from a parameter and returns it, if a sum in `dtype` can go on in it; otherwise returns None.
    DeepSpeed's stages 1 and 2 keep the fp32 gradient sum of a bf16 parameter under `grad_accum` instead of `grad`."""
    for name in ("grad", "grad_accum"):
        grad = getattr(parameter, name, None)
        if grad is not None and grad.dtype == dtype and grad.shape == parameter.shape and grad.is_contiguous():
            setattr(parameter, name, None)
            return grad
    return None


def _pieces(parameters: Sequence[Tensor], limit: int | None) -> Iterator[list[Tensor]]:
    """Divides `parameters` into runs of at most `limit` elements; a parameter that is larger is a run of its own."""
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
    """A scalar zero whose backward gives each parameter its sum as gradient."""
    @staticmethod
    def forward(ctx: Any, sums: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.sums = sums
        return parameters[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        """Returns the sums as they are, because `scale`, the gradient of the scalar, is 1."""
        sums, ctx.sums = ctx.sums, None
        return None, *sums


class Modulations:
    """Back-propagates the blocks' modulation layers once for all states of a trajectory, instead of once per state.

    Such a layer maps a time's embedding c_k `[S, E]` of state k to four slices `[S, D]` of `[S, 4 D]`, and blocks deliver the
    gradients of the slices one by one. With m_k `[S, 4 D]` the four gradients side by side:

        dW = sum_k m_k^T c_k,   db = sum_k sum over S of m_k,   dc_k = sum over the layers of m_k W
    """

    def __init__(self, sums: GradientSums) -> None:
        self.sums = sums
        self.times: list[tuple[Tensor, Tensor]] = []
        self.pieces: dict[int, tuple[Any, list[tuple[Tensor, ...]]]] = {}

    def time(self, c: Tensor) -> Tensor:
        """Returns c without its graph, for the layers to use at this state, and keeps c for `finish`."""
        given = _leaf(c)
        self.times.append((c, given))
        return given

    def apply(self, linear: Any, c: Tensor) -> tuple[Tensor, ...]:
        """Returns the four slices `[S, D]` of linear(c), each a leaf that collects its gradient for `finish`."""
        with torch.no_grad():
            slices = linear(c).unflatten(1, (4, -1)).unbind(1)
        leaves = tuple(_leaf(piece) for piece in slices)
        self.pieces.setdefault(id(linear), (linear, []))[1].append(leaves)
        return leaves

    def finish(self) -> Tensor | None:
        """Adds the layers' gradients to the sums, and returns a scalar whose backward is that of the times' embeddings, or
        None if no state used any."""
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
