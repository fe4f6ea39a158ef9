"""What the paper compares D-OPSD with: flow matching (SFT) and pairwise sample optimization (PSO)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from dopsd_fast.method.objective import Backward, StepInputs, StepReport, report
from dopsd_fast.method.trajectory import off_policy_state, rollout
from dopsd_kernels.divergence_step import divergence_step


class SFT:
    """Flow matching: L = mean((v_s(x_t, t, c_s) - (image - noise))^2), x_t = (1 - t) * noise + t * image.

    One time per item (`inputs.times`, see `trajectory.draw_times`). `targets`: `data`, the image is `inputs.latents` and there
    is no teacher; `teacher`, it is what the teacher, shown the target, draws along `inputs.grid` from `inputs.noise` (the
    paper's ablation "SFT on teacher samples"), and the noise of x_t is `inputs.second_noise`.
    """

    needs_times = per_state = True
    teacher_sees: Literal["image", "text"] = "image"

    def __init__(self, targets: Literal["data", "teacher"] = "data") -> None:
        self.draws = self.needs_teacher = targets == "teacher"
        self.needs_latents = not self.draws

    def states(self, num_states: int) -> int:
        return num_states + 1 if self.draws else 1

    def trained_states(self, num_states: int) -> int:
        return 1

    def describe(self) -> str:
        return f"targets from the {'teacher' if self.draws else 'data'}"

    def accumulate(self, inputs: StepInputs, backward: Backward) -> StepReport:
        """Back-propagate `inputs.scale` * L. Raises NonFiniteLoss, and ValueError when a needed input is missing."""
        image, noise = (_drawn(inputs, "teacher"), inputs.second_noise) if self.draws else (inputs.latents, inputs.noise)
        if image is None or noise is None or inputs.times is None:
            raise ValueError("objective sft: target latents (to draw them a second noise) and one time per item are needed")
        image = image.to(noise.dtype)
        x = off_policy_state(noise, image, inputs.times)
        v_s = inputs.forward(x, inputs.times.to(x))[0]
        step = divergence_step(v_s.contiguous(), image - noise, x, inputs.scale, None, 0.0)
        backward(step.loss)
        inputs.forward.finish(backward)
        return report([step.mean_square], [1.0], [x])


class PSO:
    """Pairwise sample optimization (arXiv 2410.03190) in the form of Diffusion-DPO (arXiv 2311.12908, Eq. 14), at the times
    that the distilled model samples at: the winner w is the target, the loser l what the model draws for the same text.

        e(v, y) = mean over elements of (v(y_t, t, c_s) - (y - noise))^2,  y_t = (1 - t) * noise + t * y
        L = -mean over items of log sigmoid(-beta ((e(v_s, w) - e(v_r, w)) - (e(v_s, l) - e(v_r, l))))

    v_r: the teacher, shown the text alone (the frozen starting weights are the reference of the paper). Noise
    (`inputs.second_noise`) and t are those of both of a pair; t is the last time of `inputs.grid` that is not after the item's
    (`inputs.times`: each state as often). `pairs`: `online`, the student draws the loser, along `inputs.grid` from
    `inputs.noise`; `offline`, the reference does. `beta` has the paper's number of steps in it and no unit.
    """

    needs_latents = needs_times = needs_teacher = draws = per_state = True
    teacher_sees: Literal["image", "text"] = "text"

    def __init__(self, beta: float = 100.0, pairs: Literal["online", "offline"] = "online") -> None:
        self.beta = beta
        self.drawn_by: Literal["student", "teacher"] = "student" if pairs == "online" else "teacher"

    def states(self, num_states: int) -> int:
        return num_states + 2

    def trained_states(self, num_states: int) -> int:
        return 1

    def describe(self) -> str:
        pairs = "online" if self.drawn_by == "student" else "offline"
        return f"{pairs} pairs, beta {self.beta:g}"

    def accumulate(self, inputs: StepInputs, backward: Backward) -> StepReport:
        """Back-propagate `inputs.scale` * L. Raises NonFiniteLoss, and ValueError when a needed input is missing."""
        noise, winner = inputs.second_noise, inputs.latents
        if winner is None or noise is None or inputs.times is None:
            raise ValueError("objective pso: target latents, a second noise and one time per item are needed")
        grid = torch.tensor(list(inputs.grid[:-1]), dtype=torch.float32, device=noise.device)
        t = grid[torch.searchsorted(grid, inputs.times.to(grid), right=True) - 1].to(noise)
        margins, squares, states = [], [], []
        for image in (winner, _drawn(inputs, self.drawn_by).to(noise.dtype)):
            x = off_policy_state(noise, image, t)
            v_s, v_r = inputs.forward(x, t)
            assert v_r is not None
            v_s, v_r, target = v_s.to(x.dtype), v_r.to(x.dtype), image - noise
            margins.append(((v_s - target).square() - (v_r - target).square()).flatten(1).mean(1))
            squares.append((v_s.detach() - v_r).square().mean())
            states.append(x)
        loss = -F.logsigmoid(-self.beta * (margins[0] - margins[1])).mean()
        backward(inputs.scale * loss)
        inputs.forward.finish(backward)
        return report([loss.detach()], [1.0], states, squares)


def _drawn(inputs: StepInputs, branch: Literal["student", "teacher"]) -> Tensor:
    """x_1 of one branch along `inputs.grid`, without gradient."""

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        v_s, v_t = inputs.forward(x, t)
        v = v_s if branch == "student" else v_t
        if v is None:
            raise ValueError("this objective needs a teacher")
        return v

    return rollout(velocity, inputs.noise, inputs.grid)
