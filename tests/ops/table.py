"""The ops that work row by row, each with what `tests/ops/test_ops.py` has to know of it to test it like the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dopsd_kernels.gated_residual_norm import (
    gated_residual_norm,
    gated_residual_norm_bwd,
    gated_residual_norm_fwd,
    gated_residual_norm_ref,
)
from dopsd_kernels.layernorm_modulate import (
    layernorm_modulate,
    layernorm_modulate_bwd,
    layernorm_modulate_fwd,
    layernorm_modulate_ref,
)
from dopsd_kernels.qk_norm_rope import qk_norm_rope, qk_norm_rope_bwd, qk_norm_rope_fwd, qk_norm_rope_ref
from dopsd_kernels.rmsnorm_modulate import rmsnorm_modulate, rmsnorm_modulate_bwd, rmsnorm_modulate_fwd, rmsnorm_modulate_ref
from dopsd_kernels.sequences import Sequences
from dopsd_kernels.swiglu import swiglu, swiglu_bwd, swiglu_fwd, swiglu_ref
from tests.ops.rule import DEVICE

Shape = tuple[Any, ...]
Leaves = Sequence[Tensor | None]
Function = Callable[..., Any]


@dataclass(frozen=True)
class Op:
    """An op whose first `rows` arguments are rows; the others are weights and modulations that may be missing."""

    name: str
    arguments: tuple[str, ...]
    """Names of the tensors that have a gradient, as the public function calls them."""
    given: dict[str, str]
    """Name -> the arguments that are there, by their first letters in `letters`."""
    letters: str
    cases: tuple[tuple[Shape, str], ...]
    """(shape, given) of the error rule."""
    narrow: Shape
    """Of gradcheck and of the registration."""
    make: Callable[[Shape, torch.dtype, Any], list[Tensor]]
    """All arguments: (shape, dtype, device) -> tensors."""
    bind: Callable[[Shape, torch.dtype, Any], tuple[Function, Function]]
    """(shape, dtype, device) -> the op and its reference, as functions of the arguments alone; a list of outputs each."""
    primitives: Callable[[Shape, Leaves, bool], Iterator[tuple[Any, tuple]]]
    """(shape, arguments, asked) -> forward and backward with what each is given; `asked`: all gradients, else the rows'."""
    rows: int = 1

    def inputs(self, shape: Shape, given: str, dtype: torch.dtype = torch.float32, device: Any = DEVICE) -> list[Tensor | None]:
        there = self.given[given]
        return [t if letter in there else None for t, letter in zip(self.make(shape, dtype, device), self.letters, strict=True)]


def spread(rows: Tensor) -> Tensor:
    """The same values with another row stride."""
    return torch.cat([rows, rows], 1)[:, : rows.shape[1]]


