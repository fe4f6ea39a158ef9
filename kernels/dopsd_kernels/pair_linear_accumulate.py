"""The gradients of one group of linear layers, added to running sums: the sum is the GEMM's own accumulator.

    sum_W_g += dy_g^T x        or, with adapters,    sum_A_g += q_g^T x,   sum_B_g += s_g dy_g^T xa_g,   q_g = s_g dy_g B_g

dy_g [T, N_g] (any row stride), x [T, D], xa [T, sum r] (x A^T, from `pair_linear_fwd`), q [T, sum r] (`pair_linear_through`).
The sums have the matrices' shapes, fp32 (float64 for float64 inputs) whatever the inputs' dtype: a trajectory's K states
and the gradients of several micro-batches lose nothing to bf16, and no pass over memory adds them up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dopsd_kernels import pair_linear_triton
from dopsd_kernels.costs import Cost, declares
from dopsd_kernels.pair_linear import chosen_kernel, fused, slices


def pair_linear_accumulate_ref(
    sums_w: Sequence[Tensor], sums_a: Sequence[Tensor], sums_b: Sequence[Tensor], dy: Sequence[Tensor], x: Tensor,
    scales: Sequence[float], xa: Tensor, q: Tensor,
) -> None:
    """The formulas, in the sums' dtype."""
    ranks = [m.shape[0] if m.numel() else 0 for m in sums_a]
    for total, gradient in zip(sums_w, dy):
        total += gradient.to(total.dtype).t() @ x.to(total.dtype)
    for g, (a, b) in enumerate(zip(sums_a, sums_b)):
        if a.numel():
            a += slices(q, ranks)[g].to(a.dtype).t() @ x.to(a.dtype)
            b += scales[g] * (dy[g].to(b.dtype).t() @ slices(xa, ranks)[g].to(b.dtype))


@torch.library.custom_op("dopsd::pair_linear_accumulate", mutates_args=("sums_w", "sums_a", "sums_b"))
def pair_linear_accumulate(
    sums_w: Sequence[Tensor], sums_a: Sequence[Tensor], sums_b: Sequence[Tensor], dy: Sequence[Tensor], x: Tensor,
    scales: Sequence[float], xa: Tensor, q: Tensor,
) -> None:
    """Adds to `sums_w` ([] where the matrices are frozen), and to `sums_a` and `sums_b` ([] without adapters; an empty tensor
    for a member without). ValueError for sums of another shape or a narrower dtype than said above."""
    _check(sums_w, sums_a, sums_b, dy, x)
    if x.shape[0] == 0:
        return
    for total, gradient in zip(sums_w, dy):
        _add(total, gradient.t(), x)
    ranks = [m.shape[0] if m.numel() else 0 for m in sums_a]
    if not sum(ranks):
        return
    if chosen_kernel(x, len(dy), True) == "triton":
        pair_linear_triton.adapter_gradients(dy, x, ranks, scales, xa, q, sums_a, sums_b, accumulate=True)
        return
    for g, (part, product) in enumerate(zip(slices(q, ranks), slices(xa, ranks))):
        if ranks[g]:
            _add(sums_a[g], part.t(), x)
            _add(sums_b[g], dy[g].t(), product, scales[g])


def _add(total: Tensor, left: Tensor, right: Tensor, scale: float = 1.0) -> None:
    if total.dtype == right.dtype:
        total.addmm_(left, right, alpha=scale)
    elif total.is_cuda:
        torch.addmm(total, left, right, out_dtype=total.dtype, alpha=scale, out=total)
    else:
        total.addmm_(left.to(total.dtype), right.to(total.dtype), alpha=scale)


def _check(
    sums_w: Sequence[Tensor], sums_a: Sequence[Tensor], sums_b: Sequence[Tensor], dy: Sequence[Tensor], x: Tensor
) -> None:
    wide = torch.promote_types(x.dtype, torch.float32)
    for name, sums, columns in (("sums_w", sums_w, x.shape[1]), ("sums_a", sums_a, x.shape[1]), ("sums_b", sums_b, 0)):
        if len(sums) not in (0, len(dy)):
            raise ValueError(f"pair_linear_accumulate: {len(sums)} {name} for {len(dy)} members: one each, or none")
        for g, total in enumerate(sums):
            if not total.numel() and name != "sums_w":
                continue
            rows = total.shape[0] if name == "sums_a" else dy[g].shape[1]
            if total.shape != (rows, columns or total.shape[-1]) or total.dtype != wide or total.device != x.device:
                raise ValueError(
                    f"pair_linear_accumulate: {name} {g} is {list(total.shape)} {total.dtype} on {total.device}, needs "
                    f"{[rows, columns or 'rank']} {wide} on {x.device}"
                )
            if not total.is_contiguous():
                raise ValueError(f"pair_linear_accumulate: {name} {g} has strides {total.stride()}, must be contiguous")


@pair_linear_accumulate.register_fake
def _(
    sums_w: Sequence[Tensor], sums_a: Sequence[Tensor], sums_b: Sequence[Tensor], dy: Sequence[Tensor], x: Tensor,
    scales: Sequence[float], xa: Tensor, q: Tensor,
) -> None:
    _check(sums_w, sums_a, sums_b, dy, x)


@declares("dopsd::pair_linear_accumulate")
def _cost(
    sums_w: Sequence[Tensor], sums_a: Sequence[Tensor], sums_b: Sequence[Tensor], dy: Sequence[Tensor], x: Tensor, *_: Any,
    out: Any,
) -> Cost:
    tokens, adapters = x.shape[0], sum(m.numel() > 0 for m in sums_a)
    if not tokens:
        return Cost()
    gemms = len(sums_w) + (min(1, adapters) if fused(x, len(dy), True) else 2 * adapters)
    return Cost(gemms, gemms, 0, sum(2 * tokens * m.numel() for m in (*sums_w, *sums_a, *sums_b)))
