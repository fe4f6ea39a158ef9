"""The parameters of a linear layer: its matrix, and the LoRA adapter beside it. Shapes: K inputs, N outputs, r the adapter's
rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn


class Matrix(NamedTuple):
    """Stands for W + scale * B A with W `[N, K]`, A `[r, K]`, B `[N, r]`. Where the layer has no adapter, A and B are empty and
    the matrix is W."""

    weight: Tensor
    a: Tensor
    b: Tensor
    scale: float

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.weight, self.a, self.b


def matrix(linear: nn.Module, adapter: str) -> Matrix:
    """Returns the parameters of a `nn.Linear`, or of PEFT's layer around one with its adapter `adapter`. They are the
    parameters themselves and no copies: gradients are filed under their identity."""
    base: Any = getattr(linear, "base_layer", linear)
    if base is linear or adapter not in linear.lora_A:  # type: ignore[operator]
        nothing = base.weight.new_empty(0)
        return Matrix(base.weight, nothing, nothing, 0.0)
    lora: Any = linear
    return Matrix(base.weight, lora.lora_A[adapter].weight, lora.lora_B[adapter].weight, float(lora.scaling[adapter]))


def split(members: Sequence[Matrix]) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[float]]:
    """Returns (weights, As, Bs, scales) of matrices that share an input. As and Bs are empty lists where no matrix has an
    adapter."""
    adapted = any(m.a.numel() for m in members)
    adapters = ([m.a for m in members], [m.b for m in members]) if adapted else ([], [])
    return [m.weight for m in members], *adapters, [m.scale for m in members]
