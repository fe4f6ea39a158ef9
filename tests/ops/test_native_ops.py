"""The CPU's own kernels: against float64 with every instruction set, the same bits for any number of threads, on torch's
OpenMP runtime."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from dopsd_kernels import _native, backend, native_ops
from dopsd_kernels.divergence_step import Divergence, divergence_step, divergence_step_ref
from dopsd_kernels.gated_residual_norm import gated_residual_norm, gated_residual_norm_ref
from dopsd_kernels.layernorm_modulate import layernorm_modulate, layernorm_modulate_ref
from dopsd_kernels.qk_norm_rope import qk_norm_rope, qk_norm_rope_ref
from dopsd_kernels.rmsnorm_modulate import rmsnorm_modulate, rmsnorm_modulate_bwd, rmsnorm_modulate_fwd, rmsnorm_modulate_ref
from dopsd_kernels.sequences import Sequences
from dopsd_kernels.swiglu import swiglu, swiglu_bwd, swiglu_ref
from tests.ops.rule import assert_twice, with_gradients

EPS = 1e-5
CHOSEN = _native.isa()


def available() -> list[str]:
    names = []
    for name in ("baseline", "avx2", "avx512"):
        try:
            _native.use_isa(name)
            names.append(name)
        except ValueError:
            pass
    _native.use_isa(CHOSEN)
    return names


@pytest.fixture(params=available())
def isa(request) -> Iterator[str]:
    _native.use_isa(request.param)
    yield request.param
    _native.use_isa(CHOSEN)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def wide(*shape: int, seed: int = 0) -> Tensor:
    """Rows whose stride is longer than they are."""
    return random(*shape[:-1], shape[-1] + 3, seed=seed)[..., : shape[-1]]


def modulation(sequences: int, width: int, which: int) -> Tensor:
    return random(sequences, 4 * width)[:, which * width : (which + 1) * width]


Case = tuple[Callable[..., Any], Callable[..., Any], list[Tensor | None]]


def rmsnorm_case(lengths: tuple[int, ...], width: int, weight: bool, scale: bool) -> Case:
    sequences = Sequences(lengths)
    inputs = [
        wide(sequences.tokens, width),
        1 + 0.3 * random(width) if weight else None,
        modulation(len(lengths), width, 1) if scale else None,
    ]
    return (
        lambda x, w, s: rmsnorm_modulate(x, w, s, sequences, EPS),
        lambda x, w, s: rmsnorm_modulate_ref(x, w, s, sequences.row_sequence, EPS),
        inputs,
    )


def layernorm_case(lengths: tuple[int, ...], width: int, scale: bool, shift: bool) -> Case:
    """Rows off centre: their mean is large beside their spread."""
    sequences = Sequences(lengths)
    inputs = [3 + wide(sequences.tokens, width), *(modulation(len(lengths), width, i) if w else None
              for i, w in enumerate((scale, shift)))]
    return (
        lambda x, a, b: layernorm_modulate(x, a, b, sequences, EPS),
        lambda x, a, b: layernorm_modulate_ref(x, a, b, sequences.row_sequence, EPS),
        inputs,
    )


def gated_case(lengths: tuple[int, ...], width: int, gate: bool, following: bool, scale: bool) -> Case:
    sequences = Sequences(lengths)
    inputs = [
        wide(sequences.tokens, width),
        wide(sequences.tokens, width, seed=1),
        1 + 0.3 * random(width),
        modulation(len(lengths), width, 0) if gate else None,
        1 + 0.3 * random(width, seed=2) if following else None,
        modulation(len(lengths), width, 2) if scale else None,
    ]

    def given(results: tuple[Tensor, Tensor | None]) -> list[Tensor]:
        return [t for t in results if t is not None]

    return (
        lambda *tensors: given(gated_residual_norm(*tensors, sequences, EPS)),
        lambda *tensors: given(gated_residual_norm_ref(*tensors, sequences.row_sequence, EPS)),
        inputs,
    )


def rope_case(tokens: int, heads: int, head_dim: int, norm: bool) -> Case:
    angle = 3 * random(tokens, head_dim // 2)
    weights = [1 + 0.3 * random(head_dim, seed=i) if norm else None for i in range(2)]

    def call(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(qkv: Tensor, q_weight: Tensor | None, k_weight: Tensor | None) -> Any:
            tables = angle.cos(), angle.sin()
            if qkv.dtype == torch.float64:
                tables = tables[0].double(), tables[1].double()
            return function(qkv, q_weight, k_weight, *tables, heads, EPS)

        return run

    return call(qk_norm_rope), call(qk_norm_rope_ref), [wide(tokens, 3 * heads * head_dim), *weights]


CASES: dict[str, Callable[[], Case]] = {
    "rmsnorm T=0": lambda: rmsnorm_case((0, 0), 36, True, True),
    "rmsnorm one row": lambda: rmsnorm_case((1,), 123, True, True),
    "rmsnorm unequal": lambda: rmsnorm_case((70, 0, 52, 1), 144, True, True),
    "rmsnorm weight": lambda: rmsnorm_case((5,), 36, True, False),
    "rmsnorm scale": lambda: rmsnorm_case((2, 0, 3), 19, False, True),
    "rmsnorm plain": lambda: rmsnorm_case((3, 2), 64, False, False),
    "rmsnorm full width": lambda: rmsnorm_case((3, 2), 3840, True, True),
    "rmsnorm parallel": lambda: rmsnorm_case((160,) * 4, 144, True, True),
    "layernorm T=0": lambda: layernorm_case((0, 0), 36, True, True),
    "layernorm one row": lambda: layernorm_case((1,), 123, True, True),
    "layernorm unequal": lambda: layernorm_case((70, 0, 52, 1), 144, True, True),
    "layernorm scale": lambda: layernorm_case((2, 0, 3), 19, True, False),
    "layernorm shift": lambda: layernorm_case((2, 0, 3), 19, False, True),
    "layernorm plain": lambda: layernorm_case((3, 2), 64, False, False),
    "layernorm full width": lambda: layernorm_case((3, 2), 3840, True, True),
    "layernorm parallel": lambda: layernorm_case((160,) * 4, 144, True, True),
    "gated T=0": lambda: gated_case((0, 0), 36, True, True, True),
    "gated one row": lambda: gated_case((1,), 123, True, True, True),
    "gated unequal": lambda: gated_case((70, 0, 52, 1), 144, True, True, True),
    "gated no gate": lambda: gated_case((2, 0, 3), 36, False, True, True),
    "gated no scale": lambda: gated_case((2, 0, 3), 36, True, True, False),
    "gated last": lambda: gated_case((2, 0, 3), 36, True, False, False),
    "gated neither": lambda: gated_case((2, 0, 3), 19, False, False, False),
    "gated full width": lambda: gated_case((3, 2), 3840, True, True, True),
    "gated parallel": lambda: gated_case((160,) * 4, 144, True, True, True),
    "rope T=0": lambda: rope_case(0, 4, 36, True),
    "rope one row": lambda: rope_case(1, 4, 36, True),
    "rope": lambda: rope_case(123, 4, 36, True),
    "rope narrow": lambda: rope_case(5, 3, 2, True),
    "rope wide": lambda: rope_case(130, 30, 128, True),
    "rope alone": lambda: rope_case(123, 4, 36, False),
    "rope parallel": lambda: rope_case(640, 4, 36, True),
    "swiglu T=0": lambda: (swiglu, swiglu_ref, [wide(0, 72)]),
    "swiglu one row": lambda: (swiglu, swiglu_ref, [4 * wide(1, 246)]),
    "swiglu": lambda: (swiglu, swiglu_ref, [4 * wide(123, 768)]),
    "swiglu narrow": lambda: (swiglu, swiglu_ref, [4 * wide(5, 2)]),
}


@pytest.mark.parametrize("case", CASES)
def test_error_rule(case, isa, monkeypatch):
    """Outputs and gradients; and it was the native kernel that ran."""
    ours, reference, inputs = CASES[case]()
    calls = []
    for name in ("rmsnorm_modulate", "layernorm_modulate", "gated_residual_norm", "qk_norm_rope", "swiglu"):
        for direction in (f"{name}_fwd", f"{name}_bwd"):
            function = getattr(native_ops, direction)
            monkeypatch.setattr(native_ops, direction, lambda *a, f=function, d=direction: (calls.append(d[-3:]), f(*a))[1])
    with backend.forced("native"):
        got = with_gradients(ours, inputs)
    assert calls == ["fwd", "bwd"]
    doubles = [None if t is None else t.double() for t in inputs]
    assert_twice(got, with_gradients(reference, inputs), with_gradients(reference, doubles), f"{isa} {case}")


def units_in_the_last_place(name: str, x: Tensor) -> float:
    y = torch.empty_like(x)
    getattr(_native, name)(x.data_ptr(), y.data_ptr(), x.numel())
    exact = getattr(torch, name)(x.double())
    unit = torch.exp2(torch.floor(torch.log2(exact.abs())) - 23)
    return float(((y.double() - exact) / unit).abs().max())


def test_exp_and_tanh(isa):
    assert units_in_the_last_place("exp", torch.linspace(-87.3, 88.3, 400_001)) < 2
    small = torch.logspace(-30, -1, 10_000)
    assert units_in_the_last_place("tanh", torch.cat([small, -small, torch.linspace(0.1, 20, 200_001)])) < 3
    for name in ("exp", "tanh"):
        x, y = torch.full((3,), float("nan")), torch.zeros(3)
        getattr(_native, name)(x.data_ptr(), y.data_ptr(), 3)
        assert y.isnan().all(), f"{name} loses NaN"


def test_swiglu_far_out(isa):
    """Gates whose exp overflows or vanishes give the limits, never NaN; NaN and infinity stay what they are."""
    g = torch.tensor([[-1000.0, -100.0, 100.0, 1000.0, float("nan"), float("inf")]])
    one = torch.ones_like(g)
    s = native_ops.swiglu_fwd(torch.cat([g, one], 1))
    dgu, again = native_ops.swiglu_bwd(one, torch.cat([g, one], 1), True)
    limits = torch.tensor([0.0, 0.0, 100.0, 1000.0])
    torch.testing.assert_close(s[0, :4], limits, rtol=0, atol=1e-30)
    torch.testing.assert_close(dgu[0, :4], torch.tensor([0.0, 0.0, 1.0, 1.0]), rtol=0, atol=1e-30)
    torch.testing.assert_close(dgu[0, 6:10], limits, rtol=0, atol=1e-30)
    assert s[0, 4].isnan() and dgu[0, 4].isnan() and s[0, 5].isinf()
    torch.testing.assert_close(s, again, equal_nan=True)


def states(result: Divergence) -> list[Tensor]:
    return [t for t in (result.x_next, result.x1_s, result.x1_t) if t is not None]


@pytest.mark.parametrize("n", [0, 1, 19, 4096, 9_001])
@pytest.mark.parametrize("dt, want_x1", [(0.15, True), (0.15, False), (None, False)])
def test_divergence_step(n, dt, want_x1, isa, monkeypatch):
    """The error rule, and that the native kernel ran; gradients for a weight and for none."""
    calls = []
    function = native_ops.divergence_step_fwd
    monkeypatch.setattr(native_ops, "divergence_step_fwd", lambda *a: (calls.append(1), function(*a))[1])
    inputs = [random(n, seed=i) for i in range(3)]

    def run(step: Callable[..., Divergence], tensors: list[Tensor], weight: float) -> list[Tensor]:
        v_s = tensors[0].clone().requires_grad_()
        result = step(v_s, *tensors[1:], weight, dt, 0.1, want_x1)
        outcome = result.loss if weight else result.mean_square
        gradient = torch.autograd.grad(result.loss, v_s)[0]
        return [outcome.detach(), gradient, *states(result)]

    for weight in (0.25, 0.0):
        with backend.forced("native"):
            ours = run(divergence_step, inputs, weight)
        doubles = [t.double() for t in inputs]
        assert_twice(ours, run(divergence_step_ref, inputs, weight), run(divergence_step_ref, doubles, weight), f"{isa} {n}")
    assert calls == [1, 1]
    one, two = torch.tensor(3.0), torch.tensor(1.0)  # no dimension: plain PyTorch
    assert divergence_step(one, two, one, 0.5, 0.1, 0.2).loss == 2


def everything() -> list[Tensor]:
    """Every kernel's every result, at sizes that are worth several threads."""
    results: list[Tensor] = []
    with backend.forced("native"):
        for case in ("rmsnorm parallel", "layernorm parallel", "gated parallel", "rope parallel", "swiglu"):
            ours, _, inputs = CASES[case]()
            results += with_gradients(ours, inputs)
        result = divergence_step(*(random(3, 10_001, seed=i) for i in range(3)), 0.25, 0.15, 0.1, want_x1=True)
    return [*results, result.loss, *states(result)]


