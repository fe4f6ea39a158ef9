"""The loss between two velocities, its gradient and the Euler step, in one pass over memory.

With v_s, v_t the velocities of student and teacher at state x and time t (0 noise, 1 image), n elements, weight w_k / K:

    loss = weight * mean((v_s - v_t)^2);   grad_v = dloss/dv_s = 2 * weight / n * (v_s - v_t)
    x_next = x + dt * v_s;   x1_s = x + (1 - t) * v_s;   x1_t = x + (1 - t) * v_t

Source: D-OPSD, arXiv 2605.05204, Eq. 7, and Euler's rule. Supervised fine-tuning is the same with v_t = image - noise and
no step. Any shape; computed in fp32 whatever the dtypes, in fp64 where an input is fp64.

The sum is the same from run to run: a program sums one block of elements, a second kernel adds the blocks in a fixed order,
in fp64. NaN and inf reach the loss. n = 0 has loss 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dopsd_kernels import backend, native_ops
from dopsd_kernels.costs import Cost, declares, size
from dopsd_kernels.cubins import CompileCase
from dopsd_kernels.direct_autograd import differentiable
from dopsd_kernels.launch import launch
from dopsd_kernels.triton_compat import tl, triton

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
FINISH_BLOCK = 4096


@triton.jit
def _divergence_step_kernel(
    v_s, v_t, x, grad_v, x_next, x1_s, x1_t, partial, n, grad_scale, dt, rest,
    WANT_NEXT: tl.constexpr, WANT_X1: tl.constexpr, BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < n
    s = tl.load(v_s + at, mask=mask, other=0.0).to(tl.float32)
    t = tl.load(v_t + at, mask=mask, other=0.0).to(tl.float32)
    difference = s - t
    tl.store(partial + tl.program_id(0), tl.sum(difference * difference, axis=0))
    tl.store(grad_v + at, difference * grad_scale, mask=mask)
    if WANT_NEXT or WANT_X1:
        state = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        if WANT_NEXT:
            tl.store(x_next + at, state + dt * s, mask=mask)
        if WANT_X1:
            tl.store(x1_s + at, state + rest * s, mask=mask)
            tl.store(x1_t + at, state + rest * t, mask=mask)


@triton.jit
def _divergence_mean_kernel(partial, mean_square, blocks, n, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, blocks, BLOCK):
        at = first + tl.arange(0, BLOCK)
        total += tl.load(partial + at, mask=at < blocks, other=0.0).to(tl.float64)
    tl.store(mean_square, tl.sum(total, axis=0) / n)


def _config(n: int) -> dict[str, Any]:
    """Small tensors need many programs, large ones few partial sums."""
    return dict(BLOCK=1024 if n < 1 << 22 else 2048, num_warps=4)


def _wide(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def divergence_step_ref(
    v_s: Tensor, v_t: Tensor, x: Tensor, weight: float, dt: float | None, t: float, want_x1: bool = False
) -> Divergence:
    """`divergence_step` in plain PyTorch, differentiable by autograd with respect to v_s."""
    wide = _wide(v_s, v_t, x)
    student, teacher, state = v_s.to(wide), v_t.detach().to(wide), x.detach().to(wide)
    mean_square = (student - teacher).square().sum() / max(v_s.numel(), 1)
    velocity = student.detach()
    return Divergence(
        loss=weight * mean_square,
        mean_square=mean_square.detach(),
        x_next=None if dt is None else (state + dt * velocity).to(x.dtype),
        x1_s=(state + (1 - t) * velocity).to(x.dtype) if want_x1 else None,
        x1_t=(state + (1 - t) * teacher).to(x.dtype) if want_x1 else None,
    )


def _forward_torch(
    v_s: Tensor, v_t: Tensor, x: Tensor, weight: float, dt: float, t: float, want_next: bool, want_x1: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    wide = _wide(v_s, v_t, x)
    student, teacher, state, n = v_s.to(wide), v_t.to(wide), x.to(wide), max(v_s.numel(), 1)
    difference = student - teacher
    mean_square = _sum_of_squares(difference) / n
    x_next = torch.add(state, student, alpha=dt).to(x.dtype) if want_next else x.new_empty(0)
    x1_s = torch.add(state, student, alpha=1 - t).to(x.dtype) if want_x1 else x.new_empty(0)
    x1_t = torch.add(state, teacher, alpha=1 - t).to(x.dtype) if want_x1 else x.new_empty(0)
    return mean_square, difference.mul_(2 * weight / n).to(v_s.dtype), x_next, x1_s, x1_t


def _sum_of_squares(difference: Tensor, block: int = 1 << 14) -> Tensor:
    """Block by block: no block is shared by two threads, so that the sum does not depend on how many there are."""
    sums = difference.flatten().square()
    while sums.numel() > block:
        whole = sums.numel() // block * block
        parts = sums[:whole].view(-1, block).sum(1)
        sums = torch.cat((parts, sums[whole:].sum(0, keepdim=True)))
    return sums.sum()


def _check(v_s: Tensor, v_t: Tensor, x: Tensor) -> None:
    for name, tensor in (("v_s", v_s), ("v_t", v_t), ("x", x)):
        if tensor.dtype not in DTYPES:
            raise ValueError(f"divergence_step: {name} is {tensor.dtype}, must be bf16, fp16, fp32 or fp64")
        if tensor.shape != v_s.shape:
            raise ValueError(f"divergence_step: {name} has shape {tuple(tensor.shape)}, v_s {tuple(v_s.shape)}")
        if tensor.device != v_s.device:
            raise ValueError(f"divergence_step: {name} is on {tensor.device}, v_s on {v_s.device}: move one of them")
        if not tensor.is_contiguous():
            raise ValueError(f"divergence_step: {name} has strides {tensor.stride()}, must be contiguous: call .contiguous()")


@torch.library.custom_op("dopsd::divergence_step_fwd", mutates_args=())
def divergence_step_fwd(
    v_s: Tensor, v_t: Tensor, x: Tensor, weight: float, dt: float, t: float, want_next: bool, want_x1: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> (mean_square `[]`, fp32 or fp64, without the weight; grad_v, with it, like v_s; x_next, x1_s, x1_t, like x, `[0]`
    where not asked). Only mean_square is differentiable, with respect to v_s. Errors: see `divergence_step`."""
    _check(v_s, v_t, x)
    wide = _wide(v_s, v_t, x)
    native = native_ops.has("divergence_step") and v_s.ndim > 0 and native_ops.usable(v_s, v_t, x)
    chosen = "torch" if wide == torch.float64 else backend.choose(v_s, native)
    if chosen == "native":
        return native_ops.divergence_step_fwd(v_s, v_t, x, weight, dt, t, want_next, want_x1)
    if chosen == "torch":
        return _forward_torch(v_s, v_t, x, weight, dt, t, want_next, want_x1)
    n = v_s.numel()
    mean_square = v_s.new_zeros((), dtype=wide) if n == 0 else v_s.new_empty((), dtype=wide)
    grad_v = torch.empty_like(v_s)
    x_next = x.new_empty(x.shape if want_next else 0)
    x1_s, x1_t = (x.new_empty(x.shape if want_x1 else 0) for _ in range(2))
    if n:
        config = _config(n)
        blocks = -(-n // config["BLOCK"])
        partial = v_s.new_empty(blocks, dtype=wide)
        launch(
            _divergence_step_kernel, (blocks,), v_s, v_t, x, grad_v, x_next, x1_s, x1_t, partial, n,
            2 * weight / n, float(dt), 1.0 - t, WANT_NEXT=want_next, WANT_X1=want_x1, **config,
        )
        launch(_divergence_mean_kernel, (1,), partial, mean_square, blocks, n, BLOCK=FINISH_BLOCK, num_warps=8)
    return mean_square, grad_v, x_next, x1_s, x1_t


@divergence_step_fwd.register_fake
def _(
    v_s: Tensor, v_t: Tensor, x: Tensor, weight: float, dt: float, t: float, want_next: bool, want_x1: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    _check(v_s, v_t, x)
    x_next = x.new_empty(x.shape if want_next else 0)
    x1_s, x1_t = (x.new_empty(x.shape if want_x1 else 0) for _ in range(2))
    return v_s.new_empty((), dtype=_wide(v_s, v_t, x)), torch.empty_like(v_s), x_next, x1_s, x1_t


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    v_s, v_t, _, ctx.weight, *_ = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*((output[1],) if ctx.weight else (v_s, v_t)))


def _backward(ctx: Any, dmean: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if dmean is None:
        return (None,) * 8
    if ctx.weight:
        (grad_v,) = ctx.saved_tensors
        dv = grad_v * (dmean / ctx.weight)
    else:
        v_s, v_t = ctx.saved_tensors
        dv = ((v_s.to(dmean.dtype) - v_t.to(dmean.dtype)) * (dmean * (2 / max(v_s.numel(), 1)))).to(v_s.dtype)
    return dv, None, None, None, None, None, None, None


divergence_step_fwd.register_autograd(_backward, setup_context=_setup)
_forward_op = differentiable(divergence_step_fwd, _setup, _backward)


@dataclass(frozen=True)
class Divergence:
    """What `divergence_step` found: `loss` `[]`, differentiable with respect to v_s; `mean_square` `[]`, the loss without
    its weight, detached; `x_next`, `x1_s`, `x1_t`, shaped like x and detached, None where not asked."""

    loss: Tensor
    mean_square: Tensor
    x_next: Tensor | None
    x1_s: Tensor | None
    x1_t: Tensor | None


def divergence_step(
    v_s: Tensor, v_t: Tensor, x: Tensor, weight: float, dt: float | None, t: float, want_x1: bool = False
) -> Divergence:
    """loss = weight * mean((v_s - v_t)^2), x_next = x + dt * v_s and, with `want_x1`, x1 = x + (1 - t) * v of both.

    `v_s`, `v_t`, `x`: one shape, contiguous, bf16, fp16, fp32 or fp64, each its own; no gradient flows to v_t and x. `weight`,
    `dt`, `t`: numbers; dt None: no next state (SFT). loss and mean_square are fp32 (fp64 where an input is fp64), states
    have x's dtype. Raises ValueError for shapes or devices that differ, other dtypes, and tensors that are not contiguous.
    """
    step = 0.0 if dt is None else dt
    mean_square, _, x_next, x1_s, x1_t = _forward_op(v_s, v_t, x, weight, step, t, dt is not None, want_x1)
    return Divergence(
        loss=mean_square * weight,
        mean_square=mean_square.detach(),
        x_next=None if dt is None else x_next,
        x1_s=x1_s if want_x1 else None,
        x1_t=x1_t if want_x1 else None,
    )


@declares("dopsd::divergence_step_fwd")
def _(
    v_s: Tensor, v_t: Tensor, x: Tensor, weight: float, dt: float, t: float, want_next: bool, want_x1: bool,
    *, out: tuple[Tensor, ...],
) -> Cost:
    """The partial sums are written and read."""
    n = v_s.numel()
    if n == 0:
        return Cost()
    partial = -(-n // _config(n)["BLOCK"]) * out[0].element_size()
    return Cost(2, 0, size(v_s, v_t, x if want_next or want_x1 else None, *out) + 2 * partial)


def _compile_cases() -> list[CompileCase]:
    cases = []
    for velocity, state in (("*bf16", "*fp32"), ("*fp32", "*fp32")):
        vectors = dict.fromkeys(("v_s", "v_t", "x", "grad_v", "x_next", "x1_s", "x1_t"), state)
        vectors.update(v_s=velocity, v_t=velocity, grad_v=velocity)
        for n, integer in ((1 << 18, "i32"), (1 << 32, "i64")):
            for wants in ((True, False), (True, True), (False, False)):
                config = _config(n)
                warps = config.pop("num_warps")
                signature = dict(**vectors, partial="*fp32", n=integer, grad_scale="fp32", dt="fp32", rest="fp32")
                name = f"divergence_step {velocity[1:]} BLOCK={config['BLOCK']} next={wants[0]} x1={wants[1]}"
                config.update(WANT_NEXT=wants[0], WANT_X1=wants[1])
                cases.append(CompileCase(name, _divergence_step_kernel, signature, config, warps))
    mean = dict(partial="*fp32", mean_square="*fp32", blocks="i32", n="i64")
    cases.append(CompileCase("divergence_mean", _divergence_mean_kernel, mean, dict(BLOCK=FINISH_BLOCK), 8))
    return cases


COMPILE_CASES = _compile_cases()
