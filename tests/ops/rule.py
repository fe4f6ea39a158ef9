"""The error rule of the op tests: against float64, a fused kernel is at most twice as wrong as eager PyTorch in the
same dtype."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
"""Without a GPU the Triton kernels run in the interpreter (tests/conftest.py sets TRITON_INTERPRET)."""

DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]
"""bf16 arithmetic is wrong in the interpreter, so it is tested on a GPU only."""


def error(value: Tensor, oracle: Tensor) -> float:
    """Root mean square of the difference, relative to the oracle's own root mean square, in float64."""
    if value.numel() == 0:
        return 0.0
    difference = (value.double() - oracle).square().mean().sqrt()
    return float(difference / oracle.square().mean().sqrt().clamp(min=1e-300))


def assert_twice(ours: Any, eager: Any, oracle: Any, what: str = "") -> None:
    """`ours` and `eager`: tensors (or sequences of them) of the dtype under test; `oracle`: float64.

    error(ours) <= 2 * error(eager) + one rounding of the result to its dtype, which is what is left where eager PyTorch
    happens to be exact."""
    if isinstance(ours, Tensor):
        ours, eager, oracle = [ours], [eager], [oracle]
    assert len(ours) == len(eager) == len(oracle)
    for i, (a, b, c) in enumerate(zip(ours, eager, oracle)):
        assert a.shape == c.shape and b.shape == c.shape, (what, i, a.shape, b.shape, c.shape)
        assert torch.isfinite(a).all() or not torch.isfinite(c).all(), f"{what}[{i}] is not finite"
        limit = 2 * error(b, c) + torch.finfo(a.dtype).eps / 2
        assert error(a, c) <= limit, f"{what}[{i}]: error {error(a, c):.3g}, limit {limit:.3g}"


def with_gradients(function: Callable[..., Any], inputs: Sequence[Tensor | None], seed: int = 0) -> list[Tensor]:
    """Outputs of `function(*inputs)`, then the gradients of every floating input under a random cotangent that is the
    same for every dtype."""
    leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) if isinstance(x, Tensor) else x for x in inputs]
    out = function(*leaves)
    outs = [out] if isinstance(out, Tensor) else list(out)
    generator = torch.Generator().manual_seed(seed)
    total = sum(
        (o.double() * torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.device)).sum() for o in outs
    )
    wanted = [x for x in leaves if isinstance(x, Tensor) and x.requires_grad]
    grads = torch.autograd.grad(total, wanted, allow_unused=True) if wanted else ()
    return [o.detach() for o in outs] + [torch.zeros_like(x) if g is None else g for x, g in zip(wanted, grads)]
