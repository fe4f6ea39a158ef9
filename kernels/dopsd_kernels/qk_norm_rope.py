"""Per-head RMSNorm of q and k, then the rotation of interleaved pairs, straight from the fused qkv buffer.

qkv `[T, 3 * H * Dh]` = [q | k | v], T tokens, H heads, Dh head dimension (even); cos, sin fp32 `[T, Dh/2]`. For each row x of
q and k, one token and one head, with w = q_weight or k_weight:

    n = x * rstd * w;   rstd = rsqrt(mean(x^2) + eps)
    (y[2i], y[2i+1]) = (n[2i] * cos[i] - n[2i+1] * sin[i], n[2i] * sin[i] + n[2i+1] * cos[i])

Without weights there is no norm: n = x. Backward, g being dy rotated back (sin -> -sin) and xhat = x * rstd:

    dw = sum over tokens and heads of g * xhat;   dx = rstd * (g * w - xhat * mean(g * w * xhat))

Only qkv is saved: rstd is computed again. Sources: RMSNorm arXiv 1910.07467, RoPE arXiv 2104.09864; the pairs are interleaved
as in Z-Image's and FLUX.2's transformers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dopsd_kernels import backend, native_ops
from dopsd_kernels.costs import Cost, declares, size
from dopsd_kernels.cubins import CompileCase
from dopsd_kernels.direct_autograd import differentiable, unrecorded
from dopsd_kernels.launch import launch
from dopsd_kernels.triton_compat import tl, triton

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
ROWS = 8
"""Tokens of which one program of the backward sums the weights' gradient."""
FINISH_ROWS, FINISH_COLUMNS = 64, 32


