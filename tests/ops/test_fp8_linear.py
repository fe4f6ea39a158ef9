"""The 8-bit linear layer: its quantiser bit for bit, its product and gradient against the plain reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dopsd_kernels import backend, fp8_linear, launch
from dopsd_kernels.costs import COSTS
from dopsd_kernels.rmsnorm_modulate import rmsnorm_modulate_fwd
from dopsd_kernels.sequences import Sequences
from tests.ops.rule import DEVICE, DTYPES, assert_twice, error

BACKENDS = ["torch", "triton"]
LAYER_DTYPES = [torch.bfloat16] if DEVICE == "cuda" else [torch.float32, torch.float16, torch.float64]


@pytest.fixture(autouse=True)
def _able(request: pytest.FixtureRequest) -> None:
    if DEVICE == "cuda" and torch.cuda.get_device_capability() < (8, 9) and "refuse" not in request.node.name:
        pytest.skip("needs GPU of compute capability 8.9")


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(DEVICE, dtype)


def same(one: Tensor, other: Tensor) -> None:
    assert one.shape == other.shape and one.dtype == other.dtype
    assert one.stride() == other.stride() or not one.numel()
    assert torch.equal(one.float(), other.float())


def test_every_e4m3_value_and_every_middle_between_two() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    values = codes[codes.isfinite()].unique().sort().values
    points = torch.cat([values, (values[1:] + values[:-1]) / 2])
    row = torch.cat([points, torch.nextafter(points, torch.tensor(1e9)), torch.nextafter(points, torch.tensor(-1e9))])
    row = row.clamp(-448, 448)[None].to(DEVICE)
    with backend.forced("triton"):
        q, scale = fp8_linear.quantise_rows(row)
    assert float(scale) == 1.0
    same(q, row.to(torch.float8_e4m3fn))


@pytest.mark.parametrize("tokens,width", [(0, 36), (1, 1), (5, 36), (123, 144), (7, 123), (2, 3840)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_quantiser(tokens: int, width: int, dtype: torch.dtype) -> None:
    x = normal(tokens, width + 9, dtype=dtype)[:, :width]
    if tokens > 2:
        x[1] = 0
        x[2] *= 1e-4
    with backend.forced("torch"):
        expected = fp8_linear.quantise_rows(x)
    with backend.forced("triton"):
        got = fp8_linear.quantise_rows(x)
    for one, other in zip(got, expected):
        same(one, other)
    if tokens:
        # e4m3 rounds to 2^-4 of a normal value, and to 2^-10 of a step below 2^-6
        bound = x.double().abs() * 2**-4 + 2**-10 * got[1].double()
        assert ((fp8_linear.dequantise_ref(*got, torch.float64) - x.double()).abs() <= bound * (1 + 1e-5)).all()


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", LAYER_DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 123])
def test_product_and_gradient(name: str, dtype: torch.dtype, tokens: int) -> None:
    weight, bias = normal(32, 48, dtype=dtype, seed=1, scale=0.1), normal(32, dtype=dtype, seed=2)
    x, dy = normal(tokens, 50, dtype=dtype)[:, :48], normal(tokens, 32, dtype=dtype, seed=3)

    def run(function: Any, wide: torch.dtype) -> list[Tensor]:
        leaves = [v.detach().to(wide).requires_grad_() for v in (x, bias)]
        y = function(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy.to(wide))]

    with backend.forced(name):
        frozen = fp8_linear.Fp8Weight(weight)
        got = run(lambda x, bias: fp8_linear.fp8_linear(x, frozen, bias), dtype)
        matrix = frozen.dequantised(torch.float64)
    oracle = run(lambda x, bias: fp8_linear.fp8_linear_ref(x, weight.double(), bias), torch.float64)
    torch.testing.assert_close(oracle[1], dy.double() @ matrix)
    if dtype == torch.float64:
        torch.testing.assert_close(got, oracle)
    else:
        assert_twice(got, run(lambda x, bias: fp8_linear.fp8_linear_ref(x, weight, bias), dtype), oracle)


def test_error_against_the_exact_layer_is_that_of_e4m3() -> None:
    """Two factors, each with an error of about 2^-4 / sqrt(3) * 0.72 of its root mean square, random in sign."""
    x, weight = normal(200, 256, dtype=torch.bfloat16), normal(128, 256, dtype=torch.bfloat16, seed=1)
    y = fp8_linear.fp8_linear(x, fp8_linear.Fp8Weight(weight))
    assert 0.02 < error(y, x.double() @ weight.double().t()) < 0.05


@pytest.mark.parametrize("emit_y", [False, True])
@pytest.mark.parametrize("width", [36, 144, 123, 3840])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm_and_quantiser_in_one_pass(emit_y: bool, width: int, dtype: torch.dtype) -> None:
    sequences = Sequences([0, 3, 2] if width == 3840 else [40, 0, 3], DEVICE)
    x = normal(sequences.tokens, width + 5, dtype=dtype)[:, :width]
    weight, scale = normal(width, dtype=dtype, seed=1), normal(3, width + 3, dtype=dtype, seed=2, scale=0.3)[:, :width]
    for w, s in ((weight, scale), (None, None)):
        arguments = x, w, s, sequences.row_sequence, 1e-5
        with backend.forced("triton"):
            y, rstd = rmsnorm_modulate_fwd(*arguments)
            q, q_scale = fp8_linear.quantise_rows(y)
            fused = fp8_linear.rmsnorm_modulate_quantise(*arguments, emit_y)
        for one, other in zip(fused, (q, q_scale, rstd, y if emit_y else x.new_empty(0))):
            same(one, other)
        with backend.forced("torch"):
            plain = fp8_linear.rmsnorm_modulate_quantise(*arguments, emit_y)
        # another order of summation may move a value across the middle between two e4m3 values
        close = fp8_linear.dequantise_ref(*plain[:2], torch.float32), fp8_linear.dequantise_ref(*fused[:2], torch.float32)
        torch.testing.assert_close(*close, rtol=2**-3, atol=float(plain[1].max()) * 2**-9)
        torch.testing.assert_close(plain[2], fused[2])


def test_refuses() -> None:
    with pytest.raises(ValueError, match="trainable"):
        fp8_linear.Fp8Weight(torch.nn.Parameter(torch.randn(16, 16)))
    for shape in ((16, 24), (24, 16), (16,)):
        with pytest.raises(ValueError, match="multiples of 16"):
            fp8_linear.Fp8Weight(torch.randn(*shape))
    frozen = fp8_linear.Fp8Weight(torch.randn(32, 16, device="cpu"))
    x = torch.randn(4, 16)
    for bad in (x.t().contiguous().t(), x[0], x.long(), torch.randn(4, 32)):
        with pytest.raises(ValueError, match="fp8_linear: ") as caught:
            fp8_linear.fp8_linear(bad, frozen)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="bias is"):
        fp8_linear.fp8_linear(x, frozen, torch.randn(31))
    with pytest.raises(ValueError, match="weight is on cpu"):
        fp8_linear.fp8_linear(x.to("meta"), frozen)


def test_refuses_an_old_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    expected = "fp8_linear needs compute capability 8.9 \\(Ada, Hopper\\) or newer, this GPU has 8.6: leave train.fp8 off"
    with pytest.raises(RuntimeError, match=f"^{expected}$"):
        fp8_linear.require_fp8(torch.device("cuda"))
    fp8_linear.require_fp8(torch.device("cpu"))


def test_opcheck() -> None:
    dtype = LAYER_DTYPES[0]
    x, frozen = normal(5, 48, dtype=dtype).requires_grad_(), fp8_linear.Fp8Weight(normal(32, 48, seed=1))
    row_sequence = Sequences([2, 3], DEVICE).row_sequence
    ops = torch.ops.dopsd
    # the other two utilities need arithmetic that PyTorch has not got for fp8
    tests = ("test_faketensor", "test_autograd_registration")
    for op, arguments in (
        (ops.fp8_linear_fwd, (x, frozen.q, frozen.scale, normal(32, dtype=dtype))),
        (ops.fp8_linear_bwd, (normal(5, 32, dtype=dtype), frozen.q, frozen.scale)),
    ):
        torch.library.opcheck(op.default, arguments, test_utils=tests)
    for op, arguments in (
        (ops.fp8_quantise_rows, (x.detach(),)),
        (ops.fp8_matmul, (*fp8_linear.quantise_rows(x.detach()), frozen.q, frozen.scale, None, dtype)),
        (ops.rmsnorm_modulate_quantise, (x.detach(), None, normal(2, 48), row_sequence, 1e-5, True)),
    ):
        real = op(*arguments)
        fake = op(*(a.to("meta") if isinstance(a, Tensor) else a for a in arguments))
        for one, other in zip(*([r] if isinstance(r, Tensor) else r for r in (fake, real))):
            assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())


def test_declared_launches_are_the_counted() -> None:
    x, frozen = normal(5, 48), fp8_linear.Fp8Weight(normal(32, 48, seed=1))
    row_sequence = Sequences([2, 3], DEVICE).row_sequence
    for name, arguments, gemms in (
        ("fp8_quantise_rows", (x,), 0),
        ("fp8_linear_fwd", (x.bfloat16() if DEVICE == "cuda" else x, frozen.q, frozen.scale, None), 1),
        ("fp8_linear_bwd", (normal(5, 32), frozen.q, frozen.scale), 1),
        ("rmsnorm_modulate_quantise", (x, None, normal(2, 48), row_sequence, 1e-5, True), 0),
    ):
        with backend.forced("triton"):
            before = launch.count
            out = getattr(fp8_linear, name)(*arguments)
        cost = COSTS[f"dopsd::{name}"](*arguments, out=out)
        assert (cost.launches, cost.gemms) == (launch.count - before + gemms, gemms), name
    moved = COSTS["dopsd::fp8_quantise_rows"](x, out=fp8_linear.quantise_rows(x)).elementwise_bytes
    assert moved == 5 * 48 * (4 + 1) + 5 * 4
