"""Linear layer with a frozen matrix in 8 bits: opt-in, because it changes the numbers.

    y = dequant(quant(x) quant(W)^T) + bias        quant(v)[row] = e4m3(v[row] / scale[row]),  scale[row] = max |v[row]| / 448

x [T, D], W [N, D], y [T, N], bias [N] or None; one fp32 scale for each token of x and each output row of W; T tokens, D and N
widths. e4m3: 4 exponent and 3 mantissa bits, largest value 448 (Micikevicius et al. 2022, arXiv 2209.05433). Products are
summed in fp32. Backward, straight through the rounding of x: dx = dy dequant(quant(W)); W is frozen and has no gradient.

`rmsnorm_modulate_quantise` is the quantiser inside the norm that precedes the layer: the normed rows are never read again.
On CUDA (compute capability 8.9 up, bf16) the product is torch._scaled_mm; elsewhere it is emulated with dequantised matrices.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dopsd_kernels import norm_parts
from dopsd_kernels.backend import choose
from dopsd_kernels.costs import Cost, declares, size
from dopsd_kernels.cubins import CompileCase
from dopsd_kernels.launch import launch
from dopsd_kernels.norm_parts import kernel_case, launch_shape, load_factor, row_stride
from dopsd_kernels.triton_compat import tl, triton

LARGEST = 448.0
SMALLEST_ROW = 1e-12
"""Rows of zeros are divided by this instead."""
MULTIPLE = 16
"""The 8-bit GEMM takes matrices whose sides are multiples of this."""


@triton.jit
def _to_e4m3(value):
    """Nearest e4m3, ties to even, of fp32 |value| <= 448. Rounded before the cast, which is then exact: Triton's interpreter
    loses the carry of a cast that rounds up to a power of two."""
    bits = value.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & ~0xFFFFF).to(tl.float32, bitcast=True)
    # below 2^-6 e4m3 has steps of 2^-9, which is the unit in the last place of fp32 at 1.5 * 2^14
    subnormal = (value + 24576.0) - 24576.0
    return tl.where(tl.abs(value) < 0.015625, subnormal, normal).to(tl.float8e4nv)


@triton.jit
def _store_row(value, q, q_scale, row, columns, mask, WIDTH: tl.constexpr):
    """Quantises one row, fp32 and 0 outside of `mask`."""
    largest = tl.maximum(tl.max(tl.abs(value), axis=0), 1e-12)
    tl.store(q + row * WIDTH + columns, _to_e4m3(value * tl.div_rn(448.0, largest)), mask=mask)
    tl.store(q_scale + row, tl.div_rn(largest, 448.0))


@triton.jit
def quantise_kernel(x, x_stride, q, q_scale, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < WIDTH
    value = tl.load(x + row * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
    _store_row(value, q, q_scale, row, columns, mask, WIDTH)


@triton.jit
def dequantise_kernel(q, q_scale, w, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < WIDTH
    value = tl.load(q + row * WIDTH + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(w + row * WIDTH + columns, (value * tl.load(q_scale + row)).to(w.dtype.element_ty), mask=mask)


@triton.jit
def norm_quantise_kernel(
    x, x_stride, weight, scale, scale_stride, row_sequence, eps, q, q_scale, rstd, y, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    """y None: not written."""
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
    # rounded to the io dtype first, so that the result is the one of the norm followed by the quantiser
    normed = (value * inverse * factor).to(x.dtype.element_ty)
    if y is not None:
        tl.store(y + row * WIDTH + columns, normed, mask=mask)
    _store_row(tl.where(mask, normed.to(tl.float32), 0.0), q, q_scale, row, columns, mask, WIDTH)


def require_fp8(device: torch.device) -> None:
    """RuntimeError on a GPU that cannot multiply fp8."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        major, minor = torch.cuda.get_device_capability(device)
        raise RuntimeError(
            f"fp8_linear needs compute capability 8.9 (Ada, Hopper) or newer, this GPU has {major}.{minor}: leave train.fp8 off"
        )


def _check_rows(op: str, x: Tensor) -> None:
    if x.dim() != 2 or not x.is_floating_point() or x.dtype.itemsize < 2:
        raise ValueError(f"{op}: x is {list(x.shape)} {x.dtype}, needs fp16, bf16, fp32 or fp64 of shape [T, D]")
    if x.stride(-1) != 1 and x.shape[1] > 1:
        raise ValueError(f"{op}: x has stride {x.stride(-1)} in its last dimension, needs 1: call .contiguous()")


