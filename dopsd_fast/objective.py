"""What one micro-batch adds to the gradient: D-OPSD, and flow matching (SFT) behind the same interface.

An objective sees a batch, velocity functions and a `backward` function; it never sees a model, an optimizer or a
rank. `accumulate(inputs, backward)` calls `backward(loss)` one or more times and returns what happened.

Room for other objectives, PSO (pairwise sample optimisation, arXiv 2410.03190) first of all:
`StepInputs.initial_velocity` is the velocity under the starting weights, when the trainer has them. Own samples need
no more than is here: from `inputs.noise`, Euler steps along `inputs.grid` with `student_velocity` under no_grad give
x_1 of the current weights; the winner is `inputs.latents`, the loser that sample, the reference `initial_velocity` at
the same states, and the pair's loss goes through `backward` like any other. Nothing here is built for it beyond that
one field.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from dopsd_fast.trajectory import WeightKind, off_policy_state, weights

Context = dict[str, Tensor]
Velocity = Callable[[Tensor, Tensor, Sequence[Context]], Tensor]
Backward = Callable[[Tensor], object]


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

    A velocity function takes (x `[B, C, h, w]`, t `[B]` in [0, 1], one context per item) and returns dx/dt = image -
    noise, shaped and typed as x. `student_velocity` carries gradient; `teacher_velocity` is called under no_grad.
    `scale` is 1 / accumulation: it scales what is back-propagated, not what is reported.
    """

    noise: Tensor
    grid: Sequence[float]
    student_contexts: Sequence[Context]
    student_velocity: Velocity
    teacher_contexts: Sequence[Context] = ()
    teacher_velocity: Velocity | None = None
    initial_velocity: Velocity | None = None
    latents: Tensor | None = None
    times: Tensor | None = None
    scale: float = 1.0


@dataclass
class StepReport:
    """`loss` = mean of `state_losses`; state_losses[k] = w_k * mean over all elements of the squared difference at
    state k.

    `gap`: root mean square over states and elements of v_s - v_t, unweighted (SFT: of v_s minus the target velocity).
    `states`: the detached x_k that were evaluated; for D-OPSD also x_K, the end of the trajectory.
    """

    loss: float
    state_losses: list[float]
    gap: float
    states: list[Tensor]


class Objective(Protocol):
    """What the trainer relies on. `needs_latents`: StepInputs.latents must be given; `needs_times`: .times;
    `needs_teacher`: .teacher_contexts and .teacher_velocity."""

    needs_latents: bool
    needs_times: bool
    needs_teacher: bool

    def accumulate(self, inputs: StepInputs, backward: Backward) -> StepReport: ...


