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

import gc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.cases.step import exactly
from bench.cases.workload import Cell
from bench.clock import interleaved, ratios, summary
from bench.models import Model
from bench.peers.reference_eager import Condition, predict_noise_direction
from bench.results import Options, Row, Status, failed
from bench.show import step as say
from dopsd_fast.families.build import build_pair
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
        })  # fmt: skip
        self.family, self.noise = model.family, noise
        self.contexts = [{"text": text} for text in texts]
        self.pair = build_pair(model.family, settings, model.dtype, model.device)

    def sample(self, grid: Sequence[float]) -> Tensor:
        """x_K `[B, C, h, w]`, fp32."""
        return rollout(self.pair.sampler(STUDENT, self.contexts, self.noise.shape), self.noise, grid)

    def fell_back(self) -> str:
        facts = self.pair.describe()
        if facts["backbone"] != "pair":
            return "diffusers' forward instead of the pair forward"
        return "plain PyTorch ops: dopsd_kernels._native is not built, or not for this dtype" if facts["ops"] == "torch" else ""


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
        )[0]  # fmt: skip

    def fell_back(self) -> str:
        return ""


VARIANTS: dict[str, Callable[[Model, Sequence[Tensor], Tensor], Any]] = {"diffusers": Diffusers, "ours": Ours}


def measure(options: Options) -> Iterator[Row]:
    """Rows as they are found."""
    torch.set_num_threads(options.threads)
    model = Model(options.model, options.device)
    standard = model.standard
    noise, texts = model.noise(standard.batch, standard.pixels), model.features(standard.batch, standard.text_tokens, 1)
    grids = {"": model.grid(standard.states, standard.pixels)}
    if not (options.tour or options.quick):
        grids[Cell(states=DEPLOYED_STATES).name] = model.grid(DEPLOYED_STATES, standard.pixels)
    wide = torch.float64 if model.dtype == torch.float32 else torch.float32
    exact: dict[str, Tensor] = {}
    say(f"{SUITE}: {CASE}, the exact trajectory")
    try:
        exact = {cell: exact_state(model, texts, noise, grid, wide) for cell, grid in grids.items()}
    except Exception as error:
        yield failed(SUITE, CASE + model.suffix, "exact", "final_state_relative_error", "", error)
    free(model)
    alive: dict[str, Any] = {}
    for name, build in VARIANTS.items():
        say(f"{SUITE}: {CASE}, building {name}")
        try:
            alive[name] = build(model, texts, noise)
        except Exception as error:
            yield from lost(f"{CASE}{{}}{model.suffix}", name, error)
    for cell, grid in grids.items():
        yield from timed(f"{CASE}{{}}{cell}{model.suffix}", alive, grid, exact.get(cell), options)
    alive.clear()
    free(model)


def timed(case: str, alive: Mapping[str, Any], grid: Sequence[float], exact: Tensor | None, options: Options) -> Iterator[Row]:
    """`case` holds "{}", which stands for "/diffusers" in the rows of the ratio."""
    say(f"{SUITE}: {case.format('')}, timing {', '.join(alive)}")
    able: dict[str, Callable[[], Tensor]] = {}
    notes, samples = {}, 0
    for name, one in alive.items():
        try:
            state, note = one.sample(grid), one.fell_back()
        except Exception as error:
            yield from lost(case, name, error)
            continue
        able[name], notes[name], samples = partial(one.sample, grid), note, len(state)
        if exact is not None:
            wrong = float((state.to(exact.dtype) - exact).norm() / exact.norm())
            remark = "" if exact.dtype == torch.float64 else "against fp32 without TF32"
            yield row(case.format(""), name, "final_state_relative_error", "", [wrong], note, remark)
    if not able:
        return
    rounds, warmup = options.repeats(20, 5), 0 if options.quick or options.tour else 2
    try:
        seconds = interleaved(able, rounds, warmup, options.device, options.clock)
    except Exception as error:
        for name in able:
            yield from lost(case, name, error)
        return
    states = (len(grid) - 1) * samples
    for name, values in seconds.items():
        yield row(case.format(""), name, "seconds_per_rollout", "s", values, notes[name])
        yield row(case.format(""), name, "states_per_second", "1/s", [states / s for s in values], notes[name])
    if len(seconds) == len(VARIANTS):
        quicker = ratios(seconds["diffusers"], seconds["ours"])
        yield row(case.format("/diffusers"), "ours", "speedup", "x", quicker, notes["ours"])


@torch.no_grad()
def exact_state(model: Model, texts: Sequence[Tensor], noise: Tensor, grid: Sequence[float], wide: torch.dtype) -> Tensor:
    """x_K of diffusers' forward in `wide`."""
    with exactly(wide):
        transformer = torch.nn.Module.to(model.transformer(), wide)
        conditions, x = [Condition(text) for text in texts], noise.to(wide)
        for now, then in zip(grid[:-1], grid[1:], strict=True):
            x = x + (now - then) * predict_noise_direction(transformer, x, 1.0 - now, conditions)
        return x


def lost(case: str, name: str, error: BaseException) -> Iterator[Row]:
    yield failed(SUITE, case.format(""), name, "seconds_per_rollout", "s", error)
    if name != "ours":
        yield failed(SUITE, case.format(f"/{name}"), "ours", "speedup", "x", error)


def row(case: str, name: str, metric: str, unit: str, values: Sequence[float], fell: str, remark: str = "") -> Row:
    note = "; ".join(filter(None, (fell, remark)))
    status: Status = "fallback" if fell else "ok"
    if not all(map(math.isfinite, values)):
        return failed(SUITE, case, name, metric, unit, "; ".join(filter(None, ("not finite", note))))
    return Row(SUITE, case, name, metric, unit=unit, status=status, note=note, **summary(values))


def free(model: Model) -> None:
    gc.collect()
    if model.device.type == "cuda":
        torch.cuda.empty_cache()
