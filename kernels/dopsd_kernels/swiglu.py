"""SwiGLU's gate: s = silu(g) * u, with silu(g) = g / (1 + exp(-g)) and gu `[T, 2F]` = [g | u] (T tokens, F width).

Source: SwiGLU, arXiv 2002.05202. Backward, with sigma = 1 / (1 + exp(-g)):

    dg = ds * u * sigma * (1 + g * (1 - sigma));   du = ds * silu(g)

Nothing but gu is saved; the backward can write s again in the same pass, for the gradient of the projection that follows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dopsd_kernels import backend, native_ops
from dopsd_kernels.costs import Cost, declares, size
from dopsd_kernels.cubins import CompileCase
from dopsd_kernels.direct_autograd import differentiable, unrecorded
from dopsd_kernels.launch import launch
from dopsd_kernels.triton_compat import tl, triton

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@triton.jit
def _swiglu_fwd_kernel(gu, s, stride_gu, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    blocks: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    mask = column < WIDTH
    g = tl.load(gu + row * stride_gu + column, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(gu + row * stride_gu + WIDTH + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(s + row * WIDTH + column, g / (1.0 + tl.exp(-g)) * u, mask=mask)


@triton.jit
def _swiglu_bwd_kernel(ds, gu, dgu, s, stride_ds, stride_gu, WIDTH: tl.constexpr, BLOCK: tl.constexpr, EMIT_S: tl.constexpr):
    blocks: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    row = (tl.program_id(0) // blocks).to(tl.int64)
    column = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    mask = column < WIDTH
    g = tl.load(gu + row * stride_gu + column, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(gu + row * stride_gu + WIDTH + column, mask=mask, other=0.0).to(tl.float32)
    dy = tl.load(ds + row * stride_ds + column, mask=mask, other=0.0).to(tl.float32)
    denominator = 1.0 + tl.exp(-g)
    sigma = 1.0 / denominator
    silu = g / denominator
    out = dgu + row * (2 * WIDTH) + column
    tl.store(out, dy * u * sigma * (1.0 + g * (1.0 - sigma)), mask=mask)
    tl.store(out + WIDTH, dy * silu, mask=mask)
    if EMIT_S:
        tl.store(s + row * WIDTH + column, silu * u, mask=mask)


def _config(width: int) -> dict[str, Any]:
    return dict(WIDTH=width, BLOCK=min(2048, 1 << (width - 1).bit_length()), num_warps=4)


def _grid(rows: int, config: dict[str, Any]) -> tuple[int]:
    return (rows * -(-config["WIDTH"] // config["BLOCK"]),)


def swiglu_ref(gu: Tensor) -> Tensor:
    """`swiglu` in plain PyTorch, computed in fp32 (float64 for float64 input), differentiable by autograd."""
    g, u = gu.to(torch.promote_types(gu.dtype, torch.float32)).chunk(2, dim=-1)
    return (F.silu(g) * u).to(gu.dtype)


def _backward_torch(ds: Tensor, gu: Tensor, emit_s: bool) -> tuple[Tensor, Tensor]:
    width = ds.shape[1]
    wide = torch.promote_types(gu.dtype, torch.float32)
    g, u = gu.to(wide).split(width, dim=1)
    dy = ds.to(wide)
    dgu = torch.empty(gu.shape, dtype=wide, device=gu.device)
    silu = F.silu(g)
    torch.mul(dy, silu, out=dgu[:, width:])
    torch.ops.aten.silu_backward.grad_input(dy * u, g, grad_input=dgu[:, :width])
    s = silu.mul_(u).to(gu.dtype) if emit_s else gu.new_empty(0)
    return dgu.to(gu.dtype), s


def _check(gu: Tensor, ds: Tensor | None = None) -> None:
    if gu.dim() != 2 or gu.shape[1] % 2:
        raise ValueError(f"swiglu: gu has shape {tuple(gu.shape)}, must be [T, 2F]")
    if gu.dtype not in DTYPES:
        raise ValueError(f"swiglu: gu is {gu.dtype}, must be bf16, fp16, fp32 or fp64")
    if gu.stride(1) != 1 and gu.shape[1] > 1:
        raise ValueError(f"swiglu: gu has strides {gu.stride()}, the last must be 1: call .contiguous()")
    if ds is None:
        return
    if ds.shape != (gu.shape[0], gu.shape[1] // 2):
        raise ValueError(f"swiglu: ds has shape {tuple(ds.shape)}, must be {(gu.shape[0], gu.shape[1] // 2)}")
    if ds.dtype != gu.dtype or ds.device != gu.device:
        raise ValueError(f"swiglu: ds is {ds.dtype} on {ds.device}, must be {gu.dtype} on {gu.device} like gu")
    if ds.stride(1) != 1 and ds.shape[1] > 1:
        raise ValueError(f"swiglu: ds has strides {ds.stride()}, the last must be 1: call .contiguous()")


def _backend(gu: Tensor, ds: Tensor) -> str:
    chosen = backend.choose(gu, native=native_ops.has("swiglu") and native_ops.usable(gu, ds))
    return "torch" if gu.dtype == torch.float64 else chosen


@torch.library.custom_op("dopsd::swiglu_fwd", mutates_args=())
def swiglu_fwd(gu: Tensor) -> Tensor:
    """gu `[T, 2F]`, any row stride -> s `[T, F]` in gu's dtype. Raises ValueError as `swiglu`."""
    _check(gu)
    chosen = _backend(gu, gu)
    if chosen == "native":
        return native_ops.swiglu_fwd(gu)
    if chosen == "torch":
        return swiglu_ref(gu)
    rows, width = gu.shape[0], gu.shape[1] // 2
    s = gu.new_empty(rows, width)
    if s.numel():
        config = _config(width)
        launch(_swiglu_fwd_kernel, _grid(rows, config), gu, s, gu.stride(0), **config)
    return s


