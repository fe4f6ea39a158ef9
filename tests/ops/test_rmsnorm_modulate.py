"""What is special to rmsnorm_modulate: what its backward is asked for, its declared bytes and its errors."""

import pytest
import torch

from dopsd_kernels import backend
from dopsd_kernels.costs import COSTS
from dopsd_kernels.norm_parts import MOST_SPLIT
from dopsd_kernels.rmsnorm_modulate import (
    rmsnorm_modulate,
    rmsnorm_modulate_bwd,
    rmsnorm_modulate_fwd,
)
from dopsd_kernels.sequences import Sequences
from tests.ops.rule import DEVICE
from tests.ops.table import T5, make_rmsnorm, spread


@pytest.mark.parametrize("chosen", ["triton", "torch", "native"])
@pytest.mark.parametrize("need_weight", [False, True])
@pytest.mark.parametrize("need_scale", [False, True])
def test_backward_gives_what_is_asked_as_the_fake_says(chosen: str, need_weight: bool, need_scale: bool) -> None:
    device = "cpu" if chosen == "native" else DEVICE
    sequences = Sequences(T5, device)
    x, weight, scale = make_rmsnorm((T5, 36), device=device)
    dy = spread(torch.flip(x, [0]))
    with backend.forced(chosen):
        y, rstd = rmsnorm_modulate_fwd(x, weight, scale, sequences.row_sequence, 1e-5)
        arguments = [dy, x, weight, scale, rstd, sequences.row_sequence, sequences.chunks]
        found = rmsnorm_modulate_bwd(*arguments, need_weight, need_scale, True)
        again = rmsnorm_modulate_bwd(*arguments, need_weight, need_scale, False)
        whole = rmsnorm_modulate_bwd(*arguments, True, True, False)
    assert torch.equal(found[3], y), "y made again differs"
    assert again[3].shape == (0,)
    for a, b, c, asked in zip(found[:3], again, whole, (True, need_weight, need_scale)):
        assert torch.equal(a, b), "the same call gave other numbers"
        assert a.shape == (c.shape if asked else (0,))
        if asked:
            torch.testing.assert_close(a, c)
    fake = rmsnorm_modulate_bwd(*(t.to("meta") for t in arguments), need_weight, need_scale, True)
    for real, promised in zip(found, fake):
        assert (real.shape, real.dtype, real.stride()) == (promised.shape, promised.dtype, promised.stride())


def test_bytes_are_declared() -> None:
    """T 128 in two sequences, D 32, fp32: written out as the kernels' loads and stores."""
    sequences = Sequences((64, 64))
    x, weight, scale = make_rmsnorm(((64, 64), 32), device="cpu")
    tables = (sequences.row_sequence, sequences.chunks)
    with backend.forced("torch"):
        out = rmsnorm_modulate_fwd(x, weight, scale, tables[0], 1e-5)
    rows, statistics, small = 4 * 128 * 32, 4 * 128, 4 * (32 + 2 * 32)
    cost = COSTS["dopsd::rmsnorm_modulate_fwd"](x, weight, scale, tables[0], 1e-5, out=out)
    assert cost.elementwise_bytes == 2 * rows + statistics + small + 4 * 128
    for asked, sums in ((False, 4 * 128), (True, 3 * 4 * (2 * MOST_SPLIT) * 32 + 2 * 4 * 2 * 3 + 2 * small)):
        arguments = (x, x, weight, scale, out[1], *tables, asked, asked, True)
        with backend.forced("torch"):
            gradients = rmsnorm_modulate_bwd(*arguments)
        cost = COSTS["dopsd::rmsnorm_modulate_bwd"](*arguments, out=gradients)
        assert cost.elementwise_bytes == 4 * rows + statistics + small + sums


def test_gradients_need_chunks() -> None:
    sequences = Sequences((3,), DEVICE)
    x, weight, scale = make_rmsnorm(((3,), 16))
    y, _ = rmsnorm_modulate_fwd(x.requires_grad_(), weight, scale, sequences.row_sequence, 1e-5)
    y.sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape
    y, _ = rmsnorm_modulate_fwd(x, weight.requires_grad_(), scale, sequences.row_sequence, 1e-5)
    with pytest.raises(ValueError, match="need chunks"):
        y.sum().backward()


def test_wrong_arguments() -> None:
    sequences = Sequences((2, 3))
    x, weight, scale = make_rmsnorm(((2, 3), 8), device="cpu")
    meta = {"device": "meta"}
    for wrong, what in (
        ((x[0], weight, scale), "x is .*must be fp16"),
        ((x.int(), weight, scale), "x is torch.int32"),
        ((x.t().contiguous().t(), weight, scale), "x has strides"),
        ((x, weight[:7], scale), "weight is .*of shape .8."),
        ((x, weight.to(**meta), scale), "weight is on meta"),
        ((x, weight, scale[:1]), "scale has 1 rows, there are 2 sequences"),
        ((x, weight, scale[:, :7]), "scale is .*of shape .S, 8."),
        ((x, weight, scale.t().contiguous().t()), "scale has strides"),
        ((x, weight, scale.to(**meta)), "scale is on meta"),
        ((x[:4], weight, scale), "x has 4 rows, the sequences have 5 tokens"),
    ):
        with pytest.raises(ValueError, match=f"rmsnorm_modulate: {what}"):
            rmsnorm_modulate(*wrong, sequences)
    with pytest.raises(ValueError, match="row_sequence is torch.int64"):
        rmsnorm_modulate_fwd(x, weight, scale, sequences.row_sequence.long(), 1e-5)
    rstd = torch.ones(5)
    for wrong_dy in (x[:4], x.double(), x.t().contiguous().t(), x.to(**meta)):
        with pytest.raises(ValueError, match="rmsnorm_modulate_bwd: dy"):
            tables = (sequences.row_sequence, sequences.chunks)
            rmsnorm_modulate_bwd(wrong_dy, x, weight, scale, rstd, *tables, True, True, False)
