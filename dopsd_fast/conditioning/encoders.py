"""Holds the frozen encoders of a family. Each is loaded when it is first used, because a run with a full cache needs none."""

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
    """Tokenizer, text encoder, VAE, and the vision-language encoder of teacher contexts, each loaded when it is first used.

    Every sample is encoded by itself, so that its result depends only on its own prompt and images, and not on the batch.
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
        """Returns the student's context of each prompt, on the CPU."""
        return [_stored(self.family.student_context(self, prompt)) for prompt in prompts]

    def teacher(self, prompts: list[str], images: list[list[Image.Image]]) -> list[Context]:
        """Returns the teacher's context of each prompt with its images, on the CPU."""
        pairs = zip(prompts, images, strict=True)
        return [_stored(self.family.teacher_context(self, prompt, pictures)) for prompt, pictures in pairs]

    def latents(self, images: list[Image.Image]) -> list[Tensor]:
        """Returns x_1 of each image, fp32 `[C, h, w]` on the CPU."""
        return [self.family.encode_image(self.vae, image).float().cpu().contiguous() for image in images]

    def release(self) -> None:
        """Frees the models. A later call loads them again."""
        for part in ("tokenizer", "text_encoder", "vae", "vlm"):
            self.__dict__.pop(part, None)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def _stored(context: Context) -> Context:
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in context.items()}
