"""Builds the embedded pipeline: `python -m dopsd_fast.nano.build [--work DIR] [--out DIR] [--tiny]`.

render -> judge, autoencoder -> pre-train (captions alone and with a picture shown) -> distil to 4 steps, polish -> check
-> save.
Every stage is seeded and resumes where it was interrupted; an hour or two on two CPU cores.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from dopsd_fast.nano import judge as judging
from dopsd_fast.nano import models, stages, world
from dopsd_fast.nano.check import check
from dopsd_fast.nano.measure import to_pictures

HERE = Path(__file__).parent


def build(work: Path, out: Path, sizes: dict[str, int], until: str = "save") -> dict | None:
    work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    judge = judging.Judge()
    stages.Stage("judge", judge, stages.judge_loss(judge, 96), sizes["judge"], 2e-3, work).run()
    if until == "judge":
        return None
    torch.manual_seed(0)
    vae = models.vae()
    stages.Stage("vae", vae, stages.vae_loss(vae, 32), sizes["vae"], 2e-3, work).run()
    normalise(vae)
    if until == "vae":
        return None

    torch.manual_seed(0)
    tokenizer = models.tokenizer()
    base = torch.nn.ModuleDict({"vlm": models.vlm(tokenizer), "transformer": models.transformer()})
    conditioner, latents = stages.Conditioner(tokenizer, base["vlm"]), stages.Latents(vae)
    loss = stages.base_loss(base["transformer"], conditioner, latents, sizes["batch"])
    stages.Stage("base", base, loss, sizes["base"], 1e-3, work).run()
    if until == "base":
        return None
    student = models.transformer()
    student.load_state_dict(base["transformer"].state_dict())
    loss = stages.distil_loss(student, base["transformer"], conditioner, latents, sizes["batch"])
    stages.Stage("distil", student, loss, sizes["distil"], 4e-4, work, decay=0.99).run()

    # Pictures of named styles that are shown lag behind the same captions alone: a teacher must not be worse than its student.
    loss = stages.distil_loss(
        student.requires_grad_(True), base["transformer"], conditioner, latents, sizes["batch"], 50_000_000, 0.75, 0.2
    )
    stages.Stage("polish", student, loss, sizes["polish"], 2e-4, work, decay=0.98).run()

    if until == "polish":
        return None
    report = check(judge, base["transformer"], student, conditioner, latents, sizes["check"])
    print(json.dumps(report, indent=1))
    save(out, tokenizer, base["vlm"], student, vae, judge, report)
    return report


def normalise(vae) -> None:
    """Latents get mean 0 and standard deviation 1 over wild renders."""
    with torch.no_grad():
        pictures = to_pictures(world.render(world.sample_scenes("wild", 256, seed=1)))
        raw = vae.encode(pictures).latent_dist.mode()
        error = (vae.decode(raw).sample - pictures).square().mean()
    vae.register_to_config(shift_factor=round(raw.mean().item(), 6), scaling_factor=round(1 / raw.std().item(), 6))
    print(f"autoencoder: {10 * torch.log10(4 / error):.1f} dB on unseen renders")


def save(out: Path, tokenizer, vlm, transformer, vae, judge, report) -> None:
    """The pipeline in the layout that ZImagePipeline.from_pretrained reads, with the VLM beside it in `vlm`."""
    from diffusers import ZImagePipeline

    encoder = models.text_encoder(tokenizer)
    encoder.load_state_dict(vlm.model.language_model.state_dict())
    folder = out / "pipeline"
    shutil.rmtree(folder, ignore_errors=True)
    ZImagePipeline(
        scheduler=models.scheduler(), vae=vae, text_encoder=encoder.eval(), tokenizer=tokenizer, transformer=transformer
    ).save_pretrained(folder)
    vlm.save_pretrained(folder / "vlm")
    tokenizer.save_pretrained(folder / "vlm")
    models.image_processor().save_pretrained(folder / "vlm")
    save_file({k: v.contiguous() for k, v in judge.state_dict().items()}, out / "judge.safetensors")
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    save_data(out / "data")


def training_scenes(targets: int, anchors: int, style: world.Style) -> list[world.Scene]:
    """Those of the records that `save_data` writes, in their order."""
    return world.sample_scenes("target", targets, 7, style) + world.sample_scenes("original", anchors, seed=7)


def save_data(folder: Path, targets: int = 64, anchors: int = 64, style: world.Style = world.TARGET) -> None:
    """A training set in the authors' JSONL format, the demonstration's unless another `style` is given: pictures of the target
    style, and anchors: pictures of the original domain, which a small model needs to see so that what moves the new style does
    not move everything."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "images").mkdir(parents=True)
    kinds = ["target"] * targets + ["original"] * anchors
    scenes = training_scenes(targets, anchors, style)
    with open(folder / "data.jsonl", "w", encoding="utf-8") as lines:
        for i, (kind, scene, picture) in enumerate(zip(kinds, scenes, world.render(scenes), strict=True)):
            name = f"images/{i:03}.png"
            Image.fromarray((picture * 255).round().astype("uint8")).save(folder / name, optimize=True)
            record = {
                "class_name": kind,
                "local_path_list": [name],
                "h*w": f"{world.SIDE}*{world.SIDE}",
                "short_en": world.caption(scene, 2),
                "medium_en": world.caption(scene, 0),
                "detailed_en": world.caption(scene, 1),
            }
            lines.write(json.dumps(record) + "\n")


def load_judge(folder: Path = HERE) -> judging.Judge:
    judge = judging.Judge()
    judge.load_state_dict(load_file(folder / "judge.safetensors"))
    return judge.eval().requires_grad_(False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--work", type=Path, default=Path("runs/nano-build"), help="where interrupted stages resume from"
    )
    parser.add_argument("--out", type=Path, default=HERE, help="where the pipeline, judge, data and report are written")
    parser.add_argument(
        "--until", default="save", choices=("judge", "vae", "base", "polish", "save"), help="stop after this stage"
    )
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (0: all)")
    parser.add_argument("--tiny", action="store_true", help="a few steps of everything, to prove that the script runs")
    for name, value in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default {value}")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    sizes = {name: 3 if args.tiny and name != "batch" else getattr(args, name) for name in SIZES}
    build(args.work, args.out, {**sizes, "batch": 6, "check": 12} if args.tiny else sizes, args.until)


SIZES = {"judge": 1500, "vae": 1500, "base": 5800, "distil": 600, "polish": 130, "batch": 32, "check": 256}

if __name__ == "__main__":
    main()
