"""What is special to gated_residual_norm: its gates, what its backward is asked for, its declared cost and its errors."""

import pytest
import torch

from dopsd_kernels import backend, launch
from dopsd_kernels.costs import COSTS
from dopsd_kernels.gated_residual_norm import (
    gated_residual_norm,
    gated_residual_norm_bwd,
    gated_residual_norm_fwd,
    gated_residual_norm_ref,
)
from dopsd_kernels.norm_parts import MOST_SPLIT
from dopsd_kernels.sequences import Sequences
from tests.ops.rule import DEVICE
from tests.ops.table import OPS, T0, T5, make_gated, spread

OP = OPS["gated_residual_norm"]


@pytest.mark.parametrize("chosen", ["triton", "torch", "native"])
def test_small_and_large_gates(chosen: str) -> None:
    """tanh keeps its relative precision near 0, and its 1 far from it."""
    x, h, weight, _, _, _ = OP.inputs(((1,), 36), "bare", device="cpu" if chosen == "native" else DEVICE)
    sequences = Sequences((1,), x.device)
    gate = torch.logspace(-30, 2.5, 36, device=x.device)[None] * torch.tensor([1.0, -1.0], device=x.device).repeat(18)
    with backend.forced(chosen):
        r, _ = gated_residual_norm(torch.zeros_like(x), h, weight, gate, None, None, sequences)
    oracle = gated_residual_norm_ref(
        *(t.double() for t in (torch.zeros_like(x), h, weight, gate)), None, None, sequences.row_sequence, 1e-5
    )[0]
    torch.testing.assert_close(r.double(), oracle, rtol=1e-6, atol=1e-37)


@pytest.mark.parametrize("chosen", ["triton", "torch", "native"])
@pytest.mark.parametrize("given", ["all", "no_modulation", "gate_only"])
@pytest.mark.parametrize("has_dr, has_dy", [(True, True), (False, True), (True, False)])
@pytest.mark.parametrize("need_weight, need_modulation", [(False, False), (True, False), (False, True), (True, True)])
def test_backward_gives_what_is_asked_as_the_fake_says(
    chosen: str, given: str, has_dr: bool, has_dy: bool, need_weight: bool, need_modulation: bool
) -> None:
    device = "cpu" if chosen == "native" else DEVICE
    sequences = Sequences(T5, device)
    x, h, *others = OP.inputs((T5, 36), given, device=device)
    has_y = others[2] is not None
    with backend.forced(chosen):
        r, y, *statistics = gated_residual_norm_fwd(x, h, *others, sequences.row_sequence, 1e-5)
        dr = spread(torch.flip(x, [0])) if has_dr else None
        dy = spread(torch.flip(h, [0])) if has_dy and has_y else None
        arguments = [dr, dy, h, r, *others, *statistics, sequences.row_sequence, sequences.chunks]
        asked = need_weight, need_modulation
        found, again = (gated_residual_norm_bwd(*arguments, *asked, emit) for emit in (has_y, False))
        zeros = [torch.zeros_like(x) if gradient is None else gradient for gradient in (dr, dy)]
        whole = gated_residual_norm_bwd(zeros[0], zeros[1] if has_y else None, *arguments[2:], True, True, False)
    assert torch.equal(found[6], y), "y made again differs"
    assert all(map(torch.equal, found[:6], again)), "the same call gave other numbers"
    for part, same, wanted in zip(found, whole, (True, True, need_weight, need_modulation, need_weight, need_modulation)):
        assert part.shape == (same.shape if wanted else (0,))
        if wanted:
            torch.testing.assert_close(part, same)
    fake = gated_residual_norm_bwd(*(None if t is None else t.to("meta") for t in arguments), *asked, has_y)
    for real, promised in zip(found, fake):
        assert (real.shape, real.dtype, real.stride()) == (promised.shape, promised.dtype, promised.stride())


@pytest.mark.parametrize("lengths", [T0, T5], ids=["T0", "T5"])
@pytest.mark.parametrize("given", OP.given)
@pytest.mark.parametrize("need_weight, need_modulation", [(False, False), (True, False), (False, True)])
def test_launches_are_declared(lengths: tuple[int, ...], given: str, need_weight: bool, need_modulation: bool) -> None:
    sequences = Sequences(lengths, DEVICE)
    x, h, *others = OP.inputs((lengths, 36), given)
    rstd, tables = x.new_ones(x.shape[0]), (sequences.row_sequence, sequences.chunks)
    dy = x if others[2] is not None else None
    for op, arguments in (
        (gated_residual_norm_fwd, (x, h, *others, tables[0], 1e-5)),
        (gated_residual_norm_bwd, (x, dy, h, x, *others, rstd, rstd, *tables, need_weight, need_modulation, False)),
    ):
        before = launch.count
        with backend.forced("triton"):
            out = op(*arguments)
        assert COSTS[op._qualname](*arguments, out=out).launches == launch.count - before