def random(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


# ---- norms: a shape is (lengths of the sequences, width) -----------------------------------------------------------------

T0, T1, T5, T123 = (0, 0), (1,), (2, 0, 3), (70, 0, 52, 1)


def norm_cases(most: str, given: dict[str, str], *more: tuple[Shape, str]) -> tuple[tuple[Shape, str], ...]:
    common = (((T0, 36), most), ((T1, 123), most), ((T5, 3840), most), ((T123, 36), most), *more)
    return (*common, *(((T5, 123), one) for one in given))


def norm_generator(shape: Shape) -> torch.Generator:
    lengths, width = shape
    return torch.Generator().manual_seed(sum(lengths) * 7919 + width)


def modulations(generator: torch.Generator, shape: Shape, dtype: torch.dtype, device: Any, count: int) -> tuple[Tensor, ...]:
    """Column slices of one tensor, as of a block's four modulations."""
    lengths, width = shape
    return random(generator, len(lengths), 4 * width).to(device, dtype).chunk(4, 1)[1 : 1 + count]


def make_rmsnorm(shape: Shape, dtype: torch.dtype = torch.float32, device: Any = DEVICE) -> list[Tensor]:
    (lengths, width), generator = shape, norm_generator(shape)
    x, weight = random(generator, sum(lengths), width), 1 + 0.3 * random(generator, width)
    return [x.to(device, dtype), weight.to(device, dtype), *modulations(generator, shape, dtype, device, 1)]


def make_layernorm(shape: Shape, dtype: torch.dtype = torch.float32, device: Any = DEVICE) -> list[Tensor]:
    """x off centre."""
    (lengths, width), generator = shape, norm_generator(shape)
    x = 0.7 + random(generator, sum(lengths), width)
    return [x.to(device, dtype), *modulations(generator, shape, dtype, device, 2)]


def make_gated(shape: Shape, dtype: torch.dtype = torch.float32, device: Any = DEVICE) -> list[Tensor]:
    (lengths, width), generator = shape, norm_generator(shape)
    gate, scale = modulations(generator, shape, dtype, device, 2)
    x, h = (factor * random(generator, sum(lengths), width) for factor in (1, 3))
    weight, following = (1 + 0.3 * random(generator, width) for _ in range(2))
    x, h, weight, following = (t.to(device, dtype) for t in (x, h, weight, following))
    return [x, h, weight, gate, following, scale]


def bind_norm(function: Function, reference: Function, eps: float, rows: int = 1) -> Callable:
    def bind(shape: Shape, dtype: torch.dtype, device: Any) -> tuple[Function, Function]:
        sequences = Sequences(shape[0], device)

        def ours(*tensors: Tensor | None) -> list[Tensor]:
            return present(function(*map(spread, tensors[:rows]), *tensors[rows:], sequences))

        return ours, lambda *tensors: present(reference(*tensors, sequences.row_sequence, eps))

    return bind


def present(outputs: Tensor | tuple[Tensor | None, ...]) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else [t for t in outputs if t is not None]


def rmsnorm_primitives(shape: Shape, leaves: Leaves, asked: bool) -> Iterator[tuple[Any, tuple]]:
    x, *others = leaves
    sequences = Sequences(shape[0], x.device)
    yield rmsnorm_modulate_fwd, (*leaves, sequences.row_sequence, 1e-5, sequences.chunks)
    _, rstd = rmsnorm_modulate_fwd(*leaves, sequences.row_sequence, 1e-5)
    yield rmsnorm_modulate_bwd, (x, x, *others, rstd, sequences.row_sequence, sequences.chunks, asked, asked, asked)


def layernorm_primitives(shape: Shape, leaves: Leaves, asked: bool) -> Iterator[tuple[Any, tuple]]:
    x, *others = leaves
    sequences = Sequences(shape[0], x.device)
    yield layernorm_modulate_fwd, (*leaves, sequences.row_sequence, 1e-6, sequences.chunks)
    _, *statistics = layernorm_modulate_fwd(*leaves, sequences.row_sequence, 1e-6)
    yield layernorm_modulate_bwd, (x, x, *others, *statistics, sequences.row_sequence, sequences.chunks, asked, asked)


def gated_primitives(shape: Shape, leaves: Leaves, asked: bool) -> Iterator[tuple[Any, tuple]]:
    x, h, *others = leaves
    sequences = Sequences(shape[0], x.device)
    yield gated_residual_norm_fwd, (*leaves, sequences.row_sequence, 1e-5, sequences.chunks)
    _, _, *statistics = gated_residual_norm_fwd(*leaves, sequences.row_sequence, 1e-5)
    has_y = others[2] is not None
    tables = (sequences.row_sequence, sequences.chunks)
    yield gated_residual_norm_bwd, (x, x if has_y else None, h, x, *others, *statistics, *tables, asked, asked, asked and has_y)


# ---- qk_norm_rope: (tokens, heads, head dimension) ------------------------------------------------------------------------

EPS = 1e-5
ROPE_SHAPES = [(0, 2, 36), (1, 4, 36), (5, 1, 2), (5, 3, 128), (123, 4, 36), (2, 5, 82), (2, 30, 128), (9, 48, 128)]
"""48 heads of 128 are more than one block."""


def seeded(*shape: int, dtype: torch.dtype = torch.float32, device: Any = DEVICE, seed: int = 0) -> Tensor:
    return random(torch.Generator().manual_seed(seed), *shape).to(device, dtype)


def make_rope(shape: Shape, dtype: torch.dtype = torch.float32, device: Any = DEVICE, extra: int = 1) -> list[Tensor]:
    """qkv, a column slice of a tensor `extra` wider on either side, and the norms' weights."""
    tokens, heads, head_dim = shape
    columns = 3 * heads * head_dim
    qkv = seeded(tokens, columns + 2 * extra, dtype=dtype, device=device, seed=tokens)[:, extra : extra + columns]
    return [qkv, *(1 + 0.3 * seeded(head_dim, dtype=dtype, device=device, seed=seed) for seed in (1, 2))]


def rotations(shape: Shape, dtype: torch.dtype = torch.float32, device: Any = DEVICE) -> tuple[Tensor, Tensor]:
    """cos and sin, in fp32 at least."""
    tokens, _, head_dim = shape
    angles = 3 * seeded(tokens, head_dim // 2, dtype=torch.float64, device=device, seed=3)
    wide = torch.promote_types(dtype, torch.float32)
    return angles.cos().to(wide), angles.sin().to(wide)


def bind_rope(shape: Shape, dtype: torch.dtype, device: Any) -> tuple[Function, Function]:
    cos, sin = rotations(shape, dtype, device)

    def call(function: Function) -> Function:
        def run(qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None) -> list[Tensor]:
            wide = torch.promote_types(qkv.dtype, torch.float32)
            return list(function(qkv, q_weight, k_weight, cos.to(wide), sin.to(wide), shape[1], EPS))

        return run

    return call(qk_norm_rope), call(qk_norm_rope_ref)


def rope_primitives(shape: Shape, leaves: Leaves, asked: bool) -> Iterator[tuple[Any, tuple]]:
    tokens, heads, head_dim = shape
    qkv = leaves[0]
    tables = rotations(shape, qkv.dtype, qkv.device)
    yield qk_norm_rope_fwd, (*leaves, *tables, heads, EPS)
    both = [seeded(heads, tokens, head_dim, dtype=qkv.dtype, device=qkv.device, seed=s).transpose(0, 1) for s in (5, 6)]
    yield qk_norm_rope_bwd, (*both, *leaves, *tables, heads, EPS, asked)


# ---- swiglu: (tokens, width) -------------------------------------------------------------------------------------------------


def make_swiglu(shape: Shape, dtype: torch.dtype = torch.float32, device: Any = DEVICE, extra: int = 1) -> list[Tensor]:
    """[tokens, 2 width], a column slice of a tensor `extra` wider on either side."""
    tokens, width = shape
    return [2 * seeded(tokens, 2 * (width + extra), dtype=dtype, device=device, seed=tokens)[:, extra : extra + 2 * width]]


def swiglu_primitives(shape: Shape, leaves: Leaves, asked: bool) -> Iterator[tuple[Any, tuple]]:
    (gu,) = leaves
    yield swiglu_fwd, (gu,)
    yield swiglu_bwd, (seeded(*shape, dtype=gu.dtype, device=gu.device), gu, asked)


# ---- the table ------------------------------------------------------------------------------------------------------------

RMSNORM = {"both": "xws", "weight": "xw", "scale": "xs", "neither": "x"}
LAYERNORM = {"both": "xab", "scale": "xa", "shift": "xb", "neither": "x"}
GATED = {"all": "xhwgns", "no_gate": "xhwns", "no_scale": "xhwgn", "no_modulation": "xhwn", "gate_only": "xhwg", "bare": "xhw"}

OPS = {op.name: op for op in (
    Op("rmsnorm_modulate", ("x", "weight", "scale"), RMSNORM, "xws", norm_cases("both", RMSNORM, ((T123, 144), "both")),
       (T5, 7), make_rmsnorm, bind_norm(rmsnorm_modulate, rmsnorm_modulate_ref, 1e-5), rmsnorm_primitives),
    Op("layernorm_modulate", ("x", "scale", "shift"), LAYERNORM, "xab", norm_cases("both", LAYERNORM, ((T123, 144), "scale")),
       (T5, 7), make_layernorm, bind_norm(layernorm_modulate, layernorm_modulate_ref, 1e-6), layernorm_primitives),
    Op("gated_residual_norm", ("x", "h", "weight", "gate", "next_weight", "next_scale"), GATED, "xhwgns",
       norm_cases("all", GATED, ((T123, 144), "bare")), (T5, 5), make_gated,
       bind_norm(gated_residual_norm, gated_residual_norm_ref, 1e-5, rows=2), gated_primitives, rows=2),
    Op("qk_norm_rope", ("qkv", "q_weight", "k_weight"), {"norm": "xqk", "alone": "x"}, "xqk",
       (*((shape, "norm") for shape in ROPE_SHAPES), ((5, 3, 36), "alone"), ((123, 4, 36), "alone"), ((0, 2, 36), "alone")),
       (3, 2, 6), make_rope, bind_rope, rope_primitives),
    Op("swiglu", ("gu",), {"all": "x"}, "x",
       tuple((shape, "all") for shape in [(0, 36), (1, 1), (5, 123), (123, 36), (2, 2500), (3, 10240)]),
       (3, 5), make_swiglu, lambda *_: (swiglu, swiglu_ref), swiglu_primitives),
)}
