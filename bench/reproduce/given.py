"""`python -m bench.reproduce.given JOB.json` draws with what a run on a user's own model has become, and measures.

The evaluation folder holds, beside the models of `bench.reproduce.perceptual`,

    target/         held-out records of the new style or subject, in any format of data.path: prompts, and the pictures to
                    compare with
    probes.jsonl    prompts of what the model knew before, with questions (see `bench.reproduce.perceptual`)

Of the target all metrics are taken that have their model, of the probes' pictures the probes and clip_score. Pictures are drawn
at the deployment step count and with 32 steps, noise by the prompt's place alone.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from bench.reproduce.arms import MANY, OURS, Arm, Budget
from bench.reproduce.embedded import SILENT, VALIDATION, exit_code
from bench.reproduce.perceptual import FILE, Metrics, Probe, read_probes
from bench.reproduce.resampling import Sample
from dopsd_fast.data.images import load_image
from dopsd_fast.data.records import Dataset, read_records
from dopsd_fast.errors import UserError
from dopsd_fast.families.registry import open_family
from dopsd_fast.method.trajectory import rollout
from dopsd_fast.nano import report
from dopsd_fast.settings.load import load_settings
from dopsd_fast.settings.schema import DataSettings, Settings
from dopsd_fast.storage.atomic import write_text

MEASURES = "measures.json"
SEED = 31_000


@dataclass
class Given:
    """`data`: records, as data.path takes them. `evaluation`: the folder. `recipe`: empty is the family's. `more`: settings of
    all arms, after all others."""

    model: str
    data: str
    evaluation: str
    device: str
    recipe: str = ""
    more: Sequence[str] = ()
    module = "bench.reproduce.given"
    rates = (3e-6, 1e-5, 3e-5)
    curve, side = False, 224

    def __post_init__(self) -> None:
        """UserError for what would otherwise be found after a training."""
        settings = Settings.model_validate({"model": {"path": self.model}})
        family = open_family(settings.model.folder, settings.conditioning)
        self.few = family.deployment_steps
        self.recipe = self.recipe or {"zimage": "zimage_turbo_full"}.get(family.name, "")
        if not self.recipe:
            raise UserError(f"reproduce: no recipe trains every weight of {family.name}: name one by --recipe")
        self.settings = load_settings(self.words(Arm(OURS, ""), None))
        self.metrics = Metrics(Path(self.evaluation), self.device)
        self.metrics.check()
        held_out(self.evaluation, self.settings, family.pixel_multiple)
        read_records(self.settings.data, family.pixel_multiple)

    def describe(self) -> dict[str, Any]:
        return {"model": self.model, "data": self.data, "eval": self.evaluation, "recipe": self.recipe, "more": list(self.more)}

    def words(self, arm: Arm, budget: Budget | None) -> list[str]:
        steps = [f"train.steps={budget.steps}"] if budget else []
        return [
            self.recipe, f"model.path={self.model}", f"data.path={self.data}", *steps, *SILENT, "checkpoint.every=0",
            "checkpoint.keep=1", *arm.words, *self.more,
        ]

    def job(self, budget: Budget, curve: bool, final: bool) -> dict[str, Any]:
        words = self.words(Arm(OURS, ""), None)
        return {"words": words, "evaluation": self.evaluation, "device": self.device, "final": final}

    def score(self, drawn: Path) -> float:
        """The first measure of the target's pictures in the order fid, lpips, dino_distance that there is."""
        found = json.loads((drawn / VALIDATION).read_text())
        return next((float(found[name]) for name in ("fid", "lpips", "dino_distance") if name in found), math.nan)

    def known_rate(self, arm: Arm) -> float:
        """Published for LoRA; what other trainers use for every weight."""
        return 1e-4 if arm.lora else 1e-5

    def read(self, drawn: Path) -> dict[tuple[str, int], Sample]:
        found = {}
        for place, metrics in json.loads((drawn / MEASURES).read_text()).items() if (drawn / MEASURES).exists() else ():
            domain, _, steps = place.partition("@")
            each = {name: np.asarray(one["values"], np.float64) for name, one in metrics.items() if one["values"] is not None}
            fixed = {name: float(one["value"]) for name, one in metrics.items() if one["values"] is None}
            found[domain, int(steps)] = Sample(values=each, fixed=fixed)
        return found

    def shown(self, drawn: Path, domain: str, steps: int, count: int) -> list[Image.Image]:
        return [Image.open(file) for file in sorted((drawn / "pictures" / f"{domain}@{steps}").glob("*.png"))[:count]]

    def heading(self, domain: str, count: int) -> tuple[list[str], list]:
        return [""] * count, []


