"""What is special to qk_norm_rope: weights of another dtype, row strides, its formula, its declared cost and its errors."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dopsd_kernels import backend, launch
from dopsd_kernels.costs import COSTS
from dopsd_kernels.qk_norm_rope import (
    FINISH_COLUMNS,
    FINISH_ROWS,
    ROWS,
    _finish_config,
    _qk_norm_rope_finish_kernel,
    qk_norm_rope,
    qk_norm_rope_bwd,
    qk_norm_rope_fwd,
    qk_norm_rope_ref,
)
from tests.ops.rule import DEVICE, DTYPES, assert_twice, with_gradients
from tests.ops.table import EPS, make_rope, rotations, seeded


def inputs(tokens: int, heads: int, head_dim: int, dtype=torch.float32, device=DEVICE, norm=True, extra=0) -> tuple:
    """(qkv, q_weight, k_weight, cos, sin)."""
    shape = tokens, heads, head_dim
    qkv, *weights = make_rope(shape, dtype, device, extra)
    return qkv, *(weights if norm else (None, None)), *rotations(shape, dtype, device)


def applied(function: Callable, cos: Tensor, sin: Tensor, heads: int) -> Callable[..., tuple[Tensor, ...]]:
    return lambda qkv, q_weight, k_weight: function(qkv, q_weight, k_weight, cos, sin, heads, EPS)


def assert_rule(chosen: str, arguments: tuple[Tensor | None, ...], heads: int) -> None:
    *leaves, cos, sin = arguments
    exact = [None if leaf is None else leaf.double() for leaf in leaves]
    with backend.forced(chosen):
        ours = with_gradients(applied(qk_norm_rope, cos, sin, heads), leaves)
    eager = with_gradients(applied(qk_norm_rope_ref, cos, sin, heads), leaves)
    oracle = with_gradients(applied(qk_norm_rope_ref, cos.double(), sin.double(), heads), exact)
    assert_twice(ours, eager, oracle, f"qk_norm_rope {chosen}")


def test_fp32_weights_of_half_activations() -> None:
    qkv, q_weight, k_weight, cos, sin = inputs(5, 3, 36, torch.float16)
    assert_rule("triton", (qkv, q_weight.float(), k_weight.float(), cos, sin), 3)


def test_more_partial_sums_than_a_block() -> None:
    partial = seeded(2 * FINISH_ROWS + 3, 2 * 36)
    assert 2 * 36 > FINISH_COLUMNS
    out = torch.empty(2, 36, device=DEVICE)
    grid, config = (-(-2 * 36 // FINISH_COLUMNS),), _finish_config(36)
    launch.launch(_qk_norm_rope_finish_kernel, grid, partial, out[0], out[1], len(partial), **config)
    assert_twice(out.flatten(), partial.sum(0), partial.double().sum(0))


def gradients(shape: tuple[int, int, int], kind: str, **options: Any) -> list[Tensor]:
    """dq and dk: slices of one wide buffer, or attention's [H, T, Dh] transposed."""
    tokens, heads, head_dim = shape
    if kind == "transposed":
        return [seeded(heads, tokens, head_dim, seed=s, **options).transpose(0, 1) for s in (5, 6)]
    both = seeded(tokens, 2 * heads * head_dim + 7, seed=5, **options)
    return [part.unflatten(1, (heads, head_dim)) for part in both[:, 7:].chunk(2, dim=1)]


@pytest.mark.parametrize("kind", ["transposed", "slices"])
@pytest.mark.parametrize(
    "chosen, dtype",
    [
        *(("triton", dtype) for dtype in DTYPES),
        *(("torch", dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16)),
        ("native", torch.float32),
    ],
)
def test_primitives_take_any_row_stride(chosen: str, dtype: torch.dtype, kind: str) -> None:
    shape, device = (11, 3, 36), "cpu" if chosen == "native" else DEVICE
    arguments = inputs(*shape, dtype, device=device, extra=5)
    exact = [x.double().requires_grad_() for x in arguments]
    same = [x.clone().requires_grad_() for x in arguments]
    dy = gradients(shape, kind, device=device, dtype=dtype)
    results = []
    for leaves in (same, exact):
        outs = qk_norm_rope_ref(*leaves, 3, EPS)[:2]
        grads = torch.autograd.grad(outs, leaves[:3], [d.to(outs[0].dtype) for d in dy])
        results.append((*(out.detach() for out in outs), grads[0][:, : 6 * 36], *grads[1:]))
    with backend.forced(chosen):
        ours = *qk_norm_rope_fwd(*arguments, 3, EPS), *qk_norm_rope_bwd(*dy, *arguments, 3, EPS, True)
        lora = qk_norm_rope_bwd(*dy, *arguments, 3, EPS, False)
    assert_twice(ours, *results)
    assert torch.equal(lora[0], ours[2]) and lora[1].shape == lora[2].shape == (0,)


