"""The CPU's own kernels (dopsd_kernels._native) behind the primitives of the same names: fp32 on the CPU, OpenMP over
rows, AVX2 or AVX-512 where the processor has them, the same bits for any number of threads.

Each function here takes and returns what the custom op of its name does (see that op's module), allocates the results
and passes addresses; it checks nothing, as the op has done so. An op asks `has(op)` and `usable(tensors)` first.
"""

from __future__ import annotations

import torch  # before _native: both then share torch's OpenMP runtime
from torch import Tensor

try:
    from dopsd_kernels import _native  # type: ignore[attr-defined]
except ImportError:  # not built: the ops run plain PyTorch
    _native = None


def has(op: str) -> bool:
    """Whether the extension was built and has `op`: "swiglu", or one direction of it, "swiglu_bwd"."""
    return hasattr(_native, op) or hasattr(_native, f"{op}_fwd")


def usable(*tensors: Tensor | None) -> bool:
    """Whether the kernels can read these tensors: fp32, on the CPU, contiguous in the last dimension."""
    for t in tensors:
        if t is not None and not (
            t.dtype is torch.float32 and t.is_cpu and (t.stride(-1) == 1 or t.shape[-1] == 1 or t.numel() == 0)
        ):
            return False
    return _native is not None


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _rows(t: Tensor | None) -> tuple[int, int]:
    """Address and row stride."""
    return (0, 0) if t is None else (t.data_ptr(), t.stride(0))


def _new(like: Tensor | None, needed: bool, x: Tensor) -> Tensor:
    """New fp32 of `like`'s shape; `[0]` if not needed or None."""
    return x.new_empty(*like.shape) if needed and like is not None else x.new_empty(0)