def held_out(folder: str, settings: Settings, multiple: int) -> tuple[Dataset, list[Probe]]:
    """UserError: there are no records. The probes may be missing."""
    if not Path(folder, "target").is_dir():
        raise UserError(f"{folder}: has no folder target/ with held-out records: prompts, and the pictures to compare with")
    records = read_records(DataSettings(path=f"{folder}/target", resolution=settings.data.resolution), multiple)
    return records, read_probes(Path(folder)) if Path(folder, FILE).exists() else []


def draw(run: str, out: str, words: list[str], evaluation: str, device: str, final: bool) -> None:
    """Draws with the student of a run folder, "": with the model as it is; `words`: settings of the model and the records.
    Writes to the folder `out` pictures/DOMAIN@STEPS/*.png, MEASURES, "DOMAIN@STEPS" -> metric -> {"value", "values", "better",
    "note"}, and VALIDATION, metric -> value of the target at the deployment step count; not `final`: what that needs alone."""
    settings, where = load_settings(words), torch.device(device)
    family = open_family(settings.model.folder, settings.conditioning)
    held, probes = held_out(evaluation, settings, family.pixel_multiple)
    metrics = Metrics(Path(evaluation), where)
    dtype = torch.bfloat16 if where.type == "cuda" else torch.float32
    prompts = {"target": [(next(iter(record.prompts.values())), record.height, record.width) for record in held.records]}
    if probes and final:
        side = settings.data.resolution - settings.data.resolution % family.pixel_multiple
        prompts["original"] = [(probe.prompt, side, side) for probe in probes]
    targets = [load_image(record.images[0], record.height, record.width) for record in held.records]
    encoders = family.load_encoders(where, dtype)
    contexts = {domain: encoders.student([prompt for prompt, _, _ in wanted]) for domain, wanted in prompts.items()}
    encoders.release()
    trained = (load_settings([f"{run}/settings.toml"]), Path(run, "export")) if run else None
    model = report.trained(family, *trained) if trained else family.load_transformer(dtype)
    model.to(where, dtype).eval()
    vae = family.load_vae().to(where)
    measures: dict[str, dict[str, Any]] = {}
    for domain, wanted in prompts.items():
        for steps in (family.deployment_steps, MANY) if final else (family.deployment_steps,):
            folder = Path(out, "pictures", f"{domain}@{steps}")
            folder.mkdir(parents=True, exist_ok=True)
            pictures: list[Image.Image] = []
            for i, ((_, height, width), context) in enumerate(zip(wanted, contexts[domain])):
                shape = family.latent_shape(height, width)
                noise = torch.randn((1, *shape), generator=torch.Generator().manual_seed(SEED + i)).to(where)
                here = {name: tensor.to(where) for name, tensor in context.items()}
                latents = rollout(partial(family.velocity, model, contexts=[here]), noise, family.sample_grid(steps, shape))
                pictures += family.decode(vae, latents)
                pictures[i].save(folder / f"{i:05}.png")
            texts = [prompt for prompt, _, _ in wanted]
            if domain == "target":
                scored = metrics.score(pictures, targets, texts)
            else:  # but for these, metrics need a picture to compare with
                scored = metrics.score(pictures, pictures, texts, only="clip_score")
                scored += [metrics.probe(pictures, probes)] if "probes" in metrics.available() else []
            measures[f"{domain}@{steps}"] = {
                one.name: {"value": one.value, "values": one.values, "better": one.better, "note": one.note} for one in scored
            }
    few = measures[f"target@{family.deployment_steps}"]
    write_text(Path(out, VALIDATION), json.dumps({name: one["value"] for name, one in few.items()}))
    if final:
        write_text(Path(out, MEASURES), json.dumps(measures))


if __name__ == "__main__":
    sys.exit(exit_code(draw, **json.loads(Path(sys.argv[1]).read_text())))