def test_deterministic() -> None:
    arguments, dy = inputs(40, 4, 36), gradients((40, 4, 36), "slices")
    with backend.forced("triton"):
        first, second = (qk_norm_rope_bwd(*dy, *arguments, 4, EPS, True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_rotation_is_the_complex_product() -> None:
    qkv, *_, cos, sin = inputs(5, 2, 8, norm=False)
    q, k, v = qk_norm_rope(qkv, None, None, cos, sin, 2)
    for x, y in zip(qkv.unflatten(1, (3, 2, 4, 2)).unbind(1), (q, k)):
        product = torch.view_as_complex(x.contiguous()) * torch.complex(cos, sin)[:, None]
        torch.testing.assert_close(y, torch.view_as_real(product).flatten(2))
    assert v.data_ptr() == qkv[:, 32:].data_ptr() and torch.equal(v.flatten(1), qkv[:, 32:])


def test_launches_are_declared() -> None:
    for tokens in (11, 0):
        for norm in (True, False):
            arguments, dy = inputs(tokens, 2, 36, norm=norm), gradients((tokens, 2, 36), "slices")
            row, angles, weights = tokens * 2 * 36 * 4, tokens * 36 * 4, norm * 2 * 36 * 4
            partial = norm * -(-tokens // ROWS) * weights
            for op, given, launches, moved in (
                (qk_norm_rope_fwd, (*arguments, 2, EPS), 1, 4 * row + angles + weights),
                (qk_norm_rope_bwd, (*dy, *arguments, 2, EPS, False), 1, (4 + 2 * norm) * row + 2 * angles + weights),
                (
                    qk_norm_rope_bwd, (*dy, *arguments, 2, EPS, True), 1 + norm,
                    (4 + 2 * norm) * row + 2 * angles + 2 * weights + 2 * partial,
                ),
            ):
                before = launch.count
                with backend.forced("triton"):
                    out = op(*given)
                cost = COSTS[op._qualname](*given, out=out)
                assert cost.launches == launch.count - before
                if tokens:
                    assert (cost.launches, cost.elementwise_bytes) == (launches, moved)


def test_no_tokens_has_zero_weight_gradient() -> None:
    arguments, dy = inputs(0, 2, 36), gradients((0, 2, 36), "slices")
    for chosen in ("triton", "torch"):
        with backend.forced(chosen):
            dqk, dq_weight, dk_weight = qk_norm_rope_bwd(*dy, *arguments, 2, EPS, True)
        assert dqk.shape == (0, 4 * 36) and not dq_weight.any() and not dk_weight.any()


def test_wrong_arguments() -> None:
    good = dict(zip(("qkv", "q_weight", "k_weight", "cos", "sin"), inputs(4, 2, 6)))
    meta = {name: tensor.to("meta") for name, tensor in good.items()}
    for name, wrong in (
        ("qkv", good["qkv"][0]),
        ("qkv", good["qkv"][:, :30]),
        ("qkv", good["qkv"].int()),
        ("qkv", seeded(36, 4).t()),
        ("q_weight", None),
        ("k_weight", good["q_weight"][:4]),
        ("k_weight", meta["k_weight"]),
        ("q_weight", seeded(6, 2)[:, 0]),
        ("cos", good["cos"][:3]),
        ("cos", good["cos"].half()),
        ("sin", meta["sin"]),
        ("sin", seeded(3, 4).t()),
    ):
        with pytest.raises(ValueError, match=f"qk_norm_rope: {name}"):
            qk_norm_rope(**{**good, name: wrong}, heads=2)
    dq, dk = gradients((4, 2, 6), "slices")
    for wrong in (dk[:3], dk.double(), dk.to("meta"), seeded(4, 6, 2).transpose(1, 2)):
        with pytest.raises(ValueError, match="qk_norm_rope: dk"):
            qk_norm_rope_bwd(dq, wrong, *good.values(), 2, EPS, True)
