"""Norm of a sublayer's output, gate and residual, then the next pre-norm and its modulation, in one pass.

    r[t] = x[t] + tanh(gate[seq(t)]) * h[t] * rstd_h[t] * weight
    y[t] = r[t] * rstd_r[t] * next_weight * (1 + next_scale[seq(t)])        rstd_v[t] = rsqrt(mean_d v[t, d]^2 + eps)

x (residual stream), h (output of attention or feed-forward), r, y `[T, D]`; weight, next_weight `[D]`; gate, next_scale
`[S, D]`, the raw modulation; rstd fp32 `[T]`; T tokens of S packed sequences, width D. gate None: factor 1; next_scale
None: 1 + 0; next_weight None: no y. y is made of r as it is stored, so that a backward can make the same y again.
From diffusers' ZImageTransformerBlock: `x + gate_msa * attention_norm2(attn)`, then `ffn_norm1(x) * scale_mlp`.

Backward, from dr and dy, with G = tanh(gate), hhat = h * rstd_h, rhat = r * rstd_r, a = dy * next_weight * (1 + next_scale):

    dx = dr + rstd_r * (a - rhat * mean_d(a * rhat))
    dh = rstd_h * (b - hhat * mean_d(b * hhat))                             b = dx * G * weight
    P_s = sum of dx * hhat over the rows of sequence s: dgate_s = (1 - G_s^2) * weight * P_s, dweight = sum_s G_s * P_s
    Q_s = sum of dy * rhat: dnext_scale_s = next_weight * Q_s, dnext_weight = sum_s (1 + next_scale_s) * Q_s
"""

from __future__ import annotations

import torch
from torch import Tensor

from dopsd_kernels import native_ops
from dopsd_kernels.costs import Cost, declares, size
from dopsd_kernels.cubins import CompileCase
from dopsd_kernels.direct_autograd import differentiable, unrecorded
from dopsd_kernels.launch import launch
from dopsd_kernels.norm_parts import (
    MOST_SPLIT,
    Part,
    backward_cost,
    check,
    check_sequences,
    choose,
    chunks_or_none,
    contiguous_rows,
    finish,
    finish_case,
    given,
    kernel_case,
    launch_shape,
    like,
    load_factor,
    modulate,
    pipeline_stages,
    row_split,
    row_stride,
    statistics_dtype,
    tanh,
)
from dopsd_kernels.sequences import Sequences
from dopsd_kernels.triton_compat import tl, triton

BACKWARD_ELEMENTS = 8
"""A thread holds so many of a row's columns: with 16 the assembler of Triton 3.7 spills for compute capability 8.x."""


@triton.jit
def _load_gated(weight, gate, gate_stride, sequence, columns, mask):
    """weight * tanh(gate[sequence]) in fp32."""
    factor = tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32)
    if gate is not None:
        factor *= tanh(tl.load(gate + sequence * gate_stride + columns, mask=mask, other=0.0).to(tl.float32))
    return factor


