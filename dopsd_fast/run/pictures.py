"""Draws the sample grids of a run. Each row shows: target | before | student now | teacher now. Pictures are sampled with the
number of steps of ordinary use, from noise that stays the same, so that grids can be compared."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from dopsd_fast.data.contact_sheet import compose
from dopsd_fast.data.epochs import item_seed
from dopsd_fast.data.images import load_image
from dopsd_fast.data.records import Record
from dopsd_fast.errors import UserError
from dopsd_fast.method.objective import shows_images
from dopsd_fast.method.trajectory import rollout
from dopsd_fast.run.metrics import free_memory, is_out_of_memory
from dopsd_fast.run.parts import RunParts
from dopsd_fast.storage.atomic import replacing

HEADINGS = ("target", "before", "student now", "teacher now")


@dataclass(frozen=True)
class Shown:
    """One row of a grid: a record's first prompt, where `record` is its index, or a prompt of the settings, where it is
    None."""

    prompt: str
    record: int | None
    height: int
    width: int


class Showcase:
    """Draws the grids `samples/step-000100.png` and so on.

    The pictures from before training are kept as files, so that a continued run shows the same ones. Every rank samples,
    because a sharded model needs all ranks; rank 0 decodes and writes."""

    def __init__(self, parts: RunParts) -> None:
        self.parts = parts
        self.folder = parts.folder / "samples"
        self.last: Path | None = None
        self.lost: list[str] = []
        """Reasons of the pictures that were left out of the current grid because they did not fit the memory."""
        s, records = parts.settings, parts.data.records
        self.rows = [self.row(r) for r in records[: s.sample.count]] + [
            Shown(prompt, None, records[0].height, records[0].width) for prompt in s.sample.prompts
        ]
        self.vae = parts.family.load_vae().to(parts.device) if parts.rank == 0 else None

    def row(self, record: Record) -> Shown:
        keys = self.parts.settings.data.prompt_keys
        prompt = next(prompt for name, prompt in record.prompts.items() if not keys or name in keys)
        return Shown(prompt, record.index, record.height, record.width)

    def start(self, first: int) -> None:
        """Draws the pictures of the untrained model and keeps them as files. A run that continues, which has `first` > 0, has
        them already."""
        if not self.rows or first:
            return
        before = self.pictures("student")
        self.tell_lost("the start", len(before))
        if self.parts.rank == 0:
            (self.folder / "before").mkdir(parents=True, exist_ok=True)
            for i, picture in enumerate(before):
                if picture is not None:
                    with replacing(self.folder / "before" / f"{i:02}.png", flush=False) as part:
                        picture.save(part, format="PNG")

    def draw(self, step: int) -> None:
        """Draws the grid of step `step`."""
        if not self.rows:
            return
        student, teacher = self.pictures("student"), self.pictures("teacher")
        self.tell_lost(f"step {step}", len(student) + len(teacher))
        if self.parts.rank:
            return
        rows = []
        for i, shown in enumerate(self.rows):
            target = None
            if shown.record is not None:
                target = load_image(self.parts.data.records[shown.record].images[0], shown.height, shown.width)
            kept = self.folder / "before" / f"{i:02}.png"
            before = Image.open(kept).convert("RGB") if kept.exists() else None
            rows.append((shown.prompt, (target, before, student[i], teacher[i])))
        self.folder.mkdir(parents=True, exist_ok=True)
        self.last = self.folder / f"step-{step:06}.png"
        with replacing(self.last, flush=False) as part:
            compose(HEADINGS, rows).save(part, format="PNG")

    def pictures(self, branch: str) -> list[Image.Image | None]:
        """Returns one picture per row. A picture that does not fit the memory is None, and on ranks other than 0 all are."""
        return [self.picture(branch, shown, i) for i, shown in enumerate(self.rows)]

    def picture(self, branch: str, shown: Shown, index: int) -> Image.Image | None:
        """Draws one picture. One that does not fit the memory is left out, because it is no reason to end a run.

        Under ZeRO-3 this holds for decoding only. A rank that fails while it samples leaves the others waiting for its shards,
        so that a UserError is raised."""
        latent = None
        try:
            latent = self.latent(branch, shown, index)
            return self.parts.family.decode(self.vae, latent)[0] if self.vae is not None else None
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            why = " ".join(str(error).split()[:12]) or type(error).__name__
        if latent is None and self.parts.engine.stage == 3:
            raise UserError(f"out of memory while drawing a sample ({why}...), which ZeRO-3 cannot leave out: draw none "
                            "(sample.every=0 sample.count=0 sample.prompts=[]); resume=auto continues from the last checkpoint")
        free_memory(self.parts.device)
        self.lost.append(why)
        return None

    def tell_lost(self, when: str, drawn: int) -> None:
        """Reports the pictures that were left out, if any, and forgets them."""
        if self.lost:
            self.parts.say(f"samples of {when}: {len(self.lost)} of {drawn} did not fit the memory and are left out "
                             f"({self.lost[0]}...); training goes on. sample.count and sample.prompts choose fewer")
        self.lost = []

    def latent(self, branch: str, shown: Shown, index: int) -> Tensor:
        """Samples x_1 `[1, C, h, w]` of one branch. The student sees the text; the teacher also sees the record's images, where
        the row has a record and the context shows images."""
        parts, s = self.parts, self.parts.settings
        seen = branch == "teacher" and shown.record is not None and shows_images(parts.objective)
        context = (
            parts.contexts.get("teacher", shown.record, shown.prompt) if seen else parts.contexts.get("student", shown.prompt)
        )
        noise = self.noise(shown, index)
        grid = parts.family.sample_grid(s.sample.steps, tuple(noise.shape[1:]))
        return rollout(parts.pair.sampler(branch, [context], noise.shape), noise, grid)

    def noise(self, shown: Shown, index: int) -> Tensor:
        generator = torch.Generator().manual_seed(item_seed(self.parts.settings.sample.seed, 0, index, 0, "sample"))
        shape = self.parts.family.latent_shape(shown.height, shown.width)
        return torch.randn((1, *shape), generator=generator).to(self.parts.device)
