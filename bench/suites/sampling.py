"""Case `student` of the suite `rollout`: sampling as it is deployed, K velocities of the student alone and Euler's steps.

    ours        the pair forward with one branch under `sampling.rollout`, as the training run's pictures are made; captions are
                refined once for the K states
    diffusers   ZImagePipeline from prompt embeddings to latents, without guidance

The model is as it lies on the disk, without adapters. Rows, with "@K8" for eight states, which is how it is deployed:

    each              seconds_per_rollout, states_per_second (K * batch / seconds)
    each              final_state_relative_error: of x_K, against float64 (for bf16 models against fp32 without TF32)
    student/diffusers ours: speedup, the pipeline's seconds over ours, round by round
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.harness import Contest, exact_dtype, exact_note, exactly, free, relative
from bench.live import say
from bench.models import Model
from bench.references.reference_eager import Condition, predict_noise_direction
from bench.results import Options, Row, failed
from bench.suites.workload import Cell, fallbacks, pair_on_device
from dopsd_fast.method.trajectory import rollout
from dopsd_fast.pair.student_teacher import STUDENT
from dopsd_fast.settings.schema import Settings

SUITE, CASE = "rollout", "student"
DEPLOYED_STATES = 8


class Ours:
    def __init__(self, model: Model, texts: Sequence[Tensor], noise: Tensor) -> None:
        settings = Settings.model_validate({
            "train": {"batch_size": len(texts), "precision": model.precision},
            "adapter": {"kind": "full"},
            "teacher": {"kind": "student"},
        })
        self.family, self.noise = model.family, noise
        self.contexts = [{"text": text} for text in texts]
        self.pair = pair_on_device(model, settings)

    def sample(self, grid: Sequence[float]) -> Tensor:
        """x_K `[B, C, h, w]`, fp32."""
        return rollout(self.pair.sampler(STUDENT, self.contexts, self.noise.shape), self.noise, grid)

    def fell_back(self) -> str:
        return fallbacks(self.pair)


class Diffusers:
    """The published pipeline around the transformer; nothing is encoded or decoded."""

    def __init__(self, model: Model, texts: Sequence[Tensor], noise: Tensor) -> None:
        from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline

        scheduler = FlowMatchEulerDiscreteScheduler.from_config(model.family.scheduler_config)
        self.pipeline: Any = ZImagePipeline(scheduler, None, None, None, model.transformer())
        self.pipeline.vae_scale_factor = model.family.pixel_multiple // 2
        self.pipeline.set_progress_bar_config(disable=True)
        self.texts, self.noise = list(texts), noise

    def sample(self, grid: Sequence[float]) -> Tensor:
        """The pipeline makes the same grid from the number of its intervals."""
        scale = self.pipeline.vae_scale_factor
        height, width = (scale * side for side in self.noise.shape[-2:])
        return self.pipeline(
            height=height, width=width, num_inference_steps=len(grid) - 1, guidance_scale=0.0, latents=self.noise,
            prompt_embeds=self.texts, output_type="latent", return_dict=False,
        )[0]

    def fell_back(self) -> str:
        return ""


VARIANTS: dict[str, Callable[[Model, Sequence[Tensor], Tensor], Any]] = {"diffusers": Diffusers, "ours": Ours}


def measure(options: Options) -> Iterator[Row]:
    """Rows as they are found."""
    torch.set_num_threads(options.threads)
    model = Model(options.model, options.device)
    standard, wide, note = model.standard, exact_dtype(model.dtype), exact_note(model.dtype)
    noise, texts = model.noise(standard.batch, standard.pixels), model.features(standard.batch, standard.text_tokens, 1)
    counts = {"": standard.states}
    if not (options.tour or options.quick):
        counts[Cell(states=DEPLOYED_STATES).name] = DEPLOYED_STATES
    alive: dict[str, Any] = {}
    notes: dict[str, str] = {}
    for cell, states in counts.items():
        grid = model.grid(states, standard.pixels)
        contest = Contest(SUITE, f"{CASE}{{}}{cell}{model.suffix}", options, "seconds_per_rollout", notes=notes)
        contest.peers = ["diffusers"]
        exact: list[Tensor] = []
        say(f"{SUITE}: {contest.place()}, the exact trajectory")
        try:
            exact.append(exact_state(model, texts, noise, grid, wide))
        except Exception as error:
            yield failed(SUITE, contest.place(), "exact", "final_state_relative_error", "", error)
        for name, build in VARIANTS.items():
            make = partial(alive.__getitem__, name) if name in alive else partial(build, model, texts, noise)
            yield from contest.build(name, make, partial(errors, grid, exact, note))
        alive |= contest.alive
        calls = {name: partial(one.sample, grid) for name, one in contest.alive.items()}
        amounts = {"states_per_second": ("1/s", float(states * len(noise)))}
        yield from contest.time(calls, partial(contest.speeds, amounts=amounts))
    alive.clear()
    free(options.device)


def errors(grid: Sequence[float], exact: Sequence[Tensor], note: str, one: Any) -> dict[str, tuple[float, str]]:
    """exact: the state, or none."""
    state = one.sample(grid)
    return {"final_state_relative_error": (relative(state, exact[0]), note)} if exact else {}


@torch.no_grad()
def exact_state(model: Model, texts: Sequence[Tensor], noise: Tensor, grid: Sequence[float], wide: torch.dtype) -> Tensor:
    """x_K of diffusers' forward in `wide`."""
    with exactly(wide):
        transformer = torch.nn.Module.to(model.transformer(), wide)
        conditions, x = [Condition(text) for text in texts], noise.to(wide)
        for now, then in zip(grid[:-1], grid[1:], strict=True):
            x = x + (now - then) * predict_noise_direction(transformer, x, 1.0 - now, conditions)
        return x
