"""AdamW with an exponential moving average of the weights as part of its state."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

# One pass works on at most this many elements, so that its two temporaries stay small beside a flat ZeRO shard.
_CHUNK = 1 << 22


def _native_ema_update() -> Any:
    """`dopsd_kernels._native.ema_update(ema, param, decay)`, or None where the extension was not built."""
    try:
        from dopsd_kernels import _native  # type: ignore[attr-defined]
    except ImportError:
        return None
    return getattr(_native, "ema_update", None)


class AdamWEMA(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101), operation for operation as `torch.optim.AdamW`, and an average of its weights.

        theta = theta * (1 - lr * weight_decay)
        m = b1 * m + (1 - b1) * g;   v = b2 * v + (1 - b2) * g^2
        theta = theta - lr / (1 - b1^n) * m / (sqrt(v / (1 - b2^n)) + eps)
        ema = decay * ema + (1 - decay) * theta

    State of a parameter, all fp32 and shaped like it: `exp_avg` (m), `exp_avg_sq` (v), `ema` (only with an `ema_decay`;
    starts as the parameter before its first update), `master` (only for a parameter that is not fp32: theta itself, of
    which the parameter is the rounded copy), and `step` (n, a Python int per tensor: ZeRO-3 calls `step()` once per
    sub-group). fp32 because at decay 0.9999 the update of a bf16 average is below half a unit in its last place: it
    never moves.

    A shard of a parameter is a parameter like any other, so ZeRO shards and offloads the average with the moments.
    `torch.optim.Optimizer.load_state_dict` would round `ema` and `master` of a bf16 parameter; use
    dopsd_fast.checkpoints.

    `ema_backend`: "native" (dopsd_kernels._native, CPU) or "torch", as used by the last step, or as it would be on the
    CPU.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        ema_decay: float | None = None,
    ) -> None:
        if ema_decay is not None and not 0.0 <= ema_decay <= 1.0:
            raise ValueError(f"ema_decay is {ema_decay}, must be in [0, 1]")
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, ema_decay=ema_decay))
        self._native = _native_ema_update()
        self.ema_backend = "torch" if self._native is None else "native"

    @torch.no_grad()
    def init_state(self, param: Tensor, ema: bool) -> dict[str, Any]:
        """Creates the state of `param` from its present value, unless it exists."""
        state = self.state[param]
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(param, dtype=torch.float32)
            state["exp_avg_sq"] = torch.zeros_like(param, dtype=torch.float32)
            if param.dtype != torch.float32:
                state["master"] = param.detach().float()
            if ema:
                state["ema"] = param.detach().to(torch.float32, copy=True)
        return state

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if closure is not None:
            raise ValueError("AdamWEMA takes no closure")
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._step_one(param, group)

    def _step_one(self, param: Tensor, group: dict[str, Any]) -> None:
        decay = group["ema_decay"]
        state = self.init_state(param, decay is not None)
        grad = param.grad.float()  # type: ignore[union-attr]
        state["step"] += 1
        theta = state.get("master", param).detach()
        for part in _chunks(theta, grad, state["exp_avg"], state["exp_avg_sq"]):
            _adamw(part, state["step"], group)
        if decay is not None:
            self._average(state["ema"], theta, decay)
        if "master" in state:
            param.copy_(theta)

    def _average(self, ema: Tensor, theta: Tensor, decay: float) -> None:
        contiguous = ema.is_contiguous() and theta.is_contiguous()
        if self._native is not None and ema.device.type == "cpu" and contiguous:
            self.ema_backend = "native"
            self._native(ema.view(-1), theta.view(-1), decay)
        else:
            self.ema_backend = "torch"
            ema.lerp_(theta, 1.0 - decay)


def _chunks(*tensors: Tensor) -> Iterable[tuple[Tensor, ...]]:
    if tensors[0].numel() <= _CHUNK or not all(tensor.is_contiguous() for tensor in tensors):
        return [tensors]
    return zip(*(tensor.view(-1).split(_CHUNK) for tensor in tensors))


def _adamw(tensors: tuple[Tensor, ...], step: int, group: dict[str, Any]) -> None:
    theta, grad, m, v = tensors
    beta1, beta2 = group["betas"]
    theta.mul_(1 - group["lr"] * group["weight_decay"])
    m.lerp_(grad, 1 - beta1)
    v.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    denominator = (v.sqrt() / (1 - beta2**step) ** 0.5).add_(group["eps"])
    theta.addcdiv_(m, denominator, value=-group["lr"] / (1 - beta1**step))
