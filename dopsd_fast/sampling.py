"""Sampling with few Euler steps, as the pipelines do it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


@torch.no_grad()
def rollout(velocity: Callable[[Tensor, Tensor], Tensor], noise: Tensor, grid: Sequence[float]) -> Tensor:
    """x_{k+1} = x_k + (t_{k+1} - t_k) * v(x_k, t_k) from x_0 = noise; returns x at grid[-1], float32 `[B, C, h, w]`.

    One call of `velocity` (x `[B, C, h, w]`, t `[B]`) per interval of `grid` (ascending times, noise first). The state is
    float32 whatever the model's dtype.
    """
    x = noise.float()
    for now, then in zip(grid[:-1], grid[1:], strict=True):
        t = torch.full((len(x),), now, device=x.device, dtype=torch.float32)
        x = x + (then - now) * velocity(x, t)
    return x
