"""What the norm ops share: launch shapes, checks, tanh, and the second half of their sums over rows.

A backward kernel that needs sums over rows runs one program per piece of a sequence. The program adds up its rows and
writes one fp32 row per sum; `finish` then adds those in a fixed order. Nothing is atomic, so the numbers repeat.
T tokens, S sequences, D width, C chunks (Sequences.chunks), N = C * split pieces.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dopsd_kernels import backend, costs, native_ops
from dopsd_kernels.cubins import CompileCase
from dopsd_kernels.launch import launch
from dopsd_kernels.sequences import Sequences
from dopsd_kernels.triton_compat import tl, triton

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

ENOUGH_PROGRAMS = 256
"""About two for each processor of the largest GPUs; fewer chunks than that are split."""

MOST_SPLIT = 4
"""64 rows / 4: a sum of 16 bf16 rows, written once and read once or twice, is up to 1/8 more traffic, most of it in L2."""

FINISH_COLUMNS, FINISH_PIECES, FINISH_WARPS = 64, 32, 8


@triton.jit
def tanh(x):
    """tanh to one unit in the last place of fp32: an odd polynomial near 0, where 1 - 2 / (exp(2x) + 1) cancels."""
    square = x * x
    near = -0.0062763707659 * square + 0.0211162003289
    near = near * square - 0.0538751345135
    near = near * square + 0.1333292396966
    near = near * square - 0.3333333043035
    near = near * square * x + x
    # exp(2x) may be infinite: 2 / inf is the 0 that is wanted
    far = 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)
    return tl.where(tl.abs(x) < 0.6, near, far)


@triton.jit
def load_factor(vector, modulation, modulation_stride, sequence, columns, mask):
    """vector * (1 + modulation[sequence]) in fp32; what is None counts as 1."""
    factor = mask.to(tl.float32)
    if vector is not None:
        factor = tl.load(vector + columns, mask=mask, other=0.0).to(tl.float32)
    if modulation is not None:
        factor *= 1.0 + tl.load(modulation + sequence * modulation_stride + columns, mask=mask, other=0.0).to(tl.float32)
    return factor


@triton.jit
def _finish_part(
    partial, weight, modulation, modulation_stride, dweight, dmodulation, chunks, chunk_count, sequences,
    GATED: tl.constexpr, WIDTH: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr, PIECES: tl.constexpr,
):
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < WIDTH
    lanes = tl.arange(0, PIECES)
    role = tl.program_id(1)
    weight_role = 0
    if dmodulation is not None:
        weight_role = sequences
        if role < sequences:
            before = 0
            through = 0
            for start in range(0, chunk_count, 1024):
                index = start + tl.arange(0, 1024)
                owner = tl.load(chunks + 3 * index + 2, mask=index < chunk_count, other=2147483647)
                before += tl.sum((owner < role).to(tl.int32))
                through += tl.sum((owner <= role).to(tl.int32))
            total = tl.zeros([PIECES, BLOCK], dtype=tl.float32)
            for start in range(before * SPLIT, through * SPLIT, PIECES):
                piece = start + lanes
                tile = partial + piece.to(tl.int64)[:, None] * WIDTH + columns[None, :]
                total += tl.load(tile, mask=(piece < through * SPLIT)[:, None] & mask[None, :], other=0.0)
            result = tl.sum(total, axis=0)
            if weight is not None:
                result *= tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32)
            if GATED:
                row = role.to(tl.int64) * modulation_stride
                factor = tanh(tl.load(modulation + row + columns, mask=mask, other=0.0).to(tl.float32))
                result *= 1.0 - factor * factor
            tl.store(dmodulation + role.to(tl.int64) * WIDTH + columns, result, mask=mask)
    if dweight is not None:
        if role == weight_role:
            total = tl.zeros([PIECES, BLOCK], dtype=tl.float32)
            for start in range(0, chunk_count * SPLIT, PIECES):
                piece = start + lanes
                inside = (piece < chunk_count * SPLIT)[:, None] & mask[None, :]
                tile = tl.load(partial + piece.to(tl.int64)[:, None] * WIDTH + columns[None, :], mask=inside, other=0.0)
                if modulation is not None:
                    owner = tl.load(chunks + 3 * (piece // SPLIT) + 2, mask=piece < chunk_count * SPLIT, other=0)
                    row = owner.to(tl.int64)[:, None] * modulation_stride
                    factor = tl.load(modulation + row + columns[None, :], mask=inside, other=0.0).to(tl.float32)
                    if GATED:
                        tile *= tanh(factor)
                    else:
                        tile *= 1.0 + factor
                total += tile
            tl.store(dweight + columns, tl.sum(total, axis=0), mask=mask)


@triton.jit
def finish_kernel(
    partial_a, weight_a, modulation_a, stride_a, dweight_a, dmodulation_a,
    partial_b, weight_b, modulation_b, stride_b, dweight_b, dmodulation_b,
    chunks, chunk_count, sequences,
    GATED_A: tl.constexpr, WIDTH: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr, PIECES: tl.constexpr,
):
    """Grid (column blocks, S + 1, parts): program (j, s) makes row s of dmodulation, program (j, S) makes dweight."""
    if tl.program_id(2) == 0:
        _finish_part(
            partial_a, weight_a, modulation_a, stride_a, dweight_a, dmodulation_a, chunks, chunk_count, sequences,
            GATED_A, WIDTH, SPLIT, BLOCK, PIECES,
        )
    else:
        if partial_b is not None:
            _finish_part(
                partial_b, weight_b, modulation_b, stride_b, dweight_b, dmodulation_b, chunks, chunk_count, sequences,
                False, WIDTH, SPLIT, BLOCK, PIECES,
            )


@dataclass
class Part:
    """One sum over rows, P_s = sum of dy * xhat over the rows of sequence s, and the gradients made of it:

        dweight = sum_s P_s * factor_s    factor = 1 + modulation | tanh(modulation) if `gated` | 1
        dmodulation_s = P_s * weight * d factor_s / d modulation_s

    weight `[D]`, modulation `[S, D]`; dweight `[D]` and dmodulation `[S, D]` are None where they are not asked for.
    """

    weight: Tensor | None
    modulation: Tensor | None
    dweight: Tensor | None
    dmodulation: Tensor | None
    gated: bool = False

    @classmethod
    def new(
        cls,
        x: Tensor,
        weight: Tensor | None,
        modulation: Tensor | None,
        need_weight: bool,
        need_modulation: bool,
        gated: bool = False,
    ) -> Part:
        """With new gradients for what is asked and not None."""
        dtype = statistics_dtype(x.dtype)
        dweight = x.new_empty(weight.shape, dtype=dtype) if need_weight and weight is not None else None
        dmodulation = None
        if need_modulation and modulation is not None:
            dmodulation = x.new_empty(modulation.shape, dtype=dtype)
        return cls(weight, modulation, dweight, dmodulation, gated)

    @property
    def asked(self) -> bool:
        return self.dweight is not None or self.dmodulation is not None

    def results(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(dweight, dmodulation), empty where not asked: a custom op cannot return None."""
        nothing = statistics_dtype(x.dtype)
        return (
            x.new_empty(0, dtype=nothing) if self.dweight is None else self.dweight,
            x.new_empty(0, dtype=nothing) if self.dmodulation is None else self.dmodulation,
        )

    def zero_(self) -> None:
        for gradient in given(self.dweight, self.dmodulation):
            gradient.zero_()

    def arguments(self, partial: Tensor) -> tuple:
        return partial, self.weight, self.modulation, row_stride(self.modulation), self.dweight, self.dmodulation

    def finish_bytes(self, partial_bytes: int) -> int:
        """Bytes that `finish` moves for this part, the chunk table aside."""
        total = costs.size(self.dweight, self.dmodulation)
        if self.dweight is not None:
            total += partial_bytes + costs.size(self.modulation)
        if self.dmodulation is not None:
            total += partial_bytes + costs.size(self.weight) + (costs.size(self.modulation) if self.gated else 0)
        return total

    def finish_torch(self, products: Tensor, row_sequence: Tensor) -> None:
        """The same in PyTorch from `products [T, D]` = dy * xhat."""
        if not self.asked:
            return
        sums = sum_rows(products, row_sequence, None if self.modulation is None else self.modulation.shape[0])
        factor = None
        if self.modulation is not None:
            modulation = self.modulation.to(sums.dtype)
            factor = modulation.tanh() if self.gated else 1 + modulation
        if self.dweight is not None:
            torch.sum(sums if factor is None else sums * factor, 0, out=self.dweight)
        if self.dmodulation is not None:
            scaled = sums if self.weight is None else sums * self.weight.to(sums.dtype)
            self.dmodulation.copy_(scaled * (1 - factor.square()) if self.gated and factor is not None else scaled)


