"""The frozen encoders of a family, each loaded at its first use."""

from __future__ import annotations

import gc
from functools import cached_property

import torch
from PIL import Image
from torch import Tensor

from dopsd_fast.conditioning.context import Context, ContextMaker
from dopsd_fast.conditioning.text import load_text_encoder, load_tokenizer
from dopsd_fast.conditioning.vlm import VisionLanguageEncoder


class Encoders:
    """Tokenizer, text encoder, VAE and what the family's teacher adds, each loaded at its first use.

    Every sample is encoded on its own, so a result depends on nothing but its own prompt and images.
    """

    def __init__(self, family: ContextMaker, device: torch.device, dtype: torch.dtype):
        self.family, self.device, self.dtype = family, device, dtype

    @property
    def fingerprints(self) -> dict[str, str]:
        return {kind: self.family.fingerprint(kind, self.dtype) for kind in ("student", "teacher", "latents")}

    @cached_property
    def tokenizer(self):
        return load_tokenizer(self.family.path / "tokenizer")

    @cached_property
    def text_encoder(self):
        class_name = self.family.index["text_encoder"][1]
        return load_text_encoder(self.family.path / "text_encoder", class_name, self.device, self.dtype)

    @cached_property
    def vae(self):
        return self.family.load_vae().to(self.device)

    @cached_property
    def vlm(self):
        c = self.family.conditioning
        folder = self.family.vlm_folder
        return VisionLanguageEncoder(folder, self.text_encoder, c.min_pixels, c.max_pixels, c.max_vlm_tokens)

    def student(self, prompts: list[str]) -> list[Context]:
        return [_stored(self.family.student_context(self, prompt)) for prompt in prompts]

    def teacher(self, prompts: list[str], images: list[list[Image.Image]]) -> list[Context]:
        pairs = zip(prompts, images, strict=True)
        return [_stored(self.family.teacher_context(self, prompt, pictures)) for prompt, pictures in pairs]

    def latents(self, images: list[Image.Image]) -> list[Tensor]:
        """x_1 of each image: `[C, h, w]` float32 on CPU."""
        return [self.family.encode_image(self.vae, image).float().cpu().contiguous() for image in images]

    def release(self) -> None:
        """Frees the models; a later call loads them again."""
        for part in ("tokenizer", "text_encoder", "vae", "vlm"):
            self.__dict__.pop(part, None)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def _stored(context: Context) -> Context:
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in context.items()}
