"""Suite `rollout`: the states of a trajectory, ours against the eager reference and the published pipeline. No backward pass.

Cases "lora" and "full": one measurement goes from x_0 = noise through K states: student and teacher velocity, the loss term,
Euler's step, and the mean loss as a number. R1 runs its encoders first, every time, as published; the others have the
conditions computed once. Ours also refines the captions in every measurement: once for its K states, diffusers in every state.
Teacher and student differ, LoRA's B is not zero. Case "student": sampling as it is deployed, K velocities of the student and
Euler's steps, from prompt embeddings to latents without guidance, the weights as they lie on the disk; ours is the pair
forward with one branch, as a training run's pictures are made, the peer `diffusers` is ZImagePipeline. Rows, "@K8" for K = 8:

    each       seconds_per_rollout, states_per_second (K * batch / seconds)
    each       final_state_relative_error, loss_relative_error: of x_K and of the mean loss, against float64 (bf16 models:
               fp32 without TF32), R1 from the same conditions as the others
    CASE/PEER  ours: speedup, the peer's seconds over ours, round by round
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.harness import Exact, exact_note, relative
from bench.results import Options, Row
from bench.suites.measurement import Measurement, cells
from bench.suites.workload import Cell, OurStep, PeerStep, Program, Workload
from dopsd_fast.method.objective import StepInputs
from dopsd_fast.method.trajectory import rollout
from dopsd_fast.pair.student_teacher import STUDENT

SAMPLING = "student"
MORE = [Cell(states=8)]
Outcome = tuple[Tensor, float]
"""(x_K `[B, C, h, w]`, mean loss)."""


def measure(options: Options) -> Iterator[Row]:
    for kind in (*options.kinds, SAMPLING):
        for cell in cells(options, MORE, MORE):
            yield from Rollout(kind, options, cell, ["diffusers"] if kind == SAMPLING else ()).rows()


class Ours(OurStep):
    trains = False

    @torch.no_grad()
    def rollout(self) -> Outcome:
        report = self.objective.accumulate(StepInputs(self.work.noise, self.work.grid, self.open()), lambda loss: None)
        return report.states[-1], report.loss


class Sampler(Ours):
    def rollout(self) -> Outcome:
        work = self.work
        velocity = self.pair.sampler(STUDENT, work.contexts(work.student), work.noise.shape)
        return rollout(velocity, work.noise, work.grid), math.nan


class Peer(PeerStep):
    trains = False

    @torch.no_grad()
    def rollout(self, encode: bool = True) -> Outcome:
        """The published loop (`ReferenceStep.backward`) without its graph. encode=False: R1, too, begins at the conditions."""
        step, x, losses = self.reference, self.noise, []
        student, teacher = self.conditions() if encode else (self.work.student, self.work.teacher)
        for sigma, sigma_next in zip(step.sigmas[:-1], step.sigmas[1:], strict=True):
            prediction = step.student_prediction(x, sigma, student)
            losses.append(F.mse_loss(prediction, step.teacher_prediction(x, sigma, teacher)))
            x = x + (sigma_next - sigma) * prediction
        return x, torch.stack(losses).mean().item()


class Pipeline(Program):
    """The published pipeline around the transformer; nothing is encoded or decoded."""

    def __init__(self, work: Workload) -> None:
        from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline

        scheduler = FlowMatchEulerDiscreteScheduler.from_config(work.family.scheduler_config)
        self.work, self.pipeline = work, ZImagePipeline(scheduler, None, None, None, work.model.transformer())
        self.pipeline.vae_scale_factor = work.family.pixel_multiple // 2
        self.pipeline.set_progress_bar_config(disable=True)

    def rollout(self) -> Outcome:
        """The pipeline makes the same grid from the number of its intervals."""
        work = self.work
        return self.pipeline(
            height=work.pixels, width=work.pixels, num_inference_steps=work.states, guidance_scale=0.0, latents=work.noise,
            prompt_embeds=[one.text for one in work.student], output_type="latent", return_dict=False,
        )[0], math.nan


class Rollout(Measurement):
    """kind: SAMPLING, too."""

    suite, seconds, error = "rollout", "seconds_per_rollout", "final_state_relative_error"
    exact: Outcome | None = None

    def find_exact(self, dtype: torch.dtype) -> None:
        """The student of full fine-tuning begins as the model that lies on the disk."""
        self.exact = Peer("R2", "full" if self.kind == SAMPLING else self.kind, self.work, dtype).rollout()

    def make(self, name: str) -> Any:
        if self.kind == SAMPLING:
            return Sampler("full", self.work) if name == "ours" else Pipeline(self.work)
        return Ours(self.kind, self.work) if name == "ours" else Peer(name, self.kind, self.work)

    def check(self, name: str, one: Any) -> Exact:
        state, loss = one.rollout(encode=False) if isinstance(one, Peer) else one.rollout()
        note = exact_note(self.work.model.dtype)
        if self.exact is None:
            return {}
        found = {self.error: (relative(state, self.exact[0]), note)}
        return found if math.isnan(loss) else found | {"loss_relative_error": (abs(loss / self.exact[1] - 1.0), note)}

    def time(self) -> Iterator[Row]:
        calls = {name: one.rollout for name, one in self.contest.alive.items()}
        amounts = {"states_per_second": ("1/s", float(self.work.states * self.work.batch))}
        yield from self.contest.time(calls, partial(self.contest.speeds, amounts=amounts))
