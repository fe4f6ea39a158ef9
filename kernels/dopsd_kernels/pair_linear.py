"""Linear layers that share one input, for two branches at once, with low-rank adapters folded in.

    y_b[:, n_g : n_g + N_g] = x_b W_{b,g}^T + bias_{b,g} + s_{b,g} (x_b A_{b,g}^T) B_{b,g}^T

b: the branch, student (s) or teacher (t); g: the member, one of G matrices that read the same input (q, k, v; or w1, w3;
or a single one) and write side by side. T_b tokens, D input width, N_g output width, r_g rank (0: no adapter).

x_b [T_b, D], W [N_g, D], bias [N_g], A [r_g, D], B [N_g, r_g], y_b [T_b, sum N]; all of one floating dtype. The two branches
share the base weights (pass the same tensors) or have their own. Sums are accumulated in fp32 for half dtypes. The adapter
never costs an elementwise pass: on CUDA one Triton kernel sums base and adapter before it writes; with cuBLAS and on the CPU
the adapter is accumulated with beta = 1 or, for fp32 and float64 on the CPU where that is less work, added to the matrix.

LoRA: Hu et al. 2021, arXiv 2106.09685. FLUX.2's parallel block is G = 1 over its fused [qkv | gate | up] matrix, then G = 1
over one buffer [attention | mlp] whose halves the two producers wrote.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dopsd_kernels import pair_linear_triton
from dopsd_kernels.backend import choose
from dopsd_kernels.costs import Cost, declares, size

__all__ = [
    "pair_linear",
    "pair_linear_bwd",
    "pair_linear_fwd",
    "pair_linear_ref",
    "pair_linear_through",
    "set_backend",
    "split_gradients",
]

CHOICES = ("auto", "triton", "cublas")

_selected = "auto"


def set_backend(name: str) -> None:
    """What runs the GEMMs on CUDA: "triton", "cublas", or "auto": triton where an adapter is to be folded in, cublas for plain
    matrices. More members than one launch takes, and float64, run on cublas always. ValueError for another name."""
    global _selected
    if name not in CHOICES:
        raise ValueError(f"pair_linear.set_backend: {name!r} is none of {', '.join(CHOICES)}")
    _selected = name


def pair_linear_ref(
    x: Tensor, w: Sequence[Tensor], bias: Sequence[Tensor], a: Sequence[Tensor], b: Sequence[Tensor], scales: Sequence[float]
) -> Tensor:
    """One branch in plain PyTorch, differentiable; computes in fp32 for half dtypes and casts the result. Lists as in
    `pair_linear_fwd`. Returns [T, sum N]."""
    wide = torch.promote_types(x.dtype, torch.float32)
    up = x.to(wide)
    columns = []
    for g, weight in enumerate(w):
        y = up @ weight.to(wide).t()
        if bias:
            y = y + bias[g].to(wide)
        if a and a[g].numel():
            y = y + scales[g] * ((up @ a[g].to(wide).t()) @ b[g].to(wide).t())
        columns.append(y)
    return torch.cat(columns, 1).to(x.dtype)


def _check(
    branch: str, x: Tensor, w: Sequence[Tensor], bias: Sequence[Tensor], a: Sequence[Tensor], b: Sequence[Tensor],
    scales: Sequence[float],
) -> None:
    """ValueError, one line, for what the kernels cannot read."""

    def refuse(what: str) -> None:
        raise ValueError(f"pair_linear, {branch}: {what}")

    def matrix(name: str, value: Tensor, *shape: int) -> None:
        if value.shape != shape or value.dtype != x.dtype or value.device != x.device:
            is_ = f"{list(value.shape)} {value.dtype} on {value.device}"
            refuse(f"{name} is {is_}, needs {list(shape)} {x.dtype} on {x.device}")
        if name == "x" and value.stride(-1) != 1 and value.shape[-1] > 1:
            refuse(f"x has stride {value.stride(-1)} in its last dimension, needs 1: call .contiguous()")
        if name != "x" and not value.is_contiguous():
            refuse(f"{name} has strides {value.stride()}, is not contiguous: call .contiguous()")

    if x.dim() != 2 or not x.is_floating_point():
        refuse(f"x is {list(x.shape)} {x.dtype}, needs a floating [tokens, width]")
    width = x.shape[1]
    matrix("x", x, x.shape[0], width)
    if not w:
        refuse("no weight given")
    if len(bias) not in (0, len(w)) or len(a) not in (0, len(w)) or len(b) != len(a) or (a and len(scales) != len(w)):
        refuse(f"{len(w)} weights, {len(bias)} biases, {len(a)} A, {len(b)} B, {len(scales)} scales: one each, or none")
    for g, weight in enumerate(w):
        matrix(f"weight {g}", weight, weight.shape[0], width)
        if bias:
            matrix(f"bias {g}", bias[g], weight.shape[0])
        if a and (a[g].numel() or b[g].numel()):
            matrix(f"A {g}", a[g], a[g].shape[0], width)
            matrix(f"B {g}", b[g], weight.shape[0], a[g].shape[0])


def _check_pair(
    x_s: Tensor, x_t: Tensor | None, w_s: Sequence[Tensor], w_t: Sequence[Tensor], bias_s: Sequence[Tensor],
    bias_t: Sequence[Tensor], a_s: Sequence[Tensor], b_s: Sequence[Tensor], a_t: Sequence[Tensor], b_t: Sequence[Tensor],
    scales_s: Sequence[float], scales_t: Sequence[float],
) -> None:
    _check("student", x_s, w_s, bias_s, a_s, b_s, scales_s)
    if x_t is not None:
        _check("teacher", x_t, w_t, bias_t, a_t, b_t, scales_t)
        if [m.shape for m in w_t] != [m.shape for m in w_s] or x_t.dtype != x_s.dtype or x_t.device != x_s.device:
            raise ValueError("pair_linear: student and teacher differ in their weights' shapes, dtype or device")


def ranks(a: Sequence[Tensor]) -> list[int]:
    """Rank of each member, 0 where it has no adapter."""
    return [m.shape[0] if m.numel() else 0 for m in a]


def _widths(b: Sequence[Tensor]) -> list[int]:
    """`ranks`, from B."""
    return [m.shape[1] if m.numel() else 0 for m in b]


def _check_gradients(dy: Sequence[Tensor], widths: Sequence[int], x: Tensor) -> None:
    """ValueError, one line, unless dy fits the members' output widths and `x`'s rows, dtype and device."""
    for g, (gradient, width) in enumerate(zip(dy, widths)):
        if gradient.shape != (x.shape[0], width) or gradient.dtype != x.dtype or gradient.device != x.device:
            raise ValueError(
                f"pair_linear: dy {g} is {list(gradient.shape)} {gradient.dtype} on {gradient.device}, needs "
                f"{[x.shape[0], width]} {x.dtype} on {x.device}"
            )
        if gradient.stride(-1) != 1 and width > 1:
            raise ValueError(f"pair_linear: dy {g} has stride {gradient.stride(-1)} in its last dimension, needs 1")


def slices(buffer: Tensor, sizes: Sequence[int]) -> list[Tensor]:
    """Column slices of the given widths: views that a GEMM reads and writes in place through its leading dimension."""
    if len(sizes) == 1:
        return [buffer]
    return list(buffer.split_with_sizes(list(sizes), 1))


def fused(x: Tensor, members: int, adapted: bool) -> bool:
    """Whether the Triton kernels run on CUDA: see `set_backend`."""
    if x.dtype == torch.float64 or members > pair_linear_triton.MEMBERS_MAX or _selected == "cublas":
        return False
    return adapted or _selected == "triton"


def chosen_kernel(x: Tensor, members: int, adapted: bool) -> str:
    """"triton" or "mm" for a call on `x`."""
    return "triton" if choose(x) == "triton" and fused(x, members, adapted) else "mm"


def _worth_adding(x: Tensor, weight: Tensor, keeps_product: bool) -> bool:
    """Whether W + s B A costs less than going through the rank (`keeps_product`: x A^T is wanted anyway): on the CPU the
    narrow GEMMs are bound by memory. Half dtypes would round the small update away."""
    if x.dtype not in (torch.float32, torch.float64) or x.is_cuda:
        return False
    n, width = weight.shape
    return x.shape[0] * (n if keeps_product else n + width) >= 2 * n * width


def _mm_forward(
    x: Tensor, w: Sequence[Tensor], bias: Sequence[Tensor], a: Sequence[Tensor], b: Sequence[Tensor], scales: Sequence[float],
    xa: Tensor | None,
) -> Tensor:
    """One branch by GEMM calls that write into column slices of the result; fills `xa` when given."""
    y = x.new_empty(x.shape[0], sum(weight.shape[0] for weight in w))
    products = slices(xa, ranks(a)) if xa is not None else []
    for g, out in enumerate(slices(y, [weight.shape[0] for weight in w])):
        weight = w[g].t()
        adapted = bool(a) and a[g].numel() > 0
        folded = adapted and _worth_adding(x, w[g], keeps_product=xa is not None)
        if folded:
            weight = torch.addmm(w[g], b[g], a[g], alpha=scales[g]).t()
        if bias:
            torch.addmm(bias[g], x, weight, out=out)
        else:
            torch.mm(x, weight, out=out)
        if adapted:
            product = None
            if products:
                product = torch.mm(x, a[g].t(), out=products[g])
            if not folded:
                out.addmm_(torch.mm(x, a[g].t()) if product is None else product, b[g].t(), alpha=scales[g])
    return y


def _scaled_mm(left: Tensor, right: Tensor, scale: float, out: Tensor | None = None) -> Tensor:
    """scale * left right; into `out` when given."""
    out = left.new_empty(left.shape[0], right.shape[1]) if out is None else out
    return torch.addmm(out, left, right, beta=0, alpha=scale, out=out)


def _mm_through(dy: Sequence[Tensor], b: Sequence[Tensor], scales: Sequence[float], sizes: Sequence[int]) -> Tensor:
    q = dy[0].new_empty(dy[0].shape[0], sum(sizes))
    for g, part in enumerate(slices(q, sizes)):
        if sizes[g]:
            _scaled_mm(dy[g], b[g], scales[g], part)
    return q


def _mm_backward(
    dy: Sequence[Tensor], x: Tensor, w: Sequence[Tensor], a: Sequence[Tensor], b: Sequence[Tensor], scales: Sequence[float],
    xa: Tensor, need_x: bool, need_lora: bool, q: Tensor | None,
) -> tuple[Tensor | None, list[Tensor], list[Tensor]]:
    """(dx, dA, dB) by GEMM calls; the sum over members is accumulated with beta = 1."""
    sizes = ranks(a) or [0] * len(w)
    folded = [r > 0 and _worth_adding(x, m, need_lora or q is not None) for r, m in zip(sizes, w)]
    unfolded = any(r > 0 and not f for r, f in zip(sizes, folded))
    if q is None and ((need_lora and sum(sizes) > 0) or (need_x and unfolded)):
        q = _mm_through(dy, b, scales, sizes)
    through = slices(q, sizes) if q is not None else []
    dx: Tensor | None = None
    if need_x:
        for g, gradient in enumerate(dy):
            weight = torch.addmm(w[g], b[g], a[g], alpha=scales[g]) if folded[g] else w[g]
            dx = torch.mm(gradient, weight) if dx is None else dx.addmm_(gradient, weight)
            if sizes[g] and not folded[g]:
                dx.addmm_(through[g], a[g])
    if not need_lora:
        return dx, [], []
    products = slices(xa, sizes) if sum(sizes) else []
    da = [torch.mm(through[g].t(), x) if r else x.new_empty(0) for g, r in enumerate(sizes)]
    db = [_scaled_mm(dy[g].t(), products[g], scales[g]) if r else x.new_empty(0) for g, r in enumerate(sizes)]
    return dx, da, db


def run_forward(
    x_s: Tensor, x_t: Tensor | None, w_s: Sequence[Tensor], w_t: Sequence[Tensor], bias_s: Sequence[Tensor],
    bias_t: Sequence[Tensor], a_s: Sequence[Tensor], b_s: Sequence[Tensor], a_t: Sequence[Tensor], b_t: Sequence[Tensor],
    scales_s: Sequence[float], scales_t: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor]:
    """What the custom op `pair_linear_fwd` runs, without its dispatch; inside torch.no_grad."""
    _check_pair(x_s, x_t, w_s, w_t, bias_s, bias_t, a_s, b_s, a_t, b_t, scales_s, scales_t)
    rank = sum(ranks(a_s))
    adapted = rank > 0 or (x_t is not None and sum(ranks(a_t)) > 0)
    if chosen_kernel(x_s, len(w_s), adapted) == "triton":
        return pair_linear_triton.forward(x_s, x_t, w_s, w_t, bias_s, bias_t, a_s, b_s, a_t, b_t, scales_s, scales_t)
    xa = x_s.new_empty(x_s.shape[0], rank) if rank else x_s.new_empty(0)
    y_s = _mm_forward(x_s, w_s, bias_s, a_s, b_s, scales_s, xa if rank else None)
    y_t = x_s.new_empty(0) if x_t is None else _mm_forward(x_t, w_t, bias_t, a_t, b_t, scales_t, None)
    return y_s, y_t, xa


def run_backward(
    dy: Sequence[Tensor], x: Tensor, w: Sequence[Tensor], a: Sequence[Tensor], b: Sequence[Tensor], scales: Sequence[float],
    xa: Tensor, need_x: bool, need_w: bool, need_bias: bool, need_lora: bool, q: Tensor | None = None,
) -> list[Tensor]:
    """What the custom op `pair_linear_bwd` runs, without its dispatch; inside torch.no_grad."""
    _check_gradients(dy, [m.shape[0] for m in w], x)
    need_lora = need_lora and len(a) > 0
    out: list[Tensor] = []
    if chosen_kernel(x, len(w), sum(ranks(a)) > 0) == "triton":
        dx, da, db = pair_linear_triton.backward(dy, x, w, a, b, scales, xa, need_x, need_lora, q)
    else:
        dx, da, db = _mm_backward(dy, x, w, a, b, scales, xa, need_x, need_lora, q)
    if dx is not None:
        out.append(dx)
    if need_w:
        out += [torch.mm(gradient.t(), x) for gradient in dy]
    if need_bias:
        out += [gradient.sum(0) for gradient in dy]
    return out + da + db


@torch.library.custom_op("dopsd::pair_linear_fwd", mutates_args=())
def pair_linear_fwd(
    x_s: Tensor, x_t: Tensor | None, w_s: Sequence[Tensor], w_t: Sequence[Tensor], bias_s: Sequence[Tensor],
    bias_t: Sequence[Tensor], a_s: Sequence[Tensor], b_s: Sequence[Tensor], a_t: Sequence[Tensor], b_t: Sequence[Tensor],
    scales_s: Sequence[float], scales_t: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor]:
    """Both branches. Returns (y_s [Ts, sum N], y_t [Tt, sum N], xa_s [Ts, sum r]: x_s A^T, which the backward needs); y_t
    and xa_s are empty [0] when there is no teacher, no student adapter.

    w_t: the same tensors as w_s when the base is shared; x_t None: no teacher, teacher lists are []. bias, a, b: [] for none;
    in a and b an empty tensor (numel 0) for a member without adapter. ValueError for shapes, dtypes, devices or strides.
    """
    return run_forward(x_s, x_t, w_s, w_t, bias_s, bias_t, a_s, b_s, a_t, b_t, scales_s, scales_t)


@pair_linear_fwd.register_fake
def _(x_s: Tensor, x_t: Tensor | None, w_s: Sequence[Tensor], w_t: Sequence[Tensor], bias_s: Sequence[Tensor],
      bias_t: Sequence[Tensor], a_s: Sequence[Tensor], b_s: Sequence[Tensor], a_t: Sequence[Tensor], b_t: Sequence[Tensor],
      scales_s: Sequence[float], scales_t: Sequence[float]) -> tuple[Tensor, Tensor, Tensor]:
    _check_pair(x_s, x_t, w_s, w_t, bias_s, bias_t, a_s, b_s, a_t, b_t, scales_s, scales_t)
    columns, rank = sum(m.shape[0] for m in w_s), sum(ranks(a_s))
    y_t = x_s.new_empty(0) if x_t is None else x_t.new_empty(x_t.shape[0], columns)
    xa = x_s.new_empty(x_s.shape[0], rank) if rank else x_s.new_empty(0)
    return x_s.new_empty(x_s.shape[0], columns), y_t, xa


@torch.library.custom_op("dopsd::pair_linear_bwd", mutates_args=())
def pair_linear_bwd(
    dy: Sequence[Tensor], x: Tensor, w: Sequence[Tensor], a: Sequence[Tensor], b: Sequence[Tensor], scales: Sequence[float],
    xa: Tensor, need_x: bool, need_w: bool, need_bias: bool, need_lora: bool, q: Tensor | None = None,
) -> list[Tensor]:
    """Gradients of one branch: one flat list [dx] + dW (G) + dbias (G) + dA (G) + dB (G), of which every group that is not
    needed is left out (`split_gradients` takes it apart); dA and dB are empty [0] for a member without adapter, and
    left out when there is no adapter at all (a == []).

    dy: one [T, N_g] per member, any row stride. xa: from the forward, read only for need_lora. q: what `pair_linear_through`
    gave for the same dy, for callers that ask for dx and for the rest in two calls; None: found here.
        q_g = s_g dy_g B_g      dx = sum_g dy_g W_g + q_g A_g      dW_g = dy_g^T x      dbias_g = sum_T dy_g
                                dA_g = q_g^T x                     dB_g = s_g dy_g^T xa_g
    """
    return run_backward(dy, x, w, a, b, scales, xa, need_x, need_w, need_bias, need_lora, q)


@pair_linear_bwd.register_fake
def _(dy: Sequence[Tensor], x: Tensor, w: Sequence[Tensor], a: Sequence[Tensor], b: Sequence[Tensor], scales: Sequence[float],
      xa: Tensor, need_x: bool, need_w: bool, need_bias: bool, need_lora: bool,
      q: Tensor | None = None) -> list[Tensor]:
    out = [x.new_empty(x.shape)] if need_x else []
    if need_w:
        out += [m.new_empty(m.shape) for m in w]
    if need_bias:
        out += [m.new_empty(m.shape[0]) for m in w]
    if need_lora:
        out += [m.new_empty(m.shape) if m.numel() else x.new_empty(0) for m in (*a, *b)]
    return out


@torch.library.custom_op("dopsd::pair_linear_through", mutates_args=())
def pair_linear_through(dy: Sequence[Tensor], b: Sequence[Tensor], scales: Sequence[float]) -> Tensor:
    """q [T, sum r], q_g = s_g dy_g B_g: the gradient with respect to x A^T. dy, b, scales as in `pair_linear_bwd`."""
    _check_gradients(dy, [m.shape[0] if m.numel() else y.shape[1] for m, y in zip(b, dy)], dy[0])
    sizes = _widths(b)
    if chosen_kernel(dy[0], len(dy), sum(sizes) > 0) == "triton":
        return pair_linear_triton.through(dy, b, scales, sizes)
    return _mm_through(dy, b, scales, sizes)


@pair_linear_through.register_fake
def _(dy: Sequence[Tensor], b: Sequence[Tensor], scales: Sequence[float]) -> Tensor:
    return dy[0].new_empty(dy[0].shape[0], sum(_widths(b)))


def _rank_flops(tokens: int, w: Sequence[Tensor], a: Sequence[Tensor]) -> int:
    """Of x A^T and (x A^T) B^T for one branch."""
    return sum(2 * tokens * r * (weight.shape[0] + weight.shape[1]) for r, weight in zip(ranks(a), w))


@declares("dopsd::pair_linear_fwd")
def _forward_cost(
    x_s: Tensor, x_t: Tensor | None, w_s: Sequence[Tensor], w_t: Sequence[Tensor], bias_s: Sequence[Tensor],
    bias_t: Sequence[Tensor], a_s: Sequence[Tensor], b_s: Sequence[Tensor], a_t: Sequence[Tensor], b_t: Sequence[Tensor],
    *_: Any, out: Any,
) -> Cost:
    branches = [(x_s, w_s, bias_s, a_s)] + ([] if x_t is None else [(x_t, w_t, bias_t, a_t)])
    adapters = sum(r > 0 for _, _, _, a in branches for r in ranks(a))
    flops = sum(2 * x.shape[0] * sum(m.numel() for m in w) + _rank_flops(x.shape[0], w, a) for x, w, _, a in branches)
    if sum(x.shape[0] for x, *_ in branches) == 0:
        return Cost()
    if fused(x_s, len(w_s), adapters > 0):
        gemms = 2 if adapters else 1
        return Cost(gemms, gemms, 0, flops)
    gemms = len(w_s) * len(branches) + 2 * adapters
    # a bias is part of the GEMM, except for a column slice: there PyTorch copies it into the result first
    copies = [(x, bias) for x, w, biases, _ in branches for bias in biases if len(w) > 1]
    moved = sum(size(bias) + x.shape[0] * size(bias) for x, bias in copies)
    return Cost(gemms + len(copies), gemms, moved, flops)


@declares("dopsd::pair_linear_through")
def _through_cost(dy: Sequence[Tensor], b: Sequence[Tensor], scales: Sequence[float], *, out: Any) -> Cost:
    adapters = sum(r > 0 for r in _widths(b))
    gemms = (1 if fused(dy[0], len(dy), adapters > 0) else adapters) if dy[0].numel() and adapters else 0
    return Cost(gemms, gemms, 0, sum(2 * dy[0].shape[0] * m.numel() for m in b))


@declares("dopsd::pair_linear_bwd")
def _backward_cost(
    dy: Sequence[Tensor], x: Tensor, w: Sequence[Tensor], a: Sequence[Tensor], b: Sequence[Tensor], scales: Sequence[float],
    xa: Tensor, need_x: bool, need_w: bool, need_bias: bool, need_lora: bool, q: Tensor | None = None, *, out: Any,
) -> Cost:
    tokens, adapters = x.shape[0], sum(r > 0 for r in ranks(a))
    if tokens == 0:
        return Cost()
    base, through = 2 * tokens * sum(m.numel() for m in w), _rank_flops(tokens, w, a)
    into = sum(2 * tokens * r * m.shape[0] for r, m in zip(ranks(a), w))
    needs_q = adapters > 0 and (need_x or need_lora) and q is None
    flops = base * (need_x + need_w) + into * needs_q + through * need_lora + (through - into) * need_x
    if fused(x, len(w), adapters > 0):
        gemms = needs_q + need_x + (need_lora and adapters > 0)
    else:
        gemms = len(w) * need_x + adapters * (needs_q + need_x + 2 * need_lora)
    gemms += len(w) * need_w
    sums = len(w) * need_bias
    moved = sum(size(gradient) + gradient.shape[1] * gradient.element_size() for gradient in dy) if need_bias else 0
    return Cost(gemms + sums, gemms, moved, flops)


def split_gradients(
    flat: Sequence[Tensor], members: int, need_x: bool, need_w: bool, need_bias: bool, need_lora: bool
) -> tuple[Tensor | None, list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """(dx or None, dW, dbias, dA, dB) of what `pair_linear_bwd` returned for the same flags; [] for what was left out."""
    rest = list(flat)

    def take(wanted: bool, count: int = members) -> list[Tensor]:
        nonlocal rest
        if not wanted or not rest:
            return []
        taken, rest = rest[:count], rest[count:]
        return taken

    dx = take(need_x, 1)
    return dx[0] if dx else None, take(need_w), take(need_bias), take(need_lora), take(need_lora)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x_s, _, w_s, _, bias_s, _, a_s, b_s, _, _, scales_s, _ = inputs
    ctx.lengths = [len(part) for part in inputs[2:10]]
    ctx.scales = list(scales_s)
    # autograd for list arguments takes [] for a list of no tensors
    ctx.no_scales = [None if scales else [] for scales in inputs[10:]]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1], output[2])
    # the parameters themselves: under ZeRO-3 their storage is released after the forward and gathered for the backward
    ctx.save_for_backward(x_s, output[2], *w_s, *a_s, *b_s)


def _backward(ctx: Any, dy_s: Tensor | None, dy_t: Tensor | None, dxa: Tensor | None) -> tuple[Any, ...]:
    nothing: list[Any] = [[None] * length for length in ctx.lengths]
    grad_x: Tensor | None = None
    if dy_s is not None:
        x_s, xa, *rest = ctx.saved_tensors
        count, adapters = ctx.lengths[0], ctx.lengths[4]
        w, a, b = rest[:count], rest[count : count + adapters], rest[count + adapters :]
        needs = ctx.needs_input_grad
        flags = needs[0], any(needs[2]), any(needs[4]), any(needs[6]) or any(needs[7])
        dy = slices(dy_s.contiguous(), [m.shape[0] for m in w])
        flat = torch.ops.dopsd.pair_linear_bwd(dy, x_s, w, a, b, ctx.scales, xa, *flags)
        grad_x, dw, dbias, da, db = split_gradients(flat, count, *flags)
        for place, grads, values in ((0, dw, w), (2, dbias, dbias), (4, da, a), (5, db, b)):
            if grads:
                nothing[place] = [g if g.shape == v.shape else torch.zeros_like(v) for g, v in zip(grads, values)]
    return grad_x, None, *nothing, *ctx.no_scales


pair_linear_fwd.register_autograd(_backward, setup_context=_setup_context)


def pair_linear(
    x_s: Tensor, x_t: Tensor | None, w_s: Sequence[Tensor], w_t: Sequence[Tensor] = (), *,
    bias_s: Sequence[Tensor] = (), bias_t: Sequence[Tensor] = (),
    a_s: Sequence[Tensor] = (), b_s: Sequence[Tensor] = (), a_t: Sequence[Tensor] = (), b_t: Sequence[Tensor] = (),
    scales_s: Sequence[float] = (), scales_t: Sequence[float] = (),
) -> tuple[Tensor, Tensor | None]:
    """(y_s [Ts, sum N], y_t [Tt, sum N] or None), differentiable with respect to the student's tensors only.

    Arguments as in `pair_linear_fwd`; ValueError, one line, for shapes, dtypes, devices or strides that do not fit.
    """
    y_s, y_t, _ = pair_linear_fwd(
        x_s, x_t, list(w_s), list(w_t), list(bias_s), list(bias_t), list(a_s), list(b_s), list(a_t), list(b_t),
        [float(s) for s in scales_s], [float(s) for s in scales_t],
    )
    return y_s, None if x_t is None else y_t
