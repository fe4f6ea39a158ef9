"""What is special to layernorm_modulate: its formula, what its backward is asked for, its declared bytes and its errors."""

import pytest
import torch

from dopsd_kernels import backend
from dopsd_kernels.costs import COSTS
from dopsd_kernels.layernorm_modulate import (
    layernorm_modulate,
    layernorm_modulate_bwd,
    layernorm_modulate_fwd,
    layernorm_modulate_ref,
)
from dopsd_kernels.norm_parts import MOST_SPLIT
from dopsd_kernels.sequences import Sequences
from tests.ops.rule import DEVICE
from tests.ops.table import OPS, T5, make_layernorm, spread


def test_the_reference_is_torchs_layer_norm() -> None:
    x, scale, shift = make_layernorm(((5,), 36), dtype=torch.float64)
    rows = torch.zeros(5, dtype=torch.int32, device=x.device)
    wanted = torch.nn.functional.layer_norm(x, (36,), eps=1e-6) * (1 + scale) + shift
    torch.testing.assert_close(layernorm_modulate_ref(x, scale, shift, rows, 1e-6), wanted)


@pytest.mark.parametrize("chosen", ["triton", "torch"])
@pytest.mark.parametrize("given", OPS["layernorm_modulate"].given)
def test_backward_gives_what_is_asked_as_the_fake_says(chosen: str, given: str) -> None:
    sequences = Sequences(T5, DEVICE)
    x, scale, shift = OPS["layernorm_modulate"].inputs((T5, 36), given)
    dy = spread(torch.flip(x, [0]))
    with backend.forced(chosen):
        y, mean, rstd = layernorm_modulate_fwd(x, scale, shift, sequences.row_sequence, 1e-6)
        arguments = [dy, x, scale, shift, mean, rstd, sequences.row_sequence, sequences.chunks]
        found, again = (layernorm_modulate_bwd(*arguments, True, emit) for emit in (True, False))
        rows_only = layernorm_modulate_bwd(*arguments, False, False)
    assert torch.equal(found[3], y), "y made again differs"
    assert all(map(torch.equal, found[:3], again)), "the same call gave other numbers"
    assert [t.shape for t in rows_only[1:]] == [(0,)] * 3 and again[3].shape == (0,)
    torch.testing.assert_close(rows_only[0], found[0])
    meta = [None if t is None else t.to("meta") for t in arguments]
    for real, promised in zip(found, layernorm_modulate_bwd(*meta, True, True)):
        assert (real.shape, real.dtype, real.stride()) == (promised.shape, promised.dtype, promised.stride())


def test_bytes_are_declared() -> None:
    """T 128 in two sequences, D 32, fp32: written out as the kernels' loads and stores."""
    sequences = Sequences((64, 64))
    x, scale, shift = make_layernorm(((64, 64), 32), device="cpu")
    tables = (sequences.row_sequence, sequences.chunks)
    rows, statistics, small = 4 * 128 * 32, 2 * 4 * 128, 4 * 2 * 32
    with backend.forced("torch"):
        out = layernorm_modulate_fwd(x, scale, shift, tables[0], 1e-6)
    cost = COSTS["dopsd::layernorm_modulate_fwd"](x, scale, shift, tables[0], 1e-6, out=out)
    assert cost.elementwise_bytes == 2 * rows + statistics + 2 * small + 4 * 128
    for asked, sums in ((False, 4 * 128), (True, 2 * (2 * 4 * (2 * MOST_SPLIT) * 32 + small) + 2 * 4 * 2 * 3)):
        arguments = (x, x, scale, shift, *out[1:], *tables, asked, False)
        with backend.forced("torch"):
            gradients = layernorm_modulate_bwd(*arguments)
        cost = COSTS["dopsd::layernorm_modulate_bwd"](*arguments, out=gradients)
        assert cost.elementwise_bytes == 3 * rows + statistics + small + sums


def test_wrong_arguments() -> None:
    sequences = Sequences((2, 3))
    x, scale, shift = make_layernorm(((2, 3), 8), device="cpu")
    for wrong, what in (
        ((x[0], scale, shift), "x is .*must be fp16"),
        ((x.int(), scale, shift), "x is torch.int32"),
        ((x.t().contiguous().t(), scale, shift), "x has strides"),
        ((x, scale[:, :7], shift), "scale is .*of shape .S, 8."),
        ((x, scale, shift.t().contiguous().t()), "shift has strides"),
        ((x, scale, shift.to("meta")), "shift is on meta"),
        ((x, scale, shift[:1]), "shift has 1 rows, there are 2 sequences"),
        ((x[:4], scale, shift), "x has 4 rows, the sequences have 5 tokens"),
    ):
        with pytest.raises(ValueError, match=f"layernorm_modulate: {what}"):
            layernorm_modulate(*wrong, sequences)
    with pytest.raises(ValueError, match="shift is .*of shape .2, 8."):
        layernorm_modulate_fwd(x, scale, shift[:1], sequences.row_sequence, 1e-6)
    mean, tables = torch.ones(5), (sequences.row_sequence, sequences.chunks)
    for wrong_dy in (x[:4], x.double(), x.t().contiguous().t(), x.to("meta")):
        with pytest.raises(ValueError, match="layernorm_modulate_bwd: dy"):
            layernorm_modulate_bwd(wrong_dy, x, scale, shift, mean, mean, *tables, True, False)
