"""divergence_step against float64, its formulas, its registration and its errors."""

import math

import pytest
import torch
from torch import Tensor

from dopsd_kernels import backend, launch
from dopsd_kernels.costs import COSTS
from dopsd_kernels.divergence_step import (
    FINISH_BLOCK,
    _divergence_mean_kernel,
    divergence_step,
    divergence_step_fwd,
    divergence_step_ref,
)
from tests.ops.rule import DEVICE, DTYPES, assert_twice

WEIGHT, DT, TIME = 0.1875, 0.15, 0.1
SHAPES = [(1,), (7, 1), (3, 5, 123), (1024,), (2, 16, 8, 8), (10007,)]


def random(*shape: int, dtype: torch.dtype = torch.float32, device: str = DEVICE, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)


def inputs(
    *shape: int, velocity: torch.dtype = torch.float32, state: torch.dtype = torch.float32, device: str = DEVICE, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """v_s, v_t close to it, x."""
    v_s = random(*shape, device=device, seed=3 * seed)
    v_t = v_s + 0.3 * random(*shape, device=device, seed=3 * seed + 1)
    return v_s.to(velocity), v_t.to(velocity), random(*shape, dtype=state, device=device, seed=3 * seed + 2)


def everything(function, v_s: Tensor, v_t: Tensor, x: Tensor, factor: float = 1.0) -> list[Tensor]:
    v_s = v_s.detach().clone().requires_grad_()
    out = function(v_s, v_t, x, WEIGHT, DT, TIME, True)
    assert not any(tensor.requires_grad for tensor in (out.mean_square, out.x_next, out.x1_s, out.x1_t))
    (grad,) = torch.autograd.grad(factor * out.loss, v_s)
    return [out.loss.detach(), out.mean_square, grad, out.x_next, out.x1_s, out.x1_t]


def assert_rule(chosen: str, shape: tuple[int, ...], **dtypes: torch.dtype) -> None:
    """Over eight draws together: the rounding of one number, such as a loss, may be luck."""
    results: list[list[list[Tensor]]] = [[], [], []]
    for seed in range(8):
        arguments = inputs(*shape, **dtypes, seed=seed)
        with backend.forced(chosen):
            results[0].append(everything(divergence_step, *arguments))
        results[1].append(everything(divergence_step_ref, *arguments))
        results[2].append(everything(divergence_step_ref, *(tensor.double() for tensor in arguments)))
    ours, eager, oracle = ([torch.stack(draws) for draws in zip(*result)] for result in results)
    assert_twice(ours, eager, oracle, f"divergence_step {chosen}")
    assert [tensor.dtype for tensor in ours] == [tensor.dtype for tensor in eager]


@pytest.mark.parametrize("chosen", ["triton", "torch"])
@pytest.mark.parametrize("velocity", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_backward(shape: tuple[int, ...], velocity: torch.dtype, chosen: str) -> None:
    assert_rule(chosen, shape, velocity=velocity)


@pytest.mark.parametrize("chosen", ["triton", "torch"])
def test_half_states(chosen: str) -> None:
    assert_rule(chosen, (3, 41), velocity=torch.float32, state=torch.float16)


def test_more_partial_sums_than_a_block() -> None:
    partial, out = random(3 * FINISH_BLOCK + 5).square(), torch.empty((), device=DEVICE)
    launch.launch(_divergence_mean_kernel, (1,), partial, out, len(partial), 7, BLOCK=FINISH_BLOCK, num_warps=8)
    assert_twice(out, partial.sum() / 7, partial.double().sum() / 7)


@pytest.mark.parametrize("chosen", ["triton", "torch"])
def test_no_elements(chosen: str) -> None:
    with backend.forced(chosen):
        loss, mean_square, grad, *states = everything(divergence_step, *inputs(2, 0))
    assert loss == mean_square == 0
    assert all(tensor.shape == (2, 0) for tensor in (grad, *states))


@pytest.mark.parametrize("chosen", ["triton", "torch"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_inf_reach_the_loss(value: float, chosen: str) -> None:
    for which in range(2):
        arguments = inputs(3001)
        arguments[which][2999] = value
        with backend.forced(chosen):
            out = divergence_step(*arguments, WEIGHT, DT, TIME)
        assert not torch.isfinite(out.loss) and torch.isnan(out.loss) == math.isnan(value)


def test_float64_is_computed_in_float64() -> None:
    arguments = [tensor.double() / 3 for tensor in inputs(5, 41)]
    for chosen in ("torch", "triton"):
        with backend.forced(chosen):
            ours = everything(divergence_step, *arguments)
        assert all(tensor.dtype == torch.float64 for tensor in ours)
        torch.testing.assert_close(ours, everything(divergence_step_ref, *arguments), rtol=1e-14, atol=1e-15)


def test_what_is_not_asked_is_none() -> None:
    target = inputs(5)
    for chosen in ("triton", "torch"):
        with backend.forced(chosen):
            out = divergence_step(*target, 1.0, None, TIME)
            step = divergence_step(*target, 1.0, DT, TIME)
        assert out.x_next is out.x1_s is out.x1_t is step.x1_s is step.x1_t is None
        assert step.x_next is not None and torch.equal(out.loss, step.loss)


@pytest.mark.parametrize("chosen", ["triton", "torch"])
def test_primitive_gradient_is_the_autograd_gradient(chosen: str) -> None:
    arguments = inputs(5, 41)
    with backend.forced(chosen):
        mean_square, grad, *_ = divergence_step_fwd(*arguments, WEIGHT, DT, TIME, True, True)
        *_, from_loss, _, _, _ = everything(divergence_step, *arguments, 3.0)
    torch.testing.assert_close(from_loss, 3 * grad, rtol=1e-6, atol=0)
    assert mean_square.dtype == torch.float32 and mean_square.shape == ()


def test_same_from_run_to_run_and_for_any_thread_count() -> None:
    arguments = inputs(70001, device="cpu")
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            with backend.forced("torch"):
                results.append(everything(divergence_step, *arguments))
    finally:
        torch.set_num_threads(before)
    with backend.forced("triton"):
        launched = [everything(divergence_step, *inputs(3001)) for _ in range(2)]
    for first, second in (results, launched):
        assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.parametrize("weight", [WEIGHT, 0.0])
def test_gradcheck(weight: float) -> None:
    v_s, v_t, x = inputs(3, 5, velocity=torch.float64, state=torch.float64, device="cpu")
    v_s.requires_grad_()
    assert torch.autograd.gradcheck(lambda v: divergence_step_ref(v, v_t, x, weight, DT, TIME).loss, v_s)
    with backend.forced("torch"):
        assert torch.autograd.gradcheck(lambda v: divergence_step(v, v_t, x, weight, DT, TIME).loss, v_s)
        assert torch.autograd.gradcheck(lambda v: divergence_step_fwd(v, v_t, x, weight, DT, TIME, True, True)[0], v_s)


@pytest.mark.parametrize("wants", [(True, True), (False, False)])
@pytest.mark.parametrize("velocity", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_registration(velocity: torch.dtype, wants: tuple[bool, bool]) -> None:
    v_s, v_t, x = inputs(3, 5, velocity=velocity, device="cpu")
    with backend.forced("torch"):
        torch.library.opcheck(divergence_step_fwd, (v_s.requires_grad_(), v_t, x, WEIGHT, DT, TIME, *wants))


def test_launches_are_declared() -> None:
    for shape in ((3, 700), (0,)):
        for want_next, want_x1 in ((True, True), (True, False), (False, True), (False, False)):
            arguments = (*inputs(*shape, velocity=torch.float16), WEIGHT, DT, TIME, want_next, want_x1)
            before = launch.count
            with backend.forced("triton"):
                out = divergence_step_fwd(*arguments)
            cost = COSTS["dopsd::divergence_step_fwd"](*arguments, out=out)
            assert cost.launches == launch.count - before
            if shape != (0,):
                states = (want_next or want_x1) + want_next + 2 * want_x1
                assert (cost.launches, cost.elementwise_bytes) == (2, 2100 * (3 * 2 + 4 * states) + 3 * 4 * 2 + 4)


def test_wrong_arguments() -> None:
    v_s, v_t, x = inputs(4, 6)
    for wrong in (v_t[:3], v_t.int(), v_t.to("meta"), random(6, 4).t()):
        with pytest.raises(ValueError, match="divergence_step: v_t"):
            divergence_step(v_s, wrong, x, WEIGHT, DT, TIME)
        with pytest.raises(ValueError, match="divergence_step: x"):
            divergence_step(v_s, v_t, wrong, WEIGHT, DT, TIME)


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs GPU")
    n = 2**31 + 1027
    v_s = torch.zeros(n, dtype=torch.float16, device="cuda")
    v_t = torch.zeros_like(v_s)
    v_s[-1], v_t[-2] = 300.0, 200.0
    mean_square, grad, *_ = divergence_step_fwd(v_s, v_t, v_s, float(n), 0.0, 0.0, False, False)
    assert mean_square.item() == pytest.approx((300.0**2 + 200.0**2) / n, rel=1e-6)
    assert grad[-1] == 600.0 and grad[-2] == -400.0 and not grad[:-2].any()