@triton.jit
def _rotate(x, c, s, HEADS: tl.constexpr, WIDTH: tl.constexpr):
    """x [HEADS, WIDTH], c and s [WIDTH // 2]."""
    a, b = tl.split(tl.reshape(x, (HEADS, WIDTH // 2, 2)))
    c = c[None, :]
    s = s[None, :]
    return tl.reshape(tl.join(a * c - b * s, a * s + b * c), (HEADS, WIDTH))


@triton.jit
def _qk_norm_rope_fwd_kernel(
    qkv, q_weight, k_weight, cos, sin, q, k, stride_qkv, stride_cos, stride_sin, eps,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, NORM: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    pair = tl.arange(0, BLOCK_D // 2)
    c = tl.load(cos + row * stride_cos + pair, mask=pair < HEAD_DIM // 2, other=0.0)
    s = tl.load(sin + row * stride_sin + pair, mask=pair < HEAD_DIM // 2, other=0.0)
    for third in tl.static_range(2):
        y = q if third == 0 else k
        if NORM:
            w = tl.load((q_weight if third == 0 else k_weight) + d, mask=d < HEAD_DIM, other=0.0).to(tl.float32)
        for first in range(0, HEADS, BLOCK_H):
            head = first + tl.arange(0, BLOCK_H)
            mask = (head < HEADS)[:, None] & (d < HEAD_DIM)[None, :]
            offset = head[:, None] * HEAD_DIM + d[None, :]
            x = tl.load(qkv + row * stride_qkv + third * HEADS * HEAD_DIM + offset, mask=mask, other=0.0).to(tl.float32)
            if NORM:
                rstd = tl.rsqrt(tl.sum(x * x, axis=1) / HEAD_DIM + eps)
                x = x * rstd[:, None] * w[None, :]
            tl.store(y + row * (HEADS * HEAD_DIM) + offset, _rotate(x, c, s, BLOCK_H, BLOCK_D), mask=mask)


@triton.jit
def _qk_norm_rope_bwd_kernel(
    dq, dk, qkv, q_weight, k_weight, cos, sin, dqk, partial, tokens,
    stride_dq, stride_dq_head, stride_dk, stride_dk_head, stride_qkv, stride_cos, stride_sin, eps,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, NORM: tl.constexpr, WEIGHT_GRAD: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """Program (p, 0) handles q of tokens p * ROWS and following, (p, 1) k; row p of partial is [dq_weight | dk_weight]."""
    d = tl.arange(0, BLOCK_D)
    pair = tl.arange(0, BLOCK_D // 2)
    third = tl.program_id(1)
    if third == 0:
        dy = dq
    else:
        dy = dk
    stride = stride_dq + third * (stride_dk - stride_dq)
    stride_head = stride_dq_head + third * (stride_dk_head - stride_dq_head)
    if NORM:
        if third == 0:
            w = tl.load(q_weight + d, mask=d < HEAD_DIM, other=0.0).to(tl.float32)
        else:
            w = tl.load(k_weight + d, mask=d < HEAD_DIM, other=0.0).to(tl.float32)
    dw = tl.zeros((BLOCK_H, BLOCK_D), tl.float32)
    for i in range(tl.minimum(ROWS, tokens - tl.program_id(0) * ROWS)):
        row = tl.program_id(0).to(tl.int64) * ROWS + i
        c = tl.load(cos + row * stride_cos + pair, mask=pair < HEAD_DIM // 2, other=0.0)
        s = tl.load(sin + row * stride_sin + pair, mask=pair < HEAD_DIM // 2, other=0.0)
        for first in range(0, HEADS, BLOCK_H):
            head = first + tl.arange(0, BLOCK_H)
            mask = (head < HEADS)[:, None] & (d < HEAD_DIM)[None, :]
            offset = third * (HEADS * HEAD_DIM) + head[:, None] * HEAD_DIM + d[None, :]
            at = row * stride + head[:, None].to(tl.int64) * stride_head + d[None, :]
            g = _rotate(tl.load(dy + at, mask=mask, other=0.0).to(tl.float32), c, -s, BLOCK_H, BLOCK_D)
            if NORM:
                x = tl.load(qkv + row * stride_qkv + offset, mask=mask, other=0.0).to(tl.float32)
                rstd = tl.rsqrt(tl.sum(x * x, axis=1) / HEAD_DIM + eps)[:, None]
                x = x * rstd
                if WEIGHT_GRAD:
                    dw += g * x
                g = g * w[None, :]
                g = rstd * (g - x * (tl.sum(g * x, axis=1) / HEAD_DIM)[:, None])
            tl.store(dqk + row * (2 * HEADS * HEAD_DIM) + offset, g, mask=mask)
    if WEIGHT_GRAD:
        to = partial + (tl.program_id(0).to(tl.int64) * 2 + third) * HEAD_DIM
        tl.store(to + d, tl.sum(dw, axis=0), mask=d < HEAD_DIM)


@triton.jit
def _qk_norm_rope_finish_kernel(
    partial, dq_weight, dk_weight, rows, HEAD_DIM: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):
    """The columns of partial [rows, 2 * HEAD_DIM] summed, always in the same order."""
    column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for first in range(0, rows, BLOCK_R):
        row = first + tl.arange(0, BLOCK_R)
        mask = (row < rows)[:, None] & (column < 2 * HEAD_DIM)[None, :]
        total += tl.load(partial + row[:, None].to(tl.int64) * (2 * HEAD_DIM) + column[None, :], mask=mask, other=0.0)
    out = tl.sum(total, axis=0)
    tl.store(dq_weight + column, out, mask=column < HEAD_DIM)
    tl.store(dk_weight + column - HEAD_DIM, out, mask=(column >= HEAD_DIM) & (column < 2 * HEAD_DIM))


def _power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _config(heads: int, head_dim: int, norm: bool) -> dict[str, Any]:
    block_d = _power_of_2(head_dim)
    block_h = min(_power_of_2(heads), max(1, 2048 // block_d))
    warps = min(8, max(1, block_h * block_d // 256))  # 8 elements a thread: with 16, Triton 3.6 and 3.7 spill at 48 heads
    return dict(HEADS=heads, HEAD_DIM=head_dim, NORM=norm, BLOCK_H=block_h, BLOCK_D=block_d, num_warps=warps)


def _finish_config(head_dim: int) -> dict[str, Any]:
    return dict(HEAD_DIM=head_dim, BLOCK_R=FINISH_ROWS, BLOCK_C=FINISH_COLUMNS, num_warps=4)


def qk_norm_rope_ref(
    qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor, sin: Tensor, heads: int, eps: float = 1e-5
) -> tuple[Tensor, Tensor, Tensor]:
    """`qk_norm_rope` in plain PyTorch, computed in fp32 (float64 for float64 input), differentiable by autograd."""
    wide = torch.promote_types(qkv.dtype, torch.float32)
    q, k, v = qkv.unflatten(1, (3, heads, -1)).unbind(1)
    cos, sin = cos.to(wide).unsqueeze(1), sin.to(wide).unsqueeze(1)
    rotated = []
    for x, weight in ((q, q_weight), (k, k_weight)):
        n = x.to(wide)
        if weight is not None:
            n = n * torch.rsqrt(n.square().mean(-1, keepdim=True) + eps) * weight.to(wide)
        rotated.append(_rotate_torch(n, cos, sin).to(qkv.dtype))
    return rotated[0], rotated[1], v


def _rotate_torch(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x `[T, H, Dh]`, cos and sin `[T, 1, Dh/2]`."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)


def _backward_torch(
    dq: Tensor, dk: Tensor, qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor, sin: Tensor,
    heads: int, eps: float, need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(qkv.dtype, torch.float32)
    cos, sin = cos.to(wide).unsqueeze(1), sin.to(wide).neg().unsqueeze(1)
    dqk = qkv.new_empty(qkv.shape[0], 2, heads, dq.shape[2])
    dweights = []
    for i, (dy, weight) in enumerate(((dq, q_weight), (dk, k_weight))):
        g = _rotate_torch(dy.to(wide), cos, sin)
        if weight is not None:
            x = qkv.unflatten(1, (3, heads, -1))[:, i].to(wide)
            rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
            x = x * rstd
            if need_weight:
                dweights.append((g * x).sum((0, 1)))
            g = g * weight.to(wide)
            g = rstd * (g - x * (g * x).mean(-1, keepdim=True))
        dqk[:, i] = g
    dq_weight, dk_weight = dweights or (qkv.new_empty(0, dtype=wide), qkv.new_empty(0, dtype=wide))
    return dqk.flatten(1), dq_weight, dk_weight


def _wrong(name: str, text: str) -> ValueError:
    return ValueError(f"qk_norm_rope: {name} {text}")


def _check(
    qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor, sin: Tensor, heads: int,
    dq: Tensor | None = None, dk: Tensor | None = None,
) -> None:
    if qkv.dtype not in DTYPES:
        raise _wrong("qkv", f"is {qkv.dtype}, must be bf16, fp16, fp32 or fp64")
    if qkv.dim() != 2 or heads < 1 or qkv.shape[1] % (6 * heads) or not qkv.shape[1]:
        raise _wrong("qkv", f"has shape {tuple(qkv.shape)}, must be [T, 3 * {heads} heads * an even head dimension]")
    if (q_weight is None) != (k_weight is None):
        raise _wrong("q_weight and k_weight", "must both be given or both be None")
    tokens, head_dim = qkv.shape[0], qkv.shape[1] // (3 * heads)
    angles = (torch.float32, torch.float64) if qkv.dtype == torch.float64 else (torch.float32,)
    for name, tensor, shape, dtypes in (
        ("qkv", qkv, tuple(qkv.shape), DTYPES),
        ("q_weight", q_weight, (head_dim,), DTYPES),
        ("k_weight", k_weight, (head_dim,), DTYPES),
        ("cos", cos, (tokens, head_dim // 2), angles),
        ("sin", sin, (tokens, head_dim // 2), angles),
        ("dq", dq, (tokens, heads, head_dim), (qkv.dtype,)),
        ("dk", dk, (tokens, heads, head_dim), (qkv.dtype,)),
    ):
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise _wrong(name, f"has shape {tuple(tensor.shape)}, must be {shape}")
        if tensor.dtype not in dtypes:
            raise _wrong(name, f"is {tensor.dtype}, must be {' or '.join(map(str, dtypes))}")
        if tensor.device != qkv.device:
            raise _wrong(name, f"is on {tensor.device}, qkv on {qkv.device}: move one of them")
        if tensor.stride(-1) != 1 and shape[-1] > 1:
            raise _wrong(name, f"has strides {tensor.stride()}, the last must be 1: call .contiguous()")


def _backend(qkv: Tensor, *others: Tensor | None) -> str:
    chosen = backend.choose(qkv, native=native_ops.has("qk_norm_rope") and native_ops.usable(qkv, *others))
    return "torch" if qkv.dtype == torch.float64 else chosen


@torch.library.custom_op("dopsd::qk_norm_rope_fwd", mutates_args=())
def qk_norm_rope_fwd(
    qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor, sin: Tensor, heads: int, eps: float
) -> tuple[Tensor, Tensor]:
    """-> (q, k), each `[T, H, Dh]`, contiguous, in qkv's dtype. Arguments and errors: see `qk_norm_rope`."""
    _check(qkv, q_weight, k_weight, cos, sin, heads)
    chosen = _backend(qkv, q_weight, k_weight, cos, sin)
    if chosen == "native":
        return native_ops.qk_norm_rope_fwd(qkv, q_weight, k_weight, cos, sin, heads, eps)
    if chosen == "torch":
        return qk_norm_rope_ref(qkv, q_weight, k_weight, cos, sin, heads, eps)[:2]
    tokens, head_dim = qkv.shape[0], qkv.shape[1] // (3 * heads)
    q, k = qkv.new_empty(tokens, heads, head_dim), qkv.new_empty(tokens, heads, head_dim)
    strides = qkv.stride(0), cos.stride(0), sin.stride(0)
    config = _config(heads, head_dim, q_weight is not None)
    launch(_qk_norm_rope_fwd_kernel, (tokens,), qkv, q_weight, k_weight, cos, sin, q, k, *strides, eps, **config)
    return q, k


@qk_norm_rope_fwd.register_fake
def _(
    qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor, sin: Tensor, heads: int, eps: float
) -> tuple[Tensor, Tensor]:
    _check(qkv, q_weight, k_weight, cos, sin, heads)
    shape = qkv.shape[0], heads, qkv.shape[1] // (3 * heads)
    return qkv.new_empty(shape), qkv.new_empty(shape)


@torch.library.custom_op("dopsd::qk_norm_rope_bwd", mutates_args=())
def qk_norm_rope_bwd(
    dq: Tensor, dk: Tensor, qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor, sin: Tensor,
    heads: int, eps: float, need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk `[T, H, Dh]` with any token and head strides -> (dqk `[T, 2 * H * Dh]`, the gradient of qkv's first two thirds;
    dq_weight, dk_weight fp32 (fp64 for fp64) `[Dh]`, or `[0]` without `need_weight` or without weights)."""
    _check(qkv, q_weight, k_weight, cos, sin, heads, dq, dk)
    chosen = _backend(qkv, q_weight, k_weight, cos, sin, dq, dk)
    if chosen == "native":
        return native_ops.qk_norm_rope_bwd(dq, dk, qkv, q_weight, k_weight, cos, sin, heads, eps, need_weight)
    if chosen == "torch":
        return _backward_torch(dq, dk, qkv, q_weight, k_weight, cos, sin, heads, eps, need_weight)
    tokens, head_dim = qkv.shape[0], qkv.shape[1] // (3 * heads)
    need_weight = need_weight and q_weight is not None
    rows = ROWS if need_weight else 1
    programs = -(-tokens // rows)
    dqk = qkv.new_empty(tokens, 2 * heads * head_dim)
    dq_weight = qkv.new_empty(head_dim if need_weight else 0, dtype=torch.float32)
    dk_weight = torch.empty_like(dq_weight)
    partial = qkv.new_empty((programs if need_weight else 0, 2 * head_dim), dtype=torch.float32)
    strides = *dq.stride()[:2], *dk.stride()[:2], qkv.stride(0), cos.stride(0), sin.stride(0)
    config = _config(heads, head_dim, q_weight is not None)
    launch(
        _qk_norm_rope_bwd_kernel, (programs, 2), dq, dk, qkv, q_weight, k_weight, cos, sin, dqk, partial, tokens,
        *strides, eps, WEIGHT_GRAD=need_weight, ROWS=rows, **config,
    )
    if need_weight:
        grid = (-(-2 * head_dim // FINISH_COLUMNS),)
        launch(_qk_norm_rope_finish_kernel, grid, partial, dq_weight, dk_weight, programs, **_finish_config(head_dim))
    return dqk, dq_weight, dk_weight


@qk_norm_rope_bwd.register_fake
def _(
    dq: Tensor, dk: Tensor, qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor, sin: Tensor,
    heads: int, eps: float, need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    _check(qkv, q_weight, k_weight, cos, sin, heads, dq, dk)
    width = qkv.shape[1] // (3 * heads) if need_weight and q_weight is not None else 0
    wide = torch.promote_types(qkv.dtype, torch.float32)
    dqk = qkv.new_empty(qkv.shape[0], qkv.shape[1] // 3 * 2)
    return dqk, qkv.new_empty(width, dtype=wide), qkv.new_empty(width, dtype=wide)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.heads, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
    qkv, q_weight, k_weight, cos, sin = ctx.saved_tensors
    dq, dk = (dy if dy.stride(-1) == 1 else dy.contiguous() for dy in (dq, dk))
    need_weight = q_weight is not None and any(ctx.needs_input_grad[1:3])
    dqk, dq_weight, dk_weight = _backward_op(dq, dk, qkv, q_weight, k_weight, cos, sin, ctx.heads, ctx.eps, need_weight)
    dqkv = torch.nn.functional.pad(dqk, (0, qkv.shape[1] - dqk.shape[1]))
    if not need_weight:
        return dqkv, None, None, None, None, None, None
    return dqkv, dq_weight.to(q_weight.dtype), dk_weight.to(k_weight.dtype), None, None, None, None


qk_norm_rope_fwd.register_autograd(_backward, setup_context=_setup)
_forward_op, _backward_op = differentiable(qk_norm_rope_fwd, _setup, _backward), unrecorded(qk_norm_rope_bwd)


def qk_norm_rope(
    qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor, sin: Tensor, heads: int, eps: float = 1e-5
) -> tuple[Tensor, Tensor, Tensor]:
    """y = rotate(x * rsqrt(mean(x^2) + eps) * w), for every head of q and of k.

    `qkv` `[T, 3 * H * Dh]` = [q | k | v]: bf16, fp16, fp32 or fp64, last dimension contiguous, any row stride. `q_weight`,
    `k_weight` `[Dh]`, any of these dtypes; both None: rotation alone. `cos`, `sin` `[T, Dh/2]`: fp32 (or fp64 with fp64 qkv),
    without gradient. Returns (q, k, v), each `[T, H, Dh]` in qkv's dtype; v is a view. Computed in fp32 (fp64 for fp64);
    differentiable with respect to qkv and the weights. Raises ValueError for another shape, dtype, device or last stride.
    """
    q, k = _forward_op(qkv, q_weight, k_weight, cos, sin, heads, eps)
    return q, k, qkv[:, qkv.shape[1] // 3 * 2 :].unflatten(1, (heads, -1))


@declares("dopsd::qk_norm_rope_fwd")
def _(
    qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor, sin: Tensor, heads: int, eps: float,
    *, out: tuple[Tensor, Tensor],
) -> Cost:
    return Cost(launches=min(len(qkv), 1), elementwise_bytes=2 * size(*out) + size(q_weight, k_weight, cos, sin))


@declares("dopsd::qk_norm_rope_bwd")
def _(
    dq: Tensor, dk: Tensor, qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor, sin: Tensor,
    heads: int, eps: float, need_weight: bool, *, out: tuple[Tensor, Tensor, Tensor],
) -> Cost:
    """cos and sin are read for q and for k; q and k only for the norm; the partial sums are written and read."""
    dqk, dq_weight, dk_weight = out
    moved = (2 if q_weight is None else 3) * size(dqk) + size(q_weight, k_weight) + 2 * size(cos, sin)
    partial = -(-len(qkv) // ROWS) * size(dq_weight, dk_weight)
    finish = bool(dq_weight.numel())
    return Cost(min(len(qkv), 1) + finish, 0, moved + 2 * partial + size(dq_weight, dk_weight))


def _compile_cases() -> list[CompileCase]:
    cases = []
    shapes = ("*bf16", 30, 128), ("*fp16", 30, 128), ("*fp32", 30, 128), ("*bf16", 48, 128), ("*fp32", 4, 36)
    for dtype, heads, head_dim in shapes:
        shape = f"{dtype[1:]} H={heads} Dh={head_dim}"
        angles = dict(cos="*fp32", sin="*fp32")
        weights = dict(q_weight=dtype, k_weight=dtype)
        tables = dict(stride_qkv="i32", stride_cos="i32", stride_sin="i32", eps="fp32")
        forward = dict(qkv=dtype, **weights, **angles, q=dtype, k=dtype, **tables)
        strides = dict.fromkeys(("tokens", "stride_dq", "stride_dq_head", "stride_dk", "stride_dk_head"), "i32")
        backward = dict(dq=dtype, dk=dtype, qkv=dtype, **weights, **angles, dqk=dtype, partial="*fp32", **strides, **tables)
        for norm in (True, False):
            config = _config(heads, head_dim, norm)
            warps = config.pop("num_warps")
            name = shape if norm else f"{shape} without norm"
            cases.append(CompileCase(f"qk_norm_rope_fwd {name}", _qk_norm_rope_fwd_kernel, forward, config, warps))
            for rows in (1, ROWS) if norm else (1,):
                config = {**config, "WEIGHT_GRAD": rows > 1, "ROWS": rows}
                label = f"qk_norm_rope_bwd {name}" + " weight" * (rows > 1)
                cases.append(CompileCase(label, _qk_norm_rope_bwd_kernel, backward, config, warps))
    signature = dict(partial="*fp32", dq_weight="*fp32", dk_weight="*fp32", rows="i32")
    config = _finish_config(128)
    warps = config.pop("num_warps")
    cases.append(CompileCase("qk_norm_rope_finish Dh=128", _qk_norm_rope_finish_kernel, signature, config, warps))
    return cases


COMPILE_CASES = _compile_cases()
