"""AdamW + EMA against torch's AdamW and against a float64 recomputation of the average."""

from __future__ import annotations

import pytest
import torch

from dopsd_kernels import backend
from dopsd_kernels.adamw_ema import AdamWEMA
from tests.ops.rule import assert_twice

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
def test_plain_pytorch_is_bit_equal_to_torch(weight_decay: float) -> None:
    ours, theirs = parameters(), parameters()
    options = dict(lr=3e-3, betas=(0.8, 0.95), eps=1e-7, weight_decay=weight_decay)
    optimizer, reference = AdamWEMA(ours, **options), torch.optim.AdamW(theirs, foreach=False, **options)
    for step in range(7):
        for params, opt in ((ours, optimizer), (theirs, reference)):
            set_gradients(params, step, torch.float32)
            with backend.forced("torch"):
                opt.step()
        for a, b in zip(ours, theirs):
            assert torch.equal(a, b)
            assert torch.equal(optimizer.state[a]["exp_avg_sq"], reference.state[b]["exp_avg_sq"])


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_native_is_at_most_twice_as_wrong_as_torch(weight_decay: float) -> None:
    ours, theirs = parameters(), parameters()
    exact = [torch.nn.Parameter(param.detach().double()) for param in ours]
    options = dict(lr=3e-3, betas=(0.8, 0.95), eps=1e-7, weight_decay=weight_decay)
    optimizer = AdamWEMA(ours, **options)
    others = [torch.optim.AdamW(params, foreach=False, **options) for params in (theirs, exact)]
    for step in range(7):
        set_gradients(ours, step, torch.float32)
        for a, b, c in zip(ours, theirs, exact):
            b.grad, c.grad = a.grad.clone(), a.grad.double()
        for opt in (optimizer, *others):
            opt.step()
    assert optimizer.ema_backend == "native"
    assert_twice([p.detach() for p in ours], [p.detach() for p in theirs], [p.detach() for p in exact])


def test_pieces_of_a_large_tensor_give_the_same(monkeypatch) -> None:
    whole, pieces = parameters(), parameters()
    for params, size in ((whole, 1 << 22), (pieces, 64)):
        monkeypatch.setattr("dopsd_kernels.adamw_ema_triton._PIECE", size)
        optimizer = AdamWEMA(params, lr=1e-2, ema_decay=0.9)
        for step in range(3):
            set_gradients(params, step, torch.float32)
            with backend.forced("torch"):
                optimizer.step()
    for a, b in zip(whole, pieces):
        torch.testing.assert_close(a, b, rtol=2**-22, atol=2**-22)  # the last elements of a piece may round otherwise


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("decay", [0.9, 0.9999])
@pytest.mark.parametrize("name", ["native", "torch"])
def test_average_equals_float64(dtype: torch.dtype, decay: float, name: str) -> None:
    params = parameters(dtype)
    expected = [param.detach().double() for param in params]
    optimizer = AdamWEMA(params, lr=1e-2, ema_decay=decay)
    steps = 20
    for step in range(steps):
        set_gradients(params, step, torch.float32)
        with backend.forced(name):
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
    assert optimizer.ema_backend == name


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


@pytest.mark.parametrize("name", ["torch", "native"])
def test_a_bf16_average_is_one_that_is_stored_in_bf16(name: str) -> None:
    """Step by step: bf16 storage, the update in fp32; at 0.9999 it does not move at all."""
    for decay, lr, moves in ((0.9999, 1e-4, False), (0.5, 1e-2, True)):
        params = parameters()
        optimizer = AdamWEMA(params, lr=lr, ema_decay=decay, ema_dtype=torch.bfloat16)
        stored = [p.detach().bfloat16() for p in params]
        start = [average.clone() for average in stored]
        for step in range(5):
            set_gradients(params, step, torch.float32)
            with backend.forced(name):
                optimizer.step()
            stored = [(decay * average.float() + (1 - decay) * p.detach()).bfloat16() for average, p in zip(stored, params)]
        for p, average, first in zip(params, stored, start):
            found = optimizer.read(p, "ema").view(p.shape)
            assert torch.equal(found, found.bfloat16().float())
            # one ulp of bf16 where the fp32 update is rounded the other way
            torch.testing.assert_close(found, average.float(), rtol=2**-7, atol=0)
            assert torch.equal(found.bfloat16(), first) == (not moves)
    param = torch.nn.Parameter(torch.full((64,), 1.0))
    teacher = torch.full((64,), 1.0)
    optimizer = AdamWEMA([param], lr=1e-3, ema_decay=0.9, ema_dtype=torch.bfloat16, teachers={param: teacher})
    set_gradients([param], 0, torch.float32)
    with backend.forced(name):
        optimizer.step()
    assert torch.equal(teacher, optimizer.read(param, "ema")) and torch.equal(teacher, teacher.bfloat16().float())
    with pytest.raises(ValueError, match="ema_dtype"):
        AdamWEMA(parameters(), ema_dtype=torch.float16)
    with pytest.raises(ValueError, match="ema_dtype"):
        AdamWEMA(parameters(), ema_dtype=torch.bfloat16, masters="low_bits")


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


