"""A linear layer's parameters: its matrix, and the LoRA adapter beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn


class Matrix(NamedTuple):
    """W `[N, K]`, or W + scale * B A with A `[r, K]`, B `[N, r]`; A and B are empty where there is no adapter."""

    weight: Tensor
    a: Tensor
    b: Tensor
    scale: float

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.weight, self.a, self.b


def matrix(linear: nn.Module, adapter: str) -> Matrix:
    """The parameters themselves, of a `nn.Linear` or of PEFT's layer around one."""
    base: Any = getattr(linear, "base_layer", linear)
    if base is linear or adapter not in linear.lora_A:  # type: ignore[operator]
        nothing = base.weight.new_empty(0)
        return Matrix(base.weight, nothing, nothing, 0.0)
    lora: Any = linear
    return Matrix(base.weight, lora.lora_A[adapter].weight, lora.lora_B[adapter].weight, float(lora.scaling[adapter]))


def split(members: Sequence[Matrix]) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[float]]:
    """(weights, As, Bs, scales) of matrices that share an input; no As and Bs where none of them has an adapter."""
    adapted = any(m.a.numel() for m in members)
    adapters = ([m.a for m in members], [m.b for m in members]) if adapted else ([], [])
    return [m.weight for m in members], *adapters, [m.scale for m in members]
