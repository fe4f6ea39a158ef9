"""rmsnorm_modulate against float64, its formulas, its registration, its declared cost and its errors."""

import pytest
import torch
from torch import Tensor

from dopsd_kernels import backend, launch, native_ops
from dopsd_kernels.costs import COSTS
from dopsd_kernels.norm_parts import MOST_SPLIT
from dopsd_kernels.rmsnorm_modulate import (
    rmsnorm_modulate,
    rmsnorm_modulate_bwd,
    rmsnorm_modulate_fwd,
    rmsnorm_modulate_ref,
)
from dopsd_kernels.sequences import Sequences
from tests.ops.rule import DEVICE, DTYPES, assert_twice, with_gradients

LENGTHS = {"T0": (0, 0), "T1": (1,), "T5": (2, 0, 3), "T123": (70, 0, 52, 1)}
GIVEN = {"both": (True, True), "weight": (True, False), "scale": (False, True), "neither": (False, False)}
CASES = [("T0", 36, "both"), ("T1", 123, "both"), ("T5", 3840, "both"), ("T123", 36, "both"), ("T123", 144, "both")]
CASES += [("T5", 123, given) for given in GIVEN]


def make(lengths: tuple[int, ...], width: int, given: str = "both", dtype=torch.float32, device=DEVICE) -> list[Tensor | None]:
    """[x, weight, scale]; scale is a column slice, as of a block's four modulations."""
    generator = torch.Generator().manual_seed(sum(lengths) * 7919 + width)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(device, dtype)

    weight, scale = GIVEN[given]
    return [
        random(sum(lengths), width),
        1 + 0.3 * random(width) if weight else None,
        random(len(lengths), 4 * width)[:, width : 2 * width] if scale else None,
    ]


def spread(rows: Tensor) -> Tensor:
    """The same values with another row stride."""
    return torch.cat([rows, rows], 1)[:, : rows.shape[1]]


def double(tensors: list[Tensor | None]) -> list[Tensor | None]:
    return [None if t is None else t.double() for t in tensors]


def assert_rule(chosen: str, lengths: tuple[int, ...], inputs: list[Tensor | None], eps: float = 1e-5) -> None:
    sequences = Sequences(lengths, inputs[0].device)

    def reference(*tensors):
        return rmsnorm_modulate_ref(*tensors, sequences.row_sequence, eps)

    with backend.forced(chosen):
        ours = with_gradients(lambda x, w, s: rmsnorm_modulate(spread(x), w, s, sequences, eps), inputs)
    assert_twice(ours, with_gradients(reference, inputs), with_gradients(reference, double(inputs)), f"{chosen} {lengths}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens, width, given", CASES)