def test_low_bits_compute_what_fp32_masters_do() -> None:
    """The same masters and averages, bit for bit; parameters and teachers are their nearest bf16."""
    runs = []
    for masters in ("fp32", "low_bits"):
        params = parameters(torch.bfloat16)
        teachers = {param: torch.empty_like(param) for param in params}
        optimizer = AdamWEMA(params, lr=1e-2, weight_decay=0.1, ema_decay=0.9, masters=masters, teachers=teachers)
        for step in range(5):
            set_gradients(params, step, torch.bfloat16)
            optimizer.step()
        runs.append((params, teachers, optimizer))
    (params, teachers, optimizer), (less, less_teachers, low_bits) = runs
    for a, b in zip(params, less):
        assert set(low_bits.state[b]) == {"step", "exp_avg", "exp_avg_sq", "low", "ema_low"}
        for kind in ("master", "exp_avg", "exp_avg_sq", "ema"):
            assert torch.equal(optimizer.read(a, kind), low_bits.read(b, kind)), kind
        for rounded, exact in ((b, low_bits.read(b, "master")), (less_teachers[b], low_bits.read(b, "ema"))):
            error = (rounded.detach().view(-1).double() - exact.double()).abs()
            assert bool((error <= (exact.bfloat16().double() - exact.double()).abs()).all())
        assert torch.equal(a, optimizer.state[a]["master"].bfloat16())
        assert torch.equal(teachers[a], optimizer.state[a]["ema"].bfloat16())


