"""The paired linear layer: it multiplies the student's and the teacher's rows in one launch, and computes the gradients of the
student's matrices. Shapes: T tokens, K inputs, N outputs of a matrix, r rank of an adapter."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dopsd_fast.pair.frozen_fp8 import FrozenFp8
from dopsd_fast.pair.gradient_sums import GradientSums
from dopsd_fast.pair.matrices import Matrix, split
from dopsd_kernels import pair_linear
from dopsd_kernels.backend import direct
from dopsd_kernels.pair_linear_accumulate import pair_linear_accumulate as accumulate_op

pair_linear_fwd, pair_linear_bwd = direct(pair_linear.pair_linear_fwd), direct(pair_linear.pair_linear_bwd)
pair_linear_through, pair_linear_accumulate = direct(pair_linear.pair_linear_through), direct(accumulate_op)


def project(
    x: Tensor, x_teacher: Tensor | None, ours: Sequence[Matrix], theirs: Sequence[Matrix], fp8: FrozenFp8 | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Multiplies the rows of student and teacher with their matrices, in one launch, and returns (y, y_teacher, xa).

    x: the student's rows `[T, K]`, the common input of the matrices `ours`. y `[T, sum N]`: their outputs, side by side.
    x_teacher, theirs, y_teacher: the same of the teacher. Without a teacher (None and empty) y_teacher is empty.
    xa `[T, sum r]`: x A^T of the student's adapters, which backward needs; empty where there are none.
    fp8: multiplies with the frozen matrices in 8 bits; None where all products run in the matrices' own type."""
    if fp8 is not None:
        y_t = fp8.project(x_teacher, theirs, False)[0] if x_teacher is not None else x.new_empty(0)
        if fp8.which == "frozen":
            y, xa = fp8.project(x, ours, True)
        else:
            y, _, xa = project(x, None, ours, ())
        return y, y_t, xa
    adapted = any(m.a.numel() for m in (*ours, *theirs))
    adapters = [[m.a for m in ours], [m.b for m in ours], [m.a for m in theirs], [m.b for m in theirs]]
    return pair_linear_fwd(
        x,
        x_teacher,
        [m.weight for m in ours],
        [m.weight for m in theirs],
        [],
        [],
        *(adapters if adapted else [[], [], [], []]),
        [m.scale for m in ours],
        [m.scale for m in theirs],
    )


def weight_gradients(
    members: list[Matrix], flags: list[Matrix], dy: list[Tensor], x: Tensor, xa: Tensor, q: Tensor
) -> list[Tensor | None]:
    """Returns the gradients (dW, dA, dB) of each member, one member after the other, and None where `flags` wants none.

    members: the matrices that share the input x `[T, K]`. flags: the same tuples with booleans in place of tensors.
    dy: the gradient of each member's output, `[T, N]`. xa: x A^T from `project`. q: scale * dy B of the adapters, empty
    where there are none."""
    need_w, need_lora = any(f.weight for f in flags), any(f.a or f.b for f in flags)
    grads: list[Tensor | None] = [None] * (3 * len(members))
    if not need_w and not need_lora:
        return grads
    flat = pair_linear_bwd(dy, x, *split(members), xa, False, need_w, False, need_lora, q if q.numel() else None)
    _, dw, _, da, db = pair_linear.split_gradients(flat, len(members), False, need_w, False, need_lora)
    for j, (kind, wanted) in enumerate(((dw, need_w), (da, need_lora), (db, need_lora))):
        for i, grad in enumerate(kind if wanted else ()):
            if flags[i][j] and members[i].parts[j].numel():
                grads[3 * i + j] = grad
    return grads


def accumulate(
    sums: GradientSums, members: list[Matrix], dy: list[Tensor], x: Tensor, xa: Tensor, q: Tensor
) -> None:
    """Adds the gradients of the members that train to their sums. The product that computes a gradient adds it, so that no
    gradient is stored by itself. Arguments as in `weight_gradients`."""
    w = [sums.of(m.weight) for m in members if m.weight in sums]
    nothing = q.new_empty(0)
    a, b = ([sums.of(part) if part in sums else nothing for part in parts] for parts in zip(*((m.a, m.b) for m in members)))
    adapted = any(part.numel() for part in a)
    if w or adapted:
        pair_linear_accumulate(w, a if adapted else [], b if adapted else [], dy, x, [m.scale for m in members], xa, q)
