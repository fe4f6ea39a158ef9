"""Attention within each sequence of packed tokens: dispatch to a library's kernels, none of our own.

    out[i] = sum_j softmax_j(q[i] . k[j] / sqrt(Dh)) v[j],   j over the sequence of i

Shapes: q, k, v `[T, H, Dh]` (v usually a strided view of the fused projection), out `[T, H, Dh]`. T tokens are the sum
of `lengths`, S sequences, H heads, Dh head dimension. Neighbouring sequences of one length are a dense batch
`[B, L, H, Dh]` without a copy; with more than two different neighbours the packed (varlen) kernels run, where there
are any. dopsd_kernels.attention_libraries holds the calls, its BACKENDS the names.

`lse` (log of the softmax denominators) belongs to the backend that made it: flat `[T * H]`, fp32 (float64 for
float64), in that backend's own order; hand it back to the same backend.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from dopsd_kernels.attention_libraries import BACKENDS, usable
from dopsd_kernels.costs import Cost, declares, size
from dopsd_kernels.direct_autograd import differentiable, unrecorded
from dopsd_kernels.sequences import Sequences

logger = logging.getLogger(__name__)

_chosen: dict[tuple, str] = {}


def choose_attention(device: torch.device, dtype: torch.dtype, head_dim: int, equal_lengths: bool) -> str:
    """The fastest usable backend; `equal_lengths`: dense batches, not packed sequences. Logged once for each answer.

    In order: flash-attn 3, then 4 (Hopper's and Blackwell's own kernels), cuDNN for dense batches from Hopper on,
    flash-attn 2, torch's flash kernel (dense or varlen), torch's flash kernel for the CPU, dense mathematics.
    """
    key = (torch.device(device), dtype, head_dim, equal_lengths)
    if key not in _chosen:
        order = ("flash_attn_3", "flash_attn_4", "cudnn", "flash_attn_2", "flash", "varlen", "cpu_flash", "math")
        fits = (name for name in order if equal_lengths or BACKENDS[name].packed or name in ("cpu_flash", "math"))
        _chosen[key] = next(name for name in fits if usable(name, *key[:3]))
        kind = "one length" if equal_lengths else "several lengths"
        logger.info("attention: %s for %s %s, head dim %d, %s", _chosen[key], device, dtype, head_dim, kind)
    return _chosen[key]


def chosen() -> tuple[str, ...]:
    """The backends that this process has chosen so far, sorted: for the run's records."""
    return tuple(sorted(set(_chosen.values())))


@functools.lru_cache(maxsize=4096)
def _runs(lengths: tuple[int, ...]) -> tuple[tuple[int, int, int], ...]:
    """(first row, number of sequences, their length) of neighbours of one length; empty sequences are left out."""
    runs: list[tuple[int, int, int]] = []
    for length in lengths:
        if length and runs and runs[-1][2] == length:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1, length)
        elif length:
            runs.append((sum(b * n for _, b, n in runs), 1, length))
    return tuple(runs)


def _plan(q: Tensor, lengths: Sequence[int], backend: str) -> tuple[str, tuple[tuple[int, int, int], ...]]:
    """(backend, dense runs); no runs: one packed call over everything."""
    runs = _runs(tuple(lengths))
    dense = len(runs) <= 2
    if backend == "auto":
        backend = choose_attention(q.device, q.dtype, q.shape[-1], dense)
    elif backend not in BACKENDS:
        raise ValueError(f"attention: backend {backend!r} is none of auto, {', '.join(BACKENDS)}")
    packed = BACKENDS[backend].packed and (not dense or backend == "varlen")
    return backend, () if packed else runs


def attention_ref(q: Tensor, k: Tensor, v: Tensor, sequences: Sequences) -> Tensor:
    """The equation, sequence by sequence, differentiable; computes in fp32 for half dtypes."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    parts = []
    for a, b, c in zip(*(x.to(wide).split(sequences.lengths) for x in (q, k, v))):
        scores = torch.einsum("ihd,jhd->hij", a, b) * q.shape[-1] ** -0.5
        parts.append(torch.einsum("hij,jhd->ihd", scores.softmax(-1), c))
    return torch.cat(parts).to(q.dtype) if parts else q * k * v


@torch.library.custom_op("dopsd::attention_fwd", mutates_args=())
def attention_fwd(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, lengths: Sequence[int], backend: str
) -> tuple[Tensor, Tensor]:
    """-> (out `[T, H, Dh]`, lse `[T * H]`). `starts` `[S + 1]` int32; `backend`: a name or "auto"."""
    if not q.shape[0]:
        return _attention_fwd_fake(q, k, v, starts, lengths, backend)
    name, runs = _plan(q, lengths, backend)
    forward = BACKENDS[name].forward
    if not runs:
        out, lse = forward(q, k, v, starts, max(lengths))
        return out.contiguous(), lse.reshape(-1)
    outs, lses = [], []
    for rows, (batch, length) in _batches(runs):
        out, lse = forward(*_dense((q, k, v), rows, batch, length), None, length)
        outs.append(out.reshape(-1, *q.shape[1:]))
        lses.append(lse.reshape(-1))
    return _join(outs), _join(lses)


@attention_fwd.register_fake
def _attention_fwd_fake(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, lengths: Sequence[int], backend: str
) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape), q.new_empty(q.shape[0] * q.shape[1], dtype=wide)


@torch.library.custom_op("dopsd::attention_bwd", mutates_args=())
def attention_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    starts: Tensor,
    lengths: Sequence[int],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> (dq, dk, dv), contiguous `[T, H, Dh]`; the arguments are attention_fwd's and its results."""
    if not q.shape[0]:
        return _attention_bwd_fake(dout, q, k, v, out, lse, starts, lengths, backend)
    name, runs = _plan(q, lengths, backend)
    backward = BACKENDS[name].backward
    dout = dout.contiguous()
    if not runs:
        dq, dk, dv = backward(dout, q, k, v, out, lse, starts, max(lengths))
        return dq.contiguous(), dk.contiguous(), dv.contiguous()
    heads, parts = q.shape[1], []
    for rows, (batch, length) in _batches(runs):
        tensors = _dense((dout, q, k, v, out), rows, batch, length)
        grads = backward(*tensors, lse[rows.start * heads : rows.stop * heads], None, length)
        parts.append([grad.reshape(-1, *q.shape[1:]) for grad in grads])
    dq, dk, dv = (_join(grads) for grads in zip(*parts))
    return dq, dk, dv


