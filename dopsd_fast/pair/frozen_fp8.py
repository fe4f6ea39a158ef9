"""8-bit products with the frozen matrices of a pair forward: opt-in, because the numbers change (dopsd_kernels.fp8_linear)."""

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
    """`which`: "teacher" (the branch that carries no gradient) or "frozen" (both). An 8-bit copy of a group of matrices that
    share an input is made when the group is first used; the originals stay, for the backward pass."""

    def __init__(self, which: str) -> None:
        self.which = which
        self._copies: dict[tuple[int, ...], Fp8Weight] = {}

    def check(self, weights: Iterable[Tensor]) -> None:
        """UserError for a matrix that cannot be multiplied in 8 bits."""
        for weight in weights:
            if weight.requires_grad:
                raise UserError(f"train.fp8={self.which}: the matrices train; only frozen ones can be 8-bit: use "
                                "adapter.kind=lora, or train.fp8=off")
            if any(side % MULTIPLE for side in weight.shape):
                raise UserError(f"train.fp8={self.which}: the model has a matrix {tuple(weight.shape)}, 8-bit products need "
                                f"multiples of {MULTIPLE}: use train.fp8=off")

    def project(self, x: Tensor, members: Sequence[Matrix], keep: bool) -> tuple[Tensor, Tensor]:
        """As `pair_linear_fwd` for one branch: (y `[T, sum N]`, x A^T of all members, empty unless `keep`)."""
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