def test_bytes_are_declared() -> None:
    """T 128 in two sequences, D 32, fp32: written out as the kernels' loads and stores."""
    sequences = Sequences((64, 64))
    x, h, *others = make_gated(((64, 64), 32), device="cpu")
    tables = (sequences.row_sequence, sequences.chunks)
    rows, statistics, vector, modulation, partial = 4 * 128 * 32, 4 * 128, 4 * 32, 4 * 2 * 32, 4 * (2 * MOST_SPLIT) * 32
    small = 2 * (vector + modulation)
    with backend.forced("torch"):
        out = gated_residual_norm_fwd(x, h, *others, tables[0], 1e-5)
    cost = COSTS["dopsd::gated_residual_norm_fwd"](x, h, *others, tables[0], 1e-5, out=out)
    assert cost.elementwise_bytes == 4 * rows + 2 * statistics + small + 4 * 128
    weights = 2 * (partial + modulation + vector)
    modulations = 2 * (partial + vector + modulation) + modulation
    for asked, sums in ((False, 4 * 128), (True, 2 * partial + weights + modulations + 2 * 4 * 2 * 3)):
        for emit in (False, True):
            arguments = (x, x, h, out[0], *others, *out[2:], *tables, asked, asked, emit)
            with backend.forced("torch"):
                gradients = gated_residual_norm_bwd(*arguments)
            cost = COSTS["dopsd::gated_residual_norm_bwd"](*arguments, out=gradients)
            assert cost.elementwise_bytes == (6 + emit) * rows + 2 * statistics + small + sums


def test_one_output_used_alone() -> None:
    sequences = Sequences((3,), DEVICE)
    tensors = [t.requires_grad_() for t in make_gated(((3,), 16))]
    for output in (0, 1):
        wanted = gated_residual_norm_ref(*tensors, sequences.row_sequence, 1e-5)[output].sum()
        ours = gated_residual_norm(*tensors, sequences)[output].sum()
        wanted, ours = (torch.autograd.grad(total, tensors, allow_unused=True) for total in (wanted, ours))
        for a, b in zip(ours, wanted):
            torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b)


def test_wrong_arguments() -> None:
    sequences = Sequences((2, 3))
    good = dict(zip(("x", "h", "weight", "gate", "next_weight", "next_scale"), make_gated(((2, 3), 8), device="cpu")))
    x, h, gate = good["x"], good["h"], good["gate"]
    for name, wrong, what in (
        ("x", x[0], "x is .*must be fp16"),
        ("x", x.t().contiguous().t(), "x has strides"),
        ("h", h[:4], "h is .*like the other rows"),
        ("h", h.double(), "h is torch.float64"),
        ("h", h.to("meta"), "h is on meta"),
        ("weight", good["weight"][:7], "weight is .*of shape .8."),
        ("gate", gate[:1], "gate has 1 rows, there are 2 sequences"),
        ("gate", gate.t().contiguous().t(), "gate has strides"),
        ("next_scale", gate.int(), "next_scale is torch.int32"),
        ("next_weight", None, "next_scale without next_weight"),
    ):
        with pytest.raises(ValueError, match=f"gated_residual_norm: {what}"):
            gated_residual_norm(**{**good, name: wrong}, sequences=sequences)
    others = list(good.values())[2:]
    rstd, tables = torch.ones(5), (sequences.row_sequence, sequences.chunks)
    for wrong_dy in (x[:4], x.double(), x.t().contiguous().t(), x.to("meta")):
        with pytest.raises(ValueError, match="gated_residual_norm_bwd: dy"):
            gated_residual_norm_bwd(x, wrong_dy, h, x, *others, rstd, rstd, *tables, True, True, False)
    with pytest.raises(ValueError, match="no y without next_weight"):
        gated_residual_norm_bwd(x, x, h, x, *others[:2], None, None, rstd, rstd, *tables, True, True, False)
