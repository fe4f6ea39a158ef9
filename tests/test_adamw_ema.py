"""AdamW + EMA against torch's AdamW and against a float64 recomputation of the average."""

from __future__ import annotations

import pytest
import torch

from dopsd_kernels.adamw_ema import AdamWEMA

SHAPES = [(5, 123, 7), (1,), (33,), (64, 64)]


def parameters(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def set_gradients(params: list[torch.nn.Parameter], step: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(step + 1)
    for param in params:
        param.grad_dtype = dtype
        param.grad = (torch.randn(param.shape, generator=generator) * 10.0 ** (step % 5 - 3)).to(dtype)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_bit_equal_to_torch(weight_decay: float) -> None:
    ours, theirs = parameters(), parameters()
    options = dict(lr=3e-3, betas=(0.8, 0.95), eps=1e-7, weight_decay=weight_decay)
    optimizer, reference = AdamWEMA(ours, **options), torch.optim.AdamW(theirs, foreach=False, **options)
    for step in range(7):
        for params, opt in ((ours, optimizer), (theirs, reference)):
            set_gradients(params, step, torch.float32)
            opt.step()
        for a, b in zip(ours, theirs):
            assert torch.equal(a, b)
            assert torch.equal(optimizer.state[a]["exp_avg_sq"], reference.state[b]["exp_avg_sq"])


def test_pieces_of_a_large_tensor_give_the_same(monkeypatch) -> None:
    whole, pieces = parameters(), parameters()
    for params, size in ((whole, 1 << 22), (pieces, 64)):
        monkeypatch.setattr("dopsd_kernels.adamw_ema._CHUNK", size)
        optimizer = AdamWEMA(params, lr=1e-2, ema_decay=0.9)
        for step in range(3):
            set_gradients(params, step, torch.float32)
            optimizer.step()
    for a, b in zip(whole, pieces):
        torch.testing.assert_close(a, b, rtol=2**-22, atol=2**-22)  # the last elements of a piece may round otherwise


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("decay", [0.9, 0.9999])
@pytest.mark.parametrize("backend", ["as_found", "torch"])
def test_average_equals_float64(dtype: torch.dtype, decay: float, backend: str) -> None:
    params = parameters(dtype)
    expected = [param.detach().double() for param in params]
    optimizer = AdamWEMA(params, lr=1e-2, ema_decay=decay)
    if backend == "torch":
        optimizer._native = None
    steps = 20
    for step in range(steps):
        set_gradients(params, step, torch.float32)
        optimizer.step()
        for i, param in enumerate(params):
            theta = optimizer.state[param].get("master", param).detach().double()
            expected[i] = decay * expected[i] + (1 - decay) * theta
    for param, wanted in zip(params, expected):
        ema = optimizer.state[param]["ema"]
        assert ema.dtype == torch.float32
        # Each update rounds a few times at the average's magnitude, and 1 - decay carries its own relative error of
        # 2^-24.
        bound = 4 * steps * 2**-24 * max(1.0, float(wanted.abs().max()))
        assert float((ema.double() - wanted).abs().max()) <= bound
    assert optimizer.ema_backend in ("native", "torch") and (backend != "torch" or optimizer.ema_backend == "torch")


def test_bf16_weights_move_an_fp32_average_but_not_a_bf16_one() -> None:
    """At 0.9999 the update is below half a unit in the last place of bf16: the published average is frozen in
    effect."""
    start = torch.linspace(0.5, 2.0, 512).bfloat16()
    weight = torch.nn.Parameter(start.clone())
    optimizer = AdamWEMA([weight], lr=1e-3, ema_decay=0.9999)
    published = start.clone()
    for _ in range(20):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        published.mul_(0.9999).add_(weight.detach(), alpha=1 - 0.9999)
    assert torch.equal(published, start)
    assert bool((optimizer.state[weight]["ema"] < start.float()).all())


def test_bf16_parameters_are_the_rounded_master() -> None:
    """Updates of 1e-4 are lost on a bf16 weight near 1; the fp32 master keeps them, as an fp32 parameter would."""
    weight = torch.nn.Parameter(torch.ones(64, dtype=torch.bfloat16))
    exact = torch.nn.Parameter(torch.ones(64))
    optimizers = [AdamWEMA([p], lr=1e-4) for p in (weight, exact)]
    for _ in range(50):
        for param, optimizer in zip((weight, exact), optimizers):
            param.grad_dtype = torch.float32
            param.grad = torch.ones(64)
            optimizer.step()
    assert torch.equal(optimizers[0].state[weight]["master"], exact.detach())
    assert torch.equal(weight, exact.detach().bfloat16())
    assert float(weight.detach()[0]) < 0.999


def test_step_counts_are_per_tensor() -> None:
    """ZeRO-3 shows the optimizer one sub-group after the other."""
    together, apart = parameters(), parameters()
    optimizer = AdamWEMA(together, lr=1e-2, ema_decay=0.5)
    one_by_one = AdamWEMA(apart, lr=1e-2, ema_decay=0.5)
    for step in range(3):
        set_gradients(together, step, torch.float32)
        optimizer.step()
        set_gradients(apart, step, torch.float32)
        for param in apart:
            one_by_one.param_groups[0]["params"] = [param]
            one_by_one.step()
    for a, b in zip(together, apart):
        assert torch.equal(a, b)
        assert torch.equal(optimizer.state[a]["ema"], one_by_one.state[b]["ema"])
        assert one_by_one.state[b]["step"] == 3


def test_parameters_without_gradient_stay() -> None:
    params = parameters()
    optimizer = AdamWEMA(params, lr=1e-2, ema_decay=0.5)
    params[0].grad = torch.ones_like(params[0])
    before = params[1].detach().clone()
    optimizer.step()
    assert torch.equal(params[1], before) and params[1] not in optimizer.state


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="ema_decay"):
        AdamWEMA(parameters(), ema_decay=1.5)
