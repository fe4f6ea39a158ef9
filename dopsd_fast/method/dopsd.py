"""Distillation on the student's own trajectory."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from dopsd_fast.method.objective import Backward, StepInputs, StepReport, report
from dopsd_fast.method.trajectory import WeightKind, off_policy_state, state_weights
from dopsd_kernels.divergence_step import divergence_step


class DOPSD:
    """Distillation on the student's own trajectory (arXiv 2605.05204, Eq. 7, with the weight of
    `method.trajectory.state_weights`).

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
    teacher_sees: Literal["image", "text"] = "image"
    draws = False

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

    def states(self, num_states: int) -> int:
        return num_states

    trained_states = states

    def describe(self) -> str:
        states = "on_policy" if self.on_policy else "off_policy"
        return f"{states}, {'per_state' if self.per_state else 'k_graphs'}, weight {self.weight}"

    def accumulate(self, inputs: StepInputs, backward: Backward) -> StepReport:
        """Back-propagate `inputs.scale` * L. Raises NonFiniteLoss, and ValueError when a needed input is missing."""
        if self.needs_latents and inputs.latents is None:
            raise ValueError("objective dopsd: off_policy states need the target latents")

        grid = inputs.grid
        num_states = len(grid) - 1
        term_weights = state_weights(self.weight, grid)
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
        return report(errors, term_weights, states)
