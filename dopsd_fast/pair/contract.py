"""What a family's pair forward offers, and who calls it when.

    layout          once a trajectory, by passes.FusedForward, for each branch: where its tokens lie
    prepare         once a trajectory: what all states share, captions and references, refined
    __call__        once a state: the velocities
    the rest        once, when the engine is built or a plan is made: which parameters are gathered, summed and swept

The weights belong to diffusers' modules; a pair forward holds references to them and no parameters of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dopsd_fast.conditioning.context import Context
from dopsd_fast.pair.gradient_sums import GradientSums
from dopsd_fast.pair.tape import Tape

Branch = str
""""student" or "teacher". The first of a call's branches carries gradient, the others none."""


class PairForward(Protocol):
    """Velocities of several branches at one state, side by side through the same kernels. An nn.Module."""

    hooked: bool
    """DeepSpeed's own hooks gather the units (deepspeed.gather=unit): inputs must then require gradient."""

    def layout(self, contexts: Sequence[Context], height: int, width: int, device: torch.device) -> Any:
        """Where the tokens of one branch lie, for one context per item and latents of height x width. What it is, is the
        family's own affair: it is handed back to `prepare` and `__call__`."""

    def prepare(
        self, branches: Sequence[Branch], contexts: Sequence[Sequence[Context]], layouts: Sequence[Any], dtype: torch.dtype
    ) -> list[Tensor]:
        """What depends on neither the time nor the latents, one tensor a branch, in `dtype`; the first with its graph."""

    def __call__(
        self,
        x: Tensor,
        t: Tensor,
        branches: Sequence[Branch],
        prepared: Sequence[Tensor],
        layouts: Sequence[Any],
        sums: GradientSums | None = None,
        tape: Tape | None = None,
    ) -> tuple[Tensor, ...]:
        """v `[B, C, h, w]` of each branch at x `[B, C, h, w]` (the model's dtype), t `[B]`. sums: takes the gradients of the
        blocks' parameters. tape: the graph ends at each unit of `state_path`, and waits there."""

    def summed_parameters(self, branch: Branch) -> list[Tensor]:
        """The parameters whose gradients `__call__` can put into `sums`."""

    def gather_units(self) -> tuple[type[nn.Module], ...]:
        """The classes of its submodules that ZeRO-3 gathers as a whole, because functions inside use the parameters
        themselves."""

    def state_path(self) -> list[nn.Module]:
        """The units that a state goes through before the last one, in order: where a tape cuts."""

    def prepare_path(self) -> list[nn.Module]:
        """The units that `prepare` goes through, in order."""

    def describe(self) -> dict[str, str]:
        """What was chosen, for the run's files: activations, attention, fp8, ops."""

    def modules(self) -> Any:
        """As nn.Module."""