def test_triton_forward_and_backward(tokens: str, width: int, given: str, dtype: torch.dtype) -> None:
    assert_rule("triton", LENGTHS[tokens], make(LENGTHS[tokens], width, given, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens, width, given", CASES)
def test_torch_forward_and_backward(tokens: str, width: int, given: str, dtype: torch.dtype) -> None:
    assert_rule("torch", LENGTHS[tokens], make(LENGTHS[tokens], width, given, dtype))


@pytest.mark.parametrize("tokens, width, given", CASES)
def test_native_forward_and_backward(tokens: str, width: int, given: str) -> None:
    inputs = make(LENGTHS[tokens], width, given, device="cpu")
    assert native_ops.has("rmsnorm_modulate") and native_ops.usable(*inputs)
    assert_rule("native", LENGTHS[tokens], inputs)


@pytest.mark.parametrize("chosen", ["triton", "torch", "native"])
@pytest.mark.parametrize("need_weight", [False, True])
@pytest.mark.parametrize("need_scale", [False, True])
def test_backward_gives_what_is_asked_as_the_fake_says(chosen: str, need_weight: bool, need_scale: bool) -> None:
    device = "cpu" if chosen == "native" else DEVICE
    sequences = Sequences(LENGTHS["T5"], device)
    x, weight, scale = make(LENGTHS["T5"], 36, device=device)
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


@pytest.mark.parametrize("given", GIVEN)
def test_gradcheck(given: str) -> None:
    sequences = Sequences(LENGTHS["T5"])
    inputs = make(LENGTHS["T5"], 7, given, torch.float64, "cpu")
    leaves = [None if t is None else t.clone().requires_grad_() for t in inputs]
    assert torch.autograd.gradcheck(lambda *t: rmsnorm_modulate_ref(*t, sequences.row_sequence, 1e-5), leaves)
    with backend.forced("torch"):
        assert torch.autograd.gradcheck(lambda *t: rmsnorm_modulate(*t, sequences), leaves)


@pytest.mark.parametrize("dtype, given", [(torch.float32, "both"), (torch.bfloat16, "weight"), (torch.float64, "neither")])
def test_registration(dtype: torch.dtype, given: str) -> None:
    sequences = Sequences(LENGTHS["T5"])
    x, w, s = make(LENGTHS["T5"], 8, given, dtype, "cpu")
    with backend.forced("torch"):
        leaves = [None if t is None else t.clone().requires_grad_() for t in (x, w, s)]
        torch.library.opcheck(rmsnorm_modulate_fwd, (*leaves, sequences.row_sequence, 1e-5, sequences.chunks))
        _, rstd = rmsnorm_modulate_fwd(x, w, s, sequences.row_sequence, 1e-5)
        for asked in ((True, True, True), (False, False, False)):
            arguments = (x, x, w, s, rstd, sequences.row_sequence, sequences.chunks, *asked)
            torch.library.opcheck(rmsnorm_modulate_bwd, arguments)


@pytest.mark.parametrize("tokens", ["T0", "T5"])
@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("asked", [False, True])
def test_launches_are_declared(tokens: str, given: str, asked: bool) -> None:
    sequences = Sequences(LENGTHS[tokens], DEVICE)
    x, weight, scale = make(LENGTHS[tokens], 36, given)
    dy, rstd = x, x.new_ones(x.shape[0])
    tables = (sequences.row_sequence, sequences.chunks)
    for op, arguments in (
        (rmsnorm_modulate_fwd, (x, weight, scale, tables[0], 1e-5)),
        (rmsnorm_modulate_bwd, (dy, x, weight, scale, rstd, *tables, asked, asked, False)),
    ):
        before = launch.count
        with backend.forced("triton"):
            out = op(*arguments)
        assert COSTS[op._qualname](*arguments, out=out).launches == launch.count - before


def test_bytes_are_declared() -> None:
    """T 128 in two sequences, D 32, fp32: written out as the kernels' loads and stores."""
    sequences = Sequences((64, 64))
    x, weight, scale = make((64, 64), 32, device="cpu")
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


def test_rows_beyond_two_to_the_31_elements() -> None:
    whole = torch.empty(2**31 + 64, dtype=torch.float16, device=DEVICE)
    inputs = make((1, 1), 16, dtype=torch.float16)
    far = whole.as_strided((2, 16), (2**31 + 16, 1)).copy_(inputs[0])
    sequences = Sequences((1, 1), DEVICE)
    with backend.forced("triton"):
        y, rstd = rmsnorm_modulate_fwd(far, *inputs[1:], sequences.row_sequence, 1e-5)
        torch.testing.assert_close(y, rmsnorm_modulate_ref(*inputs, sequences.row_sequence, 1e-5))
        arguments = inputs[1:] + [rstd, sequences.row_sequence, sequences.chunks, True, True, False]
        there = rmsnorm_modulate_bwd(far, far, *arguments)
        here = rmsnorm_modulate_bwd(inputs[0], inputs[0], *arguments)
    assert all(map(torch.equal, there, here))


def test_gradients_need_chunks() -> None:
    sequences = Sequences((3,), DEVICE)
    x, weight, scale = make((3,), 16)
    y, _ = rmsnorm_modulate_fwd(x.requires_grad_(), weight, scale, sequences.row_sequence, 1e-5)
    y.sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape
    y, _ = rmsnorm_modulate_fwd(x, weight.requires_grad_(), scale, sequences.row_sequence, 1e-5)
    with pytest.raises(ValueError, match="need chunks"):
        y.sum().backward()


def test_wrong_arguments() -> None:
    sequences = Sequences((2, 3))
    x, weight, scale = make((2, 3), 8, device="cpu")
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
