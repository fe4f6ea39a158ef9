"""What one micro-batch adds to the gradient: D-OPSD, and what the paper compares it with (flow matching, PSO) behind the same
interface.

An objective sees a batch, a `Forward` that gives velocities, and a `backward` function; it never sees a model, an
optimizer or a rank. `accumulate(inputs, backward)` calls `backward(loss)` one or more times and returns what happened.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

Backward = Callable[[Tensor], object]


class Forward(Protocol):
    """Velocities along one trajectory, under contexts that do not change on the way.

    Called with x `[B, C, h, w]` and t `[B]` in [0, 1]: (v_s, v_t), dx/dt = image - noise, shaped as x; v_s carries
    gradient, v_t none, and is None where there is no teacher. `finish` comes after the last backward of the trajectory,
    and back-propagates what all states shared."""

    def __call__(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor | None]: ...

    def finish(self, backward: Backward) -> None: ...


class NonFiniteLoss(Exception):
    """The loss of state `state` is `value` (nan or inf).

    Raised after the last `backward` of the micro-batch and before any optimizer step: the weights are still good, and
    every rank has made the same collective calls. The gradients are not usable.
    """

    def __init__(self, state: int, value: float) -> None:
        super().__init__(f"loss of trajectory state {state} is {value}")
        self.state = state
        self.value = value


@dataclass
class StepInputs:
    """One micro-batch. B items of one bucket; latents `[B, C, h, w]`, times `[B]`, fp32, on the student's device.

    `scale` is 1 / accumulation: it scales what is back-propagated, not what is reported. `second_noise`, shaped as noise: for
    the states of pictures that the step itself has drawn from `noise`.
    """

    noise: Tensor
    grid: Sequence[float]
    forward: Forward
    latents: Tensor | None = None
    times: Tensor | None = None
    second_noise: Tensor | None = None
    scale: float = 1.0


@dataclass
class StepReport:
    """`loss` = mean of `state_losses`; state_losses[k] = w_k * mean over all elements of the squared difference at
    state k.

    `gap`: root mean square over states and elements of v_s - v_t, unweighted (SFT: of v_s minus the target velocity).
    `states`: the detached x_k that were evaluated; for D-OPSD also x_K, the end of the trajectory. PSO has one loss, of its
    pairs, and the winners' and losers' states.
    """

    loss: float
    state_losses: list[float]
    gap: float
    states: list[Tensor]


class Objective(Protocol):
    """What the trainer relies on. `needs_latents`: StepInputs.latents must be given; `needs_times`: .times; `draws`:
    .second_noise; `needs_teacher`: `forward` must have one, `teacher_sees` the target's image and its text, or the text alone.
    `states(K)`: at how many states the models are called in a micro-batch; `trained_states(K)`: at how many of the grid's times
    gradients flow. `per_state`: the gradient of one time is finished before the next one's graph begins, so that one graph at a
    time is held. The planner measures a step's memory by these two."""

    needs_latents: bool
    needs_times: bool
    needs_teacher: bool
    teacher_sees: Literal["image", "text"]
    draws: bool
    per_state: bool

    def states(self, num_states: int) -> int: ...

    def trained_states(self, num_states: int) -> int: ...

    def describe(self) -> str:
        """What was chosen of it, for the first screen."""

    def accumulate(self, inputs: StepInputs, backward: Backward) -> StepReport: ...


def report(
    errors: list[Tensor], term_weights: list[float], states: list[Tensor], squares: Sequence[Tensor] = ()
) -> StepReport:
    """`squares`: the mean squares that make the gap, where the errors are not they."""
    values: list[float] = torch.stack([*errors, *squares]).tolist()  # the step's only device-to-host copy
    state_losses = [w * value for w, value in zip(term_weights, values)]
    for k, value in enumerate(state_losses):
        if not math.isfinite(value):
            raise NonFiniteLoss(k, value)
    gaps = values[len(errors) :] or values
    return StepReport(
        loss=sum(state_losses) / len(state_losses),
        state_losses=state_losses,
        gap=math.sqrt(sum(gaps) / len(gaps)),
        states=states,
    )


def shows_images(objective: Objective) -> bool:
    """Whether the teacher is shown the target images, so that their contexts are needed."""
    return objective.needs_teacher and objective.teacher_sees == "image"