class DOPSD:
    """Distillation on the student's own trajectory (arXiv 2605.05204, Eq. 7, with the weight of
    `trajectory.weights`).

        L = sum_k w_k / K * mean((v_s(x_k, t_k, c_s) - stop_grad v_t(x_k, t_k, c_t))^2)
        x_{k+1} = stop_grad(x_k + (t_{k+1} - t_k) * v_s)             on_policy, x_0 = noise
        x_k     = (1 - t_k) * noise + t_k * latents                  off_policy

    States are detached, so L is a sum of K independent terms. `per_state` back-propagates each as soon as it is known
    and holds one graph at a time; `k_graphs` back-propagates their sum at the end, as the published code does: same
    gradient, K graphs. The difference, the loss and the states are fp32 (float64 for float64 inputs) whatever the
    model computes in.
    """

    needs_times = False
    needs_teacher = True

    def __init__(
        self,
        weight: WeightKind = "v",
        states: Literal["on_policy", "off_policy"] = "on_policy",
        backward: Literal["per_state", "k_graphs"] = "per_state",
    ) -> None:
        self.weight = weight
        self.on_policy = states == "on_policy"
        self.per_state = backward == "per_state"
        self.needs_latents = not self.on_policy

    def accumulate(self, inputs: StepInputs, backward: Backward) -> StepReport:
        """Back-propagate `inputs.scale` * L. Raises NonFiniteLoss, and ValueError when a needed input is missing."""
        if inputs.teacher_velocity is None or len(inputs.teacher_contexts) != len(inputs.noise):
            raise ValueError("objective dopsd: a teacher velocity and one teacher context per item are needed")
        if self.needs_latents and inputs.latents is None:
            raise ValueError("objective dopsd: off_policy states need the target latents")

        grid = inputs.grid
        num_states = len(grid) - 1
        term_weights = weights(self.weight, grid)
        x = inputs.noise
        states = [x]
        errors: list[Tensor] = []
        total: Tensor | None = None
        for k in range(num_states):
            t = x.new_full((len(x),), grid[k])
            # The teacher goes first: its activations are gone before the student's graph is built.
            with torch.no_grad():
                v_t = inputs.teacher_velocity(x, t, inputs.teacher_contexts)
            v_s = inputs.student_velocity(x, t, inputs.student_contexts)
            error = mean_square(v_s, v_t)
            errors.append(error.detach())
            if self.on_policy:
                x = x + (grid[k + 1] - grid[k]) * v_s.detach().to(x.dtype)
            else:
                assert inputs.latents is not None
                x = off_policy_state(inputs.noise, inputs.latents, grid[k + 1])
            states.append(x)
            term = error * (inputs.scale * term_weights[k] / num_states)
            if self.per_state:
                backward(term)
            else:
                total = term if total is None else total + term
            del v_s, error, term
        if total is not None:
            backward(total)
        return _report(errors, term_weights, states)


class SFT:
    """Flow matching: L = mean((v_s(x_t, t, c_s) - (latents - noise))^2), x_t = (1 - t) * noise + t * latents.

    One time per item (`inputs.times`, see `trajectory.draw_times`); one state, no teacher.
    """

    needs_latents = True
    needs_times = True
    needs_teacher = False

    def accumulate(self, inputs: StepInputs, backward: Backward) -> StepReport:
        """Back-propagate `inputs.scale` * L. Raises NonFiniteLoss, and ValueError when a needed input is missing."""
        if inputs.latents is None or inputs.times is None:
            raise ValueError("objective sft: target latents and one time per item are needed")
        x = off_policy_state(inputs.noise, inputs.latents, inputs.times)
        v_s = inputs.student_velocity(x, inputs.times.to(x), inputs.student_contexts)
        error = mean_square(v_s, inputs.latents - inputs.noise)
        backward(error * inputs.scale)
        return _report([error.detach()], [1.0], [x])


def make_objective(settings) -> Objective:
    """The objective of `settings.method` (its name, weight, states and backward)."""
    method = settings.method
    if method.name == "dopsd":
        return DOPSD(method.weight, method.states, method.backward)
    if method.name == "sft":
        return SFT()
    raise ValueError(f"method.name: {method.name!r} is none of 'dopsd', 'sft'")


def mean_square(prediction: Tensor, target: Tensor) -> Tensor:
    """mean((prediction - target)^2) over all elements, in fp32 or wider; gradient to `prediction` only."""
    wide = torch.promote_types(prediction.dtype, torch.float32)
    return (prediction.to(wide) - target.detach().to(wide)).square().mean()


def _report(errors: list[Tensor], term_weights: list[float], states: list[Tensor]) -> StepReport:
    values: list[float] = torch.stack(errors).tolist()  # the step's only device-to-host copy
    state_losses = [w * value for w, value in zip(term_weights, values, strict=True)]
    for k, value in enumerate(state_losses):
        if not math.isfinite(value):
            raise NonFiniteLoss(k, value)
    return StepReport(
        loss=sum(state_losses) / len(state_losses),
        state_losses=state_losses,
        gap=math.sqrt(sum(values) / len(values)),
        states=states,
    )
