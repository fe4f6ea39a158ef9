"""`python -m bench.reproduce.pictures JOB.json`: draws with what a run has become, and keeps the pictures and their measures.

On the embedded pipeline. Pictures come from `dopsd_fast.nano.report.sample`: the family's grid, noise that depends on the
caption's place alone, 8 bits a channel. What is read of them is the renderer's and the judge's; the trained model has no say.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bench.reproduce.arms import FULL
from bench.reproduce.resampling import Moments, Sample
from dopsd_fast import convert
from dopsd_fast.errors import UserError
from dopsd_fast.families.base import Family
from dopsd_fast.families.registry import open_family
from dopsd_fast.nano import build, report, world
from dopsd_fast.nano import judge as judging
from dopsd_fast.nano.check import figures
from dopsd_fast.nano.measure import ground_distances, patches, to_pictures
from dopsd_fast.settings.load import load_settings

DOMAINS = ("target", "original")
FEW, MANY = 4, 32
TEST_SEED, VALIDATION_SEED = 31_000, 17_000
"""Of captions."""
TARGETS, ANCHORS, TARGETS_OF_FEW = 64, 64, 4
"""Training records: pictures of the target style and of the original domain; the customisation has some of the former only."""
KEPT, CURVE, CHOICE = "pictures.npz", "curve.json", "validation.json"


@dataclass(frozen=True)
class Job:
    """`run`: a run folder, or "" for the pipeline as it is. `out`: where to write. Captions of each domain, 0 where nothing is
    wanted: `captions` for the pictures that are kept, `validation` for the measures that rates are chosen by, `curve` (the
    first of those) for the same of every checkpoint."""

    run: str
    model: str
    out: str
    captions: int
    validation: int
    curve: int


def main(argv: Sequence[str], kind: Callable[..., Any], draw: Callable[[Any], None]) -> int:
    """Does the job in the file argv[0], which is of `kind`. The process's exit code."""
    try:
        draw(kind(**json.loads(Path(argv[0]).read_text())))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def draw(job: Job) -> None:
    """Writes CHOICE (measures of the validation captions at FEW steps), CURVE (a list of the same, one a checkpoint), and KEPT
    (uint8 [P, 32, 32, 3] of the test captions, by "domain@steps")."""
    settings = load_settings([job.run + "/settings.toml"] if job.run else [f"model.path={job.model}"])
    family, out = open_family(settings.model.folder, settings.conditioning), Path(job.out)
    out.mkdir(parents=True, exist_ok=True)
    drawer = Drawer(family)
    step, model = 0, None
    curve = []
    for step, model in checkpoints(Path(job.run), family, all_of_them=job.curve > 0) if job.run else [(0, start(family))]:
        if job.curve:
            curve.append({"step": step} | {domain: drawer.figures(model, domain, job.curve) for domain in DOMAINS})
    if job.curve:
        write(out / CURVE, curve)
    if job.validation:
        write(out / CHOICE, {"step": step} | {domain: drawer.figures(model, domain, job.validation) for domain in DOMAINS})
    if job.captions:
        kept: dict[str, Any] = {}
        for domain in DOMAINS:
            for steps in (FEW, MANY):
                pictures = drawer.pictures(model, domain, steps, job.captions, TEST_SEED)
                kept[f"{domain}@{steps}"] = ((pictures + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
        part = out / f"{KEPT}.part"
        with part.open("wb") as stream:
            np.savez_compressed(stream, **kept)
        part.replace(out / KEPT)


class Drawer:
    def __init__(self, family: Family) -> None:
        self.family, self.vae, self.encoders, self.judge = family, family.load_vae(), family.load_encoders(), build.load_judge()

    def pictures(self, model: Any, domain: str, steps: int, count: int, seed: int) -> Tensor:
        """[P, 3, 32, 32] in -1..1."""
        contexts = self.encoders.student([world.caption(scene) for scene in scenes_of(domain, count, seed)])
        return report.sample(self.family, model, self.vae, contexts, steps)

    def figures(self, model: Any, domain: str, count: int) -> dict[str, float]:
        scenes = scenes_of(domain, count, VALIDATION_SEED)
        found = figures(self.judge, self.pictures(model, domain, FEW, count, VALIDATION_SEED), scenes)
        accuracy = sum(found[name] for name in world.ATTRIBUTES) / len(world.ATTRIBUTES)
        return {"patch_fd": found["patch_fd"], "style_distance": found["palette"], "accuracy": accuracy}


def scenes_of(domain: str, count: int, seed: int) -> list[world.Scene]:
    """Captions that no training record has, and, but for the validation itself, none that learning rates are chosen by."""
    without = {world.caption(scene) for scene in build.training_scenes(TARGETS, ANCHORS, world.LEGIBLE)}
    if seed != VALIDATION_SEED:
        without |= {world.caption(scene) for scene in scenes_of(domain, FULL.validation, VALIDATION_SEED)}
    return world.sample_scenes(domain, count, seed, world.LEGIBLE, without)


def start(family: Family) -> nn.Module:
    return family.load_transformer(torch.float32)


def checkpoints(run: Path, family: Family, all_of_them: bool) -> Iterator[tuple[int, nn.Module]]:
    """(step, student) of every checkpoint of the run in order, or of the newest."""
    found = sorted((run / "checkpoints").glob("step-*"))
    if not found:
        raise UserError(f"{run}: holds no checkpoint to draw from; remove it, and the next run begins it anew")
    for folder in found if all_of_them else found[-1:]:
        yield int(folder.name.removeprefix("step-")), trained(folder, family)


def trained(checkpoint: Path, family: Family) -> nn.Module:
    """The student of a checkpoint of the trainer, or of the eager reference (one safetensors file)."""
    from safetensors.torch import load_file

    model = start(family)
    weights = checkpoint / "student.safetensors"
    if weights.exists():
        model.load_state_dict(load_file(weights))
        return model
    with tempfile.TemporaryDirectory() as name:
        if convert.main([str(checkpoint), f"{name}/export", "--which", "student"]):
            raise UserError(f"{checkpoint}: cannot be converted; its run's log says more")
        return report.trained(family, load_settings([str(checkpoint.parents[1] / "settings.toml")]), Path(name) / "export")


def sample(pictures: np.ndarray, domain: str, judge: judging.Judge, seed: int = TEST_SEED) -> Sample:
    """The measures of kept pictures: patch_fd, the Frechet distance of raw 4x4 patches to exact renders of the same scenes with
    other fine detail; style_distance, see `measure.palette_distance`; accuracy, the share of attributes as the caption says."""
    scenes = scenes_of(domain, len(pictures), seed)
    real = to_pictures(world.render([world.reseed(scene, scene.seed ^ 0x77) for scene in scenes]))
    made = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        readings, wanted = judge(made), judging.targets(scenes)
    right = torch.stack([readings[name].argmax(1) == wanted[name] for name in world.ATTRIBUTES]).double().mean(0)
    return Sample(
        values={"accuracy": right.numpy()},
        ratios={"style_distance": np.stack(ground_distances(made, scenes), axis=1)},
        frechet={"patch_fd": Moments.of(patches(made).unflatten(0, (len(made), -1)), patches(real))},
    )


def write(file: Path, content: Any) -> None:
    part = file.with_suffix(".part")
    part.write_text(json.dumps(content) + "\n")
    part.replace(file)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], Job, draw))
