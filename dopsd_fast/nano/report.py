"""What a run on the embedded pipeline learned and what it kept: `python -m dopsd_fast.nano.report [RUN]`.

Samples the pipeline before and after at the deployment step count, on captions that training never saw, and measures
with the renderer. Prints a table, writes `report.json` and `demo.png` into the run folder (default: the newest in runs/).
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from dopsd_fast.data.contact_sheet import compose
from dopsd_fast.data.records import read_records
from dopsd_fast.errors import UserError
from dopsd_fast.families.registry import open_family
from dopsd_fast.method.trajectory import rollout
from dopsd_fast.nano import world
from dopsd_fast.nano.build import load_judge
from dopsd_fast.nano.check import figures
from dopsd_fast.nano.measure import to_pictures
from dopsd_fast.settings.load import load_settings
from dopsd_fast.settings.schema import Settings

SEED = 20_000
"""Of the captions and of the noise."""


def measure(run: Path, count: int) -> dict:
    """Figures of both domains before and after the run, on captions that none of its records has, and the two ratios that the
    demonstration promises."""
    settings = load_settings([str(run / "settings.toml")])
    family = open_family(settings.model.folder, settings.conditioning)
    steps = settings.sample.steps or family.deployment_steps
    vae, encoders, judge = family.load_vae(), family.load_encoders(), load_judge()
    models = {"before": family.load_transformer(torch.float32), "after": trained(family, settings, run / "export")}
    report: dict = {"run": str(run), "count": count, "steps": steps, "rows": {}}
    shown: dict[str, list[Image.Image]] = {}
    for domain in ("target", "original"):
        scenes = unseen_scenes(settings, family, domain, count)
        contexts = encoders.student([world.caption(scene) for scene in scenes])
        shown[f"{domain} exact"] = images(to_pictures(world.render(scenes[:8])))
        for when, model in models.items():
            pictures = sample(family, model, vae, contexts, steps)
            report["rows"][f"{domain} {when}"] = figures(judge, pictures, scenes)
            shown[f"{domain} {when}"] = images(pictures[:8])
    rows = report["rows"]
    report["style_distance_ratio"] = round(rows["target after"]["palette"] / rows["target before"]["palette"], 4)
    report["original_fd_ratio"] = round(rows["original after"]["patch_fd"] / rows["original before"]["patch_fd"], 4)
    compose([""] * 8, list(shown.items()), side=96).save(run / "demo.png")
    (run / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report


def unseen_scenes(settings: Settings, family, domain: str, count: int) -> list[world.Scene]:
    """Those whose caption no record of the run has."""
    prompts = settings.data.model_copy(update={"prompt_keys": []})
    known = {text for record in read_records(prompts, family.pixel_multiple).records for text in record.prompts.values()}
    return world.sample_scenes(domain, count, SEED, without=known)


def sample(family, model: nn.Module, vae: nn.Module, contexts: list[dict[str, Tensor]], steps: int) -> Tensor:
    """Pictures [N, 3, 32, 32] in -1..1; the noise of caption i depends on i alone."""
    shape = family.latent_shape(world.SIDE, world.SIDE)
    noise = torch.randn((len(contexts), *shape), generator=torch.Generator().manual_seed(SEED))
    out = []
    for i in range(0, len(contexts), 32):
        velocity = partial(family.velocity, model, contexts=contexts[i : i + 32])
        latents = rollout(velocity, noise[i : i + 32], family.sample_grid(steps, shape))
        out += [torch.from_numpy(_array(picture)) for picture in family.decode(vae, latents)]
    return torch.stack(out).permute(0, 3, 1, 2) / 127.5 - 1


def trained(family, settings: Settings, export: Path) -> nn.Module:
    if settings.adapter.kind == "full":
        return open_family(export, settings.conditioning).load_transformer(torch.float32)
    model = family.load_transformer(torch.float32)
    model.load_lora_adapter(export, weight_name="pytorch_lora_weights.safetensors", prefix="transformer")
    return model


def _array(picture: Image.Image) -> np.ndarray:
    return np.array(picture, dtype=np.float32)


def images(pictures: Tensor) -> list[Image.Image]:
    bytes_ = ((pictures + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(picture) for picture in bytes_]


def table(report: dict) -> str:
    names = ("palette", "patch_fd", *world.ATTRIBUTES)
    lines = [
        f"{report['count']} captions that training never saw, {report['steps']} steps a picture",
        f"{'':18}" + "".join(f"{name:>10}" for name in names),
    ]
    lines += [
        f"{row:18}" + "".join(f"{values[name]:10.3f}" for name in names) for row, values in report["rows"].items()
    ]
    lines += [
        f"style distance to the exact render (palette), after / before: {report['style_distance_ratio']:.2f} (goal: <= 0.70)",
        f"original domain, patch Frechet distance, after / before:      {report['original_fd_ratio']:.2f} (goal: <= 1.25)",
    ]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", type=Path, help="run folder (default: the newest in runs/)")
    parser.add_argument("--count", type=int, default=128, help="captions per domain")
    args = parser.parse_args()
    try:
        run = args.run or max(Path("runs").glob("*/export"), key=lambda p: p.stat().st_mtime, default=None)
        if run is None or not (args.run or run.parent / "settings.toml").exists():
            raise UserError("no finished run in runs/: name a run folder")
        run = args.run or run.parent
        print(table(measure(run, args.count)))
        print(f"picture: {run / 'demo.png'}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
