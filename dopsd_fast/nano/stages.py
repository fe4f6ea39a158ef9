"""The builder's training stages. Each is a loss on a freshly rendered batch; `Stage.run` trains, saves and resumes it."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from dopsd_fast.nano import judge as judging
from dopsd_fast.nano import world
from dopsd_fast.nano.measure import to_pictures
from dopsd_fast.storage.atomic import replacing

GRID = (0.0, 0.1, 0.25, 0.5, 1.0)
"""Four steps at shift 3 (t = 0 is noise)."""


@dataclass
class Stage:
    """AdamW with warm-up and cosine decay on `loss(step)`; keeps a running average of the weights, which is its result."""

    name: str
    module: nn.Module
    loss: Callable[[int], Tensor]
    steps: int
    learning_rate: float
    folder: Path
    decay: float = 0.998
    seconds_between_saves: float = 60.0

    def run(self) -> nn.Module:
        params = dict(self.module.named_parameters())
        average = {name: p.detach().clone() for name, p in params.items()}
        optimizer = torch.optim.AdamW(params.values(), lr=self.learning_rate, betas=(0.9, 0.98), weight_decay=1e-3)
        first, file = 0, self.folder / f"{self.name}.safetensors"
        if file.exists():
            first = self._load(file, params, average, optimizer)
        started = saved = time.perf_counter()
        shown: list[float] = []
        for step in range(first, self.steps):
            torch.manual_seed(_seed(self.name, step))
            for group in optimizer.param_groups:
                group["lr"] = self.learning_rate * _schedule(step, self.steps)
            loss = self.loss(step)
            loss.backward()
            nn.utils.clip_grad_norm_(params.values(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            decay = min(self.decay, (step + 1) / (step + 10))
            torch._foreach_lerp_(list(average.values()), [p.detach() for p in params.values()], 1 - decay)
            shown.append(loss.item())
            if (step + 1) % 100 == 0 or step + 1 == self.steps:
                rate = (step + 1 - first) / (time.perf_counter() - started)
                print(
                    f"{self.name:8} {step + 1:6}/{self.steps}  loss {sum(shown) / len(shown):.4f}  {rate:.2f} steps/s",
                    flush=True,
                )
                shown.clear()
            if step + 1 == self.steps or time.perf_counter() - saved > self.seconds_between_saves:
                self._save(file, step + 1, params, average, optimizer)
                saved = time.perf_counter()
        with torch.no_grad():
            for name, p in params.items():
                p.copy_(average[name])
        return self.module.eval().requires_grad_(False)

    def _save(self, file: Path, step: int, params, average, optimizer) -> None:
        tensors = {f"weight/{n}": p.detach().contiguous() for n, p in params.items()}
        tensors |= {f"average/{n}": a for n, a in average.items()}
        for name, p in params.items():
            for key, value in optimizer.state[p].items():
                tensors[f"{key}/{name}"] = value
        with replacing(file) as part:
            save_file({k: v.clone() for k, v in tensors.items()}, part, metadata={"step": json.dumps(step)})

    def _load(self, file: Path, params, average, optimizer) -> int:
        from safetensors import safe_open

        tensors = load_file(file)
        with safe_open(file, "pt") as opened:
            step = json.loads(opened.metadata()["step"])
        with torch.no_grad():
            for name, p in params.items():
                p.copy_(tensors[f"weight/{name}"])
                average[name].copy_(tensors[f"average/{name}"])
                optimizer.state[p] = {
                    k: tensors[f"{k}/{name}"] for k in ("step", "exp_avg", "exp_avg_sq") if f"{k}/{name}" in tensors
                }
                if not optimizer.state[p]:
                    del optimizer.state[p]
        print(f"{self.name:8} resumes at step {step}", flush=True)
        return step


def _seed(name: str, step: int) -> int:
    return step * 1009 + sum(map(ord, name))


def _schedule(step: int, steps: int) -> float:
    warm = min(200, max(1, steps // 20))
    return (
        (step + 1) / warm
        if step < warm
        else 0.01 + 0.99 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))) / 2
    )


def judge_loss(judge: nn.Module, batch: int) -> Callable[[int], Tensor]:
    """Real renders of all domains, some lightly noised, so that readings of generated pictures are steady."""

    def loss(step: int) -> Tensor:
        scenes = [
            s
            for i, d in enumerate(("original", "wild", "target"))
            for s in world.sample_scenes(d, batch // 3, seed=10_000_000 + step)
        ]
        pictures = to_pictures(world.render(scenes))
        pictures = pictures + torch.rand(len(scenes), 1, 1, 1) * 0.2 * torch.randn_like(pictures)
        return judging.loss(judge(pictures), judging.targets(scenes))

    return loss


def vae_loss(vae: Any, batch: int, kl: float = 1e-5) -> Callable[[int], Tensor]:
    """Mean squared error of the reconstruction plus `kl` x KL(q(z|x) || N(0, 1)) per latent element."""

    def loss(step: int) -> Tensor:
        scenes = world.sample_scenes("wild" if step % 4 else "original", batch, seed=20_000_000 + step)
        pictures = to_pictures(world.render(scenes))
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(pictures).latent_dist
            decoded = vae.decode(posterior.sample()).sample
        return F.mse_loss(decoded.float(), pictures) + kl * posterior.kl().float().mean() / 2048

    return loss


class Conditioner:
    """Captions, and pictures to show, -> caption features, through the one language model that both encoders share."""

    def __init__(self, tokenizer, vlm):
        self.tokenizer, self.vlm = tokenizer, vlm
        self.image_id = vlm.config.image_token_id

    def text(self, captions: list[str]) -> list[Tensor]:
        inputs = self._tokens(captions, "")
        hidden = self.vlm.model.language_model(**inputs, output_hidden_states=True).hidden_states[-2]
        return [h[m.bool()] for h, m in zip(hidden, inputs["attention_mask"], strict=True)]

    def image(self, captions: list[str], pictures: Tensor) -> list[Tensor]:
        """pictures [N, 3, 32, 32] in -1..1, cut as the image processor cuts them (merge size 1)."""
        size = self.vlm.config.vision_config.patch_size
        side = pictures.shape[-1] // size
        cut = pictures.unfold(2, size, size).unfold(3, size, size).permute(0, 2, 3, 1, 4, 5)
        pixels = cut.unsqueeze(4).expand(-1, -1, -1, -1, 2, -1, -1).reshape(len(pictures) * side * side, -1)
        pads = "<|vision_start|>" + "<|image_pad|>" * side * side + "<|vision_end|>"
        inputs = self._tokens(captions, pads)
        hidden = self.vlm.model(
            **inputs,
            pixel_values=pixels,
            image_grid_thw=torch.tensor([[1, side, side]] * len(pictures)),
            mm_token_type_ids=(inputs["input_ids"] == self.image_id).int(),
            output_hidden_states=True,
        ).hidden_states[-2]
        return [h[m.bool()] for h, m in zip(hidden, inputs["attention_mask"], strict=True)]

    def _tokens(self, captions: list[str], before: str):
        texts = [f"<|im_start|>user\n{before}{c}<|im_end|>\n<|im_start|>assistant\n" for c in captions]
        return dict(self.tokenizer(texts, padding=True, return_tensors="pt"))


def velocity(transformer, x: Tensor, t: Tensor, contexts: list[Tensor]) -> Tensor:
    """x [B, C, h, w] at times t [B] -> dx/dt, float32."""
    out = transformer(list(x.unsqueeze(2)), t, contexts, return_dict=False)[0]
    return torch.stack(out).squeeze(2).float()


def draw(step: int, batch: int, offset: int, share: float, wild_shown: float) -> tuple[list[world.Scene], bool]:
    """One batch's scenes, and whether the model is shown pictures: a `share` of the steps with a picture, the others captions
    alone. `wild_shown`: the wild domain's share of a shown batch."""
    shown = (step * share) % 1 < share
    wild = wild_shown if shown else 0.25
    count = round(batch * wild)
    scenes = world.sample_scenes("wild", count, offset + step) + world.sample_scenes(
        "original", batch - count, offset + step
    )
    return scenes, shown


