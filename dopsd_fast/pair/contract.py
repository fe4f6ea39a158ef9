"""What a family's pair forward offers, and who calls it when.

    layout          once a trajectory, by passes.FusedForward, for each branch: where its tokens lie
    prepare         once a trajectory: what all states share: refined captions, reference images
    __call__        once a state: the velocities
    the rest        once, when the engine is built or a plan is made: which parameters are gathered, summed and swept

The weights belong to diffusers' modules. A pair forward refers to them and has no parameters of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dopsd_fast.conditioning.context import Context
from dopsd_fast.pair.gradient_sums import GradientSums
from dopsd_fast.pair.tape import Tape
from dopsd_fast.pair.units import Branch, Layout


class PairForward(Protocol):
    """Velocities of several branches at one state, side by side through the same kernels. An nn.Module."""

    hooked: bool
    """Says that DeepSpeed's own hooks gather the units (deepspeed.gather=unit); their inputs must then require gradient."""

    def layout(self, contexts: Sequence[Context], height: int, width: int, device: torch.device) -> Layout:
        """Returns where the tokens of one branch lie, for one context per item and latents of height x width."""

    def prepare(
        self, branches: Sequence[Branch], contexts: Sequence[Sequence[Context]], layouts: Sequence[Layout], dtype: torch.dtype
    ) -> list[Tensor]:
        """Computes the features that depend on neither the time nor the latents, so that all states share them, and returns
        one tensor a branch, in `dtype`. The first branch's tensor carries its graph."""

    def __call__(
        self,
        x: Tensor,
        t: Tensor,
        branches: Sequence[Branch],
        prepared: Sequence[Tensor],
        layouts: Sequence[Layout],
        sums: GradientSums | None = None,
        tape: Tape | None = None,
    ) -> tuple[Tensor, ...]:
        """Returns v `[B, C, h, w]` of each branch at x `[B, C, h, w]` (in the model's dtype) and t `[B]`. sums: takes the
        gradients of the blocks' parameters. tape: cuts the graph after each unit of `state_path` and keeps the pieces."""

    def summed_parameters(self, branch: Branch) -> list[Tensor]:
        """Lists the parameters whose gradients `__call__` can put into `sums`."""

    def gather_units(self) -> tuple[type[nn.Module], ...]:
        """Names the classes of submodules that ZeRO-3 gathers as a whole, because functions inside read the parameters of their
        submodules without calling these."""

    def state_path(self) -> list[nn.Module]:
        """Lists the units that a state goes through before the last one, in order. A tape cuts after each."""

    def prepare_path(self) -> list[nn.Module]:
        """Lists the units that `prepare` goes through, in order."""

    def describe(self) -> dict[str, str]:
        """Names what was chosen, for the run's files: activations, attention, fp8, ops."""

    def modules(self) -> Any:
        """As nn.Module."""
