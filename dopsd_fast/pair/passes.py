"""Velocities of student and teacher along one trajectory: through the fused pair forward, or one model after the other.

Which gradients are delivered by whom, and when, depends on how ZeRO-3 holds the weights (`Pair.gather`):

    gather          the blocks' parameters                 what all states share          the other parameters
                                                           (captions, reference images)
    None, "step"    GradientSums: added at every state,    one backward in `finish`       autograd, at every state's
                    delivered once by `finish`                                            backward
    "unit"          autograd, at every state's backward:   one backward in `finish`       autograd, at every state's
                    the weights are there only while                                      backward
                    their own unit runs
    "sweep"         autograd, in `finish`: the states'     the last turn of the sweep     autograd, in their unit's turn
                    graphs wait on a Tape, cut at each                                    of the sweep; the last unit's at
                    unit, and each unit's turn goes                                       every state's backward
                    through all states at once

None stands for ZeRO stages 0 to 2, where the weights are whole. The reduction over the ranks comes afterwards: once a step,
when the engine's `accumulating` is left (None, "step", "unit"), or when a unit's turn is over ("sweep").
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from dopsd_fast.conditioning.context import Context
from dopsd_fast.method.objective import Backward
from dopsd_fast.pair.contract import PairForward
from dopsd_fast.pair.gradient_sums import GradientSums
from dopsd_fast.pair.tape import Tape
from dopsd_fast.pair.units import Branch

BranchVelocity = Callable[[Tensor, Tensor, Sequence[Context]], Tensor]
"""(x `[B, C, h, w]`, t `[B]`, one context per item) -> v, shaped as x, of one branch."""


class Through(Protocol):
    """Gives `call(x, t)`: the `Pair`, through which every state goes, so that ZeRO-3 sees where a forward begins."""

    def __call__(
        self, x: Tensor, t: Tensor, *, call: Callable[[Tensor, Tensor], tuple[Tensor, ...]]
    ) -> tuple[Tensor, ...]: ...


Turns = Sequence[tuple[Sequence[nn.Module], Callable[[], None]]]
"""(units, what to do while their weights are there), one after the other."""


@dataclass
class TwoCalls:
    """Student and teacher one after the other, through diffusers' own forward. The teacher goes first: its activations are
    gone before the student's graph is built. Every parameter's gradient is autograd's, at every state's backward."""

    student: BranchVelocity
    student_contexts: Sequence[Context]
    teacher: BranchVelocity | None = None
    teacher_contexts: Sequence[Context] = ()

    def __call__(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor | None]:
        v_t = None
        if self.teacher is not None:
            with torch.no_grad():
                v_t = self.teacher(x, t, self.teacher_contexts)
        return self.student(x, t, self.student_contexts), v_t

    def finish(self, backward: Backward) -> None:
        """Nothing is left: every state has delivered its gradients."""


class FusedForward:
    """The family's pair forward along one trajectory (see `method.objective.Forward`).

    What the states share, the refined captions, is computed here, once, and given to each state without its graph. The
    states' gradients for it are summed in fp32, and `finish` back-propagates them once. The table above says what happens
    to the parameters' gradients.

    forward: the pair forward. call: the `Pair`. branches: the contexts of each branch, one an item; the first branch carries
    gradient. shape: of the latents, `[B, C, h, w]`. dtype, device: of the weights. gather, sweep: as in `Pair`."""

    def __init__(
        self,
        forward: PairForward,
        call: Through,
        branches: dict[Branch, Sequence[Context]],
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        gather: str | None = None,
        sweep: Callable[[Turns], None] | None = None,
    ) -> None:
        self.forward, self.call, self.sweep = forward, call, sweep
        self.dtype, self.names = dtype, tuple(branches)
        contexts = list(branches.values())
        self.layouts = [forward.layout(ours, shape[-2], shape[-1], device) for ours in contexts]
        self.shared = forward.prepare(self.names, contexts, self.layouts, dtype)
        self.given = [prepared.detach() for prepared in self.shared]
        if self.shared[0].requires_grad:
            self.given[0].requires_grad_()
            self.given[0].grad_dtype = torch.promote_types(dtype, torch.float32)
        self.sums: GradientSums | None = None
        self.tape: Tape | None = None
        if torch.is_grad_enabled() and gather in (None, "step"):
            self.sums = GradientSums(forward.summed_parameters(self.names[0]))
        elif torch.is_grad_enabled() and gather == "sweep":
            self.tape = Tape()

    def __call__(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor | None]:
        """(v_s, v_t) at x `[B, C, h, w]`, t `[B]`; v_t None where there is one branch only."""
        v = self.call(x.to(self.dtype), t, call=self._state)
        return v[0], v[1] if len(v) > 1 else None

    def _state(self, x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        sums, tape = (self.sums, self.tape) if torch.is_grad_enabled() else (None, None)
        return self.forward(x, t, self.names, self.given, self.layouts, sums, tape)

    def finish(self, backward: Backward) -> None:
        """Back-propagates what all states shared, and under gather=sweep the units themselves, after the last state."""
        if self.tape is None:
            self._finish_shared(backward)
            return
        assert self.sweep is not None
        turns = [([unit], partial(self.tape.back, unit)) for unit in reversed(self.forward.state_path())]
        self.sweep([*turns, (self.forward.prepare_path(), partial(self._finish_shared, backward))])

    def _finish_shared(self, backward: Backward) -> None:
        rest = self.sums.finish() if self.sums is not None else []
        gradient = self.given[0].grad
        if gradient is not None:
            # The gradient of this product's sum with respect to `shared` is `gradient`.
            rest.append((self.shared[0] * gradient.to(self.dtype)).sum())
            self.given[0].grad = None
        if rest:
            backward(sum(rest[1:], rest[0]))