def _quantise_torch(x: Tensor) -> tuple[Tensor, Tensor]:
    value = x.float()
    largest = value.abs().amax(1, keepdim=True).clamp(min=SMALLEST_ROW) if x.shape[1] else value.new_ones(x.shape[0], 1)
    # by a tensor: PyTorch replaces a division by or of a number by a product with a rounded reciprocal
    bound = torch.full_like(largest, LARGEST)
    return (value * (bound / largest)).to(torch.float8_e4m3fn), largest / bound


def dequantise_ref(q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """q * scale, computed in fp32 (float64: in float64), in `dtype`; q [R, D] e4m3, scale [R, 1] fp32."""
    wide = torch.promote_types(dtype, torch.float32)
    return (q.to(wide) * scale.to(wide)).to(dtype)


def fp8_linear_ref(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y in plain PyTorch from the unquantised weight, differentiable in x (straight through) and bias."""
    wide = torch.promote_types(x.dtype, torch.float32)
    rounded = dequantise_ref(*_quantise_torch(x.detach()), wide)
    straight = x.to(wide) + (rounded - x.detach().to(wide))
    y = straight @ dequantise_ref(*_quantise_torch(weight.detach()), wide).t()
    return (y if bias is None else y + bias.to(wide)).to(x.dtype)


@torch.library.custom_op("dopsd::fp8_quantise_rows", mutates_args=())
def fp8_quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """(q [T, D] e4m3, scale [T, 1] fp32) with x ~ q * scale. x [T, D], any row stride. ValueError for another shape, dtype
    or stride; RuntimeError below compute capability 8.9."""
    _check_rows("quantise_rows", x)
    require_fp8(x.device)
    if choose(x) != "triton":
        return _quantise_torch(x)
    q, scale = x.new_empty(x.shape, dtype=torch.float8_e4m3fn), x.new_empty(x.shape[0], 1, dtype=torch.float32)
    launch(quantise_kernel, (x.shape[0],), x, x.stride(0), q, scale, WIDTH=x.shape[1], **launch_shape(x.shape[1]))
    return q, scale


@fp8_quantise_rows.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor]:
    _check_rows("quantise_rows", x)
    return x.new_empty(x.shape, dtype=torch.float8_e4m3fn), x.new_empty(x.shape[0], 1, dtype=torch.float32)


@torch.library.custom_op("dopsd::fp8_matmul", mutates_args=())
def fp8_matmul(
    q: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """y [T, N] in `dtype` (on CUDA bf16 only) from rows that are quantised already: q, scale as of `quantise_rows`;
    weight, weight_scale as in `Fp8Weight`."""
    require_fp8(q.device)
    if q.shape[0] == 0:
        return q.new_empty(0, weight.shape[0], dtype=dtype)
    if q.is_cuda:
        if dtype != torch.bfloat16:
            raise ValueError(f"fp8_linear: x is {dtype}, the 8-bit GEMM gives bfloat16 only: use mixed precision bf16")
        return torch._scaled_mm(q, weight.t(), scale, weight_scale.t(), bias=bias, out_dtype=dtype, use_fast_accum=False)
    wide = torch.promote_types(dtype, torch.float32)
    y = (q.to(wide) @ weight.to(wide).t()).mul_(scale).mul_(weight_scale.t())
    return (y if bias is None else y.add_(bias)).to(dtype)


@fp8_matmul.register_fake
def _(q: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    return q.new_empty(q.shape[0], weight.shape[0], dtype=dtype)


@torch.library.custom_op("dopsd::fp8_linear_fwd", mutates_args=())
def fp8_linear_fwd(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """y [T, N] like x; weight [N, D] e4m3 and weight_scale [N, 1] fp32 as in `Fp8Weight`."""
    _check_linear(x, weight, weight_scale, bias)
    q, scale = fp8_quantise_rows(x)
    return fp8_matmul(q, scale, weight, weight_scale, bias, x.dtype)


@fp8_linear_fwd.register_fake
def _(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    _check_linear(x, weight, weight_scale, bias)
    return x.new_empty(x.shape[0], weight.shape[0])


def _check_linear(x: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> None:
    _check_rows("fp8_linear", x)
    if weight.dtype != torch.float8_e4m3fn or weight.dim() != 2 or weight.shape[1] != x.shape[1]:
        raise ValueError(
            f"fp8_linear: weight is {list(weight.shape)} {weight.dtype}, needs [N, {x.shape[1]}] float8_e4m3fn: see Fp8Weight"
        )
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != x.dtype):
        raise ValueError(f"fp8_linear: bias is {list(bias.shape)} {bias.dtype}, needs [{weight.shape[0]}] {x.dtype}")
    for name, t in (("weight", weight), ("weight_scale", weight_scale), ("bias", bias)):
        if t is not None and t.device != x.device:
            raise ValueError(f"fp8_linear: {name} is on {t.device}, x on {x.device}: move one of them")


@torch.library.custom_op("dopsd::fp8_linear_bwd", mutates_args=())
def fp8_linear_bwd(dy: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    """dx [T, D] = dy dequant(W), in dy's dtype; dy [T, N], any row stride."""
    _check_rows("fp8_linear_bwd", dy)
    return torch.mm(dy, _dequantise(weight, weight_scale, dy.dtype))


@fp8_linear_bwd.register_fake
def _(dy: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    return dy.new_empty(dy.shape[0], weight.shape[1])


def _dequantise(q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    if choose(q) != "triton" or dtype == torch.float64:
        return dequantise_ref(q, scale, dtype)
    w = q.new_empty(q.shape, dtype=dtype)
    launch(dequantise_kernel, (q.shape[0],), q, scale, w, WIDTH=q.shape[1], **launch_shape(q.shape[1]))
    return w


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    _, weight, weight_scale, bias = inputs
    ctx.save_for_backward(weight, weight_scale)
    ctx.has_bias = bias is not None


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    weight, weight_scale = ctx.saved_tensors
    need_x, _, _, need_bias = ctx.needs_input_grad
    dx = fp8_linear_bwd(norm_parts.contiguous_rows(dy), weight, weight_scale) if need_x else None
    return dx, None, None, dy.sum(0) if need_bias else None


fp8_linear_fwd.register_autograd(_backward, setup_context=_save)


@torch.library.custom_op("dopsd::rmsnorm_modulate_quantise", mutates_args=())
def rmsnorm_modulate_quantise(
    x: Tensor, weight: Tensor | None, scale: Tensor | None, row_sequence: Tensor, eps: float, emit_y: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(q [T, D] e4m3, q_scale [T, 1] fp32, rstd [T] fp32, y [T, D] or empty): `rmsnorm_modulate_fwd` and then
    `quantise_rows`, to the bit, in one pass. emit_y: y is wanted too (for an adapter beside the 8-bit matrix)."""
    norm_parts.check("rmsnorm_modulate_quantise", x, row_sequence, {}, {"weight": weight}, {"scale": scale})
    require_fp8(x.device)
    if choose(x) != "triton" or x.dtype == torch.float64:
        value = x.to(norm_parts.statistics_dtype(x.dtype))
        rstd = torch.rsqrt(value.square().mean(-1) + eps)
        y = norm_parts.modulate(value * rstd[:, None], weight, scale, row_sequence).to(x.dtype)
        return *_quantise_torch(y), rstd.float(), y if emit_y else x.new_empty(0)
    q, q_scale, rstd, y = _norm_results(x, emit_y)
    launch(
        norm_quantise_kernel, (x.shape[0],), x, x.stride(0), weight, scale, row_stride(scale), row_sequence, eps, q, q_scale,
        rstd, y if emit_y else None, WIDTH=x.shape[1], **launch_shape(x.shape[1]),
    )
    return q, q_scale, rstd, y


def _norm_results(x: Tensor, emit_y: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens = x.shape[0]
    q, q_scale = x.new_empty(x.shape, dtype=torch.float8_e4m3fn), x.new_empty(tokens, 1, dtype=torch.float32)
    return q, q_scale, x.new_empty(tokens, dtype=torch.float32), x.new_empty(x.shape if emit_y else 0)


@rmsnorm_modulate_quantise.register_fake
def _(x, weight, scale, row_sequence, eps, emit_y):
    return _norm_results(x, emit_y)


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """The public form of `fp8_quantise_rows`."""
    return fp8_quantise_rows(x)


class Fp8Weight:
    """A frozen matrix, quantised once: `q` [N, D] e4m3, `scale` [N, 1] fp32. A copy: the original may be freed.

    ValueError if `weight` is trainable, is no matrix, or has a side that is no multiple of 16; RuntimeError below compute
    capability 8.9."""

    def __init__(self, weight: Tensor) -> None:
        if weight.requires_grad:
            raise ValueError("fp8_linear: the weight is trainable (requires_grad): only frozen matrices can be 8-bit")
        if weight.dim() != 2 or any(side % MULTIPLE for side in weight.shape):
            raise ValueError(f"fp8_linear: weight is {list(weight.shape)}, needs [N, D], both multiples of {MULTIPLE}")
        self.q, self.scale = quantise_rows(weight)

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """[N, D]: the matrix that the layer multiplies by."""
        return _dequantise(self.q, self.scale, dtype)


def fp8_linear(x: Tensor, weight: Fp8Weight, bias: Tensor | None = None) -> Tensor:
    """y [T, N] of x's dtype (on CUDA bf16), differentiable in x and bias.

    x [T, D], last dimension contiguous; ValueError for another shape, dtype, device or stride, RuntimeError below compute
    capability 8.9.
    """
    return fp8_linear_fwd(x, weight.q, weight.scale, bias)


@declares("dopsd::fp8_quantise_rows")
def _quantise_cost(x: Tensor, *, out: Any) -> Cost:
    return Cost(launches=int(x.shape[0] > 0), elementwise_bytes=size(x, *out))


@declares("dopsd::fp8_matmul")
def _matmul_cost(q: Tensor, scale: Tensor, weight: Tensor, *_: Any, out: Any) -> Cost:
    gemms = int(q.shape[0] > 0)
    return Cost(gemms, gemms, 0, 2 * q.shape[0] * weight.numel())


@declares("dopsd::fp8_linear_fwd")
def _forward_cost(x: Tensor, weight: Tensor, *_: Any, out: Any) -> Cost:
    used = int(x.shape[0] > 0)
    return Cost(2 * used, used, size(x) + x.numel() + 4 * x.shape[0], 2 * x.shape[0] * weight.numel())


@declares("dopsd::fp8_linear_bwd")
def _backward_cost(dy: Tensor, weight: Tensor, weight_scale: Tensor, *, out: Any) -> Cost:
    moved = size(weight, weight_scale) + weight.numel() * dy.element_size()
    return Cost(2, 1, moved, 2 * dy.shape[0] * weight.numel())


@declares("dopsd::rmsnorm_modulate_quantise")
def _norm_cost(x, weight, scale, row_sequence, eps, emit_y, *, out) -> Cost:
    table = size(row_sequence) if scale is not None else 0
    return Cost(launches=int(x.shape[0] > 0), elementwise_bytes=table + size(x, weight, scale, *out))


def _compile_cases() -> list[CompileCase]:
    cases = []
    for width in (3840, 10240):
        rows: dict[str, str | None] = {"x": "*bf16", "x_stride": "i32", "q": "*fp8e4nv", "q_scale": "*fp32"}
        cases.append(kernel_case(f"fp8_quantise_rows bf16 D={width}", quantise_kernel, rows, width))
        back: dict[str, str | None] = {"q": "*fp8e4nv", "q_scale": "*fp32", "w": "*bf16"}
        cases.append(kernel_case(f"fp8_dequantise bf16 D={width}", dequantise_kernel, back, width))
    for emit_y in (False, True):
        norm: dict[str, str | None] = {"x": "*bf16", "x_stride": "i32", "weight": "*bf16", "scale": "*bf16"}
        norm |= {"scale_stride": "i32", "row_sequence": "*i32", "eps": "fp32", "q": "*fp8e4nv", "q_scale": "*fp32"}
        norm["rstd"] = "*fp32"
        norm["y"] = "*bf16" if emit_y else None
        name = "rmsnorm_modulate_quantise bf16 D=3840" + " emit_y" * emit_y
        cases.append(kernel_case(name, norm_quantise_kernel, norm, 3840))
    return [replace(case, least=89) for case in cases]


COMPILE_CASES = _compile_cases()
