"""What one micro-batch adds to the gradient: D-OPSD, and flow matching (SFT) behind the same interface.

An objective sees a batch, a `Forward` that gives velocities, and a `backward` function; it never sees a model, an
optimizer or a rank. `accumulate(inputs, backward)` calls `backward(loss)` one or more times and returns what happened.

Room for other objectives, PSO (pairwise sample optimisation, arXiv 2410.03190) first of all: a frozen teacher is the
starting weights, and `Forward` gives their velocity beside the student's. Own samples need no more than is here: from
`inputs.noise`, Euler steps along `inputs.grid` with `forward` under no_grad give x_1 of the current weights; the winner is
`inputs.latents`, the loser that sample, and the pair's loss goes through `backward` like any other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from dopsd_fast.trajectory import WeightKind, off_policy_state, weights
from dopsd_kernels.divergence_step import divergence_step

Context = dict[str, Tensor]
Velocity = Callable[[Tensor, Tensor, Sequence[Context]], Tensor]
Backward = Callable[[Tensor], object]


class Forward(Protocol):
    """Velocities along one trajectory, under contexts that do not change on the way.

    Called with x `[B, C, h, w]` and t `[B]` in [0, 1]: (v_s, v_t), dx/dt = image - noise, shaped as x; v_s carries
    gradient, v_t none, and is None where there is no teacher. `finish` comes after the last backward of the trajectory,
    and back-propagates what all states shared."""

    def __call__(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor | None]: ...

    def finish(self, backward: Backward) -> None: ...


@dataclass
class TwoCalls:
    """Student and teacher one after the other: (x, t, one context per item) -> v each. The teacher goes first: its
    activations are gone before the student's graph is built."""

    student: Velocity
    student_contexts: Sequence[Context]
    teacher: Velocity | None = None
    teacher_contexts: Sequence[Context] = ()

    def __call__(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor | None]:
        v_t = None
        if self.teacher is not None:
            with torch.no_grad():
                v_t = self.teacher(x, t, self.teacher_contexts)
        return self.student(x, t, self.student_contexts), v_t

    def finish(self, backward: Backward) -> None:
        pass


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

    `scale` is 1 / accumulation: it scales what is back-propagated, not what is reported.
    """

    noise: Tensor
    grid: Sequence[float]
    forward: Forward
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
    `needs_teacher`: `forward` must have one."""

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
        if self.needs_latents and inputs.latents is None:
            raise ValueError("objective dopsd: off_policy states need the target latents")

        grid = inputs.grid
        num_states = len(grid) - 1
        term_weights = weights(self.weight, grid)
        x = inputs.noise.contiguous()
        states = [x]
        errors: list[Tensor] = []
        total: Tensor | None = None
        for k in range(num_states):
            t = x.new_full((len(x),), grid[k])
            v_s, v_t = inputs.forward(x, t)
            if v_t is None:
                raise ValueError("objective dopsd: a teacher is needed")
            weight = inputs.scale * term_weights[k] / num_states
            dt = grid[k + 1] - grid[k] if self.on_policy else None
            step = divergence_step(v_s.contiguous(), v_t.contiguous(), x, weight, dt, grid[k])
            errors.append(step.mean_square)
            if step.x_next is not None:
                x = step.x_next
            else:
                assert inputs.latents is not None
                x = off_policy_state(inputs.noise, inputs.latents, grid[k + 1])
            states.append(x)
            if self.per_state:
                backward(step.loss)
            else:
                total = step.loss if total is None else total + step.loss
            del v_s, v_t, step
        if total is not None:
            backward(total)
        inputs.forward.finish(backward)
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
        v_s = inputs.forward(x, inputs.times.to(x))[0]
        step = divergence_step(v_s.contiguous(), inputs.latents - inputs.noise, x, inputs.scale, None, 0.0)
        backward(step.loss)
        inputs.forward.finish(backward)
        return _report([step.mean_square], [1.0], [x])


def make_objective(settings) -> Objective:
    """The objective of `settings.method` (its name, weight, states and backward)."""
    method = settings.method
    if method.name == "dopsd":
        return DOPSD(method.weight, method.states, method.backward)
    if method.name == "sft":
        return SFT()
    raise ValueError(f"method.name: {method.name!r} is none of 'dopsd', 'sft'")


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
