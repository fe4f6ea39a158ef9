"""What the embedded pipeline must show, measured: few-step quality, attributes, and how well a shown style is copied."""

from __future__ import annotations

import torch

from dopsd_fast.nano import judge as judging
from dopsd_fast.nano import stages, world
from dopsd_fast.nano.measure import palette_distance, patch_distance, to_pictures


@torch.no_grad()
def sample(transformer, conditioner, latents, scenes, steps: int, shown: bool, seed: int = 0) -> torch.Tensor:
    """Pictures [N, 3, 32, 32] by `steps` Euler steps at shift 3; with `shown`, a picture of the same content is seen."""
    sigma = torch.linspace(1, 0, steps + 1)
    grid = (1 - 3 * sigma / (1 + 2 * sigma)).tolist()
    noise = torch.randn(len(scenes), 8, 16, 16, generator=torch.Generator().manual_seed(seed))
    out = []
    for i in range(0, len(scenes), 32):
        part = scenes[i : i + 32]
        other = to_pictures(world.render([world.reseed(s, s.seed ^ 0x3C3C3C) for s in part]))
        words = [world.caption(scene) for scene in part]
        context = conditioner.image(words, other) if shown else conditioner.text(words)
        x = noise[i : i + 32]
        for a, b in zip(grid, grid[1:], strict=False):
            x = x + (b - a) * stages.velocity(transformer, x, torch.full((len(x),), a), context)
        out.append(latents.decode(x))
    return torch.cat(out)


def figures(judge, pictures, scenes) -> dict[str, float]:
    real = to_pictures(world.render([world.reseed(s, s.seed ^ 0x77) for s in scenes]))
    out = {"patch_fd": patch_distance(pictures, real), "palette": palette_distance(pictures, scenes)}
    out |= judging.accuracy(judge, pictures, scenes)
    return {name: round(value, 4) for name, value in out.items()}


def check(judge, base, distilled, conditioner, latents, count: int) -> dict:
    """Figures of real renders, base at 4 and 32 steps, distilled at 4; caption alone and with a picture shown."""
    report: dict = {"count": count, "rows": {}}
    for domain in ("original", "target"):
        scenes = world.sample_scenes(domain, count, seed=99)
        rows = {"real": figures(judge, to_pictures(world.render(scenes)), scenes)}
        for shown in (False, True):
            for name, model, steps in (("base 4", base, 4), ("base 32", base, 32), ("distilled 4", distilled, 4)):
                pictures = sample(model, conditioner, latents, scenes, steps, shown)
                rows[f"{name} {'shown' if shown else 'text'}"] = figures(judge, pictures, scenes)
        report["rows"][domain] = rows
    original, target = report["rows"]["original"], report["rows"]["target"]
    scored = list(world.ATTRIBUTES)
    report["caption_features"] = caption_features(conditioner)
    report["required"] = {
        "judge reads real renders >= 0.97": min(r["real"][a] for r in (original, target) for a in scored),
        "base 32 accuracy >= 0.90": min(original["base 32 text"][a] for a in scored),
        "distilled 4 / base 32 accuracy >= 0.95": round(
            min(original["distilled 4 text"][a] / max(original["base 32 text"][a], 1e-9) for a in scored), 4
        ),
        "distilled 4 / base 4 patch FD <= 0.3": round(
            original["distilled 4 text"]["patch_fd"] / original["base 4 text"]["patch_fd"], 4
        ),
        "held-out style: shown / text patch FD <= 0.5": round(
            target["distilled 4 shown"]["patch_fd"] / target["distilled 4 text"]["patch_fd"], 4
        ),
        "style word moves a caption, in distances between captions >= 0.5": report["caption_features"]["distance"],
    }
    return report


@torch.no_grad()
def caption_features(conditioner) -> dict[str, float]:
    """How a caption's features change when the target's style word is put before it, over 64 captions of the plain style:
    `cosine` of the mean-pooled features with and without it, and `distance` between the two in units of the mean distance
    between two captions that describe different things."""
    scenes = [s for s in world.sample_scenes("original", 400, seed=5) if not s.style.word][:64]
    plain, styled = (
        torch.stack([f.mean(0) for f in conditioner.text([word + world.caption(s) for s in scenes])])
        for word in ("", f"{world.TARGET_TAG} style: ")
    )
    others = (plain[:, None] - plain[None]).norm(dim=-1)
    distance = (plain - styled).norm(dim=-1).mean() / others[others > 0].mean()
    cosine = torch.cosine_similarity(plain, styled, dim=-1).mean()
    return {"cosine": round(cosine.item(), 4), "distance": round(distance.item(), 4)}