@triton.jit
def forward_kernel(
    x, x_stride, h, h_stride, weight, gate, gate_stride, next_weight, next_scale, next_scale_stride, row_sequence, eps,
    r, y, rstd_h, rstd_r, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):
    """Grid (T,): program t makes row t of r and, with `next_weight`, of y, and their statistics."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < WIDTH
    sequence = row
    if gate is not None or next_scale is not None:
        sequence = tl.load(row_sequence + row).to(tl.int64)
    hidden = tl.load(h + row * h_stride + columns, mask=mask, other=0.0).to(tl.float32)
    residual = tl.load(x + row * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
    factor = _load_gated(weight, gate, gate_stride, sequence, columns, mask)
    inverse = tl.rsqrt(tl.sum(hidden * hidden, axis=0) / WIDTH + eps)
    tl.store(rstd_h + row, inverse)
    stored = (residual + hidden * inverse * factor).to(r.dtype.element_ty)
    tl.store(r + row * WIDTH + columns, stored, mask=mask)
    if next_weight is not None:
        next_factor = load_factor(next_weight, next_scale, next_scale_stride, sequence, columns, mask)
        value = stored.to(tl.float32)
        inverse = tl.rsqrt(tl.sum(value * value, axis=0) / WIDTH + eps)
        tl.store(rstd_r + row, inverse)
        tl.store(y + row * WIDTH + columns, (value * inverse * next_factor).to(y.dtype.element_ty), mask=mask)


@triton.jit
def backward_kernel(
    dr, dr_stride, dy, dy_stride, h, h_stride, r, r_stride, weight, gate, gate_stride,
    next_weight, next_scale, next_scale_stride, rstd_h, rstd_r, row_sequence, chunks,
    dx, dh, y, partial, next_partial,
    WIDTH: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):
    """With a partial `[C * SPLIT, WIDTH]`: grid (C * SPLIT,), program p takes every SPLIT-th row of a chunk and writes row
    p of it: their sum of dx * hhat, of dy * rhat. Without: grid (T,), one row each. `y`: written again if not None."""
    program = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    mask = columns < WIDTH
    if partial is not None or next_partial is not None:
        chunk = chunks + 3 * (program // SPLIT)
        first = tl.load(chunk) + program % SPLIT
        last = tl.load(chunk + 1)
        sequence = tl.load(chunk + 2).to(tl.int64)
    else:
        first = program
        last = program + 1
        sequence = program.to(tl.int64)
        if gate is not None or next_scale is not None:
            sequence = tl.load(row_sequence + sequence).to(tl.int64)
    factor = _load_gated(weight, gate, gate_stride, sequence, columns, mask)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    next_total = tl.zeros([BLOCK], dtype=tl.float32)
    for index in tl.range(first, last, SPLIT, num_stages=STAGES):
        row = tl.cast(index, tl.int64)
        gradient = tl.zeros([BLOCK], dtype=tl.float32)
        if dr is not None:
            gradient = tl.load(dr + row * dr_stride + columns, mask=mask, other=0.0).to(tl.float32)
        if dy is not None or y is not None:
            inverse = tl.load(rstd_r + row)
            normed = tl.load(r + row * r_stride + columns, mask=mask, other=0.0).to(tl.float32) * inverse
            # from the cache for every row: kept in registers, it would leave room for one program a processor only
            next_factor = load_factor(next_weight, next_scale, next_scale_stride, sequence, columns, mask)
            if y is not None:
                tl.store(y + row * WIDTH + columns, (normed * next_factor).to(y.dtype.element_ty), mask=mask)
            if dy is not None:
                inward = tl.load(dy + row * dy_stride + columns, mask=mask, other=0.0).to(tl.float32)
                if next_partial is not None:
                    next_total += inward * normed
                inward *= next_factor
                gradient += (inward - normed * (tl.sum(inward * normed, axis=0) / WIDTH)) * inverse
        tl.store(dx + row * WIDTH + columns, gradient.to(dx.dtype.element_ty), mask=mask)
        inverse_h = tl.load(rstd_h + row)
        normed_h = tl.load(h + row * h_stride + columns, mask=mask, other=0.0).to(tl.float32) * inverse_h
        if partial is not None:
            total += gradient * normed_h
        gradient *= factor
        gradient = (gradient - normed_h * (tl.sum(gradient * normed_h, axis=0) / WIDTH)) * inverse_h
        tl.store(dh + row * WIDTH + columns, gradient.to(dh.dtype.element_ty), mask=mask)
    place = program.to(tl.int64) * WIDTH + columns
    if partial is not None:
        tl.store(partial + place, total, mask=mask)
    if next_partial is not None:
        tl.store(next_partial + place, next_total, mask=mask)


def gated_residual_norm_ref(
    x: Tensor,
    h: Tensor,
    weight: Tensor,
    gate: Tensor | None,
    next_weight: Tensor | None,
    next_scale: Tensor | None,
    row_sequence: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor | None]:
    """(r, y or None) in plain PyTorch, differentiable; computed in fp32, for float64 in float64."""

    def normed(value: Tensor) -> Tensor:
        return value * torch.rsqrt(value.square().mean(-1, keepdim=True) + eps)

    statistics = statistics_dtype(x.dtype)
    update = normed(h.to(statistics)) * _gated_rows(weight, gate, row_sequence, statistics)
    r = (x.to(statistics) + update).to(x.dtype)
    if next_weight is None:
        return r, None
    return r, modulate(normed(r.to(statistics)), next_weight, next_scale, row_sequence).to(x.dtype)


@torch.library.custom_op("dopsd::gated_residual_norm_fwd", mutates_args=())
def gated_residual_norm_fwd(
    x: Tensor,
    h: Tensor,
    weight: Tensor,
    gate: Tensor | None,
    next_weight: Tensor | None,
    next_scale: Tensor | None,
    row_sequence: Tensor,
    eps: float,
    chunks: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> (r `[T, D]`, y `[T, D]`, rstd_h `[T]`, rstd_r `[T]`); y and rstd_r are empty without `next_weight`. `chunks`
    (Sequences.chunks) serves autograd only: the gradients of weights, gate and next_scale need it."""
    _check_forward(x, h, weight, gate, next_weight, next_scale, row_sequence)
    chosen = choose("gated_residual_norm", x, h, weight, gate, next_weight, next_scale)
    if chosen == "native":
        return native_ops.gated_residual_norm_fwd(x, h, weight, gate, next_weight, next_scale, row_sequence, eps)
    if chosen == "torch":
        return _forward_torch(x, h, weight, gate, next_weight, next_scale, row_sequence, eps)
    tokens, width = x.shape
    r, y, rstd_h, rstd_r = _outputs(x, next_weight)
    launch(
        forward_kernel, (tokens,), x, x.stride(0), h, h.stride(0), weight, gate, row_stride(gate),
        next_weight, next_scale, row_stride(next_scale), row_sequence, eps, r, y, rstd_h, rstd_r,
        WIDTH=width, **launch_shape(width),
    )
    return r, y, rstd_h, rstd_r


