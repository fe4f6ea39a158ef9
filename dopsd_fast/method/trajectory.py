"""Times, weights and states of the shared trajectory.

t = 0 is pure noise and t = 1 the image; sigma = 1 - t. A grid is the list t_0 < ... < t_K of K + 1 Python floats
(computed in float64) with t_0 = 0 and t_K = 1: the K states are evaluated at t_0 ... t_{K-1}, and t_K only ends the
last Euler step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

WeightKind = Literal["v", "x1", "mu"]


def shift_sigma(sigma: float, shift: float) -> float:
    """sigma' = s * sigma / (1 + (s - 1) * sigma), the flow-matching schedulers' static shift.

    The exponential shift of FLUX.2, e^mu / (e^mu + 1/sigma - 1), is the same map with s = e^mu.
    """
    return shift * sigma / (1.0 + (shift - 1.0) * sigma)


def shifted_grid(num_states: int, shift: float) -> list[float]:
    """Times t_k = 1 - sigma'(1 - k/K) for k = 0..K; K = 4, shift 3 gives 0, 0.1, 0.25, 0.5, 1.

    Raises ValueError for K < 1 or a shift that is not positive.
    """
    if num_states < 1:
        raise ValueError(f"trajectory: num_states must be at least 1, not {num_states}")
    if not shift > 0.0:
        raise ValueError(f"trajectory: shift must be positive, not {shift}")
    return [1.0 - shift_sigma(1.0 - k / num_states, shift) for k in range(num_states)] + [1.0]


def grid_shift(grid: Sequence[float]) -> float:
    """The static shift s for which shifted_grid(len(grid) - 1, s) is `grid` (1.0 for K = 1, where every shift gives
    0, 1).

    Inverse of the shift formula at k = 1: s = sigma' (1 - sigma) / (sigma (1 - sigma')), sigma = 1 - 1/K, sigma' = 1
    - t_1.
    """
    num_states = len(grid) - 1
    if num_states < 2:
        return 1.0
    plain, shifted = 1.0 - 1.0 / num_states, 1.0 - grid[1]
    return shifted * (1.0 - plain) / (plain * (1.0 - shifted))


def state_weights(kind: WeightKind, grid: Sequence[float]) -> list[float]:
    """The K weights w_k of the D-OPSD loss.

    `v`: 1 (paper, Eq. 7: velocity MSE). `x1`: (1 - t_k)^2 (released code: MSE between predicted clean latents).
    `mu`: (t_{k+1} - t_k)^2 (PE-OPSD: MSE between next states).
    """
    steps = list(zip(grid[:-1], grid[1:], strict=True))
    if kind == "v":
        return [1.0 for _ in steps]
    if kind == "x1":
        return [(1.0 - t) ** 2 for t, _ in steps]
    if kind == "mu":
        return [(t_next - t) ** 2 for t, t_next in steps]
    raise ValueError(f"method.weight: {kind!r} is none of 'v', 'x1', 'mu'")


def off_policy_state(noise: Tensor, image: Tensor, t: float | Tensor) -> Tensor:
    """x_t = (1 - t) * noise + t * image; noise, image `[B, C, h, w]`, t one float or a tensor `[B]`."""
    if isinstance(t, Tensor):
        t = t.to(noise).view(-1, *[1] * (noise.ndim - 1))
    return (1.0 - t) * noise + t * image


def draw_times(seeds: Sequence[int], shift: float) -> Tensor:
    """One training time per item for flow matching: t = 1 - sigma'(u), u uniform in (0, 1]; returns float32 `[B]`
    (CPU).

    u comes from a generator seeded with the item's own seed, so a time depends on (seed, epoch, record, repeat)
    alone. `shift` is the model's static shift (`grid_shift` of its grid): training then weighs noise levels as
    sampling visits them.
    """
    times = []
    for seed in seeds:
        uniform = torch.rand((), generator=torch.Generator().manual_seed(seed), dtype=torch.float64).item()
        times.append(1.0 - shift_sigma(1.0 - uniform, shift))
    return torch.tensor(times, dtype=torch.float32)


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
