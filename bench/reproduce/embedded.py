"""`python -m bench.reproduce.embedded JOB.json` draws with what a run on the embedded pipeline has become.

Pictures come from `dopsd_fast.nano.report.sample`: the family's grid, noise that depends on the caption's place alone, 8 bits a
channel. What is read of them is the renderer's and the judge's; the trained model has no say.
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
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from bench.reproduce.arms import DOMAINS, FULL, MANY, Arm, Budget
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
from dopsd_fast.storage.atomic import atomic_folder, replacing, write_text

FEW = 4
TEST_SEED, VALIDATION_SEED = 31_000, 17_000
"""Of captions."""
TARGETS, ANCHORS, TARGETS_OF_FEW = 64, 64, 4
"""Training records: pictures of the target style and of the original domain; the customisation has some of the former only."""
VALIDATION, CURVE, KEPT = "validation.json", "curve.json", "pictures.npz"
"""What is in the folder of what was drawn: measures that learning rates are chosen by, and of every checkpoint; pictures."""
SILENT = ("sample.every=0", "sample.count=0", "sample.prompts=[]")
KNOWN = {"sft": 1e-3, "sft_lora": 3e-3, "pso": 1e-4, "dopsd": 1e-3}
"""Learning rates for runs without a search, which are shorter: the highest that the search of the committed results scored at
most 5 % worse than its best."""


@dataclass
class Embedded:
    """`folder`: where the records are written when they are first asked for: 64 pictures of the target style with 64
    anchors, or four pictures for the customisation."""

    folder: Path
    module = "bench.reproduce.embedded"
    rates = (1e-4, 3e-4, 1e-3)
    curve, few, side = True, FEW, 112

    def describe(self) -> dict[str, Any]:
        return {"model": "nano"}

    def words(self, arm: Arm, budget: Budget) -> list[str]:
        lora = ["adapter.rank=16", "adapter.alpha=32"] if arm.lora else []
        return [
            "nano_full", "model.path=nano", f"data.path={self.data(arm.data)}", f"train.steps={budget.steps}",
            "train.threads=1", *SILENT, "conditioning.cache=disk", f"conditioning.folder={self.folder / 'contexts'}",
            f"checkpoint.every={max(1, budget.steps // budget.points)}", f"checkpoint.keep={budget.points + 1}",
            *arm.words, *lora,
        ]

    def data(self, which: str) -> Path:
        folder = self.folder / which
        if not (folder / "data.jsonl").exists():
            with atomic_folder(folder) as part:
                build.save_data(part, *(TARGETS, ANCHORS) if which == "all" else (TARGETS_OF_FEW, 0), world.LEGIBLE)
        return folder

    def job(self, budget: Budget, curve: bool, final: bool) -> dict[str, Any]:
        sizes = (budget.captions, 0, budget.curve * curve) if final else (0, budget.validation, 0)
        return dict(zip(("captions", "validation", "curve"), sizes))

    def score(self, drawn: Path) -> float:
        """patch_fd of the validation captions at the deployment step count, target plus original domain: both are wanted."""
        found = json.loads((drawn / VALIDATION).read_text())
        return float(found["target"]["patch_fd"] + found["original"]["patch_fd"])

    def known_rate(self, arm: Arm) -> float:
        return KNOWN.get(arm.name, KNOWN["dopsd"])

    def kept(self, drawn: Path) -> dict[str, np.ndarray]:
        """By "domain@steps"; empty: there is nothing."""
        if not (drawn / KEPT).exists():
            return {}
        with np.load(drawn / KEPT) as kept:
            return dict(kept)

    def read(self, drawn: Path) -> dict[tuple[str, int], Sample]:
        kept, judge = self.kept(drawn), build.load_judge()
        return {(d, n): sample(kept[f"{d}@{n}"], d, judge) for d in DOMAINS for n in (FEW, MANY) if kept}

    def shown(self, drawn: Path, domain: str, steps: int, count: int) -> list[Image.Image]:
        return [Image.fromarray(one) for one in self.kept(drawn).get(f"{domain}@{steps}", ())[:count]]

    def heading(self, domain: str, count: int) -> tuple[list[str], list[tuple[str, Sequence[Image.Image]]]]:
        scenes = scenes_of(domain, count, TEST_SEED)
        exact = report.images(to_pictures(world.render(scenes)))
        return [f"{scene.size} {scene.colour} {scene.shape}" for scene in scenes], [("exact render", exact)]


# ---- drawing ---------------------------------------------------------------------------------------------------------


def draw(run: str, out: str, captions: int, validation: int, curve: int) -> None:
    """Draws with the students of a run folder, "": with the pipeline as it is. Of each domain it writes to the folder `out`, 0
    where it is not wanted: KEPT, uint8 [captions, 32, 32, 3] by "domain@steps"; VALIDATION, measures of so many validation
    captions at FEW steps; CURVE, a list of the same, one a checkpoint, of the first `curve` of those."""
    settings = load_settings([f"{run}/settings.toml" if run else "model.path=nano"])
    drawer, points = Drawer(open_family(settings.model.folder, settings.conditioning)), []
    for step, student in drawer.students(run, all_of_them=curve > 0):
        if curve:
            points.append(drawer.figures(step, student, curve))
    if curve:
        write_text(Path(out, CURVE), json.dumps(points))
    if validation:
        write_text(Path(out, VALIDATION), json.dumps(drawer.figures(step, student, validation)))
    if captions:
        places = [(domain, steps) for domain in DOMAINS for steps in (FEW, MANY)]
        drawn = {f"{d}@{steps}": drawer.pictures(student, d, steps, captions, TEST_SEED) for d, steps in places}
        kept = {place: ((one + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy() for place, one in drawn.items()}
        with replacing(Path(out, KEPT)) as part, part.open("wb") as stream:
            np.savez_compressed(stream, **kept)  # type: ignore[arg-type]


class Drawer:
    def __init__(self, family: Family) -> None:
        self.family, self.vae, self.encoders, self.judge = family, family.load_vae(), family.load_encoders(), build.load_judge()

    def pictures(self, student: Any, domain: str, steps: int, count: int, seed: int) -> Tensor:
        """[P, 3, 32, 32] in -1..1."""
        contexts = self.encoders.student([world.caption(scene) for scene in scenes_of(domain, count, seed)])
        return report.sample(self.family, student, self.vae, contexts, steps)

    def figures(self, step: int, student: Any, count: int) -> dict[str, Any]:
        """{"step": step, "target": {measure: value}, "original": {...}} of validation captions."""
        point: dict[str, Any] = {"step": step}
        for domain in DOMAINS:
            pictures = self.pictures(student, domain, FEW, count, VALIDATION_SEED)
            found = figures(self.judge, pictures, scenes_of(domain, count, VALIDATION_SEED))
            accuracy = sum(found[name] for name in world.ATTRIBUTES) / len(world.ATTRIBUTES)
            point[domain] = {"patch_fd": found["patch_fd"], "style_distance": found["palette"], "accuracy": accuracy}
        return point

    def students(self, run: str, all_of_them: bool) -> Iterator[tuple[int, nn.Module]]:
        """(step, student) of every checkpoint of the run in order, or of the newest."""
        found = sorted(Path(run, "checkpoints").glob("step-*")) if run else []
        if run and not found:
            raise UserError(f"{run}: holds no checkpoint to draw from; remove it, and the next run begins it anew")
        if not run:
            yield 0, self.family.load_transformer(torch.float32)
        for folder in found if all_of_them else found[-1:]:
            yield int(folder.name.removeprefix("step-")), self.trained(folder)

    def trained(self, checkpoint: Path) -> nn.Module:
        """The student of a checkpoint of the trainer, or of the eager reference (one safetensors file)."""
        weights = checkpoint / "student.safetensors"
        if weights.exists():
            model = self.family.load_transformer(torch.float32)
            model.load_state_dict(load_file(weights))
            return model
        with tempfile.TemporaryDirectory() as name:
            if convert.main([str(checkpoint), f"{name}/export", "--which", "student"]):
                raise UserError(f"{checkpoint}: cannot be converted; its run's log says more")
            return report.trained(self.family, load_settings([f"{checkpoint.parents[1]}/settings.toml"]), Path(name, "export"))


def scenes_of(domain: str, count: int, seed: int) -> list[world.Scene]:
    """Captions that no training record has, and, but for the validation itself, none that learning rates are chosen by."""
    without = {world.caption(scene) for scene in build.training_scenes(TARGETS, ANCHORS, world.LEGIBLE)}
    if seed != VALIDATION_SEED:
        without |= {world.caption(scene) for scene in scenes_of(domain, FULL.validation, VALIDATION_SEED)}
    return world.sample_scenes(domain, count, seed, world.LEGIBLE, without)


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


def exit_code(work: Callable[..., None], *arguments: Any, **named: Any) -> int:
    """Of a process that does this work; a UserError is one line."""
    try:
        work(*arguments, **named)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(draw, **json.loads(Path(sys.argv[1]).read_text())))
