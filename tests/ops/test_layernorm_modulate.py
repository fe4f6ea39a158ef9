"""layernorm_modulate against float64, its formulas, its registration, its declared cost and its errors."""

import pytest
import torch
from torch import Tensor

from dopsd_kernels import backend, launch
from dopsd_kernels.costs import COSTS
from dopsd_kernels.layernorm_modulate import (
    layernorm_modulate,
    layernorm_modulate_bwd,
    layernorm_modulate_fwd,
    layernorm_modulate_ref,
)
from dopsd_kernels.norm_parts import MOST_SPLIT
from dopsd_kernels.sequences import Sequences
from tests.ops.rule import DEVICE, DTYPES, assert_twice, with_gradients

LENGTHS = {"T0": (0, 0), "T1": (1,), "T5": (2, 0, 3), "T123": (70, 0, 52, 1)}
GIVEN = {"both": (True, True), "scale": (True, False), "shift": (False, True), "neither": (False, False)}
CASES = [("T0", 36, "both"), ("T1", 123, "both"), ("T5", 3840, "both"), ("T123", 36, "both"), ("T123", 144, "scale")]
CASES += [("T5", 123, given) for given in GIVEN]


def make(lengths: tuple[int, ...], width: int, given: str = "both", dtype=torch.float32, device=DEVICE) -> list[Tensor | None]:
    """[x, scale, shift], x off centre; scale and shift are column slices of one tensor."""
    generator = torch.Generator().manual_seed(sum(lengths) * 7919 + width)
    x = 0.7 + torch.randn(sum(lengths), width, generator=generator, dtype=torch.float64)
    modulation = torch.randn(len(lengths), 2 * width, generator=generator, dtype=torch.float64).to(device, dtype)
    chunks = zip(modulation.chunk(2, 1), GIVEN[given])
    return [x.to(device, dtype), *(chunk if wanted else None for chunk, wanted in chunks)]


def spread(rows: Tensor) -> Tensor:
    """The same values with another row stride."""
    return torch.cat([rows, rows], 1)[:, : rows.shape[1]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("chosen", ["triton", "torch"])
@pytest.mark.parametrize("tokens, width, given", CASES)
def test_forward_and_backward(tokens: str, width: int, given: str, chosen: str, dtype: torch.dtype) -> None:
    sequences = Sequences(LENGTHS[tokens], DEVICE)
    inputs = make(LENGTHS[tokens], width, given, dtype)

    def reference(*tensors):
        return layernorm_modulate_ref(*tensors, sequences.row_sequence, 1e-6)

    with backend.forced(chosen):
        ours = with_gradients(lambda x, scale, shift: layernorm_modulate(spread(x), scale, shift, sequences), inputs)
    oracle = with_gradients(reference, [None if t is None else t.double() for t in inputs])
    assert_twice(ours, with_gradients(reference, inputs), oracle, f"{chosen} {tokens}")


def test_the_reference_is_torchs_layer_norm() -> None:
    x, scale, shift = make((5,), 36, dtype=torch.float64)
    rows = torch.zeros(5, dtype=torch.int32, device=x.device)
    wanted = torch.nn.functional.layer_norm(x, (36,), eps=1e-6) * (1 + scale) + shift
    torch.testing.assert_close(layernorm_modulate_ref(x, scale, shift, rows, 1e-6), wanted)


@pytest.mark.parametrize("chosen", ["triton", "torch"])
@pytest.mark.parametrize("given", GIVEN)
def test_backward_gives_what_is_asked_as_the_fake_says(chosen: str, given: str) -> None:
    sequences = Sequences(LENGTHS["T5"], DEVICE)
    x, scale, shift = make(LENGTHS["T5"], 36, given)
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


@pytest.mark.parametrize("given", GIVEN)
def test_gradcheck(given: str) -> None:
    sequences = Sequences(LENGTHS["T5"])
    inputs = make(LENGTHS["T5"], 7, given, torch.float64, "cpu")
    leaves = [None if t is None else t.clone().requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(lambda *t: layernorm_modulate_ref(*t, sequences.row_sequence, 1e-6), leaves)
    with backend.forced("torch"):
        assert torch.autograd.gradcheck(lambda *t: layernorm_modulate(*t, sequences), leaves)


@pytest.mark.parametrize("dtype, given", [(torch.float32, "both"), (torch.bfloat16, "scale"), (torch.float64, "neither")])
def test_registration(dtype: torch.dtype, given: str) -> None:
    sequences = Sequences(LENGTHS["T5"])
    x, scale, shift = make(LENGTHS["T5"], 8, given, dtype, "cpu")
    with backend.forced("torch"):
        leaves = [None if t is None else t.clone().requires_grad_() for t in (x, scale, shift)]
        torch.library.opcheck(layernorm_modulate_fwd, (*leaves, sequences.row_sequence, 1e-6, sequences.chunks))
        _, *statistics = layernorm_modulate_fwd(x, scale, shift, sequences.row_sequence, 1e-6)
        for asked in ((True, True), (False, False)):
            arguments = (x, x, scale, shift, *statistics, sequences.row_sequence, sequences.chunks, *asked)
            torch.library.opcheck(layernorm_modulate_bwd, arguments)


@pytest.mark.parametrize("tokens", ["T0", "T5"])
@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("asked", [False, True])
def test_launches_are_declared(tokens: str, given: str, asked: bool) -> None:
    sequences = Sequences(LENGTHS[tokens], DEVICE)
    x, scale, shift = make(LENGTHS[tokens], 36, given)
    mean, tables = x.new_zeros(x.shape[0]), (sequences.row_sequence, sequences.chunks)
    for op, arguments in (
        (layernorm_modulate_fwd, (x, scale, shift, tables[0], 1e-6)),
        (layernorm_modulate_bwd, (x, x, scale, shift, mean, mean, *tables, asked, False)),
    ):
        before = launch.count
        with backend.forced("triton"):
            out = op(*arguments)
        assert COSTS[op._qualname](*arguments, out=out).launches == launch.count - before


def test_bytes_are_declared() -> None:
    """T 128 in two sequences, D 32, fp32: written out as the kernels' loads and stores."""
    sequences = Sequences((64, 64))
    x, scale, shift = make((64, 64), 32, device="cpu")
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
    x, scale, shift = make((2, 3), 8, device="cpu")
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