def finish(partials: Sequence[Tensor], parts: Sequence[Part], chunks: Tensor, split: int) -> None:
    """Adds up `partials`, an `[N, D]` for each of one or two parts, into their gradients: one launch. Only the first
    part may be gated."""
    width = partials[0].shape[1]
    second = parts[1].arguments(partials[1]) if len(parts) == 2 else (None, None, None, 0, None, None)
    sequences = max(0 if part.dmodulation is None else part.dmodulation.shape[0] for part in parts)
    roles = sequences + any(part.dweight is not None for part in parts)
    launch(
        finish_kernel, (-(-width // FINISH_COLUMNS), roles, len(parts)), *parts[0].arguments(partials[0]), *second,
        chunks, chunks.shape[0], sequences, GATED_A=parts[0].gated, WIDTH=width, SPLIT=split,
        BLOCK=FINISH_COLUMNS, PIECES=FINISH_PIECES, num_warps=FINISH_WARPS,
    )


def backward_cost(
    moved: int, parts: Sequence[Part], row_sequence: Tensor | None, chunks: Tensor, shape: torch.Size
) -> costs.Cost:
    """Of a backward that moves `moved` bytes besides the sums of `parts` and the index table that it reads."""
    tokens, width = shape
    asked = [part for part in parts if part.asked]
    if tokens == 0:
        return costs.Cost()
    if not asked:
        return costs.Cost(launches=1, elementwise_bytes=moved + costs.size(row_sequence))
    partial = 4 * chunks.shape[0] * row_split(chunks.shape[0]) * width
    sums = sum(partial + part.finish_bytes(partial) for part in asked)
    return costs.Cost(launches=2, elementwise_bytes=moved + 2 * costs.size(chunks) + sums)


def kernel_case(
    name: str, kernel: Any, arguments: dict[str, str | None], width: int, elements: int = 16, **constexprs: int
) -> CompileCase:
    """`arguments`: type of each, None for one that is not given. At the launch shape of `width` and `elements`."""
    options = launch_shape(width, elements)
    absent = {argument: None for argument, kind in arguments.items() if kind is None}
    return CompileCase(
        name=name,
        kernel=kernel,
        signature={argument: kind for argument, kind in arguments.items() if kind is not None},
        constexprs={**absent, "WIDTH": width, "BLOCK": options["BLOCK"], **constexprs},
        num_warps=options["num_warps"],
    )


def finish_case(name: str, width: int, io: str, *parts: tuple[bool, bool, bool, bool], gated: bool = False) -> CompileCase:
    """`parts`: of each, whether (weight, modulation, dweight, dmodulation) are given."""
    arguments: dict[str, str | None] = {}
    for suffix, given_parts in zip("ab", (*parts, None)):
        weight, modulation, dweight, dmodulation = given_parts or (False,) * 4
        arguments |= {
            f"partial_{suffix}": "*fp32" if given_parts else None,
            f"weight_{suffix}": io if weight else None,
            f"modulation_{suffix}": io if modulation else None,
            f"stride_{suffix}": "i32",
            f"dweight_{suffix}": "*fp32" if dweight else None,
            f"dmodulation_{suffix}": "*fp32" if dmodulation else None,
        }
    arguments |= {"chunks": "*i32", "chunk_count": "i32", "sequences": "i32"}
    case = kernel_case(name, finish_kernel, arguments, width)
    constexprs = {"GATED_A": gated, "SPLIT": MOST_SPLIT, "BLOCK": FINISH_COLUMNS, "PIECES": FINISH_PIECES}
    return replace(case, constexprs={**case.constexprs, **constexprs}, num_warps=FINISH_WARPS)


def row_split(chunk_count: int) -> int:
    """Programs that share the rows of one chunk: 1, 2 or 4, so that there are enough programs."""
    split = 1
    while split < MOST_SPLIT and chunk_count * split < ENOUGH_PROGRAMS:
        split *= 2
    return split


def launch_shape(width: int, elements: int = 16) -> dict[str, int]:
    """BLOCK (the columns of one row) and num_warps: about `elements` a thread, at most 16 warps."""
    block = max(16, 1 << max(width - 1, 0).bit_length())
    return {"BLOCK": block, "num_warps": min(16, max(1, block // (32 * elements)))}


def pipeline_stages(width: int, element_size: int, rows: int) -> int:
    """2, so that a program loads its next `rows` rows while it works on these, if they fit any GPU's shared memory."""
    return 2 if 2 * rows * element_size * launch_shape(width)["BLOCK"] <= 65536 else 1


def row_stride(rows: Tensor | None) -> int:
    return 0 if rows is None else rows.stride(0)


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def choose(op: str, x: Tensor, *others: Tensor | None) -> str:
    """backend.choose for an op that reads x and `others`; PyTorch for float64: the kernels compute in fp32."""
    if x.dtype == torch.float64:
        return "torch"
    return backend.choose(x, native=native_ops.has(op) and native_ops.usable(x, *others))


def given(*tensors: Tensor | None) -> list[Tensor]:
    return [t for t in tensors if t is not None]


def contiguous_rows(gradient: Tensor) -> Tensor:
    """Autograd may pass an expanded gradient."""
    return gradient if gradient.stride(-1) == 1 or gradient.shape[-1] < 2 else gradient.contiguous()


def chunks_or_none(op: str, chunks: Tensor | None, row_sequence: Tensor, asked: bool) -> Tensor:
    """The chunks that autograd saved; ValueError where they are missing and asked for."""
    if chunks is None and asked:
        raise ValueError(f"{op}: the gradients of weights and modulations need chunks: pass Sequences.chunks")
    return row_sequence.new_empty(0, 3) if chunks is None else chunks


def like(gradient: Tensor, parameter: Tensor | None, needed: bool) -> Tensor | None:
    return gradient.to(parameter.dtype) if needed and parameter is not None else None


def modulate(value: Tensor, vector: Tensor | None, modulation: Tensor | None, row_sequence: Tensor) -> Tensor:
    """PyTorch: value * vector * (1 + modulation[row_sequence]) in the dtype of `value [T, D]`; None counts as 1."""
    if modulation is None:
        return value if vector is None else value * vector.to(value.dtype)
    factor = 1 + modulation.to(value.dtype)
    if vector is not None:
        factor = factor * vector.to(value.dtype)
    return value * factor.index_select(0, row_sequence)


def sum_rows(values: Tensor, row_sequence: Tensor, sequences: int | None) -> Tensor:
    """PyTorch: `[S, D]` sums of `values [T, D]` over the rows of each sequence; `[1, D]`, all rows, for None."""
    if sequences is None or sequences == 1:
        return values.sum(0, keepdim=True)
    belongs = row_sequence == torch.arange(sequences, device=values.device)[:, None]
    return belongs.to(values.dtype) @ values


def check(
    op: str,
    x: Tensor,
    row_sequence: Tensor,
    rows: dict[str, Tensor | None],
    vectors: dict[str, Tensor | None],
    modulations: dict[str, Tensor | None],
) -> None:
    """ValueError unless x and `rows` are `[T, D]` alike, `vectors` `[D]`, `modulations` `[S, D]`, `row_sequence` int32
    `[T]`, all on one device and with contiguous last dimensions."""
    if x.ndim != 2 or x.dtype not in DTYPES:
        raise ValueError(f"{op}: x is {x.dtype} {list(x.shape)}, must be fp16, bf16, fp32 or fp64 of shape [T, D]")
    tokens, width = x.shape
    for name, t in {"x": x, **rows}.items():
        if t is not None and (t.shape != x.shape or t.dtype != x.dtype):
            raise ValueError(
                f"{op}: {name} is {t.dtype} {list(t.shape)}, must be {x.dtype} {list(x.shape)} like the other rows"
            )
    for name, t in vectors.items():
        if t is not None and (t.shape != (width,) or t.dtype not in DTYPES):
            raise ValueError(f"{op}: {name} is {t.dtype} {list(t.shape)}, must be floating of shape [{width}]")
    sequences = None
    for name, t in modulations.items():
        if t is None:
            continue
        if t.ndim != 2 or t.shape[1] != width or t.dtype not in DTYPES or t.shape[0] != (sequences or t.shape[0]):
            raise ValueError(
                f"{op}: {name} is {t.dtype} {list(t.shape)}, must be floating of shape [{sequences or 'S'}, {width}]"
            )
        sequences = t.shape[0]
    if row_sequence.shape != (tokens,) or row_sequence.dtype != torch.int32:
        raise ValueError(
            f"{op}: row_sequence is {row_sequence.dtype} {list(row_sequence.shape)}, must be int32 of shape [{tokens}]"
        )
    for name, t in {"x": x, **rows, **vectors, **modulations, "row_sequence": row_sequence}.items():
        if t is None:
            continue
        if t.device != x.device:
            raise ValueError(f"{op}: {name} is on {t.device}, x on {x.device}: move one of them")
        if t.stride(-1) != 1 and t.shape[-1] > 1:
            raise ValueError(
                f"{op}: {name} has strides {list(t.stride())}, its last dimension must be contiguous: call .contiguous()"
            )


def check_sequences(op: str, x: Tensor, modulations: dict[str, Tensor | None], sequences: Sequences) -> None:
    """ValueError unless the packed layout has the rows of x, and every modulation one row per sequence."""
    if x.ndim == 2 and sequences.tokens != x.shape[0]:
        raise ValueError(f"{op}: x has {x.shape[0]} rows, the sequences have {sequences.tokens} tokens")
    for name, t in modulations.items():
        if t is not None and t.shape[0] != len(sequences):
            raise ValueError(f"{op}: {name} has {t.shape[0]} rows, there are {len(sequences)} sequences")
