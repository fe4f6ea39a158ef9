"""What is special to swiglu: row strides, gates far out, its declared cost and its errors."""

import pytest
import torch

from dopsd_kernels import backend, launch
from dopsd_kernels.costs import COSTS
from dopsd_kernels.swiglu import swiglu, swiglu_bwd, swiglu_fwd, swiglu_ref
from tests.ops.rule import DEVICE, DTYPES, assert_twice


def rows(tokens: int, columns: int, dtype: torch.dtype = torch.float32, device: str = DEVICE, extra: int = 0) -> torch.Tensor:
    """Random [tokens, columns], a column slice of a tensor that is `extra` wider on either side."""
    generator = torch.Generator().manual_seed(tokens * 7919 + columns)
    whole = 2 * torch.randn(tokens, columns + 2 * extra, generator=generator, dtype=torch.float64)
    return whole.to(device, dtype)[:, extra : extra + columns]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("chosen", ["triton", "torch"])
def test_primitives_take_any_row_stride(chosen: str, dtype: torch.dtype) -> None:
    gu, ds = rows(5, 72, dtype, extra=3), rows(5, 36, dtype, extra=5)
    oracle, eager = gu.double().requires_grad_(), gu.clone().requires_grad_()
    wanted = swiglu_ref(oracle).detach(), *torch.autograd.grad(swiglu_ref(oracle), oracle, ds.double())
    same = swiglu_ref(eager).detach(), *torch.autograd.grad(swiglu_ref(eager), eager, ds)
    with backend.forced(chosen):
        dgu, s = swiglu_bwd(ds, gu, True)
        assert swiglu_bwd(ds, gu, False)[1].shape == (0,)
        assert_twice((swiglu_fwd(gu), dgu), same, wanted)
        assert torch.equal(s, swiglu_fwd(gu))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 200.0, -200.0])
def test_extreme_gates_as_eager(value: float) -> None:
    gu = torch.tensor([[value, value, 1.5, 2.0]], device=DEVICE)
    with backend.forced("triton"):
        torch.testing.assert_close(swiglu(gu), swiglu_ref(gu), equal_nan=True)


def test_launches_are_declared() -> None:
    for tokens in (3, 0):
        gu, ds = rows(tokens, 72), rows(tokens, 36)
        for op, arguments in ((swiglu_fwd, (gu,)), (swiglu_bwd, (ds, gu, False)), (swiglu_bwd, (ds, gu, True))):
            before = launch.count
            with backend.forced("triton"):
                out = op(*arguments)
            cost = COSTS[op._qualname](*arguments, out=out)
            assert cost.launches == launch.count - before == bool(tokens)
            widths = 3 if op is swiglu_fwd else 5 + arguments[-1]
            assert cost.elementwise_bytes == widths * ds.numel() * 4


def test_wrong_arguments() -> None:
    gu = rows(3, 10)
    for wrong in (gu[0], gu[:, :9], gu.int(), rows(10, 4).t()):
        with pytest.raises(ValueError, match="swiglu: gu"):
            swiglu(wrong)
    other_device, other_strides = torch.empty(3, 5, device="meta"), rows(5, 3).t()
    for wrong in (gu, gu[:, :4], gu[:, :5].double(), other_device, other_strides):
        with pytest.raises(ValueError, match="swiglu: ds"):
            swiglu_bwd(wrong, gu, False)


@pytest.mark.parametrize("tokens, width", [(0, 36), (5, 123), (3, 10240)])
def test_native_makes_the_product_again(tokens: int, width: int) -> None:
    gu = rows(tokens, 2 * width, device="cpu", extra=1)
    with backend.forced("native"):
        torch.testing.assert_close(swiglu_bwd(gu[:, :width], gu, True)[1], swiglu_fwd(gu))
