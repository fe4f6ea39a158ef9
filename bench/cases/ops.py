"""Suite `kernels`: each op of `dopsd_kernels` against plain PyTorch, forward and backward, with its error beside it.

On a GPU at Z-Image's widths in bf16, elsewhere at the embedded pipeline's in fp32. The peer `eager` is the op's own
`*_ref` with autograd's backward; for the matrix products and attention it is torch's own call. Errors are relative to
float64 in the 2-norm; the worst of all results.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.results import Options, Row, interleaved, ratios, summary
from dopsd_kernels.attention import attention
from dopsd_kernels.divergence_step import divergence_step, divergence_step_ref
from dopsd_kernels.gated_residual_norm import gated_residual_norm, gated_residual_norm_ref
from dopsd_kernels.layernorm_modulate import layernorm_modulate, layernorm_modulate_ref
from dopsd_kernels.pair_linear import pair_linear
from dopsd_kernels.qk_norm_rope import qk_norm_rope, qk_norm_rope_ref
from dopsd_kernels.rmsnorm_modulate import rmsnorm_modulate, rmsnorm_modulate_ref
from dopsd_kernels.sequences import Sequences
from dopsd_kernels.swiglu import swiglu, swiglu_ref

EPS = 1e-5
SHARES = {"gated_residual_norm", "layernorm_modulate", "rmsnorm_modulate", "qk_norm_rope", "swiglu", "divergence_step"}
"""Ops that only move memory: on a GPU their speed is a share of a copy's."""


@dataclass(frozen=True)
class Size:
    """`sequences` of `length` tokens; the teacher's have `teacher_length`."""

    sequences: int
    length: int
    teacher_length: int
    heads: int
    head_dim: int
    hidden: int
    rank: int
    latents: tuple[int, ...]

    @property
    def width(self) -> int:
        return self.heads * self.head_dim


NANO = Size(sequences=8, length=96, teacher_length=160, heads=4, head_dim=36, hidden=384, rank=16, latents=(8, 8, 16, 16))
ZIMAGE = Size(
    sequences=1, length=4352, teacher_length=4864, heads=30, head_dim=128, hidden=10240, rank=64, latents=(64, 16, 128, 128)
)  # fmt: skip
TINY = Size(sequences=2, length=5, teacher_length=7, heads=2, head_dim=12, hidden=16, rank=3, latents=(2, 4, 6, 6))


@dataclass(frozen=True)
class Op:
    """`ours(*tensors)` and `eager(*tensors)` give the same tensors; gradients go to `tensors` that require them."""

    name: str
    ours: Callable[..., Any]
    eager: Callable[..., Any]
    tensors: tuple[Tensor, ...]

    def to(self, dtype: torch.dtype) -> Op:
        return replace(self, tensors=tuple(t.detach().to(dtype).requires_grad_(t.requires_grad) for t in self.tensors))


def run(options: Options) -> list[Row]:
    torch.set_num_threads(options.threads)
    cuda = options.device.type == "cuda"
    size = TINY if options.quick else ZIMAGE if cuda else NANO
    rows = []
    found = ops(size, options.device, torch.bfloat16 if cuda else torch.float32)
    if cuda and torch.cuda.get_device_capability(options.device) >= (8, 9):
        found.append(fp8(size, options.device))
    for op in found:
        rows += [*speed(op, options), *errors(op)]
    return rows


