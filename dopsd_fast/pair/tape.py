"""The graphs of all states of a trajectory, cut at the units of the model, so that the backwards of all states can go
through it unit by unit: a unit's weights are needed once, and its gradient is complete when its turn is over."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Tape:
    """`cut` while the states are computed, then `back` through the units in reverse order."""

    def __init__(self) -> None:
        self._cuts: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def cut(self, unit: nn.Module, value: Any) -> Any:
        """`value`, which `unit` made, without its graph: a leaf that waits for its gradient."""
        if not torch.is_tensor(value) or not value.requires_grad:
            return value
        leaf = value.detach().requires_grad_()
        leaf.grad_dtype = torch.promote_types(value.dtype, torch.float32)
        self._cuts.setdefault(id(unit), []).append((value, leaf))
        return leaf

    def back(self, unit: nn.Module) -> None:
        """Through `unit`, at every state at once: each parameter's gradient is summed before it is stored."""
        cuts = self._cuts.pop(id(unit), [])
        known = [(value, leaf.grad.to(value.dtype)) for value, leaf in cuts if leaf.grad is not None]
        del cuts
        if known:
            torch.autograd.backward([value for value, _ in known], [gradient for _, gradient in known])
