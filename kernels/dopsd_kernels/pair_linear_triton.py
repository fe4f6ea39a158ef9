"""The Triton kernels of `pair_linear`: notation, shapes and equations there.

Four kernels, each one launch for all members (three at most, MEMBERS_MAX) and, in the forward, for both branches:

    project            out_{b,g} = x_b M_{b,g}^T (+ bias) (+ s_{b,g} p_{b,g} B_{b,g}^T)   M = A, out = p; then M = W, out = y
    through            q_g  = s_g dy_g B_g
    input_gradient     dx   = sum_g q_g A_g + dy_g W_g
    adapter_gradients  dB_g = s_g dy_g^T p_g,   dA_g = q_g^T x

Sums run in fp32, in one fixed order: deterministic. fp32 inputs are multiplied as fp32, not as tf32. A kernel's many pointer
arguments come as (branch, member) pairs; a program picks its own by selects on its number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from dopsd_kernels.cubins import CompileCase
from dopsd_kernels.launch import launch
from dopsd_kernels.triton_compat import HAS_TRITON, tl, triton

MEMBERS_MAX = 3
"""Members that one launch takes; `pair_linear` runs more of them through cuBLAS."""


@triton.jit
def _pick(number, first, second, third):
    return tl.where(number == 0, first, tl.where(number == 1, second, third))


@triton.jit
def _accumulate(
    total, left, right, rows, columns, inside_rows, inside_columns, depth,
    left_stride, right_depth_stride, right_column_stride, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):
    """total + left[rows, :depth] right[:depth, columns]; left has unit stride along depth."""
    inner = tl.arange(0, BLOCK_K)
    left += rows[:, None].to(tl.int64) * left_stride + inner[None, :]
    right += inner[:, None].to(tl.int64) * right_depth_stride + columns[None, :].to(tl.int64) * right_column_stride
    for start in range(0, depth, BLOCK_K):
        inside = inner < depth - start
        a = tl.load(left, mask=inside_rows[:, None] & inside[None, :], other=0.0)
        b = tl.load(right, mask=inside[:, None] & inside_columns[None, :], other=0.0)
        total = tl.dot(a, b, total, input_precision=PRECISION)
        left += BLOCK_K
        right += right_depth_stride * BLOCK_K
    return total


@triton.jit
def _tile(number, rows, column_blocks, BLOCK_M: tl.constexpr, GROUP: tl.constexpr):
    """(row block, column block) of program `number`: GROUP row blocks share the columns that the L2 cache holds."""
    span = GROUP * column_blocks
    first = number // span * GROUP
    height = tl.minimum(tl.cdiv(rows, BLOCK_M) - first, GROUP)
    return first + number % span % height, number % span // height


@triton.jit
def project_kernel(
    x_s, x_t, rows_s, rows_t, x_stride_s, x_stride_t, depth: tl.constexpr, m00, m01, m02, m10, m11, m12,
    n00: tl.constexpr, n01: tl.constexpr, n02: tl.constexpr, n10: tl.constexpr, n11: tl.constexpr, n12: tl.constexpr,
    bias00, bias01, bias02, bias10, bias11, bias12, p_s, p_t, p_stride_s, p_stride_t, b00, b01, b02, b10, b11, b12,
    r00: tl.constexpr, r01: tl.constexpr, r02: tl.constexpr, r10: tl.constexpr, r11: tl.constexpr, r12: tl.constexpr, s00,
    s01, s02, s10, s11, s12, y_s, y_t, y_stride_s, y_stride_t, BIAS_S: tl.constexpr, BIAS_T: tl.constexpr,
    ADAPTERS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr, GROUP: tl.constexpr,
):
    number = tl.program_id(0)
    columns_s = tl.cdiv(n00, BLOCK_N) + tl.cdiv(n01, BLOCK_N) + tl.cdiv(n02, BLOCK_N)
    columns_t = tl.cdiv(n10, BLOCK_N) + tl.cdiv(n11, BLOCK_N) + tl.cdiv(n12, BLOCK_N)
    student = number < tl.cdiv(rows_s, BLOCK_M) * columns_s
    number -= tl.where(student, 0, tl.cdiv(rows_s, BLOCK_M) * columns_s)
    row_count = tl.where(student, rows_s, rows_t)
    row_block, column_block = _tile(number, row_count, tl.where(student, columns_s, columns_t), BLOCK_M, GROUP)

    n0, n1, n2 = tl.where(student, n00, n10), tl.where(student, n01, n11), tl.where(student, n02, n12)
    second, third = tl.cdiv(n0, BLOCK_N), tl.cdiv(n0, BLOCK_N) + tl.cdiv(n1, BLOCK_N)
    member = (column_block >= second).to(tl.int32) + (column_block >= third).to(tl.int32)
    column_block -= _pick(member, 0, second, third)
    width = _pick(member, n0, n1, n2)
    rows = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_rows, inside_columns = rows < row_count, columns < width

    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if ADAPTERS:
        r0, r1, r2 = tl.where(student, r00, r10), tl.where(student, r01, r11), tl.where(student, r02, r12)
        rank = _pick(member, r0, r1, r2)
        b = tl.where(student, _pick(member, b00, b01, b02), _pick(member, b10, b11, b12))
        p = tl.where(student, p_s, p_t) + _pick(member, 0, r0, r0 + r1)
        total = _accumulate(
            total, p, b, rows, columns, inside_rows, inside_columns, rank, tl.where(student, p_stride_s, p_stride_t), 1, rank,
            BLOCK_R, PRECISION,
        )
        total *= tl.where(student, _pick(member, s00, s01, s02), _pick(member, s10, s11, s12))
    x = tl.where(student, x_s, x_t)
    m = tl.where(student, _pick(member, m00, m01, m02), _pick(member, m10, m11, m12))
    total = _accumulate(
        total, x, m, rows, columns, inside_rows, inside_columns, depth, tl.where(student, x_stride_s, x_stride_t), 1, depth,
        BLOCK_K, PRECISION,
    )
    if BIAS_S or BIAS_T:
        bias = tl.where(student, _pick(member, bias00, bias01, bias02), _pick(member, bias10, bias11, bias12))
        asked = inside_columns & tl.where(student, BIAS_S, BIAS_T)
        total += tl.load(bias + columns, mask=asked, other=0.0).to(tl.float32)[None, :]
    y = tl.where(student, y_s, y_t) + _pick(member, 0, n0, n0 + n1)
    y += rows[:, None].to(tl.int64) * tl.where(student, y_stride_s, y_stride_t) + columns[None, :]
    tl.store(y, total.to(y.dtype.element_ty), mask=inside_rows[:, None] & inside_columns[None, :])


@triton.jit
def through_kernel(
    dy0, dy1, dy2, dy_stride0, dy_stride1, dy_stride2, rows_count, n0: tl.constexpr, n1: tl.constexpr, n2: tl.constexpr,
    b0, b1, b2, r0: tl.constexpr, r1: tl.constexpr, r2: tl.constexpr, s0, s1, s2, q, q_stride, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):
    second, third = tl.cdiv(r0, BLOCK_R), tl.cdiv(r0, BLOCK_R) + tl.cdiv(r1, BLOCK_R)
    row_block, column_block = _tile(tl.program_id(0), rows_count, third + tl.cdiv(r2, BLOCK_R), BLOCK_M, GROUP)
    member = (column_block >= second).to(tl.int32) + (column_block >= third).to(tl.int32)
    column_block -= _pick(member, 0, second, third)
    rank = _pick(member, r0, r1, r2)
    rows = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = column_block * BLOCK_R + tl.arange(0, BLOCK_R)
    inside_rows, inside_columns = rows < rows_count, columns < rank
    total = _accumulate(
        tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32), _pick(member, dy0, dy1, dy2), _pick(member, b0, b1, b2), rows, columns,
        inside_rows, inside_columns, _pick(member, n0, n1, n2), _pick(member, dy_stride0, dy_stride1, dy_stride2), rank, 1,
        BLOCK_K, PRECISION,
    )
    total *= _pick(member, s0, s1, s2)
    q += _pick(member, 0, r0, r0 + r1) + rows[:, None].to(tl.int64) * q_stride + columns[None, :]
    tl.store(q, total.to(q.dtype.element_ty), mask=inside_rows[:, None] & inside_columns[None, :])


@triton.jit
def input_gradient_kernel(
    dy0, dy1, dy2, dy_stride0, dy_stride1, dy_stride2, rows_count, n0: tl.constexpr, n1: tl.constexpr, n2: tl.constexpr,
    w0, w1, w2, depth: tl.constexpr, q, q_stride, a0, a1, a2, r0: tl.constexpr, r1: tl.constexpr, r2: tl.constexpr, dx,
    dx_stride, MEMBERS: tl.constexpr, ADAPTERS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, GROUP: tl.constexpr,
):
    row_block, column_block = _tile(tl.program_id(0), rows_count, tl.cdiv(depth, BLOCK_N), BLOCK_M, GROUP)
    rows = row_block * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
    columns = column_block * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    inside_rows, inside_columns = rows < rows_count, columns < depth
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for g in tl.static_range(MEMBERS):
        if ADAPTERS:
            total = _accumulate(
                total, q + _pick(g, 0, r0, r0 + r1), _pick(g, a0, a1, a2), rows, columns, inside_rows, inside_columns,
                _pick(g, r0, r1, r2), q_stride, depth, 1, BLOCK_R, PRECISION,
            )
        total = _accumulate(
            total, _pick(g, dy0, dy1, dy2), _pick(g, w0, w1, w2), rows, columns, inside_rows, inside_columns,
            _pick(g, n0, n1, n2), _pick(g, dy_stride0, dy_stride1, dy_stride2), depth, 1, BLOCK_K, PRECISION,
        )
    dx += rows[:, None] * dx_stride + columns[None, :]
    tl.store(dx, total.to(dx.dtype.element_ty), mask=inside_rows[:, None] & inside_columns[None, :])


@triton.jit
def adapter_gradients_kernel(
    dy0, dy1, dy2, dy_stride0, dy_stride1, dy_stride2, rows_count, n0: tl.constexpr, n1: tl.constexpr, n2: tl.constexpr,
    x, x_stride, depth: tl.constexpr, p, p_stride, q, q_stride, r0: tl.constexpr, r1: tl.constexpr, r2: tl.constexpr, s0,
    s1, s2, da0, da1, da2, db0, db1, db2, ACCUMULATE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr,
):
    """Programs of dB of every member first, then those of dA; a member's blocks of rank lie along the second axis."""
    number = tl.program_id(0)
    second, third = tl.cdiv(n0, BLOCK_M), tl.cdiv(n0, BLOCK_M) + tl.cdiv(n1, BLOCK_M)
    fourth, blocks = third + tl.cdiv(n2, BLOCK_M), tl.cdiv(depth, BLOCK_M)
    is_b = number < fourth
    member_b = (number >= second).to(tl.int32) + (number >= third).to(tl.int32)
    member = tl.where(is_b, member_b, (number - fourth) // blocks)
    wide_block = tl.where(is_b, number - _pick(member_b, 0, second, third), (number - fourth) % blocks)
    rank = _pick(member, r0, r1, r2)
    width = tl.where(is_b, _pick(member, n0, n1, n2), depth)
    left = tl.where(is_b, _pick(member, dy0, dy1, dy2), x)
    left_stride = tl.where(is_b, _pick(member, dy_stride0, dy_stride1, dy_stride2), x_stride)
    right = tl.where(is_b, p, q) + _pick(member, 0, r0, r0 + r1)
    right_stride = tl.where(is_b, p_stride, q_stride)

    wide = wide_block * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
    narrow = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R).to(tl.int64)
    inside_wide, inside_narrow = wide < width, narrow < rank
    token = tl.arange(0, BLOCK_T)
    left += token[None, :].to(tl.int64) * left_stride + wide[:, None]
    right += token[:, None].to(tl.int64) * right_stride + narrow[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for start in range(0, rows_count, BLOCK_T):
        inside = token < rows_count - start
        a = tl.load(left, mask=inside_wide[:, None] & inside[None, :], other=0.0)
        b = tl.load(right, mask=inside[:, None] & inside_narrow[None, :], other=0.0)
        total = tl.dot(a, b, total, input_precision=PRECISION)
        left += left_stride.to(tl.int64) * BLOCK_T
        right += right_stride.to(tl.int64) * BLOCK_T
    total *= tl.where(is_b, _pick(member, s0, s1, s2), 1.0)
    out = tl.where(is_b, _pick(member, db0, db1, db2), _pick(member, da0, da1, da2))
    out += wide[:, None] * tl.where(is_b, rank, 1) + narrow[None, :] * tl.where(is_b, 1, depth)
    inside_both = inside_wide[:, None] & inside_narrow[None, :]
    if ACCUMULATE:
        total += tl.load(out, mask=inside_both, other=0.0).to(tl.float32)
    tl.store(out, total.to(out.dtype.element_ty), mask=inside_both)


@dataclass(frozen=True)
class Tiles:
    """Block sizes of a kernel: rows, columns, summed dimension; warps and pipeline stages."""

    m: int
    n: int
    k: int
    warps: int
    stages: int


@cache
def _shared_memory(device: torch.device) -> int:
    """Bytes that one block may ask for; without a GPU, as much as on Hopper."""
    if device.type != "cuda":
        return 232448
    properties: Any = torch.cuda.get_device_properties(device)
    return properties.shared_memory_per_block_optin


def wide_tiles(dtype: torch.dtype, shared_memory: int) -> Tiles:
    """For y and dx: as large as shared memory (228 KiB on Hopper, 164 on A100, 100 on consumer cards) feeds."""
    if dtype == torch.float32:
        return Tiles(64, 64, 32, 4, 2)
    return Tiles(128, 256, 64, 8, 3) if shared_memory >= 200 * 1024 else Tiles(128, 128, 32, 8, 4)


def narrow_tiles(dtype: torch.dtype, rank: int) -> Tiles:
    """For x A^T and dy B, which read much and write little: few rows a program, so that all processors read."""
    columns = min(64, max(16, triton.next_power_of_2(rank)))
    return Tiles(32, columns, 32, 4, 2) if dtype == torch.float32 else Tiles(32, columns, 64, 4, 4)


def gradient_tiles(dtype: torch.dtype, rank: int) -> Tiles:
    """For dA and dB: `k` counts tokens."""
    columns = min(64, max(16, triton.next_power_of_2(rank)))
    return Tiles(64, columns, 32, 4, 2) if dtype == torch.float32 else Tiles(64, columns, 64, 4, 3)


def _depth_of_rank(rank: int) -> int:
    return min(64, max(16, triton.next_power_of_2(rank)))


GROUP = 8


def _padded(values: Sequence[Any], filler: Any) -> list[Any]:
    return [*values, *[filler] * (MEMBERS_MAX - len(values))]


def _ranks(a: Sequence[Tensor], members: int) -> list[int]:
    return [m.shape[0] if m.numel() else 0 for m in a] or [0] * members


def _blocks(sizes: Sequence[int], block: int) -> int:
    return sum(-(-size // block) for size in sizes)


def _precision(x: Tensor) -> str:
    return "ieee" if x.dtype == torch.float32 else "tf32"


@dataclass(frozen=True)
class Branch:
    """One branch of a projection: out = x M^T (+ bias) (+ s p B^T) for each member."""

    x: Tensor
    m: Sequence[Tensor]
    widths: Sequence[int]
    out: Tensor
    bias: Sequence[Tensor] = ()
    p: Tensor | None = None
    b: Sequence[Tensor] = ()
    ranks: Sequence[int] = ()
    scales: Sequence[float] = ()


def _project(student: Branch, teacher: Branch, tiles: Tiles) -> None:
    """One launch of `project_kernel` for both branches."""
    both = student, teacher
    x = student.x

    def pairs(select: Any, filler: Any) -> list[Any]:
        return [value for branch in both for value in _padded(select(branch), filler)]

    rank = max([0, *student.ranks, *teacher.ranks])
    programs = sum(-(-branch.x.shape[0] // tiles.m) * _blocks(branch.widths, tiles.n) for branch in both)
    launch(
        project_kernel, (programs,),
        student.x, teacher.x, student.x.shape[0], teacher.x.shape[0], student.x.stride(0), teacher.x.stride(0), x.shape[1],
        *pairs(lambda branch: branch.m, x), *pairs(lambda branch: branch.widths, 0), *pairs(lambda branch: branch.bias, x),
        *[x if branch.p is None else branch.p for branch in both],
        *[0 if branch.p is None else branch.p.stride(0) for branch in both],
        *pairs(lambda branch: branch.b, x), *pairs(lambda branch: branch.ranks, 0), *pairs(lambda branch: branch.scales, 0.0),
        student.out, teacher.out, student.out.stride(0), teacher.out.stride(0),
        BIAS_S=bool(student.bias), BIAS_T=bool(teacher.bias), ADAPTERS=rank > 0, PRECISION=_precision(x),
        BLOCK_M=tiles.m, BLOCK_N=tiles.n, BLOCK_K=tiles.k, BLOCK_R=_depth_of_rank(rank), GROUP=GROUP,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )


def forward(
    x_s: Tensor, x_t: Tensor | None, w_s: Sequence[Tensor], w_t: Sequence[Tensor], bias_s: Sequence[Tensor],
    bias_t: Sequence[Tensor], a_s: Sequence[Tensor], b_s: Sequence[Tensor], a_t: Sequence[Tensor], b_t: Sequence[Tensor],
    scales_s: Sequence[float], scales_t: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor]:
    """`pair_linear_fwd` in two launches, or in one where there is no adapter."""
    widths = [m.shape[0] for m in w_s]
    teacher_x = x_s[:0] if x_t is None else x_t
    if x_t is None:
        w_t, bias_t, a_t, b_t, scales_t = w_s, bias_s, [], [], []
    ranks_s, ranks_t = _ranks(a_s, len(w_s)), _ranks(a_t, len(w_s))
    y_s = x_s.new_empty(x_s.shape[0], sum(widths))
    y_t = x_s.new_empty(teacher_x.shape[0], sum(widths))
    p_s = x_s.new_empty(x_s.shape[0], sum(ranks_s))
    p_t = x_s.new_empty(teacher_x.shape[0], sum(ranks_t))
    rank = max(*ranks_s, *ranks_t)
    if rank:
        _project(Branch(x_s, a_s, ranks_s, p_s), Branch(teacher_x, a_t, ranks_t, p_t), narrow_tiles(x_s.dtype, rank))
    _project(
        Branch(x_s, w_s, widths, y_s, bias_s, p_s, b_s, ranks_s, scales_s),
        Branch(teacher_x, w_t, widths, y_t, bias_t, p_t, b_t, ranks_t, scales_t),
        wide_tiles(x_s.dtype, _shared_memory(x_s.device)),
    )
    return y_s, x_s.new_empty(0) if x_t is None else y_t, p_s if sum(ranks_s) else x_s.new_empty(0)


def through(dy: Sequence[Tensor], b: Sequence[Tensor], scales: Sequence[float], ranks: Sequence[int]) -> Tensor:
    """`pair_linear_through` in one launch."""
    like = dy[0]
    q, rank = like.new_empty(like.shape[0], sum(ranks)), max(ranks, default=0)
    if rank:
        tiles = narrow_tiles(like.dtype, rank)
        launch(
            through_kernel, (-(-like.shape[0] // tiles.m) * _blocks(ranks, tiles.n),),
            *_gradients(dy), *_padded(b, like), *_padded(ranks, 0), *_padded(scales, 0.0), q, q.stride(0),
            PRECISION=_precision(like), BLOCK_M=tiles.m, BLOCK_R=tiles.n, BLOCK_K=tiles.k, GROUP=GROUP,
            num_warps=tiles.warps, num_stages=tiles.stages,
        )
    return q


def _gradients(dy: Sequence[Tensor]) -> list[Any]:
    """The arguments with which every kernel of the backward begins."""
    strides, widths = [g.stride(0) for g in dy], [g.shape[1] for g in dy]
    return [*_padded(dy, dy[0]), *_padded(strides, 0), dy[0].shape[0], *_padded(widths, 0)]


def backward(
    dy: Sequence[Tensor], x: Tensor, w: Sequence[Tensor], a: Sequence[Tensor], b: Sequence[Tensor], scales: Sequence[float],
    xa: Tensor, need_x: bool, need_lora: bool, q: Tensor | None = None,
) -> tuple[Tensor | None, list[Tensor], list[Tensor]]:
    """(dx or None, dA, dB) of `pair_linear_bwd` in at most three launches, in two when q is given."""
    tokens, depth = x.shape
    ranks = _ranks(a, len(w))
    rank = max(ranks)
    dx = x.new_empty(tokens, depth) if need_x else None
    da = [x.new_empty(m.shape) if m.numel() else x.new_empty(0) for m in a] if need_lora else []
    db = [x.new_empty(m.shape) if m.numel() else x.new_empty(0) for m in b] if need_lora else []
    if tokens == 0:
        return dx, [m.zero_() for m in da], [m.zero_() for m in db]
    if q is None:
        q = through(dy, b, scales, ranks) if need_x or need_lora else x
    if dx is not None:
        tiles = wide_tiles(x.dtype, _shared_memory(x.device))
        launch(
            input_gradient_kernel, (-(-tokens // tiles.m) * -(-depth // tiles.n),),
            *_gradients(dy), *_padded(w, x), depth, q, q.stride(0), *_padded(a, x), *_padded(ranks, 0), dx, dx.stride(0),
            MEMBERS=len(w), ADAPTERS=rank > 0, PRECISION=_precision(x), BLOCK_M=tiles.m, BLOCK_N=tiles.n, BLOCK_K=tiles.k,
            BLOCK_R=_depth_of_rank(rank), GROUP=GROUP, num_warps=tiles.warps, num_stages=tiles.stages,
        )
    if need_lora and rank:
        adapter_gradients(dy, x, ranks, scales, xa, q, da, db, accumulate=False)
    return dx, da, db


def adapter_gradients(
    dy: Sequence[Tensor], x: Tensor, ranks: Sequence[int], scales: Sequence[float], xa: Tensor, q: Tensor,
    da: Sequence[Tensor], db: Sequence[Tensor], accumulate: bool,
) -> None:
    """dA and dB of every member into `da` and `db`, or added to what is there; one launch."""
    rank, depth = max(ranks), x.shape[1]
    tiles = gradient_tiles(x.dtype, rank)
    some = next(m for m in da if m.numel())
    given = [[m if m.numel() else some for m in gradients] for gradients in (da, db)]
    launch(
        adapter_gradients_kernel,
        (_blocks([gradient.shape[1] for gradient in dy], tiles.m) + len(dy) * -(-depth // tiles.m), -(-rank // tiles.n)),
        *_gradients(dy), x, x.stride(0), depth, xa, xa.stride(0), q, q.stride(0),
        *_padded(ranks, 0), *_padded(scales, 0.0), *_padded(given[0], some), *_padded(given[1], some),
        ACCUMULATE=accumulate, PRECISION=_precision(x), BLOCK_M=tiles.m, BLOCK_R=tiles.n, BLOCK_T=tiles.k,
        num_warps=tiles.warps, num_stages=tiles.stages,
    )


def _case(name: str, kernel: Any, tiles: Tiles, constexprs: dict[str, Any], least: int = 80) -> CompileCase:
    """Z-Image's sizes, rank 64: what a launch with bf16 tensors compiles; every number that is no constexpr is a row count,
    a stride, or a scale."""
    names = kernel.arg_names
    pointers = {"x", "x_s", "x_t", "p", "q", "dx", "p_s", "p_t", "y_s", "y_t"}
    signature = {}
    for argument in names:
        if argument in constexprs:
            continue
        stem = argument.rstrip("012")
        if stem in {"da", "db"} and constexprs["ACCUMULATE"]:
            signature[argument] = "*fp32"
        elif argument in pointers or stem in {"m", "bias", "b", "w", "a", "dy", "da", "db"}:
            signature[argument] = "*bf16"
        else:
            signature[argument] = "fp32" if stem == "s" else "i32"
    return CompileCase(f"pair_linear {name}", kernel, signature, constexprs, tiles.warps, tiles.stages, least)


def _sizes(letter: str, kernel: Any, *sizes: int) -> dict[str, int]:
    """Values of the arguments letter0, letter1, letter2, or letter00 .. letter12."""
    names = [name for name in kernel.arg_names if name.rstrip("012") == letter and name != letter]
    return dict(zip(names, _padded(sizes, 0) * 2))


def _compile_cases() -> list[CompileCase]:
    bf16, large, small, rank, width, inner = torch.bfloat16, 232448, 101376, 64, 3840, 10240
    blocks = {"PRECISION": "tf32", "GROUP": GROUP, "BLOCK_R": 64}
    cases = []
    for label, memory, least in (("large", large, 90), ("small", small, 80)):
        tiles = wide_tiles(bf16, memory)
        shape = {**blocks, "BLOCK_M": tiles.m, "BLOCK_N": tiles.n, "BLOCK_K": tiles.k}
        flags = {**shape, "BIAS_S": False, "BIAS_T": False, "ADAPTERS": True, "depth": width}
        sizes = {**_sizes("n", project_kernel, width, width, width), **_sizes("r", project_kernel, rank, rank, rank)}
        cases.append(_case(f"project qkv {label}", project_kernel, tiles, {**flags, **sizes}, least))
        sizes = {**_sizes("n", input_gradient_kernel, inner, inner), **_sizes("r", input_gradient_kernel, rank, rank)}
        flags = {**shape, "ADAPTERS": True, "MEMBERS": 2, "depth": width}
        cases.append(_case(f"input_gradient w1 w3 {label}", input_gradient_kernel, tiles, {**flags, **sizes}, least))
    tiles = narrow_tiles(bf16, rank)
    shape = {**blocks, "BLOCK_M": tiles.m, "BLOCK_N": tiles.n, "BLOCK_K": tiles.k}
    flags = {**shape, "BIAS_S": False, "BIAS_T": False, "ADAPTERS": False, "depth": width}
    sizes = {**_sizes("n", project_kernel, rank, rank, rank), **_sizes("r", project_kernel)}
    cases.append(_case("project A", project_kernel, tiles, {**flags, **sizes}))
    sizes = {**_sizes("n", through_kernel, width, width, width), **_sizes("r", through_kernel, rank, rank, rank)}
    flags = {**blocks, "BLOCK_M": tiles.m, "BLOCK_R": tiles.n, "BLOCK_K": tiles.k}
    cases.append(_case("through", through_kernel, tiles, {**flags, **sizes}))
    tiles = gradient_tiles(bf16, rank)
    sizes = _sizes("n", adapter_gradients_kernel, width, width, width) | _sizes("r", adapter_gradients_kernel, rank, rank, rank)
    flags = {"PRECISION": "tf32", "BLOCK_M": tiles.m, "BLOCK_R": tiles.n, "BLOCK_T": tiles.k, "depth": width}
    for name, accumulate in (("adapter_gradients", False), ("adapter_gradients accumulate", True)):
        cases.append(_case(name, adapter_gradients_kernel, tiles, {**flags, **sizes, "ACCUMULATE": accumulate}))
    return cases


COMPILE_CASES: list[CompileCase] = _compile_cases() if HAS_TRITON and hasattr(project_kernel, "arg_names") else []
