"""Suite `kernels`: each op of `dopsd_kernels` against plain PyTorch and `torch.compile`, with the error of each beside it.

Sizes are those of the model's standard configuration (bench/models.py). Peers: `eager` is the op's own `*_ref` with autograd's
backward, for matrix products and attention torch's own calls; `compiled` is torch.compile of `eager`, fullgraph, static shapes.
Rows; OP is a case, PHASE `forward`, without gradient, or `backward`, alone:

    OP            each    seconds_PHASE, bytes_per_second_PHASE, flops_per_second_PHASE, ceiling_share_PHASE
    OP            ours    bytes_PHASE, flops_PHASE: the work of a call, the same for all variants (bench/suites/roofline.py)
    OP            each    result_relative_error, gradient_relative_error: against float64 in the 2-norm, the worst of all
    OP/eager      ours    speedup_PHASE: eager's seconds over ours; OP/compiled likewise
    copy, gemm    same    bytes_per_second, flops_per_second: the ceilings of memory and of products

A roofline has flops_PHASE / bytes_PHASE across and flops_per_second_PHASE up, under min(gemm, copy * flops / bytes). On a GPU
seconds are the GPU's own, by events behind a fill that flushes the cache (bench/clock.py); on a CPU those of the whole call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.machine import ceilings
from bench.models import WIDE, Model
from bench.results import Options, Row, failed
from bench.suites import roofline
from dopsd_fast.families.zimage.pair import PAD_MULTIPLE
from dopsd_kernels.attention import attention
from dopsd_kernels.divergence_step import divergence_step, divergence_step_ref
from dopsd_kernels.fp8_linear import Fp8Weight, fp8_linear
from dopsd_kernels.gated_residual_norm import gated_residual_norm, gated_residual_norm_ref
from dopsd_kernels.layernorm_modulate import layernorm_modulate, layernorm_modulate_ref
from dopsd_kernels.pair_linear import pair_linear
from dopsd_kernels.pair_linear_accumulate import pair_linear_accumulate
from dopsd_kernels.qk_norm_rope import qk_norm_rope, qk_norm_rope_ref
from dopsd_kernels.rmsnorm_modulate import rmsnorm_modulate, rmsnorm_modulate_ref
from dopsd_kernels.sequences import Sequences
from dopsd_kernels.swiglu import swiglu, swiglu_ref

SUITE = "kernels"
EPS = 1e-5
FULL_STATES = 64
"""States of a wide model in divergence_step: those of one picture are too few to fill a GPU."""
PRODUCTS = {"attention", "pair_linear_lora", "pair_linear_full", "pair_linear_accumulate_lora",
            "pair_linear_accumulate_full", "fp8_linear"}
"""Ops that multiply matrices; the tour leaves their compiled peers out, which call the same products."""


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

    @classmethod
    def of(cls, model: Model) -> Size:
        """The standard configuration of `model`."""
        transformer: Any = model.family.meta_transformer()
        standard, config = model.standard, dict(transformer.config)
        latent = model.family.latent_shape(standard.pixels, standard.pixels)
        patch = config["all_patch_size"][0]
        picture = _padded(latent[1] * latent[2] // patch**2)
        return cls(
            sequences=standard.batch,
            length=picture + _padded(standard.text_tokens),
            teacher_length=picture + _padded(standard.teacher_tokens),
            heads=config["n_heads"],
            head_dim=config["dim"] // config["n_heads"],
            hidden=transformer.layers[0].feed_forward.w1.out_features,
            rank=standard.rank,
            latents=(FULL_STATES if config["dim"] >= WIDE else standard.batch, *latent),
        )


def _padded(tokens: int) -> int:
    return -(-tokens // PAD_MULTIPLE) * PAD_MULTIPLE


TINY = Size(sequences=2, length=5, teacher_length=7, heads=2, head_dim=16, hidden=16, rank=3, latents=(2, 4, 6, 6))


@dataclass(frozen=True)
class Op:
    """`ours(*tensors)` and `eager(*tensors)` give the same tensors; gradients go to `tensors` that require them. An op that
    adds to running sums adds to some of `tensors` and gives those."""

    name: str
    ours: Callable[..., Any]
    eager: Callable[..., Any]
    tensors: tuple[Tensor, ...]

    def to(self, dtype: torch.dtype) -> Op:
        return replace(self, tensors=tuple(t.detach().to(dtype).requires_grad_(t.requires_grad) for t in self.tensors))


def measure(options: Options) -> Iterator[Row]:
    """Rows as they are found, op by op."""
    model = Model(options.model, options.device)
    size = TINY if options.quick else Size.of(model)
    limits = ceilings(options.device, model.dtype, options.quick)
    yield Row(SUITE, f"copy{model.suffix}", "copy", "bytes_per_second", limits.bytes_per_second, "B/s")
    yield Row(SUITE, f"gemm{model.suffix}", "gemm", "flops_per_second", limits.flops_per_second, "FLOP/s")
    for name, build in OPS.items():
        torch.manual_seed(0)
        try:
            op = build(Draw(size, options.device, model.dtype))
            work = roofline.work(build(Draw(size, torch.device("meta"), model.dtype)))
        except (RuntimeError, ValueError) as error:  # a GPU or a width that the op cannot do
            yield failed(SUITE, f"{name}{model.suffix}", "ours", "seconds_forward", "s", error)
            continue
        compiles = not (options.tour and name in PRODUCTS)
        yield from roofline.measure(op, work, limits, options, model.suffix, compiles=compiles)
        del op


# ---- the ops ---------------------------------------------------------------------------------------------------------


class Draw:
    """Random tensors of one size, device and dtype: `draw(rows, columns)`."""

    def __init__(self, size: Size, device: torch.device, dtype: torch.dtype) -> None:
        self.size, self.device, self.dtype = size, device, dtype
        self.sequences = Sequences([size.length] * size.sequences, device)
        self.rows = self.sequences.tokens

    def __call__(self, *shape: int, grad: bool = True, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, device=self.device) * scale).to(self.dtype).requires_grad_(grad)

    def activations(self, **options: Any) -> Tensor:
        return self(self.rows, self.size.width, **options)

    def weight(self) -> Tensor:
        return self(self.size.width)

    def modulation(self) -> Tensor:
        return self(self.size.sequences, self.size.width)


def _per_sequence(draw: Draw, ours: Callable[..., Any], eager: Callable[..., Any], *tensors: Tensor) -> Op:
    """An op whose modulation or gate has a row for each sequence."""
    return Op(eager.__name__.removesuffix("_ref"), partial(ours, sequences=draw.sequences, eps=EPS),
              partial(eager, row_sequence=draw.sequences.row_sequence, eps=EPS), tensors)


def _rmsnorm_modulate(draw: Draw) -> Op:
    return _per_sequence(draw, rmsnorm_modulate, rmsnorm_modulate_ref, draw.activations(), draw.weight(), draw.modulation())


def _layernorm_modulate(draw: Draw) -> Op:
    tensors = draw.activations(), draw.modulation(), draw.modulation()
    return _per_sequence(draw, layernorm_modulate, layernorm_modulate_ref, *tensors)


def _gated_residual_norm(draw: Draw) -> Op:
    tensors = draw.activations(), draw.activations(), draw.weight(), draw.modulation(), draw.weight(), draw.modulation()
    return _per_sequence(draw, gated_residual_norm, gated_residual_norm_ref, *tensors)


def _qk_norm_rope(draw: Draw) -> Op:
    size = draw.size
    angles = torch.rand(draw.rows, size.head_dim // 2, device=draw.device) * 6.3
    given: dict[str, Any] = dict(cos=angles.cos(), sin=angles.sin(), heads=size.heads, eps=EPS)
    tensors = draw(draw.rows, 3 * size.width), draw(size.head_dim), draw(size.head_dim)
    return Op("qk_norm_rope", partial(qk_norm_rope, **given), partial(qk_norm_rope_ref, **given), tensors)


def _swiglu(draw: Draw) -> Op:
    return Op("swiglu", swiglu, swiglu_ref, (draw(draw.rows, 2 * draw.size.hidden),))


def _divergence_step(draw: Draw) -> Op:
    states = draw(*draw.size.latents), *(draw(*draw.size.latents, grad=False) for _ in range(2))
    return Op("divergence_step", partial(_divergence, divergence_step), partial(_divergence, divergence_step_ref), states)


def _divergence(step: Callable[..., Any], v_s: Tensor, v_t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    result = step(v_s, v_t, x, 0.25, 0.15, 0.1)
    return result.loss, result.x_next


def _attention(draw: Draw) -> Op:
    tensors = tuple(draw(draw.rows, draw.size.heads, draw.size.head_dim) for _ in range(3))
    return Op("attention", partial(attention, sequences=draw.sequences), partial(_dense_attention, draw.size.length), tensors)


def _dense_attention(length: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.unflatten(0, (-1, length)).transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1)


def _pair_linear_op(kind: str, draw: Draw) -> Op:
    """Three matrices (q, k, v) of student and teacher; "lora": frozen ones that both share, and A and B of each."""
    d, r = draw.size.width, draw.size.rank
    matrices = [draw(d, d, grad=kind == "full", scale=d**-0.5) for _ in range(3)]
    student = [draw(*shape, scale=0.1) for shape in [(r, d)] * 3 + [(d, r)] * 3] if kind == "lora" else matrices
    teacher = [1.1 * one.detach() for one in student]
    teacher_rows = draw(draw.size.sequences * draw.size.teacher_length, d, grad=False)
    tensors = draw.activations(), teacher_rows, *matrices, *(student if kind == "lora" else ()), *teacher
    return Op(f"pair_linear_{kind}", partial(_pair_linear, pair_linear), partial(_pair_linear, _two_branches), tensors)


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


def _pair_linear_accumulate(kind: str, draw: Draw) -> Op:
    """The gradients of q, k and v, "lora": of A and B of each, added to fp32 sums."""
    d, r, wide = draw.size.width, draw.size.rank, torch.promote_types(draw.dtype, torch.float32)
    shapes = [(r, d)] * 3 + [(d, r)] * 3 if kind == "lora" else [(d, d)] * 3
    sums = [draw(*shape, grad=False).to(wide) for shape in shapes]
    through = [draw(draw.rows, 3 * r, grad=False) for _ in range(2)] if kind == "lora" else []  # x A^T and dy B, side by side
    tensors = [draw.activations(grad=False) for _ in range(4)]
    ours, eager = (partial(_accumulate, add) for add in (pair_linear_accumulate, _add_gradients))
    return Op(f"pair_linear_accumulate_{kind}", ours, eager, (*tensors, *sums, *through))


def _accumulate(add: Callable[..., Any], x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    dy, rest = list(tensors[:3]), list(tensors[3:])
    if len(rest) == 3:
        add(rest, [], [], dy, x, [2.0] * 3, x.new_empty(0), x.new_empty(0))
        return tuple(rest)
    add([], rest[:3], rest[3:6], dy, x, [2.0] * 3, *rest[6:])
    return tuple(rest[:6])


def _add_gradients(
    sums_w: list[Tensor], sums_a: list[Tensor], sums_b: list[Tensor], dy: list[Tensor], x: Tensor, scales: list[float],
    xa: Tensor, q: Tensor,
) -> None:
    """As autograd does it: each gradient in the tensors' dtype, then added."""
    for total, gradient in zip(sums_w, dy):
        total += gradient.t() @ x
    parts = [t.chunk(3, 1) for t in (xa, q)] if sums_a else [(), ()]
    for a, b, product, through, gradient, scale in zip(sums_a, sums_b, *parts, dy, scales):
        a += through.t() @ x
        b += scale * (gradient.t() @ product)


def _fp8_linear(draw: Draw) -> Op:
    """A frozen feed-forward matrix in float8 against the same in the model's dtype; its errors are the quantisation's."""
    size = draw.size
    weight = draw(size.hidden, size.width, grad=False, scale=size.width**-0.5)
    quantised = Fp8Weight(weight)
    ours, eager = (lambda x: fp8_linear(x, quantised)), (lambda x: F.linear(x, weight.to(x.dtype)))
    return Op("fp8_linear", ours, eager, (draw.activations(),))


OPS: dict[str, Callable[[Draw], Op]] = {
    "rmsnorm_modulate": _rmsnorm_modulate,
    "layernorm_modulate": _layernorm_modulate,
    "gated_residual_norm": _gated_residual_norm,
    "qk_norm_rope": _qk_norm_rope,
    "swiglu": _swiglu,
    "divergence_step": _divergence_step,
    "attention": _attention,
    "pair_linear_lora": partial(_pair_linear_op, "lora"),
    "pair_linear_full": partial(_pair_linear_op, "full"),
    "pair_linear_accumulate_lora": partial(_pair_linear_accumulate, "lora"),
    "pair_linear_accumulate_full": partial(_pair_linear_accumulate, "full"),
    "fp8_linear": _fp8_linear,
}