@pytest.mark.parametrize("masters", ["fp32", "low_bits"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resumes_bit_for_bit(masters: str, dtype: torch.dtype) -> None:
    """What `read` gives, `write` restores: in pieces, and between the two storages."""

    def start(masters: str, params: list[torch.nn.Parameter]) -> tuple[AdamWEMA, dict]:
        teachers = {param: torch.empty_like(param) for param in params}
        return AdamWEMA(params, lr=1e-2, ema_decay=0.99, masters=masters, teachers=teachers), teachers

    def steps(params: list[torch.nn.Parameter], optimizer: AdamWEMA, wanted: range) -> None:
        for step in wanted:
            set_gradients(params, step, torch.float32)
            optimizer.step()

    straight, resumed = parameters(dtype), parameters(dtype)
    optimizer, teachers = start("fp32", straight)
    steps(straight, optimizer, range(3))
    other, other_teachers = start(masters, resumed)
    for a, b in zip(straight, resumed):
        other.init_state(b, True)["step"] = 3
        half = a.numel() // 2
        for kind in ("master", "exp_avg", "exp_avg_sq", "ema"):
            other.write(b, kind, optimizer.read(a, kind, 0, half))
            other.write(b, kind, optimizer.read(a, kind, half), half)
        torch.testing.assert_close(b, a, rtol=2**-8, atol=0)
    steps(straight, optimizer, range(3, 6))
    steps(resumed, other, range(3, 6))
    for a, b in zip(straight, resumed):
        for kind in ("master", "exp_avg", "exp_avg_sq", "ema"):
            assert torch.equal(optimizer.read(a, kind), other.read(b, kind)), kind
        if masters == "fp32":
            assert torch.equal(a, b) and torch.equal(teachers[a], other_teachers[b])


@pytest.mark.parametrize("copies", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["native", "torch"])
def test_parts_of_a_step_are_the_step(name: str, copies: torch.dtype) -> None:
    """Clipping folded into the read of the gradients, and the rounded copies of theta and the average beside it. Plain
    PyTorch's square root rounds the last elements of a part otherwise; C++ gives the same bits."""
    whole, parts = (torch.nn.Parameter(torch.linspace(-2, 2, 4099)) for _ in range(2))
    optimizers = [AdamWEMA([param], lr=1e-2, weight_decay=0.1, ema_decay=0.9) for param in (whole, parts)]
    optimizers[1].grad_scale = factor = float(torch.tensor(0.3))
    for step in range(3):
        set_gradients([whole], step, torch.float32)
        parts.grad = whole.grad.clone()
        whole.grad.mul_(factor)
        student, teacher = (torch.full((4099,), 7.0, dtype=copies) for _ in range(2))
        with backend.forced(name):
            optimizers[0].step()
            hyper = optimizers[1].begin(parts, optimizers[1].param_groups[0])
            for start in range(0, 4099, 1000):
                numel = min(1000, 4099 - start)
                ours = (copy.narrow(0, start, numel) for copy in (student, teacher))
                optimizers[1].update(parts, hyper, start, numel, *ours)
        assert optimizers[1].ema_backend == name
        for kind in ("master", "exp_avg", "exp_avg_sq", "ema"):
            a, b = (optimizer.read(param, kind) for param, optimizer in zip((whole, parts), optimizers))
            torch.testing.assert_close(b, a, rtol=0 if name == "native" else 2**-20, atol=0 if name == "native" else 2**-20)
        assert torch.equal(student, parts.detach().to(copies))
        assert torch.equal(teacher, optimizers[1].read(parts, "ema").to(copies))
    assert optimizers[1].state[parts]["step"] == 3


def test_parts_need_a_whole_fp32_parameter() -> None:
    half = torch.nn.Parameter(torch.zeros(6, dtype=torch.bfloat16))
    optimizer = AdamWEMA([half])
    hyper = optimizer.begin(half, optimizer.param_groups[0])
    with pytest.raises(ValueError, match="contiguous fp32 parameter with a gradient"):
        optimizer.update(half, hyper, 0, 6)


def test_a_strided_parameter_is_updated_like_a_contiguous_one() -> None:
    start = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    strided, plain = torch.nn.Parameter(start.t().contiguous().t()), torch.nn.Parameter(start.clone())
    optimizer = AdamWEMA([strided, plain], lr=1e-2, ema_decay=0.5, teachers={strided: torch.empty(24)})
    for step in range(3):
        set_gradients([strided], step, torch.float32)
        plain.grad = strided.grad.clone()
        optimizer.step()
    torch.testing.assert_close(strided, plain, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(optimizer.state[strided]["ema"], optimizer.state[plain]["ema"], rtol=1e-6, atol=1e-7)


def test_fp16_parameters_keep_an_fp32_master() -> None:
    weight = torch.nn.Parameter(torch.ones(64, dtype=torch.float16))
    optimizer = AdamWEMA([weight], lr=1e-4)
    for _ in range(20):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert torch.equal(weight, optimizer.state[weight]["master"].half()) and float(weight.detach()[0]) < 0.9985
    with pytest.raises(ValueError, match="low_bits needs bf16 or fp32"):
        AdamWEMA([weight], masters="low_bits").init_state(weight, False)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="ema_decay"):
        AdamWEMA(parameters(), ema_decay=1.5)
    with pytest.raises(ValueError, match="masters is 'bf16'"):
        AdamWEMA(parameters(), masters="bf16")
    params = parameters()
    with pytest.raises(ValueError, match="must be contiguous, on cpu and have 33 elements"):
        AdamWEMA(params, teachers={params[2]: torch.zeros(32)})
    optimizer = AdamWEMA(params)
    optimizer.init_state(params[2], True)
    with pytest.raises(ValueError, match="before the first step"):
        optimizer.set_teacher(params[2], torch.zeros(33))