@attention_bwd.register_fake
def _attention_bwd_fake(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    starts: Tensor,
    lengths: Sequence[int],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _batches(runs: Sequence[tuple[int, int, int]]) -> list[tuple[slice, tuple[int, int]]]:
    return [(slice(start, start + batch * length), (batch, length)) for start, batch, length in runs]


def _dense(tensors: Sequence[Tensor], rows: slice, batch: int, length: int) -> list[Tensor]:
    """`[T, H, Dh]` -> views `[batch, length, H, Dh]` of the given rows."""
    shape = (batch, length, *tensors[0].shape[1:])
    return [(x if x.shape[0] == batch * length else x[rows]).view(shape) for x in tensors]


def _join(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(tuple(parts))


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, starts, lengths, backend = inputs
    ctx.save_for_backward(q, k, v, *output, starts)
    ctx.lengths, ctx.backend = lengths, backend
    ctx.set_materialize_grads(False)


def _backward(ctx, dout: Tensor | None, _dlse: Tensor | None) -> tuple:
    if dout is None:
        return (None,) * 6
    q, k, v, out, lse, starts = ctx.saved_tensors
    return *_backward_op(dout, q, k, v, out, lse, starts, ctx.lengths, ctx.backend), None, None, None


attention_fwd.register_autograd(_backward, setup_context=_setup_context)
_forward_op, _backward_op = differentiable(attention_fwd, _setup_context, _backward), unrecorded(attention_bwd)


def attention(q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, backend: str = "auto") -> Tensor:
    """The attention of each token over its own sequence: `[T, H, Dh]` -> `[T, H, Dh]`, differentiable.

    fp32, fp16, bf16 or float64; last dimension contiguous. `backend`: one of BACKENDS, or "auto" for
    `choose_attention`. ValueError for shapes, dtypes, devices or strides that do not fit, and for a backend that cannot
    do this call.
    """
    for name, x in (("k", k), ("v", v)):
        if x.shape != q.shape or x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"attention: {name} is {tuple(x.shape)} {x.dtype} on {x.device}, "
                f"q is {tuple(q.shape)} {q.dtype} on {q.device}: they must be alike"
            )
    if q.ndim != 3 or q.shape[0] != sequences.tokens:
        raise ValueError(f"attention: q is {tuple(q.shape)}, must be [{sequences.tokens} tokens, heads, head dim]")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.numel() and x.stride(-1) != 1:
            raise ValueError(f"attention: the last dimension of {name} has stride {x.stride(-1)}, must be contiguous")
    if sequences.device != q.device and sequences.device.type != q.device.type:
        raise ValueError(f"attention: the sequences are on {sequences.device}, q is on {q.device}")
    if backend in BACKENDS and not usable(backend, q.device, q.dtype, q.shape[-1]):
        raise ValueError(
            f"attention: backend {backend!r} cannot do {q.dtype} with head dim {q.shape[-1]} on {q.device}; "
            'use "auto"'
        )
    return _forward_op(q, k, v, sequences.starts, sequences.lengths, backend)[0]


def _products(q: Tensor, lengths: Sequence[int]) -> int:
    """FLOPs of one product of the attention matrix with a `[L, Dh]` matrix, over all sequences and heads."""
    return 2 * q.shape[1] * q.shape[2] * sum(length * length for length in lengths)


def _calls(lengths: Sequence[int]) -> int:
    """Calls of the library on a GPU: one a dense run if there are at most two, else one packed call."""
    count = len(_runs(tuple(lengths)))
    return count if count <= 2 else 1


@declares("dopsd::attention_fwd")
def _cost_fwd(q: Tensor, k: Tensor, v: Tensor, starts: Tensor, lengths: Sequence[int], backend: str, out) -> Cost:
    """A flash kernel a call; two dense calls are joined by a copy of each result."""
    cost = Cost(launches=_calls(lengths), flops=2 * _products(q, lengths))
    return cost + Cost(2, 0, 2 * size(*out)) if cost.launches > 1 else cost


@declares("dopsd::attention_bwd")
def _cost_bwd(dout, q, k, v, attended, lse, starts, lengths, backend, out) -> Cost:
    """Three kernels a call: sum(dout * out) by row, the five products, rounding dq from its fp32 accumulator."""
    calls = _calls(lengths)
    cost = Cost(launches=3 * calls, flops=5 * _products(q, lengths))
    return cost + Cost(3, 0, 2 * size(*out)) if calls > 1 else cost
