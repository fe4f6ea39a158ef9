"""LayerNorm without affine weights and a per-sequence scale and shift in one pass.

    y[t] = (x[t] - mean[t]) * rstd[t] * (1 + scale[seq(t)]) + shift[seq(t)]
    mean[t] = mean_d x[t, d]        rstd[t] = rsqrt(mean_d (x[t, d] - mean[t])^2 + eps)

x, y `[T, D]`, scale and shift `[S, D]` or None (the raw modulation), mean and rstd fp32 `[T]`; T tokens of S packed
sequences, width D. As in diffusers' FinalLayer of Z-Image (scale only) and in FLUX.2's AdaLayerNormContinuous and blocks.

Backward, with xhat = (x - mean) * rstd and g = dy * (1 + scale), sums over the rows of sequence s:

    dx = rstd * (g - mean_d(g) - xhat * mean_d(g * xhat));   dscale_s = sum dy * xhat;   dshift_s = sum dy
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
)
from dopsd_kernels.sequences import Sequences
from dopsd_kernels.triton_compat import tl, triton


@triton.jit
def _load_shift(shift, shift_stride, sequence, columns, mask):
    return tl.load(shift + sequence * shift_stride + columns, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def forward_kernel(
    x, x_stride, scale, scale_stride, shift, shift_stride, row_sequence, eps, y, mean, rstd,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):
    """Grid (T,): program t makes row t of y, mean[t] and rstd[t]."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < WIDTH
    sequence = row
    if scale is not None or shift is not None:
        sequence = tl.load(row_sequence + row).to(tl.int64)
    value = tl.load(x + row * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
    factor = load_factor(None, scale, scale_stride, sequence, columns, mask)
    center = tl.sum(value, axis=0) / WIDTH
    value = tl.where(mask, value - center, 0.0)
    inverse = tl.rsqrt(tl.sum(value * value, axis=0) / WIDTH + eps)
    tl.store(mean + row, center)
    tl.store(rstd + row, inverse)
    value = value * inverse * factor
    if shift is not None:
        value += _load_shift(shift, shift_stride, sequence, columns, mask)
    tl.store(y + row * WIDTH + columns, value.to(y.dtype.element_ty), mask=mask)


@triton.jit
def backward_kernel(
    dy, dy_stride, x, x_stride, scale, scale_stride, shift, shift_stride, mean, rstd, row_sequence, chunks,
    dx, y, partial_scale, partial_shift,
    WIDTH: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):
    """With a `partial_* [C * SPLIT, WIDTH]`: grid (C * SPLIT,), program p takes every SPLIT-th row of a chunk and writes
    row p of it: their sum of dy * xhat, of dy. Without: grid (T,), one row each. `y`: written again if not None."""
    program = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    mask = columns < WIDTH
    if partial_scale is not None or partial_shift is not None:
        chunk = chunks + 3 * (program // SPLIT)
        first = tl.load(chunk) + program % SPLIT
        last = tl.load(chunk + 1)
        sequence = tl.load(chunk + 2).to(tl.int64)
    else:
        first = program
        last = program + 1
        sequence = program.to(tl.int64)
        if scale is not None or (y is not None and shift is not None):
            sequence = tl.load(row_sequence + sequence).to(tl.int64)
    factor = load_factor(None, scale, scale_stride, sequence, columns, mask)
    total_scale = tl.zeros([BLOCK], dtype=tl.float32)
    total_shift = tl.zeros([BLOCK], dtype=tl.float32)
    for index in tl.range(first, last, SPLIT, num_stages=STAGES):
        row = tl.cast(index, tl.int64)
        inverse = tl.load(rstd + row)
        normed = (tl.load(x + row * x_stride + columns, mask=mask, other=0.0).to(tl.float32) - tl.load(mean + row)) * inverse
        normed = tl.where(mask, normed, 0.0)
        gradient = tl.load(dy + row * dy_stride + columns, mask=mask, other=0.0).to(tl.float32)
        if partial_scale is not None:
            total_scale += gradient * normed
        if partial_shift is not None:
            total_shift += gradient
        gradient *= factor
        inner = tl.sum(gradient * normed, axis=0) / WIDTH
        gradient = (gradient - tl.sum(gradient, axis=0) / WIDTH - normed * inner) * inverse
        tl.store(dx + row * WIDTH + columns, gradient.to(dx.dtype.element_ty), mask=mask)
        if y is not None:
            result = normed * factor
            if shift is not None:
                result += _load_shift(shift, shift_stride, sequence, columns, mask)
            tl.store(y + row * WIDTH + columns, result.to(y.dtype.element_ty), mask=mask)
    place = program.to(tl.int64) * WIDTH + columns
    if partial_scale is not None:
        tl.store(partial_scale + place, total_scale, mask=mask)
    if partial_shift is not None:
        tl.store(partial_shift + place, total_shift, mask=mask)


def layernorm_modulate_ref(x: Tensor, scale: Tensor | None, shift: Tensor | None, row_sequence: Tensor, eps: float) -> Tensor:
    """y in plain PyTorch, differentiable; computed in fp32, for float64 in float64."""
    value = x.to(statistics_dtype(x.dtype))
    value = value - value.mean(-1, keepdim=True)
    value = value * torch.rsqrt(value.square().mean(-1, keepdim=True) + eps)
    return _modulated(value, scale, shift, row_sequence).to(x.dtype)


@torch.library.custom_op("dopsd::layernorm_modulate_fwd", mutates_args=())
def layernorm_modulate_fwd(
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    row_sequence: Tensor,
    eps: float,
    chunks: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> (y `[T, D]` like x, mean `[T]`, rstd `[T]`). `chunks` (Sequences.chunks) serves autograd only: the gradients of
    scale and shift need it."""
    check("layernorm_modulate", x, row_sequence, {}, {}, {"scale": scale, "shift": shift})
    statistics = statistics_dtype(x.dtype)
    chosen = choose("layernorm_modulate", x, scale, shift)
    if chosen == "native":
        return native_ops.layernorm_modulate_fwd(x, scale, shift, row_sequence, eps)
    if chosen != "triton":
        value = x.to(statistics)
        mean = value.mean(-1)
        value = value - mean[:, None]
        rstd = torch.rsqrt(value.square().mean(-1) + eps)
        return _modulated(value.mul_(rstd[:, None]), scale, shift, row_sequence).to(x.dtype), mean, rstd
    tokens, width = x.shape
    y, mean, rstd = x.new_empty(x.shape), x.new_empty(tokens, dtype=statistics), x.new_empty(tokens, dtype=statistics)
    launch(
        forward_kernel, (tokens,), x, x.stride(0), scale, row_stride(scale), shift, row_stride(shift), row_sequence, eps,
        y, mean, rstd, WIDTH=width, **launch_shape(width),
    )
    return y, mean, rstd


def _modulated(normed: Tensor, scale: Tensor | None, shift: Tensor | None, row_sequence: Tensor) -> Tensor:
    y = modulate(normed, None, scale, row_sequence)
    return y if shift is None else y + shift.to(normed.dtype).index_select(0, row_sequence)


@layernorm_modulate_fwd.register_fake
def _(x, scale, shift, row_sequence, eps, chunks=None):
    check("layernorm_modulate", x, row_sequence, {}, {}, {"scale": scale, "shift": shift})
    statistics = statistics_dtype(x.dtype)
    return x.new_empty(x.shape), x.new_empty(x.shape[0], dtype=statistics), x.new_empty(x.shape[0], dtype=statistics)


def _parts(x: Tensor, scale: Tensor | None, shift: Tensor | None, need_modulation: bool) -> list[Part]:
    return [Part.new(x, None, modulation, False, need_modulation) for modulation in (scale, shift)]


@torch.library.custom_op("dopsd::layernorm_modulate_bwd", mutates_args=())
def layernorm_modulate_bwd(
    dy: Tensor,
    x: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    row_sequence: Tensor,
    chunks: Tensor,
    need_modulation: bool,
    emit_y: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> (dx `[T, D]`, dscale and dshift `[S, D]` of rstd's dtype, y as the forward made it); what is not asked, or
    belongs to a None, is empty. `chunks` is read only for dscale and dshift."""
    check("layernorm_modulate_bwd", x, row_sequence, {"dy": dy}, {}, {"scale": scale, "shift": shift})
    chosen = choose("layernorm_modulate", x, dy, scale, shift)
    if chosen == "native":
        return native_ops.layernorm_modulate_bwd(
            dy, x, scale, shift, mean, rstd, row_sequence, chunks, need_modulation, emit_y
        )
    parts = _parts(x, scale, shift, need_modulation)
    (_, dscale), (_, dshift) = (part.results(x) for part in parts)
    if chosen != "triton":
        dx, y = _backward_torch(dy, x, parts, mean, rstd, row_sequence, emit_y)
        return dx, dscale, dshift, y
    tokens, width = x.shape
    dx, y = x.new_empty(x.shape), x.new_empty(x.shape if emit_y else 0)
    asked = [part for part in parts if part.asked]
    if tokens == 0:
        for part in asked:
            part.zero_()
        return dx, dscale, dshift, y
    split = row_split(chunks.shape[0]) if asked else 1
    partials = [x.new_empty(chunks.shape[0] * split, width, dtype=torch.float32) if part.asked else None for part in parts]
    launch(
        backward_kernel, (chunks.shape[0] * split if asked else tokens,),
        dy, dy.stride(0), x, x.stride(0), scale, row_stride(scale), shift, row_stride(shift), mean, rstd, row_sequence,
        chunks, dx, y if emit_y else None, *partials,
        WIDTH=width, SPLIT=split, STAGES=pipeline_stages(width, x.element_size(), 2) if asked else 1,
        **launch_shape(width),
    )
    if asked:
        finish(given(*partials), asked, chunks, split)
    return dx, dscale, dshift, y


def _backward_torch(
    dy: Tensor, x: Tensor, parts: list[Part], mean: Tensor, rstd: Tensor, row_sequence: Tensor, emit_y: bool
) -> tuple[Tensor, Tensor]:
    scale, shift = parts[0].modulation, parts[1].modulation
    normed = (x.to(rstd.dtype) - mean[:, None]).mul_(rstd[:, None])
    gradient = dy.to(rstd.dtype)
    parts[0].finish_torch(gradient * normed, row_sequence)
    parts[1].finish_torch(gradient, row_sequence)
    gradient = modulate(gradient, None, scale, row_sequence)
    inner = (gradient * normed).mean(-1, keepdim=True)
    dx = (gradient - gradient.mean(-1, keepdim=True) - normed * inner).mul_(rstd[:, None])
    y = _modulated(normed, scale, shift, row_sequence).to(x.dtype) if emit_y else x.new_empty(0)
    return dx.to(x.dtype), y


@layernorm_modulate_bwd.register_fake
def _(dy, x, scale, shift, mean, rstd, row_sequence, chunks, need_modulation, emit_y):
    check("layernorm_modulate_bwd", x, row_sequence, {"dy": dy}, {}, {"scale": scale, "shift": shift})
    (_, dscale), (_, dshift) = (part.results(x) for part in _parts(x, scale, shift, need_modulation))
    return x.new_empty(x.shape), dscale, dshift, x.new_empty(x.shape if emit_y else 0)


def _save(ctx, inputs, output):
    x, scale, shift, row_sequence, _, chunks = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, scale, shift, mean, rstd, row_sequence, chunks)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, _, __):
    if dy is None:
        return (None,) * 6
    x, scale, shift, mean, rstd, row_sequence, chunks = ctx.saved_tensors
    _, need_scale, need_shift, *_ = ctx.needs_input_grad
    asked = need_scale or need_shift
    chunks = chunks_or_none("layernorm_modulate_fwd", chunks, row_sequence, asked)
    dx, dscale, dshift, _ = _backward_op(
        contiguous_rows(dy), x, scale, shift, mean, rstd, row_sequence, chunks, asked, False
    )
    return dx, like(dscale, scale, need_scale), like(dshift, shift, need_shift), None, None, None


layernorm_modulate_fwd.register_autograd(_backward, setup_context=_save)
_forward_op, _backward_op = differentiable(layernorm_modulate_fwd, _save, _backward), unrecorded(layernorm_modulate_bwd)


def layernorm_modulate(
    x: Tensor, scale: Tensor | None, shift: Tensor | None, sequences: Sequences, eps: float = 1e-6
) -> Tensor:
    """y `[T, D]` of x's dtype, differentiable in x, scale and shift.

    x `[T, D]` fp16, bf16, fp32 or fp64; scale and shift `[S, D]` of any of these; last dimensions contiguous, any row
    stride. Computed in fp32 (float64: in float64). ValueError for another shape, dtype, device or stride.
    """
    check_sequences("layernorm_modulate", x, {"scale": scale, "shift": shift}, sequences)
    return _forward_op(x, scale, shift, sequences.row_sequence, eps, sequences.chunks)[0]


@declares("dopsd::layernorm_modulate_fwd")
def _forward_cost(x, scale, shift, row_sequence, eps, chunks=None, *, out) -> Cost:
    table = 0 if scale is None and shift is None else size(row_sequence)
    return Cost(launches=int(x.shape[0] > 0), elementwise_bytes=table + size(x, scale, shift, *out))


@declares("dopsd::layernorm_modulate_bwd")
def _backward_cost(dy, x, scale, shift, mean, rstd, row_sequence, chunks, need_modulation, emit_y, *, out) -> Cost:
    moved = size(dy, x, scale, shift if emit_y else None, mean, rstd, out[0], out[3])
    table = None if scale is None and not (emit_y and shift is not None) else row_sequence
    return backward_cost(moved, _parts(x, scale, shift, need_modulation), table, chunks, x.shape)


def _compile_cases() -> list[CompileCase]:
    cases = []
    for width, io in ((3840, "*bf16"), (3072, "*bf16"), (144, "*fp32")):
        for shifted in (True, False):
            name = f"{io[1:]} D={width} scale" + " shift" * shifted
            head: dict[str, str | None] = {"x": io, "x_stride": "i32", "scale": io, "scale_stride": "i32"}
            head |= {"shift": io if shifted else None, "shift_stride": "i32"}
            statistics: dict[str, str | None] = {"mean": "*fp32", "rstd": "*fp32"}
            tail: dict[str, str | None] = {"row_sequence": "*i32", "eps": "fp32", "y": io}
            cases.append(kernel_case(f"layernorm_modulate_fwd {name}", forward_kernel, head | tail | statistics, width))
            for sums in (False, True):
                partial = "*fp32" if sums else None
                arguments = {"dy": io, "dy_stride": "i32", **head, **statistics, "row_sequence": "*i32", "chunks": "*i32"}
                arguments |= {"dx": io, "y": None if sums else io, "partial_scale": partial}
                arguments["partial_shift"] = partial if shifted else None
                split, stages = (MOST_SPLIT, 2) if sums else (1, 1)
                title = f"layernorm_modulate_bwd {name} " + ("sums" if sums else "emit_y")
                cases.append(kernel_case(title, backward_kernel, arguments, width, SPLIT=split, STAGES=stages))
            parts = [(False, True, False, True)] * (1 + shifted)
            cases.append(finish_case(f"layernorm_modulate finish {name}", width, io, *parts))
    return cases


COMPILE_CASES = _compile_cases()