def ops(size: Size, device: torch.device, dtype: torch.dtype) -> list[Op]:
    """Every op at one size, on random numbers."""
    torch.manual_seed(0)
    sequences = Sequences([size.length] * size.sequences, device)
    rows, teacher_rows = sequences.tokens, size.sequences * size.teacher_length
    index = sequences.row_sequence

    def draw(*shape: int, grad: bool = True, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, device=device) * scale).to(dtype).requires_grad_(grad)

    d, s = size.width, size.sequences
    weight, modulation = partial(draw, d), partial(draw, s, d)
    angles = torch.rand(rows, size.head_dim // 2, device=device) * 6.3
    state = partial(draw, *size.latents)
    return [
        Op("rmsnorm_modulate", partial(rmsnorm_modulate, sequences=sequences, eps=EPS),
           partial(rmsnorm_modulate_ref, row_sequence=index, eps=EPS), (draw(rows, d), weight(), modulation())),
        Op("layernorm_modulate", partial(layernorm_modulate, sequences=sequences, eps=EPS),
           partial(layernorm_modulate_ref, row_sequence=index, eps=EPS), (draw(rows, d), modulation(), modulation())),
        Op("gated_residual_norm", partial(gated_residual_norm, sequences=sequences, eps=EPS),
           partial(gated_residual_norm_ref, row_sequence=index, eps=EPS),
           (draw(rows, d), draw(rows, d), weight(), modulation(), weight(), modulation())),
        Op("qk_norm_rope", partial(qk_norm_rope, cos=angles.cos(), sin=angles.sin(), heads=size.heads, eps=EPS),
           partial(qk_norm_rope_ref, cos=angles.cos(), sin=angles.sin(), heads=size.heads, eps=EPS),
           (draw(rows, 3 * d), draw(size.head_dim), draw(size.head_dim))),
        Op("swiglu", swiglu, swiglu_ref, (draw(rows, 2 * size.hidden),)),
        Op("divergence_step", partial(_divergence, divergence_step), partial(_divergence, divergence_step_ref),
           (state(), state(grad=False), state(grad=False))),
        Op("attention", partial(attention, sequences=sequences), partial(_attention, size.length),
           tuple(draw(rows, size.heads, size.head_dim) for _ in range(3))),
        *(
            Op(f"pair_linear_{kind}", partial(_pair_linear, pair_linear), partial(_pair_linear, _two_branches),
               (draw(rows, d), draw(teacher_rows, d, grad=False), *matrices))
            for kind, matrices in (("lora", _lora(draw, size)), ("full", _full(draw, size)))
        ),
    ]  # fmt: skip


def fp8(size: Size, device: torch.device) -> Op:
    """A frozen feed-forward matrix in float8 against the same in bf16; its errors are those of the quantisation."""
    from dopsd_kernels.fp8_linear import Fp8Weight, fp8_linear

    x = torch.randn(size.sequences * size.length, size.width, device=device, dtype=torch.bfloat16).requires_grad_()
    weight = (torch.randn(size.hidden, size.width, device=device) * size.width**-0.5).bfloat16()
    quantised = Fp8Weight(weight)
    return Op("fp8_linear", lambda x: fp8_linear(x, quantised), lambda x: F.linear(x, weight.to(x)), (x,))


def _divergence(step: Callable[..., Any], v_s: Tensor, v_t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    result = step(v_s, v_t, x, 0.25, 0.15, 0.1)
    return result.loss, result.x_next


def _lora(draw: Callable[..., Tensor], size: Size) -> tuple[Tensor, ...]:
    """Three frozen matrices (q, k, v) and, for student and teacher, A and B of each."""
    d, r = size.width, size.rank
    frozen = [draw(d, d, grad=False, scale=d**-0.5) for _ in range(3)]
    student = [draw(*shape, scale=0.1) for shape in [(r, d)] * 3 + [(d, r)] * 3]
    return *frozen, *student, *(one.detach() + 0.1 * one.detach() for one in student)


def _full(draw: Callable[..., Tensor], size: Size) -> tuple[Tensor, ...]:
    d = size.width
    student = [draw(d, d, scale=d**-0.5) for _ in range(3)]
    return *student, *(1.1 * one.detach() for one in student)


def _pair_linear(linear: Callable[..., Any], x_s: Tensor, x_t: Tensor, *matrices: Tensor) -> tuple[Tensor, Tensor]:
    groups = [list(matrices[i : i + 3]) for i in range(0, len(matrices), 3)]
    if len(groups) == 2:
        return linear(x_s, x_t, groups[0], groups[1])
    base, a_s, b_s, a_t, b_t = groups
    scales = [2.0] * 3
    return linear(x_s, x_t, base, base, a_s=a_s, b_s=b_s, a_t=a_t, b_t=b_t, scales_s=scales, scales_t=scales)


def _two_branches(x_s: Tensor, x_t: Tensor, w_s: list[Tensor], w_t: list[Tensor], **lora: Any) -> tuple[Tensor, Tensor]:
    branches = []
    for side, x, w in (("s", x_s, w_s), ("t", x_t, w_t)):
        columns = [F.linear(x, one) for one in w]
        for i, (a, b, scale) in enumerate(zip(*(lora.get(f"{name}_{side}", ()) for name in ("a", "b", "scales")))):
            columns[i] = columns[i] + F.linear(F.linear(x, a), b) * scale
        branches.append(torch.cat(columns, dim=1))
    return branches[0], branches[1]


def _attention(length: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.unflatten(0, (-1, length)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1)


# ---- the measurement -------------------------------------------------------------------------------------------------


def differentiable(results: Any) -> list[Tensor]:
    return [r for r in (results if isinstance(results, tuple) else (results,)) if isinstance(r, Tensor) and r.requires_grad]


def speed(op: Op, options: Options) -> list[Row]:
    """Seconds of a call, forward without gradient and backward alone; a measurement is as many calls as take 5 ms."""
    leaves = [t for t in op.tensors if t.requires_grad]
    phases: dict[str, dict[str, Callable[[], Any]]] = {"forward": {}, "backward": {}}
    for name, function in (("ours", op.ours), ("eager", op.eager)):
        outputs = differentiable(function(*op.tensors))
        seeds = [torch.randn_like(out) for out in outputs]
        phases["forward"][name] = torch.no_grad()(partial(function, *op.tensors))
        phases["backward"][name] = partial(torch.autograd.grad, outputs, leaves, seeds, retain_graph=True)
    rounds, rows = (2 if options.quick else options.rounds or 30), []
    for phase, calls in phases.items():
        once = max(values[-1] for values in interleaved(calls, 1, 2, options.device).values())
        repeats = 1 if options.quick else max(1, round(5e-3 / once))
        many = {name: partial(_repeat, call, repeats) for name, call in calls.items()}
        taken = interleaved(many, rounds, 2, options.device, options.clock)
        taken = {name: [value / repeats for value in values] for name, values in taken.items()}
        for name, values in taken.items():
            rows.append(Row("kernels", op.name, name, f"seconds_{phase}", unit="s", **summary(values)))
        faster = ratios(taken["eager"], taken["ours"])
        rows.append(Row("kernels", f"{op.name}/eager", "ours", f"speedup_{phase}", unit="x", **summary(faster)))
        if options.device.type == "cuda" and op.name in SHARES:
            rows.append(bandwidth(op, phase, taken["ours"], options))
    return rows


def _repeat(call: Callable[[], Any], count: int) -> None:
    for _ in range(count):
        call()


def bandwidth(op: Op, phase: str, seconds: list[float], options: Options) -> Row:
    """The declared bytes over the time, as a share of what a copy of 1 GiB moves in the same run."""
    from bench.cases.meta_trace import Trace

    trace = Trace()
    with trace:
        outputs = differentiable(op.ours(*op.tensors))
        if phase == "backward":
            forward = trace.cost(op="dopsd::").elementwise_bytes
            torch.autograd.grad(outputs, [t for t in op.tensors if t.requires_grad], [torch.randn_like(o) for o in outputs])
    moved = trace.cost(op="dopsd::").elementwise_bytes - (forward if phase == "backward" else 0)
    source = torch.zeros(1 << 30, dtype=torch.uint8, device=options.device)
    copies = interleaved({"copy": partial(torch.empty_like(source).copy_, source)}, 10, 3, options.device)["copy"]
    rate = 2 * source.numel() / summary(copies)["value"]
    return Row("kernels", op.name, "ours", f"copy_bandwidth_share_{phase}", unit="",
               **summary([moved / second / rate for second in seconds]))  # fmt: skip


def errors(op: Op) -> list[Row]:
    """Relative errors of results and gradients against the reference in float64, for ours and for eager."""
    wide = op.to(torch.float64)
    exact_outputs, exact_gradients = outcome(op.eager, wide.tensors)
    rows = []
    for name, function in (("ours", op.ours), ("eager", op.eager)):
        outputs, gradients = outcome(function, op.tensors)
        for what, values, exact in (("result", outputs, exact_outputs), ("gradient", gradients, exact_gradients)):
            worst = max(float((v.double() - e).norm() / e.norm()) for v, e in zip(values, exact, strict=True))
            rows.append(Row("kernels", op.name, name, f"{what}_relative_error", worst, ""))
    return rows


def outcome(function: Callable[..., Any], tensors: tuple[Tensor, ...]) -> tuple[list[Tensor], list[Tensor]]:
    """All results, and the gradients for upstream gradients that depend on the results' shapes alone."""
    results = function(*tensors)
    outputs = [r for r in (results if isinstance(results, tuple) else (results,)) if isinstance(r, Tensor)]
    flowing = differentiable(tuple(outputs))
    generator = torch.Generator().manual_seed(1)
    seeds = [torch.randn(out.shape, generator=generator).to(out) for out in flowing]
    gradients = torch.autograd.grad(flowing, [t for t in tensors if t.requires_grad], seeds)
    return [out.detach() for out in outputs], list(gradients)
