"""What the arms are trained and judged on: the embedded world, or a user's own model, records and metrics."""

from __future__ import annotations

import json
import math
import shutil
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

from bench.reproduce.arms import Arm, Budget
from bench.reproduce.pictures import ANCHORS, TARGETS, TARGETS_OF_FEW
from dopsd_fast.errors import UserError
from dopsd_fast.families.registry import open_family
from dopsd_fast.nano import build, world
from dopsd_fast.settings.load import load_settings
from dopsd_fast.settings.schema import Settings

SILENT = ("sample.every=0", "sample.count=0", "sample.prompts=[]")


class Subject(Protocol):
    """`module`: what draws with a trained model, called with the file of a job. `rates`: where a search of learning rates
    begins. `curve`: pictures are drawn from every checkpoint."""

    @property
    def module(self) -> str: ...
    @property
    def rates(self) -> tuple[float, ...]: ...
    @property
    def curve(self) -> bool: ...

    def describe(self) -> dict[str, Any]: ...

    def words(self, arm: Arm, budget: Budget) -> list[str]:
        """The settings of a run but for learning rate, seed and place; its recipe first."""
        ...

    def job(self, run: str, out: Path, budget: Budget, curve: bool, final: bool) -> dict[str, Any]:
        """What `module` is told. `run`: the run folder, "" for the start."""
        ...

    def score(self, drawn: Path) -> float:
        """What learning rates are chosen by, lower is better: of the validation pictures in `drawn`."""
        ...

    def known_rate(self, arm: Arm) -> float: ...


@dataclass
class Embedded:
    """nano. `folder`: where the records are written when they are first asked for: 64 pictures of the target style with 64
    anchors, or four pictures for the customisation."""

    folder: Path
    model: str = "nano"
    module = "bench.reproduce.pictures"
    rates: ClassVar[tuple[float, ...]] = (1e-4, 3e-4, 1e-3)
    curve = True
    _lock: threading.Lock = field(default_factory=threading.Lock)

    KNOWN = {"sft": 1e-3, "sft_lora": 3e-3, "pso": 1e-4, "dopsd": 1e-3}
    """For runs without a search, which are shorter: the highest rate that the search of the committed results scored at most
    5 % worse than its best."""

    def describe(self) -> dict[str, Any]:
        return {"model": self.model}

    def words(self, arm: Arm, budget: Budget) -> list[str]:
        lora = ["adapter.rank=16", "adapter.alpha=32"] if arm.lora else []
        return [
            "nano_full", f"model.path={self.model}", f"data.path={self.data(arm.data)}", f"train.steps={budget.steps}",
            "train.threads=1", *SILENT, "conditioning.cache=disk", f"conditioning.folder={self.folder / 'contexts'}",
            f"checkpoint.every={max(1, budget.steps // budget.points)}", f"checkpoint.keep={budget.points + 1}",
            *arm.words, *lora,
        ]  # fmt: skip

    def data(self, which: str) -> Path:
        folder = self.folder / which
        with self._lock:
            if not (folder / "data.jsonl").exists():
                part = folder.with_name(f"{which}.part")
                targets, anchors = (TARGETS, ANCHORS) if which == "all" else (TARGETS_OF_FEW, 0)
                build.save_data(part, targets, anchors, world.LEGIBLE)
                shutil.rmtree(folder, ignore_errors=True)
                part.replace(folder)
        return folder

    def job(self, run: str, out: Path, budget: Budget, curve: bool, final: bool) -> dict[str, Any]:
        sizes = (budget.captions, 0, budget.curve * curve) if final else (0, budget.validation, 0)
        return {"run": run, "model": self.model, "out": str(out)} | dict(zip(("captions", "validation", "curve"), sizes))

    def score(self, drawn: Path) -> float:
        """patch_fd of the validation captions at the deployment step count, target plus original domain: both are wanted."""
        found = json.loads((drawn / "validation.json").read_text())
        return float(found["target"]["patch_fd"] + found["original"]["patch_fd"])

    def known_rate(self, arm: Arm) -> float:
        return self.KNOWN.get(arm.name, self.KNOWN["dopsd"])


@dataclass
class Given:
    """A user's own. `data`: records, as data.path takes them. `evaluation`: see `bench.reproduce.full_pictures`. `recipe`:
    empty is the family's. `more`: settings of all arms, after all others."""

    model: str
    data: str
    evaluation: str
    device: str
    recipe: str = ""
    more: Sequence[str] = ()
    module = "bench.reproduce.full_pictures"
    rates: ClassVar[tuple[float, ...]] = (3e-6, 1e-5, 3e-5)
    curve = False

    def __post_init__(self) -> None:
        settings = Settings.model_validate({"model": {"path": self.model}})
        self.family = open_family(settings.model.folder, settings.conditioning)
        if not self.recipe:
            found = {"zimage": "zimage_turbo_full"}.get(self.family.name)
            if found is None:
                raise UserError(f"reproduce: no recipe trains every weight of {self.family.name}: name one by --recipe")
            self.recipe = found
        load_settings(self.words(Arm("dopsd", ""), None))

    def describe(self) -> dict[str, Any]:
        return {"model": self.model, "data": self.data, "eval": self.evaluation, "recipe": self.recipe, "more": list(self.more)}

    def words(self, arm: Arm, budget: Budget | None) -> list[str]:
        steps = [f"train.steps={budget.steps}"] if budget else []
        return [
            self.recipe, f"model.path={self.model}", f"data.path={self.data}", *steps, *SILENT, "checkpoint.every=0",
            "checkpoint.keep=1", *arm.words, *self.more,
        ]  # fmt: skip

    def settings(self) -> Settings:
        return load_settings(self.words(Arm("dopsd", ""), None))

    def job(self, run: str, out: Path, budget: Budget, curve: bool, final: bool) -> dict[str, Any]:
        mine = {"words": self.words(Arm("dopsd", ""), None), "evaluation": self.evaluation, "device": self.device}
        return {"run": run, "out": str(out), "final": final, **mine}

    def score(self, drawn: Path) -> float:
        """The first measure of the target's pictures in the order fid, lpips, dino_distance that there is."""
        found = json.loads((drawn / "validation.json").read_text())
        return next((float(found[name]) for name in ("fid", "lpips", "dino_distance") if name in found), math.nan)

    def known_rate(self, arm: Arm) -> float:
        """Published for LoRA; what other trainers use for every weight."""
        return 1e-4 if arm.lora else 1e-5
