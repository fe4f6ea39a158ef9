"""Parts that every family's pair forward is built from: the units that ZeRO-3 gathers as a whole, the layout of the tokens, and
the arguments of a block's call. Shapes: T tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from dopsd_fast.pair.frozen_fp8 import FrozenFp8
from dopsd_fast.pair.gradient_sums import GradientSums
from dopsd_kernels.sequences import Sequences

ACTIVATIONS = ("keep", "selective", "recompute")
"""How much of the forward a block keeps for its backward (`train.activations`).

    keep       The block keeps everything that its backward reads.
    selective  It leaves out the two halves of the feed-forward layer and computes them again: 8 values fewer a token and
               channel.
    recompute  It keeps only its inputs x and h, 2 values a token and channel, and runs its forward again."""


@dataclass(frozen=True)
class Packed:
    """Where a branch's sequences lie in its packed tokens, and each token's rotary angles: `cos`, `sin` fp32
    `[T, head_dim / 2]`."""

    sequences: Sequences
    cos: Tensor
    sin: Tensor


@dataclass(frozen=True)
class BlockCall:
    """The arguments that every block of a stack shares: the token layouts of student and teacher, the number of heads, the
    norms' epsilons, and what the blocks keep for backward. The pair forward builds one per stack and state."""

    packed: Packed
    teacher: Packed | None
    heads: int
    eps: float
    qk_eps: float
    activations: str = "keep"
    attention: str = "auto"
    sums: GradientSums | None = None
    """Takes the gradients of the blocks' parameters. Where it is None, autograd takes them."""
    fp8: FrozenFp8 | None = None


Branch = str
""""student" or "teacher". The first of a call's branches carries gradient, the others none."""


def apply(module: nn.Module, x: Tensor, adapter: str) -> Tensor:
    """Returns `module(x)` of a layer or of a sequence of layers. PEFT's layers use `adapter`, whichever adapter is active."""
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
    """Holds the modules of student and teacher that are used at the same moment, so that ZeRO-3 gathers them together.

    Where both branches use the same module (LoRA, or the live student as teacher), it is registered once, so that its
    parameters appear once.

    adapters: the name of each branch's adapter. modules: for each part's name, the module or parameter of each branch."""

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
        """Tells whether part `name` gives both branches the same result: they use the same module, and either it has no
        adapters or they use the same one."""
        part = self.part(branch, name)
        plain = part is None or not isinstance(part, nn.Module) or not any(hasattr(m, "lora_A") for m in part.modules())
        return part is self.part(other, name) and (plain or self.adapters[branch] == self.adapters[other])

    def apply_part(self, branch: Branch, name: str, x: Tensor) -> Tensor:
        return apply(self.part(branch, name), x, self.adapters[branch])


@dataclass(frozen=True)
class Layout:
    """Where a branch's tokens lie in each part of the model: the image tokens, the caption tokens, both joined, and the image
    tokens without padding, which the last layer reads. `tokens` counts one item's image tokens without padding."""

    image: Packed
    caption: Packed
    joint: Packed
    final: Sequences
    tokens: int