def _check_forward(
    x: Tensor,
    h: Tensor,
    weight: Tensor,
    gate: Tensor | None,
    next_weight: Tensor | None,
    next_scale: Tensor | None,
    row_sequence: Tensor,
) -> None:
    vectors, modulations = {"weight": weight, "next_weight": next_weight}, {"gate": gate, "next_scale": next_scale}
    check("gated_residual_norm", x, row_sequence, {"h": h}, vectors, modulations)
    if next_weight is None and next_scale is not None:
        raise ValueError("gated_residual_norm: next_scale without next_weight: pass both, or neither for no y")


def _outputs(x: Tensor, next_weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens, statistics = x.shape[0], statistics_dtype(x.dtype)
    y = x.new_empty(0 if next_weight is None else x.shape)
    rstd_r = x.new_empty(0 if next_weight is None else tokens, dtype=statistics)
    return x.new_empty(x.shape), y, x.new_empty(tokens, dtype=statistics), rstd_r


def _forward_torch(
    x: Tensor,
    h: Tensor,
    weight: Tensor,
    gate: Tensor | None,
    next_weight: Tensor | None,
    next_scale: Tensor | None,
    row_sequence: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    statistics = statistics_dtype(x.dtype)
    hidden = h.to(statistics)
    rstd_h = torch.rsqrt(hidden.square().mean(-1) + eps)
    r = (hidden * rstd_h[:, None]).mul_(_gated_rows(weight, gate, row_sequence, statistics)).add_(x).to(x.dtype)
    if next_weight is None:
        return r, x.new_empty(0), rstd_h, x.new_empty(0, dtype=statistics)
    value = r.to(statistics)
    rstd_r = torch.rsqrt(value.square().mean(-1) + eps)
    y = modulate(value * rstd_r[:, None], next_weight, next_scale, row_sequence)
    return r, y.to(x.dtype), rstd_h, rstd_r


def _gated_rows(weight: Tensor, gate: Tensor | None, row_sequence: Tensor, dtype: torch.dtype) -> Tensor:
    factor = weight.to(dtype)
    return factor if gate is None else (torch.tanh(gate.to(dtype)) * factor).index_select(0, row_sequence)


@gated_residual_norm_fwd.register_fake
def _(x, h, weight, gate, next_weight, next_scale, row_sequence, eps, chunks=None):
    _check_forward(x, h, weight, gate, next_weight, next_scale, row_sequence)
    return _outputs(x, next_weight)


@torch.library.custom_op("dopsd::gated_residual_norm_bwd", mutates_args=())
def gated_residual_norm_bwd(
    dr: Tensor | None,
    dy: Tensor | None,
    h: Tensor,
    r: Tensor,
    weight: Tensor,
    gate: Tensor | None,
    next_weight: Tensor | None,
    next_scale: Tensor | None,
    rstd_h: Tensor,
    rstd_r: Tensor,
    row_sequence: Tensor,
    chunks: Tensor,
    need_weight: bool,
    need_modulation: bool,
    emit_y: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> (dx, dh `[T, D]`, dweight `[D]`, dgate `[S, D]`, dnext_weight `[D]`, dnext_scale `[S, D]`, the sums of rstd_h's
    dtype, y as the forward made it). dr or dy None: zero. What is not asked, or belongs to a None, is empty. `chunks` is
    read only for the sums."""
    _check_backward(dr, dy, h, r, weight, gate, next_weight, next_scale, row_sequence, emit_y)
    chosen = choose("gated_residual_norm", h, dr, dy, r, weight, gate, next_weight, next_scale)
    if chosen == "native":
        return native_ops.gated_residual_norm_bwd(
            dr, dy, h, r, weight, gate, next_weight, next_scale, rstd_h, rstd_r, row_sequence, chunks,
            need_weight, need_modulation, emit_y,
        )
    parts = _parts(h, weight, gate, next_weight, next_scale, need_weight, need_modulation)
    sums = (*parts[0].results(h), *parts[1].results(h))
    if chosen == "torch":
        dx, dh, y = _backward_torch(dr, dy, h, r, parts, rstd_h, rstd_r, row_sequence, emit_y)
        return dx, dh, *sums, y
    tokens, width = h.shape
    dx, dh, y = h.new_empty(h.shape), h.new_empty(h.shape), h.new_empty(h.shape if emit_y else 0)
    asked = [part for part in parts if part.asked]
    if tokens == 0:
        for part in asked:
            part.zero_()
        return dx, dh, *sums, y
    split = row_split(chunks.shape[0]) if asked else 1
    programs = chunks.shape[0] * split if asked else tokens
    partials = [h.new_empty(programs, width, dtype=torch.float32) if part.asked else None for part in parts]
    launch(
        backward_kernel, (programs,), dr, row_stride(dr), dy, row_stride(dy), h, h.stride(0), r, r.stride(0),
        weight, gate, row_stride(gate), next_weight, next_scale, row_stride(next_scale), rstd_h, rstd_r, row_sequence,
        chunks, dx, dh, y if emit_y else None, *partials,
        WIDTH=width, SPLIT=split, STAGES=pipeline_stages(width, h.element_size(), 4) if asked else 1,
        **launch_shape(width, BACKWARD_ELEMENTS),
    )
    if asked:
        finish(given(*partials), asked, chunks, split)
    return dx, dh, *sums, y


def _check_backward(
    dr: Tensor | None,
    dy: Tensor | None,
    h: Tensor,
    r: Tensor,
    weight: Tensor,
    gate: Tensor | None,
    next_weight: Tensor | None,
    next_scale: Tensor | None,
    row_sequence: Tensor,
    emit_y: bool,
) -> None:
    rows, vectors = {"dr": dr, "dy": dy, "r": r}, {"weight": weight, "next_weight": next_weight}
    check("gated_residual_norm_bwd", h, row_sequence, rows, vectors, {"gate": gate, "next_scale": next_scale})
    if next_weight is None and (emit_y or dy is not None):
        raise ValueError("gated_residual_norm_bwd: there is no y without next_weight, but dy or emit_y is given")


def _parts(
    h: Tensor,
    weight: Tensor,
    gate: Tensor | None,
    next_weight: Tensor | None,
    next_scale: Tensor | None,
    need_weight: bool,
    need_modulation: bool,
) -> list[Part]:
    return [
        Part.new(h, weight, gate, need_weight, need_modulation, gated=True),
        Part.new(h, next_weight, next_scale, need_weight, need_modulation),
    ]


def _backward_torch(
    dr: Tensor | None,
    dy: Tensor | None,
    h: Tensor,
    r: Tensor,
    parts: list[Part],
    rstd_h: Tensor,
    rstd_r: Tensor,
    row_sequence: Tensor,
    emit_y: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    inner, following = parts
    dtype = rstd_h.dtype
    y = h.new_empty(0)
    dx = torch.zeros_like(h, dtype=dtype) if dr is None else dr.to(dtype)
    if dy is None:
        following.zero_()
    if emit_y or dy is not None:
        normed = r.to(dtype) * rstd_r[:, None]
        if emit_y:
            y = modulate(normed, following.weight, following.modulation, row_sequence).to(h.dtype)
        if dy is not None:
            inward = dy.to(dtype)
            following.finish_torch(inward * normed, row_sequence)
            inward = modulate(inward, following.weight, following.modulation, row_sequence)
            dx = dx + (inward - normed * (inward * normed).mean(-1, keepdim=True)).mul_(rstd_r[:, None])
    normed = h.to(dtype) * rstd_h[:, None]
    inner.finish_torch(dx * normed, row_sequence)
    assert inner.weight is not None
    dh = dx * _gated_rows(inner.weight, inner.modulation, row_sequence, dtype)
    dh = (dh - normed * (dh * normed).mean(-1, keepdim=True)).mul_(rstd_h[:, None])
    return dx.to(h.dtype, copy=dx is dr), dh.to(h.dtype), y


@gated_residual_norm_bwd.register_fake
def _(
    dr, dy, h, r, weight, gate, next_weight, next_scale, rstd_h, rstd_r, row_sequence, chunks,
    need_weight, need_modulation, emit_y,
):
    _check_backward(dr, dy, h, r, weight, gate, next_weight, next_scale, row_sequence, emit_y)
    parts = _parts(h, weight, gate, next_weight, next_scale, need_weight, need_modulation)
    y = h.new_empty(h.shape if emit_y else 0)
    return h.new_empty(h.shape), h.new_empty(h.shape), *parts[0].results(h), *parts[1].results(h), y


def _save(ctx, inputs, output):
    _, h, weight, gate, next_weight, next_scale, row_sequence, _, chunks = inputs
    r, y, rstd_h, rstd_r = output
    ctx.save_for_backward(h, r, weight, gate, next_weight, next_scale, rstd_h, rstd_r, row_sequence, chunks)
    ctx.mark_non_differentiable(rstd_h, rstd_r, *([y] if next_weight is None else []))
    ctx.set_materialize_grads(False)


def _backward(ctx, dr, dy, _, __):
    if dr is None and dy is None:
        return (None,) * 9
    h, r, weight, gate, next_weight, next_scale, rstd_h, rstd_r, row_sequence, chunks = ctx.saved_tensors
    _, _, *needed, _, _, _ = ctx.needs_input_grad
    chunks = chunks_or_none("gated_residual_norm_fwd", chunks, row_sequence, any(needed))
    dr, dy = (None if gradient is None else contiguous_rows(gradient) for gradient in (dr, dy))
    dx, dh, *sums, _ = _backward_op(
        dr, dy, h, r, weight, gate, next_weight, next_scale, rstd_h, rstd_r, row_sequence, chunks,
        needed[0] or needed[2], needed[1] or needed[3], False,
    )
    gradients = [like(*each) for each in zip(sums, (weight, gate, next_weight, next_scale), needed)]
    return dx, dh, *gradients, None, None, None


gated_residual_norm_fwd.register_autograd(_backward, setup_context=_save)
_forward_op = differentiable(gated_residual_norm_fwd, _save, _backward)
_backward_op = unrecorded(gated_residual_norm_bwd)


def gated_residual_norm(
    x: Tensor,
    h: Tensor,
    weight: Tensor,
    gate: Tensor | None,
    next_weight: Tensor | None,
    next_scale: Tensor | None,
    sequences: Sequences,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor | None]:
    """(r, y) `[T, D]` of x's dtype, y None without `next_weight`; differentiable in all six tensors.

    x, h `[T, D]` of one dtype, fp16, bf16, fp32 or fp64; weight, next_weight `[D]` and gate, next_scale `[S, D]` of any of
    these; last dimensions contiguous, any row stride. Computed in fp32 (float64: in float64). ValueError for another
    shape, dtype, device or stride.
    """
    check_sequences("gated_residual_norm", x, {"gate": gate, "next_scale": next_scale}, sequences)
    r, y, _, _ = _forward_op(x, h, weight, gate, next_weight, next_scale, sequences.row_sequence, eps, sequences.chunks)
    return r, None if next_weight is None else y


@declares("dopsd::gated_residual_norm_fwd")
def _forward_cost(x, h, weight, gate, next_weight, next_scale, row_sequence, eps, chunks=None, *, out) -> Cost:
    table = 0 if gate is None and next_scale is None else size(row_sequence)
    moved = size(x, h, weight, gate, next_weight, next_scale, *out)
    return Cost(launches=int(x.shape[0] > 0), elementwise_bytes=table + moved)


@declares("dopsd::gated_residual_norm_bwd")
def _backward_cost(
    dr, dy, h, r, weight, gate, next_weight, next_scale, rstd_h, rstd_r, row_sequence, chunks,
    need_weight, need_modulation, emit_y, *, out,
) -> Cost:
    moved = size(dr, dy, h, weight, gate, rstd_h, out[0], out[1], out[6])
    if emit_y or dy is not None:
        moved += size(r, next_weight, next_scale, rstd_r)
    parts = _parts(h, weight, gate, next_weight, next_scale, need_weight, need_modulation)
    table = None if gate is None and next_scale is None else row_sequence
    return backward_cost(moved, parts, table, chunks, h.shape)


def _compile_cases() -> list[CompileCase]:
    cases = []
    for width, io, gated, next_norm in (
        (3840, "*bf16", True, True),
        (3840, "*bf16", True, False),
        (3840, "*bf16", False, True),
        (3840, "*bf16", False, False),
        (144, "*fp32", True, True),
    ):
        following = io if next_norm else None
        gate, scale = (io, following) if gated else (None, None)
        name = f"{io[1:]} D={width}" + " gate" * gated + " next" * next_norm
        tensors: dict[str, str | None] = {"weight": io, "gate": gate, "gate_stride": "i32", "next_weight": following}
        tensors |= {"next_scale": scale, "next_scale_stride": "i32"}
        forward: dict[str, str | None] = {"x": io, "x_stride": "i32", "h": io, "h_stride": "i32", **tensors}
        forward |= {"row_sequence": "*i32", "eps": "fp32", "r": io, "y": io, "rstd_h": "*fp32", "rstd_r": "*fp32"}
        cases.append(kernel_case(f"gated_residual_norm_fwd {name}", forward_kernel, forward, width))
        for sums in (False, True):
            partial = "*fp32" if sums else None
            backward: dict[str, str | None] = {"dr": io, "dr_stride": "i32", "dy": following, "dy_stride": "i32"}
            backward |= {"h": io, "h_stride": "i32", "r": io, "r_stride": "i32", **tensors}
            backward |= {"rstd_h": "*fp32", "rstd_r": "*fp32", "row_sequence": "*i32", "chunks": "*i32", "dx": io, "dh": io}
            backward |= {"y": None if sums else following, "partial": partial}
            backward["next_partial"] = partial if next_norm else None
            split, stages = (MOST_SPLIT, 2) if sums else (1, 1)
            title = f"gated_residual_norm_bwd {name} " + ("sums" if sums else "emit_y")
            case = kernel_case(title, backward_kernel, backward, width, BACKWARD_ELEMENTS, SPLIT=split, STAGES=stages)
            cases.append(case)
        parts = [(True, gated, True, gated), (True, gated, True, gated)][: 1 + next_norm]
        cases.append(finish_case(f"gated_residual_norm finish {name}", width, io, *parts, gated=gated))
    return cases


COMPILE_CASES = _compile_cases()
