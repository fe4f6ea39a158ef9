"""Gradients of a group of linear layers, added to fp32 sums."""

import pytest
import torch

from dopsd_kernels import backend, launch
from dopsd_kernels.costs import COSTS
from dopsd_kernels.pair_linear import pair_linear_through
from dopsd_kernels.pair_linear_accumulate import pair_linear_accumulate, pair_linear_accumulate_ref
from tests.ops.rule import DEVICE, DTYPES, assert_twice

SHAPES = [(5, 36, (12, 20), (3, 0)), (123, 48, (48, 48, 48), (4, 4, 7)), (1, 16, (8,), (2,)), (0, 16, (8, 8), (2, 2))]


def make(tokens, depth, widths, ranks, dtype, trains=False, seed=0):
    """(sums_w, sums_a, sums_b), (dy, x, scales, xa, q) from numbers that are the same in every dtype."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, to=dtype):
        return torch.randn(shape, generator=generator).to(torch.float16).to(to).to(DEVICE)

    wide = torch.promote_types(dtype, torch.float32)
    joint = draw(tokens, sum(widths))
    dy = list(joint.split(list(widths), 1))
    x = draw(tokens, depth)
    b = [draw(n, r) if r else x.new_empty(0) for n, r in zip(widths, ranks)]
    scales = [2.0 + g for g in range(len(widths))]
    empty = x.new_empty(0, dtype=wide)
    sums = (
        [draw(n, depth, to=wide) for n in widths] if trains else [],
        [draw(r, depth, to=wide) if r else empty for r in ranks] if any(ranks) else [],
        [draw(n, r, to=wide) if r else empty for n, r in zip(widths, ranks)] if any(ranks) else [],
    )
    xa = draw(tokens, sum(ranks))
    q = pair_linear_through(dy, b, scales) if any(ranks) else x.new_empty(0)
    return sums, (dy, x, scales, xa, q)


def copies(sums):
    return tuple([total.clone() for total in group] for group in sums)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}-{len(shape[2])}")
@pytest.mark.parametrize("name", ["triton", "torch"])
def test_sums(name, shape, dtype):
    sums, inputs = make(*shape, dtype, trains=name == "torch")
    ours, eager, exact = copies(sums), copies(sums), tuple([t.double() for t in group] for group in sums)
    with backend.forced(name):
        pair_linear_accumulate(*ours, *inputs)
    pair_linear_accumulate_ref(*eager, *inputs)
    wide = [[t.double() for t in inputs[0]], inputs[1].double(), inputs[2], inputs[3].double(), inputs[4].double()]
    pair_linear_accumulate_ref(*exact, *wide)
    for a, b, c in zip(ours, eager, exact):
        assert_twice(a, b, c)


def test_twice_is_the_sum_of_both():
    sums, inputs = make(*SHAPES[1], torch.float32, trains=True)
    start, once = copies(sums), copies(sums)
    pair_linear_accumulate(*once, *inputs)
    twice = copies(once)
    pair_linear_accumulate(*twice, *inputs)
    for a, b, c in zip(sum(start, []), sum(once, []), sum(twice, [])):
        torch.testing.assert_close(c - b, b - a, rtol=1e-4, atol=1e-4)


def test_small_gradients_are_not_lost_in_bf16():
    """512 gradients of 2^-9 beside 1: bf16 has 8 bits, a bf16 sum would stay 1."""
    dy, x = [torch.full((1, 1), 2.0**-9, dtype=torch.bfloat16)], torch.ones(1, 1, dtype=torch.bfloat16)
    total, nothing = torch.ones(1, 1), torch.empty(0, dtype=torch.bfloat16)
    with backend.forced("torch"):
        for _ in range(512):
            pair_linear_accumulate([total], [], [], dy, x, [1.0], nothing, nothing)
    assert total.item() == 2.0


@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_declared_launches(shape):
    sums, inputs = make(*shape, torch.float32)
    before = launch.count
    with backend.forced("triton"):
        pair_linear_accumulate(*sums, *inputs)
    declared = COSTS["dopsd::pair_linear_accumulate"](*sums, *inputs, out=None)
    assert launch.count - before == declared.launches == 1


def test_bad_sums_are_refused():
    (w, a, b), inputs = make(*SHAPES[1], torch.float32, trains=True)
    for wrong, words in (
        ((w[:2], a, b), "2 sums_w for 3 members"),
        (([w[0].half(), *w[1:]], a, b), "sums_w 0 is .* torch.float16"),
        (([w[0].t().contiguous().t(), *w[1:]], a, b), "must be contiguous"),
        ((w, a, [b[0][:5], *b[1:]]), "sums_b 0 is"),
    ):
        with pytest.raises(ValueError, match=words):
            pair_linear_accumulate(*wrong, *inputs)