def captions(scenes: list[world.Scene], step: int) -> list[str]:
    return [world.caption(scene, (step + i) % 4 % 3) for i, scene in enumerate(scenes)]


def contexts(conditioner: Conditioner, scenes, step: int, shown: bool) -> list[Tensor]:
    """What is shown is the same content with other fine detail."""
    words = captions(scenes, step)
    if not shown:
        return conditioner.text(words)
    other = [world.reseed(s, s.seed ^ 0x5A5A5A) for s in scenes]
    return conditioner.image(words, to_pictures(world.render(other)))


class Latents:
    """Pictures <-> normalised latents through the trained autoencoder."""

    def __init__(self, vae):
        self.vae = vae

    @torch.no_grad()
    def encode(self, pictures: Tensor) -> Tensor:
        raw = self.vae.encode(pictures).latent_dist.mode().float()
        return (raw - self.vae.config.shift_factor) * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        out = [
            self.vae.decode(part / self.vae.config.scaling_factor + self.vae.config.shift_factor).sample.clamp(-1, 1)
            for part in latents.split(32)
        ]
        return torch.cat(out)


def object_weights(scenes: list[world.Scene], weight: float = 4.0) -> Tensor:
    """[N, 1, 16, 16], mean 1."""
    masks = torch.from_numpy(np.stack([world.object_mask(scene, margin=3.0) for scene in scenes])).float()
    weights = 1 + (weight - 1) * F.max_pool2d(masks[:, None], 2)
    return weights / weights.mean()