@swiglu_fwd.register_fake
def _(gu: Tensor) -> Tensor:
    _check(gu)
    return gu.new_empty(gu.shape[0], gu.shape[1] // 2)


@torch.library.custom_op("dopsd::swiglu_bwd", mutates_args=())
def swiglu_bwd(ds: Tensor, gu: Tensor, emit_s: bool) -> tuple[Tensor, Tensor]:
    """ds `[T, F]`, gu `[T, 2F]`, any row strides -> (dgu `[T, 2F]`, s `[T, F]`, or `[0]` without `emit_s`)."""
    _check(gu, ds)
    chosen = _backend(gu, ds)
    if chosen == "native":
        return native_ops.swiglu_bwd(ds, gu, emit_s)
    if chosen == "torch":
        return _backward_torch(ds, gu, emit_s)
    rows, width = ds.shape
    dgu = gu.new_empty(gu.shape)
    s = gu.new_empty((rows, width) if emit_s else 0)
    if ds.numel():
        config = _config(width)
        strides = ds.stride(0), gu.stride(0)
        launch(_swiglu_bwd_kernel, _grid(rows, config), ds, gu, dgu, s, *strides, EMIT_S=emit_s, **config)
    return dgu, s


@swiglu_bwd.register_fake
def _(ds: Tensor, gu: Tensor, emit_s: bool) -> tuple[Tensor, Tensor]:
    _check(gu, ds)
    return gu.new_empty(gu.shape), gu.new_empty(ds.shape if emit_s else 0)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])


def _backward(ctx: Any, ds: Tensor) -> Tensor:
    (gu,) = ctx.saved_tensors
    return _backward_op(ds if ds.stride(1) == 1 else ds.contiguous(), gu, False)[0]


swiglu_fwd.register_autograd(_backward, setup_context=_setup)
_forward_op, _backward_op = differentiable(swiglu_fwd, _setup, _backward), unrecorded(swiglu_bwd)


def swiglu(gu: Tensor) -> Tensor:
    """s = silu(g) * u.

    `gu` `[T, 2F]` = [g | u]: bf16, fp16, fp32 or fp64, contiguous in its last dimension, any row stride (a column slice of
    a wider projection needs no copy). Returns `[T, F]` in gu's dtype, computed in fp32 (fp64 for fp64). Differentiable.
    Raises ValueError for another shape, dtype or last stride.
    """
    return _forward_op(gu)


@declares("dopsd::swiglu_fwd")
def _(gu: Tensor, *, out: Tensor) -> Cost:
    return Cost(launches=min(out.numel(), 1), elementwise_bytes=size(gu, out))


@declares("dopsd::swiglu_bwd")
def _(ds: Tensor, gu: Tensor, emit_s: bool, *, out: tuple[Tensor, Tensor]) -> Cost:
    return Cost(launches=min(ds.numel(), 1), elementwise_bytes=size(ds, gu, *out))


def _compile_cases() -> list[CompileCase]:
    cases = []
    for dtype, width in (("*bf16", 10240), ("*fp16", 10240), ("*fp32", 384)):
        config = _config(width)
        warps = config.pop("num_warps")
        forward = dict(gu=dtype, s=dtype, stride_gu="i32")
        cases.append(CompileCase(f"swiglu_fwd {dtype[1:]} F={width}", _swiglu_fwd_kernel, forward, config, warps))
        backward = dict(ds=dtype, gu=dtype, dgu=dtype, s=dtype, stride_ds="i32", stride_gu="i32")
        for emit in (False, True):
            name = f"swiglu_bwd {dtype[1:]} F={width}" + " emit_s" * emit
            cases.append(CompileCase(name, _swiglu_bwd_kernel, backward, {**config, "EMIT_S": emit}, warps))
    return cases


COMPILE_CASES = _compile_cases()
