"""What the pair forward of every family is made of: the units that ZeRO-3 gathers as a whole, the layout of tokens, and the
call of a block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from dopsd_fast.pair.frozen_fp8 import FrozenFp8
from dopsd_fast.pair.gradient_sums import GradientSums
from dopsd_kernels.sequences import Sequences

ACTIVATIONS = ("keep", "selective", "recompute")
"""What a block keeps for its backward: everything that backward reads; the same without the feed-forward layer's halves, which
are computed again (8 values a token and channel less); only its inputs x and h (2 values), from which it runs again."""


@dataclass(frozen=True)
class Packed:
    """How a branch's tokens lie: its sequences, and each token's rotation, cos and sin fp32 `[T, head_dim / 2]`."""

    sequences: Sequences
    cos: Tensor
    sin: Tensor


@dataclass(frozen=True)
class BlockCall:
    """What is the same for every block of a stack: the token layouts of student and teacher, the number of heads, the norms'
    epsilons, and what backward keeps. The pair forward builds one per stack and state."""

    packed: Packed
    teacher: Packed | None
    heads: int
    eps: float
    qk_eps: float
    activations: str = "keep"
    attention: str = "auto"
    sums: GradientSums | None = None
    """Where the parameters' gradients go; None: to autograd."""
    fp8: FrozenFp8 | None = None


Branch = str


def apply(module: nn.Module, x: Tensor, adapter: str) -> Tensor:
    """`module(x)` for a layer, or a sequence of layers, where PEFT's layers use `adapter`."""
    if isinstance(module, nn.Sequential):
        for part in module:
            x = apply(part, x, adapter)
        return x
    if not hasattr(module, "lora_A"):
        return module(x)
    lora: Any = module
    y = lora.base_layer(x)
    if adapter in lora.lora_A:
        y = y + lora.lora_B[adapter](lora.lora_A[adapter](x)) * lora.scaling[adapter]
    return y


class Unit(nn.Module):
    """The modules of both branches that are used together. With one set of modules for both (LoRA, or the live student as
    teacher) they are registered once."""

    def __init__(self, adapters: dict[Branch, str], **modules: dict[Branch, nn.Module | nn.Parameter | None]) -> None:
        super().__init__()
        self.adapters = adapters
        self.names: dict[str, dict[Branch, str]] = {}
        for name, by_branch in modules.items():
            self.names[name] = {}
            for branch, part in by_branch.items():
                known = next((n for n in self.names[name].values() if getattr(self, n) is part), None)
                self.names[name][branch] = known or f"{branch}_{name}"
                if known is None:
                    setattr(self, f"{branch}_{name}", part)

    def part(self, branch: Branch, name: str) -> Any:
        return getattr(self, self.names[name][branch])

    def shared(self, branch: Branch, other: Branch, name: str) -> bool:
        """Both branches use the same module there, without adapters."""
        part = self.part(branch, name)
        plain = part is None or not isinstance(part, nn.Module) or not any(hasattr(m, "lora_A") for m in part.modules())
        return part is self.part(other, name) and (plain or self.adapters[branch] == self.adapters[other])

    def apply_part(self, branch: Branch, name: str, x: Tensor) -> Tensor:
        return apply(self.part(branch, name), x, self.adapters[branch])


@dataclass(frozen=True)
class Layout:
    """Where a branch's tokens lie in the parts of the model. `tokens`: image tokens of an item, without padding."""

    image: Packed
    caption: Packed
    joint: Packed
    final: Sequences
    tokens: int
