"""Multiplies with the frozen matrices of a pair forward in 8 bits. The user must ask for it, because it changes the numbers
(see dopsd_kernels.fp8_linear). Shapes: T tokens, N outputs of a matrix."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from dopsd_fast.errors import UserError
from dopsd_fast.pair.matrices import Matrix
from dopsd_kernels.backend import direct
from dopsd_kernels.fp8_linear import MULTIPLE, Fp8Weight, fp8_matmul, fp8_quantise_rows

matmul, quantise_rows = direct(fp8_matmul), direct(fp8_quantise_rows)


class FrozenFp8:
    """Keeps 8-bit copies of frozen matrices. `which` (train.fp8) names the branches whose products use them: "teacher", the
    branch that carries no gradient, or "frozen", both.

    Matrices that share an input are copied together, when they are first used. The originals stay because backward multiplies
    with them."""

    def __init__(self, which: str) -> None:
        self.which = which
        self._copies: dict[tuple[int, ...], Fp8Weight] = {}

    def check(self, weights: Iterable[Tensor]) -> None:
        """Raises UserError for a matrix that trains, or whose sides 8-bit products cannot take."""
        for weight in weights:
            if weight.requires_grad:
                raise UserError(f"train.fp8={self.which}: the matrices train; only frozen ones can be 8-bit: use "
                                "adapter.kind=lora, or train.fp8=off")
            if any(side % MULTIPLE for side in weight.shape):
                raise UserError(f"train.fp8={self.which}: the model has a matrix {tuple(weight.shape)}, 8-bit products need "
                                f"multiples of {MULTIPLE}: use train.fp8=off")

    def project(self, x: Tensor, members: Sequence[Matrix], keep: bool) -> tuple[Tensor, Tensor]:
        """Does for one branch what `pair_linear_fwd` does for two: returns y `[T, sum N]`, and x A^T of all members' adapters,
        which is empty unless `keep` asks for it."""
        key = tuple(id(m.weight) for m in members)
        if key not in self._copies:
            self._copies[key] = Fp8Weight(torch.cat([m.weight.detach() for m in members]))
        copy = self._copies[key]
        y = matmul(*quantise_rows(x), copy.q, copy.scale, None, x.dtype)
        products = []
        for m, part in zip(members, y.split([len(m.weight) for m in members], 1)):
            if m.a.numel():
                products.append(torch.mm(x, m.a.t()))
                part.addmm_(products[-1], m.b.t(), alpha=m.scale)
        return y, torch.cat(products, 1) if products and keep else x.new_empty(0)
