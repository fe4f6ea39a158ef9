"""What is measured, in fp32 on a CPU and bf16 on a GPU: the embedded pipeline, random weights, or a pipeline folder.

    nano           the embedded pipeline, its own weights
    zimage-turbo   Z-Image-Turbo's architecture, 6.15 B parameters, random weights: as fast as the published ones
    zimage-small   the same, 192 wide and 4 blocks deep, to try out on a CPU what zimage-turbo is measured with
    PATH           a Z-Image pipeline folder in diffusers' layout, its own weights
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dopsd_fast.errors import UserError
from dopsd_fast.families.base import Family
from dopsd_fast.families.build import build_pair
from dopsd_fast.families.published import PUBLISHED, published_family
from dopsd_fast.families.registry import open_family
from dopsd_fast.pair.student_teacher import Pair
from dopsd_fast.settings.schema import Settings

SMALL = {"dim": 192, "n_layers": 4, "n_refiner_layers": 1, "n_heads": 3, "n_kv_heads": 3, "cap_feat_dim": 64,
         "axes_dims": [16, 24, 24], "axes_lens": [512, 128, 128]}
"""What differs from the published architecture in zimage-small."""
RANDOM = {"zimage-turbo": {}, "zimage-small": SMALL}
WIDE, SHOWN_PIXELS = 1024, 768**2
"""From this width on a model is measured at the published sizes; the largest picture that recipes/zimage_turbo_lora.toml shows
to the teacher's encoder."""


@dataclass(frozen=True)
class Standard:
    """The standard configuration of a model: every suite's plain case."""

    pixels: int
    batch: int
    text_tokens: int
    teacher_tokens: int
    rank: int
    alpha: float
    states: int = 4


class Model:
    """One model on one device. `suffix`: what its cases end in, nothing for the two that have committed results: nano on a CPU
    and zimage-turbo on a GPU. `folder`: where its parts lie; None for random weights, which have no encoders, prompts or
    pictures on the disk. UserError: no such folder, another family than Z-Image, a size that this machine cannot hold."""

    def __init__(self, name: str, device: torch.device) -> None:
        self.device, self.random, self.settings = device, name in RANDOM, Settings()
        if self.random:
            self.name = name
            self.family: Family = published_family("zimage", self.settings.conditioning)
            self.family.transformer_config = PUBLISHED["zimage"]["transformer"] | RANDOM[name]
            self.family.scheduler_config = {"shift": 3.0, "use_dynamic_shifting": False}
            self.family.load_transformer = self._draw  # type: ignore[method-assign]
        else:
            folder = Settings.model_validate({"model": {"path": name}}).model.folder
            self.name = "nano" if folder.resolve() == self.settings.model.folder else Path(name).name
            self.family = open_family(folder, self.settings.conditioning)
        if self.family.name != "zimage":
            raise UserError(f"--model {name}: it is {self.family.name}, the published step is written for zimage pipelines")
        if name == "zimage-turbo" and device.type != "cuda":
            raise UserError("--model zimage-turbo computes for hours on a CPU: use a GPU, --model zimage-small or suite cost")
        self.suffix = "" if self.name == ("zimage-turbo" if device.type == "cuda" else "nano") else f"@{self.name}"
        self.folder = None if self.random else self.family.path

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    @property
    def precision(self) -> str:
        return "bf16" if self.dtype == torch.bfloat16 else "fp32"

    @cached_property
    def config(self) -> dict[str, Any]:
        """The transformer's, with diffusers' defaults."""
        transformer: Any = self.family.meta_transformer()
        return dict(transformer.config)

    @cached_property
    def standard(self) -> Standard:
        if self.config["dim"] >= WIDE:
            return Standard(1024, 1, 256, 768, 64, 128.0)
        rank, alpha = (16, 32.0) if self.name == "nano" else (64, 128.0)  # nano's as in recipes/nano_lora.toml
        return Standard(8 * self.family.pixel_multiple, 8, 20, 80, rank, alpha)

    @property
    def shown_pixels(self) -> int:
        """Most pixels of a picture that the teacher's encoder is shown; 0: all, and its tokens have room for them."""
        return 0 if self.random or self.standard.pixels**2 <= SHOWN_PIXELS else SHOWN_PIXELS

    def transformer(self, dtype: torch.dtype | None = None) -> Any:
        """A new diffusers transformer on the device, the same weights every time."""
        return self.family.load_transformer(dtype or self.dtype).to(self.device)

    def pair(self, settings: Settings) -> Pair:
        """As the trainer builds it, on the device. PEFT draws adapters on the default device: 952 matrices of Z-Image's two
        adapters, drawn on the CPU, would keep a GPU waiting."""
        s = settings
        with self.device:
            return build_pair(self.family, s.backbone, s.adapter, s.teacher, s.train, self.dtype, self.device)

    def _draw(self, dtype: torch.dtype) -> Any:
        model = torch.nn.Module.to(self.family.meta_transformer(), dtype).to_empty(device=self.device)
        draw_weights(model, torch.Generator(self.device).manual_seed(0))
        return model.requires_grad_(True)

    def noise(self, batch: int, pixels: int) -> Tensor:
        shape = (batch, *self.family.latent_shape(pixels, pixels))
        return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(self.device)

    def features(self, batch: int, tokens: int, seed: int) -> list[Tensor]:
        """Text features `[tokens, D]` of each item, in `dtype`, drawn at random."""
        shape, draw = (tokens, self.config["cap_feat_dim"]), torch.Generator().manual_seed(seed)
        return [torch.randn(shape, generator=draw).to(self.device, self.dtype) for _ in range(batch)]

    def grid(self, states: int, pixels: int) -> list[float]:
        """t_0 = 0 ... t_K = 1."""
        return self.family.train_grid(states, 0.0, self.family.latent_shape(pixels, pixels))


@torch.no_grad()
def draw_weights(model: torch.nn.Module, draw: torch.Generator) -> None:
    """Random weights: matrices with variance 1 / fan-in, gains around 1, other vectors small; none is zero."""
    for name, p in model.named_parameters():
        if p.ndim > 1 and "pad_token" not in name:
            p.normal_(0.0, p[0].numel() ** -0.5, generator=draw)
        else:
            p.normal_(1.0 if name.endswith("weight") else 0.0, 0.1, generator=draw)


@contextmanager
def building(device: torch.device | str, dtype: torch.dtype) -> Iterator[None]:
    """New tensors are on `device`, new floating ones `dtype`."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)
