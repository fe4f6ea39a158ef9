"""Z-Image. Its transformer takes t and returns v in this project's convention. The diffusers pipeline negates v before it hands
it to the scheduler."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from dopsd_fast.conditioning.context import Context, TensorShapes
from dopsd_fast.conditioning.encoders import Encoders
from dopsd_fast.conditioning.text import encode_prompt
from dopsd_fast.conditioning.vlm import check_vlm_folder
from dopsd_fast.errors import UserError
from dopsd_fast.families.base import WIDE, Family, model_dtype
from dopsd_fast.families.zimage.pair import PAD_MULTIPLE, ZImagePair

TURBO_SHIFT, BASE_SHIFT = 3.0, 6.0
"""The shifts in scheduler/scheduler_config.json of the published Z-Image-Turbo and of Z-Image, its undistilled base."""
TURBO_SIZE = {"dim": 3840, "n_layers": 30, "n_refiner_layers": 2, "n_heads": 30, "cap_feat_dim": 2560}
"""The sizes in transformer/config.json, which both have in common."""


class ZImage(Family):
    """A context is {"text": `[T, F]`} with T tokens of F features. With the published VAE, the latent of an image of height x
    width pixels is `[16, height / 8, width / 8]`, normalised as (latent - shift) * scale."""

    name = "zimage"
    pipeline_class = "ZImagePipeline"
    transformer_class = "ZImageTransformer2DModel"
    vae_class = "AutoencoderKL"
    contexts = ("vlm",)
    deployment_steps = 8
    guidance_scale = 0.0
    thinking = True
    hidden_layers = (-2,)
    lora_kinds = {"attention": r"\.attention\.", "feed-forward": r"\.feed_forward\."}

    @property
    def lora_targets(self) -> tuple[str, ...]:
        attention = tuple(f"attention.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0"))
        return attention + tuple(f"feed_forward.{name}" for name in ("w1", "w2", "w3"))

    def _variants(self) -> Iterator[tuple[str, str]]:
        scheduler, model = self.scheduler_config, self.transformer_config
        dynamic, shift = scheduler.get("use_dynamic_shifting", False), scheduler.get("shift", 1.0)
        if dynamic:
            yield "shift", f"the scheduler's shift follows the size of the picture, Z-Image-Turbo's is {TURBO_SHIFT:g} for all"
        elif shift == BASE_SHIFT:
            yield "base", (f"the scheduler's shift is {shift:g}, that of Z-Image's base checkpoint, which is not distilled; "
                           f"Z-Image-Turbo's is {TURBO_SHIFT:g}")
        elif shift != TURBO_SHIFT:
            yield "shift", f"the scheduler's shift is {shift:g}, Z-Image-Turbo's is {TURBO_SHIFT:g}"
        size = tuple(model.get(name, value) for name, value in TURBO_SIZE.items())
        if size[0] >= WIDE and size != tuple(TURBO_SIZE.values()):
            shown = ", ".join(f"{name} {value}" for name, value in zip(TURBO_SIZE, size) if value != TURBO_SIZE[name])
            yield "size", f"the transformer has {shown}, which no published Z-Image has"

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        self._check_size(height, width)
        limit_h, limit_w = (length * self.pixel_multiple for length in self._axes_lens[1:])
        if height > limit_h or width > limit_w:
            raise UserError(f"image size {height}x{width}: the model's rotary tables end at {limit_h}x{limit_w}")
        scale = self.pixel_multiple // 2
        return self.vae_config["latent_channels"], height // scale, width // scale

    def _model_shift(self, steps: int, latent_shape: tuple[int, ...]) -> float:
        from diffusers.pipelines.z_image.pipeline_z_image import calculate_shift

        config = self.scheduler_config
        if not config.get("use_dynamic_shifting"):
            return float(config.get("shift", 1.0))
        tokens = (latent_shape[-2] // 2) * (latent_shape[-1] // 2)
        names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
        mu = calculate_shift(tokens, *(config.get(n, d) for n, d in zip(names, (256, 4096, 0.5, 1.15), strict=True)))
        return math.exp(mu) if config.get("time_shift_type", "exponential") == "exponential" else mu

    def largest_contexts(self, latent: tuple[int, int, int]) -> tuple[TensorShapes, TensorShapes]:
        config: dict[str, Any] = dict(self.meta_transformer().config)
        c = self.conditioning
        limit = (config["axes_lens"][0] - 2) // PAD_MULTIPLE * PAD_MULTIPLE  # more tokens are refused
        student, teacher = (min(most, limit) for most in (c.max_text_tokens, c.max_vlm_tokens))
        return {"text": (student, config["cap_feat_dim"])}, {"text": (teacher, config["cap_feat_dim"])}

    def velocity(self, transformer: nn.Module, x: Tensor, t: Tensor, contexts: Sequence[Context]) -> Tensor:
        """Returns v = transformer(x, t, text). Raises UserError for a context that is longer than the rotary tables."""
        dtype = model_dtype(transformer)
        for context in contexts:
            self._check_tokens(len(context["text"]))
        out = transformer(
            list(x.to(dtype).unsqueeze(2).unbind(0)),
            t.float(),
            [context["text"].to(x.device, dtype) for context in contexts],
            return_dict=False,
        )[0]
        return torch.stack(list(out)).squeeze(2).to(x.dtype)

    def pair_forward(
        self, modules: dict[str, Any], adapters: dict[str, str], activations: str, attention: str, fp8: str
    ) -> ZImagePair:
        return ZImagePair(modules, adapters, activations, attention, fp8, self._check_tokens)

    def student_context(self, encoders: Encoders, prompt: str) -> Context:
        """Encodes the prompt as `ZImagePipeline.encode_prompt` does with `max_sequence_length =
        conditioning.max_text_tokens`."""
        states, mask = encode_prompt(
            encoders.text_encoder,
            encoders.tokenizer,
            prompt,
            self.hidden_layers,
            self.thinking,
            self.conditioning.max_text_tokens,
        )
        return self._checked(states[mask, 0], prompt)

    def teacher_context(self, encoders: Encoders, prompt: str, images: list[Image.Image]) -> Context:
        return self._checked(encoders.vlm.encode(prompt, images), prompt)

    def _teacher_parts(self) -> tuple[list[Path], dict[str, Any]]:
        c = self.conditioning
        check_vlm_folder(self.vlm_folder)
        return [self.vlm_folder], {"vlm_tokens": c.max_vlm_tokens, "pixels": [c.min_pixels, c.max_pixels]}

    def _from_vae(self, vae: Any, latent: Tensor) -> Tensor:
        return (latent - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor

    def _to_vae(self, vae: Any, latent: Tensor) -> Tensor:
        return latent / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)

    @property
    def _axes_lens(self) -> list[int]:
        return self.transformer_config.get("axes_lens", [1024, 512, 512])

    def _checked(self, text: Tensor, prompt: str) -> Context:
        self._check_tokens(len(text), f" of prompt {prompt[:60]!r}")
        return {"text": text}

    def _check_tokens(self, tokens: int, what: str = "") -> None:
        # Caption ids run from 1 to the padded length and every image token has the id after them.
        limit = (self._axes_lens[0] - 2) // PAD_MULTIPLE * PAD_MULTIPLE
        if tokens > limit:
            raise UserError(
                f"{tokens} caption tokens{what}: the transformer's rotary table takes {limit}; lower "
                "conditioning.max_text_tokens, conditioning.max_vlm_tokens or conditioning.max_pixels"
            )