def base_loss(transformer, conditioner: Conditioner, latents: Latents, batch: int) -> Callable[[int], Tensor]:
    """Flow matching: mean w (v(x_t, t, c) - (image - noise))^2, sigma = 1.5u / (1 + 0.5u) with u uniform. w is 4 on the object
    and 3 pixels around it and 1 elsewhere: the ground's fine detail is most of the loss and says nothing of shapes."""

    def loss(step: int) -> Tensor:
        scenes, shown = draw(step, batch, 30_000_000, share=0.6, wild_shown=0.7)
        with torch.autocast("cpu", torch.bfloat16):
            image = latents.encode(to_pictures(world.render(scenes)))
            noise, u = torch.randn_like(image), torch.rand(len(scenes))
            t = 1 - 1.5 * u / (1 + 0.5 * u)
            x = torch.lerp(noise, image, t.view(-1, 1, 1, 1))
            v = velocity(transformer, x, t, contexts(conditioner, scenes, step, shown))
        return (object_weights(scenes) * (v - (image - noise)).square()).mean()

    return loss


@torch.no_grad()
def integrate(transformer, x: Tensor, start: float, end: float, steps: int, context) -> Tensor:
    """Midpoint rule for dx/dt = v from `start` to `end`."""
    dt = (end - start) / steps
    for i in range(steps):
        t = torch.full((len(x),), start + i * dt)
        middle = x + dt / 2 * velocity(transformer, x, t, context)
        x = x + dt * velocity(transformer, middle, t + dt / 2, context)
    return x


def distil_loss(
    student,
    base,
    conditioner: Conditioner,
    latents: Latents,
    batch: int,
    offset: int = 40_000_000,
    share: float = 0.6,
    wild_shown: float = 0.5,
) -> Callable[[int], Tensor]:
    """One step of the student over a segment of GRID = the base's fine path over that segment:
    mean (v_s(x, t_k, c) - (x(t_{k+1}) - x(t_k)) / (t_{k+1} - t_k))^2, from noised data and from the student's own states.

    The end of the last segment is first moved onto the world's pictures (`world.snap`), where the context tells the style:
    the place that an adversarial loss has in distilling real models. Few-step pictures may so be sharper than the base's.
    """

    def loss(step: int) -> Tensor:
        scenes, shown = draw(step, batch, offset, share, wild_shown)
        k = (0, 1, 2, 3, 3)[(step // 5) % 5]
        with torch.autocast("cpu", torch.bfloat16):
            with torch.no_grad():
                context = contexts(conditioner, scenes, step, shown)
                image = latents.encode(to_pictures(world.render(scenes)))
                noise = torch.randn_like(image)
                x = torch.lerp(noise, image, GRID[k])
                if (step // 25) % 2 or k == 0:
                    x = noise
                    for a, b in zip(GRID[:k], GRID[1 : k + 1], strict=True):
                        x = x + (b - a) * velocity(student, x, torch.full((len(x),), a), context)
                end = integrate(base, x, GRID[k], GRID[k + 1], (2, 2, 3, 5)[k], context)
                if k == 3:
                    end = snapped(latents, end, scenes, shown)
            v = velocity(student, x, torch.full((len(x),), GRID[k]), context)
        return F.mse_loss(v, (end - x) / (GRID[k + 1] - GRID[k]))

    return loss


def snapped(latents: Latents, end: Tensor, scenes: list[world.Scene], shown: bool) -> Tensor:
    """`end` [N, C, h, w] through `world.snap`; a style that is neither named nor shown stays what the model made of it."""
    pictures = (latents.decode(end).float() + 1) / 2
    arrays = pictures.permute(0, 2, 3, 1).numpy()
    clean = latents.encode(to_pictures(np.stack([world.snap(a, s) for a, s in zip(arrays, scenes, strict=True)])))
    told = torch.tensor([shown or scene.style in world.NAMED for scene in scenes])
    return torch.where(told.view(-1, 1, 1, 1), clean, end)
