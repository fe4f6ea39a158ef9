"""Holds the graphs of all states of a trajectory, cut at the units of the model. Because of the cuts, backward can go through
the model unit by unit and take all states at once in each: ZeRO-3 then gathers a unit's weights once for all backwards, and the
unit's gradient is complete when its turn is over."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Tape:
    """The forwards call `cut` at the end of each unit; afterwards `back` is called for each unit, in reverse order."""

    def __init__(self) -> None:
        self._cuts: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def cut(self, unit: nn.Module, value: Any) -> Any:
        """Returns `value`, which `unit` computed, as a leaf that collects its gradient, and keeps the graph behind it for
        `back`. A value without gradient is returned as it is."""
        if not torch.is_tensor(value) or not value.requires_grad:
            return value
        leaf = value.detach().requires_grad_()
        leaf.grad_dtype = torch.promote_types(value.dtype, torch.float32)
        self._cuts.setdefault(id(unit), []).append((value, leaf))
        return leaf

    def back(self, unit: nn.Module) -> None:
        """Back-propagates through `unit` for all states in one call of autograd, which sums each parameter's gradient over the
        states before it stores it."""
        cuts = self._cuts.pop(id(unit), [])
        known = [(value, leaf.grad.to(value.dtype)) for value, leaf in cuts if leaf.grad is not None]
        del cuts
        if known:
            torch.autograd.backward([value for value, _ in known], [gradient for _, gradient in known])