def rmsnorm_modulate_fwd(
    x: Tensor, weight: Tensor | None, scale: Tensor | None, row_sequence: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    tokens, width = x.shape
    y, rstd = x.new_empty(tokens, width), x.new_empty(tokens)
    _native.rmsnorm_modulate_fwd(
        tokens, width, 0 if scale is None else scale.shape[0], row_sequence.data_ptr(), *_rows(x), _address(weight),
        *_rows(scale), eps, y.data_ptr(), rstd.data_ptr(),
    )
    return y, rstd


def rmsnorm_modulate_bwd(
    dy: Tensor, x: Tensor, weight: Tensor | None, scale: Tensor | None, rstd: Tensor, row_sequence: Tensor, chunks: Tensor,
    need_weight: bool, need_scale: bool, emit_y: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens, width = x.shape
    dx, y = x.new_empty(tokens, width), x.new_empty((tokens, width) if emit_y else 0)
    dweight, dscale = _new(weight, need_weight, x), _new(scale, need_scale, x)
    _native.rmsnorm_modulate_bwd(
        tokens, width, 0 if scale is None else scale.shape[0], row_sequence.data_ptr(), chunks.data_ptr(), chunks.shape[0],
        *_rows(dy), *_rows(x), _address(weight), *_rows(scale), rstd.data_ptr(), dx.data_ptr(), dweight.data_ptr(),
        dscale.data_ptr(), y.data_ptr(),
    )
    return dx, dweight, dscale, y


def layernorm_modulate_fwd(
    x: Tensor, scale: Tensor | None, shift: Tensor | None, row_sequence: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    tokens, width = x.shape
    y, mean, rstd = x.new_empty(tokens, width), x.new_empty(tokens), x.new_empty(tokens)
    _native.layernorm_modulate_fwd(
        tokens, width, _sequences(scale, shift), row_sequence.data_ptr(), *_rows(x), *_rows(scale), *_rows(shift), eps,
        y.data_ptr(), mean.data_ptr(), rstd.data_ptr(),
    )
    return y, mean, rstd


def layernorm_modulate_bwd(
    dy: Tensor, x: Tensor, scale: Tensor | None, shift: Tensor | None, mean: Tensor, rstd: Tensor, row_sequence: Tensor,
    chunks: Tensor, need_modulation: bool, emit_y: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens, width = x.shape
    dx, y = x.new_empty(tokens, width), x.new_empty((tokens, width) if emit_y else 0)
    dscale, dshift = _new(scale, need_modulation, x), _new(shift, need_modulation, x)
    _native.layernorm_modulate_bwd(
        tokens, width, _sequences(scale, shift), row_sequence.data_ptr(), chunks.data_ptr(), chunks.shape[0], *_rows(dy),
        *_rows(x), *_rows(scale), *_rows(shift), mean.data_ptr(), rstd.data_ptr(), dx.data_ptr(), dscale.data_ptr(),
        dshift.data_ptr(), y.data_ptr(),
    )
    return dx, dscale, dshift, y


def divergence_step_fwd(
    v_s: Tensor, v_t: Tensor, x: Tensor, weight: float, dt: float, t: float, want_next: bool, want_x1: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    n = v_s.numel()
    mean_square, grad_v, x_next = v_s.new_empty(()), torch.empty_like(v_s), x.new_empty(x.shape if want_next else 0)
    x1_s, x1_t = (x.new_empty(x.shape if want_x1 else 0) for _ in range(2))
    _native.divergence_step_fwd(
        n, v_s.data_ptr(), v_t.data_ptr(), x.data_ptr(), 2 * weight / max(n, 1), dt, 1 - t, mean_square.data_ptr(),
        grad_v.data_ptr(), x_next.data_ptr(), x1_s.data_ptr(), x1_t.data_ptr(),
    )
    return mean_square, grad_v, x_next, x1_s, x1_t


def gated_residual_norm_fwd(
    x: Tensor, h: Tensor, weight: Tensor, gate: Tensor | None, next_weight: Tensor | None, next_scale: Tensor | None,
    row_sequence: Tensor, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens, width = x.shape
    more = next_weight is not None
    r, y = x.new_empty(tokens, width), x.new_empty((tokens, width) if more else 0)
    rstd_h, rstd_r = x.new_empty(tokens), x.new_empty(tokens if more else 0)
    _native.gated_residual_norm_fwd(
        tokens, width, _sequences(gate, next_scale), row_sequence.data_ptr(), *_rows(x), *_rows(h), weight.data_ptr(),
        *_rows(gate), _address(next_weight), *_rows(next_scale), eps, r.data_ptr(), y.data_ptr(), rstd_h.data_ptr(),
        rstd_r.data_ptr(),
    )
    return r, y, rstd_h, rstd_r


def gated_residual_norm_bwd(
    dr: Tensor | None, dy: Tensor | None, h: Tensor, r: Tensor, weight: Tensor, gate: Tensor | None,
    next_weight: Tensor | None, next_scale: Tensor | None, rstd_h: Tensor, rstd_r: Tensor, row_sequence: Tensor,
    chunks: Tensor, need_weight: bool, need_modulation: bool, emit_y: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    tokens, width = h.shape
    dx, dh = h.new_empty(tokens, width), h.new_empty(tokens, width)
    y = h.new_empty((tokens, width) if emit_y and next_weight is not None else 0)
    dweight, dgate = _new(weight, need_weight, h), _new(gate, need_modulation, h)
    dnext_weight, dnext_scale = _new(next_weight, need_weight, h), _new(next_scale, need_modulation, h)
    _native.gated_residual_norm_bwd(
        tokens, width, _sequences(gate, next_scale), row_sequence.data_ptr(), chunks.data_ptr(), chunks.shape[0],
        *_rows(dr), *_rows(dy), *_rows(h), *_rows(r), weight.data_ptr(), *_rows(gate), _address(next_weight),
        *_rows(next_scale), rstd_h.data_ptr(), rstd_r.data_ptr(), dx.data_ptr(), dh.data_ptr(), dweight.data_ptr(),
        dgate.data_ptr(), dnext_weight.data_ptr(), dnext_scale.data_ptr(), y.data_ptr(),
    )
    return dx, dh, dweight, dgate, dnext_weight, dnext_scale, y


def _sequences(*modulations: Tensor | None) -> int:
    return next((m.shape[0] for m in modulations if m is not None), 0)


def qk_norm_rope_fwd(
    qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor, sin: Tensor, heads: int, eps: float
) -> tuple[Tensor, Tensor]:
    tokens, head_dim = qkv.shape[0], qkv.shape[1] // (3 * heads)
    q, k = qkv.new_empty(tokens, heads, head_dim), qkv.new_empty(tokens, heads, head_dim)
    _native.qk_norm_rope_fwd(
        tokens, heads, head_dim, *_rows(qkv), _address(q_weight), _address(k_weight), *_rows(cos), *_rows(sin), eps,
        q.data_ptr(), k.data_ptr(),
    )
    return q, k


def qk_norm_rope_bwd(
    dq: Tensor, dk: Tensor, qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor, sin: Tensor,
    heads: int, eps: float, need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    tokens, head_dim = qkv.shape[0], qkv.shape[1] // (3 * heads)
    dqk = qkv.new_empty(tokens, 2 * heads * head_dim)
    dq_weight, dk_weight = _new(q_weight, need_weight, qkv), _new(k_weight, need_weight, qkv)
    _native.qk_norm_rope_bwd(
        tokens, heads, head_dim, *_rows(dq), dq.stride(1), *_rows(dk), dk.stride(1), *_rows(qkv), _address(q_weight),
        _address(k_weight), *_rows(cos), *_rows(sin), eps, dqk.data_ptr(), dq_weight.data_ptr(), dk_weight.data_ptr(),
    )
    return dqk, dq_weight, dk_weight


def swiglu_fwd(gu: Tensor) -> Tensor:
    tokens, width = gu.shape[0], gu.shape[1] // 2
    s = gu.new_empty(tokens, width)
    _native.swiglu_fwd(tokens, width, *_rows(gu), s.data_ptr())
    return s


def swiglu_bwd(ds: Tensor, gu: Tensor, emit_s: bool) -> tuple[Tensor, Tensor]:
    tokens, width = ds.shape
    dgu, s = gu.new_empty(tokens, 2 * width), gu.new_empty((tokens, width) if emit_s else 0)
    _native.swiglu_bwd(tokens, width, *_rows(ds), *_rows(gu), dgu.data_ptr(), s.data_ptr())
    return dgu, s
