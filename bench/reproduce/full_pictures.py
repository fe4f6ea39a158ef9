"""`python -m bench.reproduce.full_pictures JOB.json`: draws with what a run on a user's own model has become, and measures.

The evaluation folder holds, beside the models of `bench.reproduce.perceptual`,

    target/         held-out records of the new style or subject, in any format of data.path: prompts, and the pictures to
                    compare with
    probes.jsonl    prompts of what the model knew before, with questions (see `bench.reproduce.probes`)

Of the target all metrics are taken that have their model, of the probes' pictures the probes and clip_score. Pictures are drawn
at the deployment step count and with 32 steps, noise by the prompt's place alone.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from bench.reproduce.perceptual import Metrics, Scored
from bench.reproduce.pictures import MANY, main, write
from bench.reproduce.probes import Probe, read_probes
from dopsd_fast.data.images import load_image
from dopsd_fast.data.records import Dataset, read_records
from dopsd_fast.errors import UserError
from dopsd_fast.families.registry import open_family
from dopsd_fast.method.trajectory import rollout
from dopsd_fast.nano import report
from dopsd_fast.settings.load import load_settings
from dopsd_fast.settings.schema import DataSettings, Settings

MEASURES, VALIDATION = "measures.json", "validation.json"
SEED = 31_000


@dataclass(frozen=True)
class Job:
    """`run`: a run folder, or "" for the model as it is. `words`: settings of the model and the records."""

    run: str
    words: list[str]
    out: str
    evaluation: str
    device: str
    final: bool


def draw(job: Job) -> None:
    """Writes pictures/DOMAIN@STEPS/*.png and MEASURES: "DOMAIN@STEPS" -> metric -> {"value", "values", "better", "note"}; and
    VALIDATION, metric -> value of the target at the deployment step count. Without `final` only what VALIDATION needs."""
    settings, out, device = load_settings(job.words), Path(job.out), torch.device(job.device)
    family = open_family(settings.model.folder, settings.conditioning)
    held, probes = held_out(Path(job.evaluation), settings, family.pixel_multiple), probes_of(Path(job.evaluation))
    metrics = Metrics(Path(job.evaluation), device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    encoders = family.load_encoders(device, dtype)
    wanted: dict[str, list[tuple[str, int, int]]] = {"target": [one_prompt(record) for record in held.records]}
    if probes and job.final:
        side = settings.data.resolution - settings.data.resolution % family.pixel_multiple
        wanted["original"] = [(probe.prompt, side, side) for probe in probes]
    contexts = {domain: encoders.student([prompt for prompt, _, _ in prompts]) for domain, prompts in wanted.items()}
    encoders.release()
    model = report.trained(family, run_settings(job), Path(job.run) / "export") if job.run else family.load_transformer(dtype)
    model.to(device, dtype).eval()
    vae = family.load_vae().to(device)
    measures: dict[str, Any] = {}
    for domain, prompts in wanted.items():
        for steps in (family.deployment_steps, MANY) if job.final else (family.deployment_steps,):
            pictures = []
            for i, ((_, height, width), context) in enumerate(zip(prompts, contexts[domain])):
                shape = family.latent_shape(height, width)
                noise = torch.randn((1, *shape), generator=torch.Generator().manual_seed(SEED + i)).to(device)
                here = {name: tensor.to(device) for name, tensor in context.items()}
                latents = rollout(partial(family.velocity, model, contexts=[here]), noise, family.sample_grid(steps, shape))
                pictures += family.decode(vae, latents)
            keep(out / "pictures" / f"{domain}@{steps}", pictures)
            scored = measured(metrics, domain, pictures, held, [prompt for prompt, _, _ in prompts], probes)
            measures[f"{domain}@{steps}"] = {
                one.name: {"value": one.value, "values": one.values, "better": one.better, "note": one.note} for one in scored
            }
    few = measures[f"target@{family.deployment_steps}"]
    write(out / VALIDATION, {name: one["value"] for name, one in few.items()})
    if job.final:
        write(out / MEASURES, measures)


def measured(
    metrics: Metrics, domain: str, pictures: list[Image.Image], held: Dataset, prompts: list[str], probes: list[Probe]
) -> list[Scored]:
    if domain == "target":
        targets = [load_image(record.images[0], record.height, record.width) for record in held.records]
        return metrics.score(pictures, targets, prompts)
    found = []
    if "clip_score" in metrics.available():  # the others need a picture to compare with
        found += [one for one in metrics.score(pictures, pictures, prompts) if one.name == "clip_score"]
    if "probes" in metrics.available():
        found.append(metrics.probe(pictures, probes))
    return found


def held_out(folder: Path, settings: Settings, multiple: int) -> Dataset:
    """UserError: there are none."""
    if not (folder / "target").is_dir():
        raise UserError(f"{folder}: has no folder target/ with held-out records: prompts, and the pictures to compare with")
    return read_records(DataSettings(path=str(folder / "target"), resolution=settings.data.resolution), multiple)


def probes_of(folder: Path) -> list[Probe]:
    return read_probes(folder) if (folder / "probes.jsonl").exists() else []


def one_prompt(record: Any) -> tuple[str, int, int]:
    return next(iter(record.prompts.values())), record.height, record.width


def run_settings(job: Job) -> Settings:
    return load_settings([f"{job.run}/settings.toml"])


def keep(folder: Path, pictures: Sequence[Image.Image]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i, picture in enumerate(pictures):
        picture.save(folder / f"{i:05}.png")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], Job, draw))