def test_same_bits_for_any_number_of_threads(isa, threads):
    torch.set_num_threads(1)
    first = everything()
    for count in (2, 3, 5):
        torch.set_num_threads(count)
        for a, b in zip(first, everything(), strict=True):
            assert torch.equal(a, b)


def test_one_openmp_runtime(threads):
    """torch's number of threads is ours too: both ask the same runtime, so there is one pool."""
    for count in (3, 1, 2):
        torch.set_num_threads(count)
        assert _native.max_threads() == count


def test_backward_makes_only_what_is_asked():
    sequences = Sequences((70, 3))
    x, weight, scale = wide(73, 36), random(36), random(2, 36)
    y, rstd = rmsnorm_modulate_fwd(x, weight, scale, sequences.row_sequence, EPS)
    none = torch.empty(0, 3, dtype=torch.int32)
    arguments = (y, x, weight, scale, rstd, sequences.row_sequence)
    with backend.forced("native"):
        whole = rmsnorm_modulate_bwd(*arguments, sequences.chunks, True, True, True)
        least = rmsnorm_modulate_bwd(*arguments, none, False, False, False)
        assert torch.equal(whole[0], least[0]) and torch.equal(whole[3], y)
        assert [t.numel() for t in least[1:]] == [0, 0, 0]
        with pytest.raises(ValueError, match="chunks is empty"):
            rmsnorm_modulate_bwd(*arguments, none, True, False, False)
        assert swiglu_bwd(random(3, 4), random(3, 8), False)[1].numel() == 0


def test_usable():
    x = torch.zeros(4, 6)
    assert native_ops.usable(x, None, x[:, 1:3], x[::2], torch.zeros(0, 6), x[:, :1])
    assert not native_ops.usable(x, x.half())
    assert not native_ops.usable(x.double())
    assert not native_ops.usable(x[:, ::2])
    assert not native_ops.usable(x.to("meta"))
    assert native_ops.has("swiglu") and native_ops.has("swiglu_bwd") and not native_ops.has("attention")


def test_refusals():
    with pytest.raises(ValueError, match='no "sse9"'):
        _native.use_isa("sse9")
    with backend.forced("native"), pytest.raises(ValueError, match="over 1024"):
        qk_norm_rope(torch.zeros(1, 3 * 1026), None, None, torch.zeros(1, 513), torch.zeros(1, 513), 1)
