"""RMSNorm, weight and per-sequence scale in one pass.

    y[t] = x[t] * rstd[t] * weight * (1 + scale[seq(t)])        rstd[t] = rsqrt(mean_d x[t, d]^2 + eps)

x, y `[T, D]`, weight `[D]` or None, scale `[S, D]` or None (the raw modulation), rstd fp32 `[T]`; T tokens of S packed
sequences, width D. As in diffusers' ZImageTransformerBlock: `attention_norm1(x) * scale_msa`, with scale_msa = 1 + scale.

Backward, with f = weight * (1 + scale), xhat = x * rstd and g = dy * f:

    dx = rstd * (g - xhat * mean_d(g * xhat))
    P_s = sum of dy * xhat over the rows of sequence s;  dscale_s = weight * P_s;  dweight = sum_s (1 + scale_s) * P_s
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
    kernel_case,
    launch_shape,
    like,
    load_factor,
    modulate,
    pipeline_stages,
    row_split,
    row_stride,
    statistics_dtype,
)
from dopsd_kernels.sequences import Sequences
from dopsd_kernels.triton_compat import tl, triton


@triton.jit
def forward_kernel(
    x, x_stride, weight, scale, scale_stride, row_sequence, eps, y, rstd, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    """Grid (T,): program t makes row t of y and rstd[t]."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < WIDTH
    sequence = row
    if scale is not None:
        sequence = tl.load(row_sequence + row).to(tl.int64)
    value = tl.load(x + row * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
    factor = load_factor(weight, scale, scale_stride, sequence, columns, mask)
    inverse = tl.rsqrt(tl.sum(value * value, axis=0) / WIDTH + eps)
    tl.store(rstd + row, inverse)
    tl.store(y + row * WIDTH + columns, (value * inverse * factor).to(y.dtype.element_ty), mask=mask)


@triton.jit
def backward_kernel(
    dy, dy_stride, x, x_stride, weight, scale, scale_stride, rstd, row_sequence, chunks, dx, y, partial,
    WIDTH: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):
    """With `partial [C * SPLIT, WIDTH]`: grid (C * SPLIT,), program p takes every SPLIT-th row of a chunk and writes row
    p of it, their sum of dy * xhat. Without: grid (T,), one row each. `y`: written again where it is not None."""
    program = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    mask = columns < WIDTH
    if partial is not None:
        chunk = chunks + 3 * (program // SPLIT)
        first = tl.load(chunk) + program % SPLIT
        last = tl.load(chunk + 1)
        sequence = tl.load(chunk + 2).to(tl.int64)
    else:
        first = program
        last = program + 1
        sequence = program.to(tl.int64)
        if scale is not None:
            sequence = tl.load(row_sequence + sequence).to(tl.int64)
    factor = load_factor(weight, scale, scale_stride, sequence, columns, mask)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for index in tl.range(first, last, SPLIT, num_stages=STAGES):
        row = tl.cast(index, tl.int64)
        inverse = tl.load(rstd + row)
        normed = tl.load(x + row * x_stride + columns, mask=mask, other=0.0).to(tl.float32) * inverse
        gradient = tl.load(dy + row * dy_stride + columns, mask=mask, other=0.0).to(tl.float32)
        if partial is not None:
            total += gradient * normed
        gradient *= factor
        inner = tl.sum(gradient * normed, axis=0) / WIDTH
        tl.store(dx + row * WIDTH + columns, ((gradient - normed * inner) * inverse).to(dx.dtype.element_ty), mask=mask)
        if y is not None:
            tl.store(y + row * WIDTH + columns, (normed * factor).to(y.dtype.element_ty), mask=mask)
    if partial is not None:
        tl.store(partial + program.to(tl.int64) * WIDTH + columns, total, mask=mask)


def rmsnorm_modulate_ref(x: Tensor, weight: Tensor | None, scale: Tensor | None, row_sequence: Tensor, eps: float) -> Tensor:
    """y in plain PyTorch, differentiable; computed in fp32, for float64 in float64."""
    value = x.to(statistics_dtype(x.dtype))
    value = value * torch.rsqrt(value.square().mean(-1, keepdim=True) + eps)
    return modulate(value, weight, scale, row_sequence).to(x.dtype)


@torch.library.custom_op("dopsd::rmsnorm_modulate_fwd", mutates_args=())
def rmsnorm_modulate_fwd(
    x: Tensor,
    weight: Tensor | None,
    scale: Tensor | None,
    row_sequence: Tensor,
    eps: float,
    chunks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """-> (y `[T, D]` like x, rstd `[T]`). `chunks` (Sequences.chunks) serves autograd only: the gradients of weight and
    scale need it."""
    check("rmsnorm_modulate", x, row_sequence, {}, {"weight": weight}, {"scale": scale})
    chosen = choose("rmsnorm_modulate", x, weight, scale)
    if chosen == "native":
        return native_ops.rmsnorm_modulate_fwd(x, weight, scale, row_sequence, eps)
    statistics = statistics_dtype(x.dtype)
    if chosen == "torch":
        value = x.to(statistics)
        rstd = torch.rsqrt(value.square().mean(-1) + eps)
        return modulate(value * rstd[:, None], weight, scale, row_sequence).to(x.dtype), rstd
    tokens, width = x.shape
    y, rstd = x.new_empty(x.shape), x.new_empty(tokens, dtype=statistics)
    launch(
        forward_kernel, (tokens,), x, x.stride(0), weight, scale, row_stride(scale), row_sequence, eps, y, rstd,
        WIDTH=width, **launch_shape(width),
    )
    return y, rstd


@rmsnorm_modulate_fwd.register_fake
def _(x, weight, scale, row_sequence, eps, chunks=None):
    check("rmsnorm_modulate", x, row_sequence, {}, {"weight": weight}, {"scale": scale})
    return x.new_empty(x.shape), x.new_empty(x.shape[0], dtype=statistics_dtype(x.dtype))


@torch.library.custom_op("dopsd::rmsnorm_modulate_bwd", mutates_args=())
def rmsnorm_modulate_bwd(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    scale: Tensor | None,
    rstd: Tensor,
    row_sequence: Tensor,
    chunks: Tensor,
    need_weight: bool,
    need_scale: bool,
    emit_y: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> (dx `[T, D]`, dweight `[D]` and dscale `[S, D]` of rstd's dtype, y as the forward made it); what is not asked,
    or belongs to a None, is empty. `chunks` is read only for dweight and dscale."""
    check("rmsnorm_modulate_bwd", x, row_sequence, {"dy": dy}, {"weight": weight}, {"scale": scale})
    chosen = choose("rmsnorm_modulate", x, dy, weight, scale)
    if chosen == "native":
        return native_ops.rmsnorm_modulate_bwd(
            dy, x, weight, scale, rstd, row_sequence, chunks, need_weight, need_scale, emit_y
        )
    part = Part.new(x, weight, scale, need_weight, need_scale)
    if chosen == "torch":
        dx, y = _backward_torch(dy, x, part, rstd, row_sequence, emit_y)
        return dx, *part.results(x), y
    tokens, width = x.shape
    dx, y = x.new_empty(x.shape), x.new_empty(x.shape if emit_y else 0)
    if tokens == 0:
        part.zero_()
        return dx, *part.results(x), y
    split = row_split(chunks.shape[0]) if part.asked else 1
    partial = x.new_empty(chunks.shape[0] * split, width, dtype=torch.float32) if part.asked else None
    launch(
        backward_kernel, (tokens if partial is None else partial.shape[0],),
        dy, dy.stride(0), x, x.stride(0), weight, scale, row_stride(scale), rstd, row_sequence, chunks,
        dx, y if emit_y else None, partial,
        WIDTH=width, SPLIT=split, STAGES=pipeline_stages(width, x.element_size(), 2) if part.asked else 1,
        **launch_shape(width),
    )
    if partial is not None:
        finish([partial], [part], chunks, split)
    return dx, *part.results(x), y


def _backward_torch(
    dy: Tensor, x: Tensor, part: Part, rstd: Tensor, row_sequence: Tensor, emit_y: bool
) -> tuple[Tensor, Tensor]:
    normed = x.to(rstd.dtype) * rstd[:, None]
    gradient = dy.to(rstd.dtype)
    part.finish_torch(gradient * normed, row_sequence)
    gradient = modulate(gradient, part.weight, part.modulation, row_sequence)
    dx = (gradient - normed * (gradient * normed).mean(-1, keepdim=True)).mul_(rstd[:, None])
    y = modulate(normed, part.weight, part.modulation, row_sequence).to(x.dtype) if emit_y else x.new_empty(0)
    return dx.to(x.dtype), y


@rmsnorm_modulate_bwd.register_fake
def _(dy, x, weight, scale, rstd, row_sequence, chunks, need_weight, need_scale, emit_y):
    check("rmsnorm_modulate_bwd", x, row_sequence, {"dy": dy}, {"weight": weight}, {"scale": scale})
    gradients = Part.new(x, weight, scale, need_weight, need_scale).results(x)
    return x.new_empty(x.shape), *gradients, x.new_empty(x.shape if emit_y else 0)


def _save(ctx, inputs, output):
    x, weight, scale, row_sequence, _, chunks = inputs
    ctx.save_for_backward(x, weight, scale, output[1], row_sequence, chunks)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, _):
    x, weight, scale, rstd, row_sequence, chunks = ctx.saved_tensors
    if dy is None:
        return None, None, None, None, None, None
    _, need_weight, need_scale, *_ = ctx.needs_input_grad
    chunks = chunks_or_none("rmsnorm_modulate_fwd", chunks, row_sequence, need_weight or need_scale)
    dx, dweight, dscale, _ = _backward_op(
        contiguous_rows(dy), x, weight, scale, rstd, row_sequence, chunks, need_weight, need_scale, False
    )
    return dx, like(dweight, weight, need_weight), like(dscale, scale, need_scale), None, None, None


rmsnorm_modulate_fwd.register_autograd(_backward, setup_context=_save)
_forward_op, _backward_op = differentiable(rmsnorm_modulate_fwd, _save, _backward), unrecorded(rmsnorm_modulate_bwd)


def rmsnorm_modulate(x: Tensor, weight: Tensor | None, scale: Tensor | None, sequences: Sequences, eps: float = 1e-5) -> Tensor:
    """y `[T, D]` of x's dtype, differentiable in x, weight and scale.

    x `[T, D]` fp16, bf16, fp32 or fp64; weight `[D]` and scale `[S, D]` of any of these; last dimensions contiguous, any
    row stride. Computed in fp32 (float64: in float64). ValueError for another shape, dtype, device or stride.
    """
    check_sequences("rmsnorm_modulate", x, {"scale": scale}, sequences)
    return _forward_op(x, weight, scale, sequences.row_sequence, eps, sequences.chunks)[0]


@declares("dopsd::rmsnorm_modulate_fwd")
def _forward_cost(x, weight, scale, row_sequence, eps, chunks=None, *, out) -> Cost:
    table = size(row_sequence) if scale is not None else 0
    return Cost(launches=int(x.shape[0] > 0), elementwise_bytes=table + size(x, weight, scale, *out))


@declares("dopsd::rmsnorm_modulate_bwd")
def _backward_cost(dy, x, weight, scale, rstd, row_sequence, chunks, need_weight, need_scale, emit_y, *, out) -> Cost:
    dx, _, _, y = out
    part = Part.new(x, weight, scale, need_weight, need_scale)
    moved = size(dy, x, weight, scale, rstd, dx, y)
    return backward_cost(moved, [part], row_sequence if scale is not None else None, chunks, x.shape)


def _compile_cases() -> list[CompileCase]:
    cases = []
    for width, io in ((3840, "*bf16"), (144, "*fp32")):
        for modulated in (True, False):
            scale = io if modulated else None
            name = f"{io[1:]} D={width}" + " scale" * modulated
            head: dict[str, str | None] = {"x": io, "x_stride": "i32", "weight": io, "scale": scale, "scale_stride": "i32"}
            tail: dict[str, str | None] = {"row_sequence": "*i32", "eps": "fp32", "y": io, "rstd": "*fp32"}
            cases.append(kernel_case(f"rmsnorm_modulate_fwd {name}", forward_kernel, head | tail, width))
            for sums in (False, True):
                arguments = {"dy": io, "dy_stride": "i32", **head, "rstd": "*fp32", "row_sequence": "*i32"}
                arguments |= {"chunks": "*i32", "dx": io, "y": None if sums else io, "partial": "*fp32" if sums else None}
                split, stages = (MOST_SPLIT, 2) if sums else (1, 1)
                title = f"rmsnorm_modulate_bwd {name} " + ("sums" if sums else "emit_y")
                cases.append(kernel_case(title, backward_kernel, arguments, width, SPLIT=split, STAGES=stages))
            part = (True, modulated, True, modulated)
            cases.append(finish_case(f"rmsnorm_modulate finish {name}", width, io, part))
    return cases


COMPILE_CASES = _compile_cases()
