"""FLUX.2-klein. The transformer takes sigma = 1 - t and returns noise - image, so v = -output."""

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
from dopsd_fast.families.base import WIDE, Family, model_dtype

REFERENCE_STEP = 10  # the i-th reference image (from 0) has the id 10 + 10 * i on the time axis; the noise has 0
REFERENCE_PIXELS = 1024 * 1024  # the pipeline shrinks larger input images


KV_PIPELINE = "Flux2KleinKVPipeline"
DEV_SIZE = {"num_attention_heads": 48, "num_layers": 8, "num_single_layers": 48, "joint_attention_dim": 15360}
"""transformer/config.json of FLUX.2-dev, which are diffusers' defaults."""
KLEIN_SIZES = ((24, 5, 20, 7680), (32, 8, 24, 12288))
"""The same of FLUX.2-klein-4B and -9B."""


class Flux2Klein(Family):
    """Contexts: {"text": `[max_text_tokens, 3 D]`}, the teacher's also "reference" `[N, C]` and its ids `[N, 4]`.

    Latents are 2x2-patchified and batch-norm normalised: `[128, h/16, w/16]` for the published VAE.
    """

    name = "flux2_klein"
    pipeline_class = "Flux2KleinPipeline"
    transformer_class = "Flux2Transformer2DModel"
    vae_class = "AutoencoderKLFlux2"
    contexts = ("edit",)
    deployment_steps = 4
    guidance_scale = 1.0
    thinking = False
    hidden_layers = (9, 18, 27)
    lora_kinds = {
        "single-stream (attention and feed-forward in one)": r"^single_transformer_blocks\.",
        "attention": r"\.attn\.",
        "feed-forward": r"\.ff(_context)?\.",
    }

    @property
    def lora_targets(self) -> tuple[str, ...]:
        """All attention and feed-forward matrices of both kinds of block.

        `to_out` of the single-stream blocks is named in full: as a mere ending it would also name the double-stream
        blocks' `attn.to_out`, which is a list.
        """
        attention = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
        forward = ("ff.linear_in", "ff.linear_out", "ff_context.linear_in", "ff_context.linear_out")
        singles = range(self.transformer_config.get("num_single_layers", 48))
        return (
            *(f"attn.{name}" for name in (*attention, "to_qkv_mlp_proj")),
            *forward,
            *(f"single_transformer_blocks.{i}.attn.to_out" for i in singles),
        )

    def _variants(self) -> Iterator[tuple[str, str]]:
        if self.index.get("_class_name") == KV_PIPELINE:
            yield "kv", (f"model_index.json names {KV_PIPELINE}, a variant trained for another attention than is computed here "
                         "(its references do not see the picture)")
        elif self.index.get("is_distilled") is not True:
            yield "base", "model_index.json does not say is_distilled: true, so this is the base checkpoint of many steps"
        model, scheduler = self.transformer_config, self.scheduler_config
        if model.get("guidance_embeds", True):
            yield "guidance", "transformer/config.json says guidance_embeds: true, but klein takes none and gets none here"
        size = tuple(model.get(name, value) for name, value in DEV_SIZE.items())
        if size[0] * model.get("attention_head_dim", 128) >= WIDE and size not in KLEIN_SIZES:
            shown = ", ".join(f"{name} {value}" for name, value in zip(DEV_SIZE, size))
            yield "size", f"the transformer has {shown}, which no published klein has"
        dynamic, kind = scheduler.get("use_dynamic_shifting", False), scheduler.get("time_shift_type", "exponential")
        if not dynamic or kind != "exponential":
            shift = f"is of type {kind}" if dynamic else f"is fixed at {scheduler.get('shift', 1.0):g}"
            yield "shift", f"the scheduler's shift {shift}, klein's is exponential and follows the size of the picture"

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        self._check_size(height, width)
        scale = self.pixel_multiple
        return 4 * self.vae_config["latent_channels"], height // scale, width // scale

    def _model_shift(self, steps: int, latent_shape: tuple[int, ...]) -> float:
        from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

        config = self.scheduler_config
        if not config.get("use_dynamic_shifting"):
            return float(config.get("shift", 1.0))
        mu = compute_empirical_mu(latent_shape[-2] * latent_shape[-1], steps)
        return math.exp(mu) if config.get("time_shift_type", "exponential") == "exponential" else mu

    def largest_contexts(self, latent: tuple[int, int, int]) -> tuple[TensorShapes, TensorShapes]:
        config: dict[str, Any] = dict(self.meta_transformer().config)
        text = {"text": (self.conditioning.max_text_tokens, config["joint_attention_dim"])}
        tokens = min(latent[1] * latent[2], REFERENCE_PIXELS // self.pixel_multiple**2)
        return text, text | {"reference": (tokens, config["in_channels"]), "reference_ids": (tokens, 4)}

    def velocity(self, transformer: nn.Module, x: Tensor, t: Tensor, contexts: Sequence[Context]) -> Tensor:
        """v = -transformer([noise tokens, reference tokens], 1 - t, text) at the noise tokens.

        diffusers reads one table of position ids per call, so items with other text lengths or reference ids run in
        calls of their own.
        """
        groups: dict[tuple, list[int]] = {}
        for i, context in enumerate(contexts):
            ids = context.get("reference_ids")
            key = (len(context["text"]), None if ids is None else tuple(ids.flatten().tolist()))
            groups.setdefault(key, []).append(i)
        if len(groups) == 1:
            return self._group_velocity(transformer, x, t, contexts)
        parts: dict[int, Tensor] = {}
        for members in groups.values():
            v = self._group_velocity(transformer, x[members], t[members], [contexts[i] for i in members])
            parts.update(zip(members, v, strict=True))
        return torch.stack([parts[i] for i in range(len(contexts))])

    def _group_velocity(self, transformer: nn.Module, x: Tensor, t: Tensor, contexts: Sequence[Context]) -> Tensor:
        batch, channels, height, width = x.shape
        dtype = model_dtype(transformer)
        text = torch.stack([c["text"] for c in contexts]).to(x.device, dtype)
        tokens = x.to(dtype).flatten(2).transpose(1, 2)
        image_ids = grid_ids(0, height, width)
        if "reference" in contexts[0]:
            tokens = torch.cat([tokens, torch.stack([c["reference"] for c in contexts]).to(x.device, dtype)], dim=1)
            image_ids = torch.cat([image_ids, contexts[0]["reference_ids"].cpu()])
        text_ids = torch.zeros(text.shape[1], 4, dtype=torch.int64)
        text_ids[:, 3] = torch.arange(text.shape[1])
        out = transformer(
            hidden_states=tokens,
            encoder_hidden_states=text,
            timestep=(1 - t.float()),
            img_ids=image_ids.to(x.device),
            txt_ids=text_ids.to(x.device),
            guidance=None,
            return_dict=False,
        )[0]
        return -out[:, : height * width].transpose(1, 2).reshape(batch, channels, height, width).to(x.dtype)

    def student_context(self, encoders: Encoders, prompt: str) -> Context:
        """Equals `Flux2KleinPipeline.encode_prompt`: three hidden states side by side, padding kept."""
        states, _ = encode_prompt(
            encoders.text_encoder,
            encoders.tokenizer,
            prompt,
            self.hidden_layers,
            self.thinking,
            self.conditioning.max_text_tokens,
        )
        return {"text": states.flatten(1)}

    def teacher_context(self, encoders: Encoders, prompt: str, images: list[Image.Image]) -> Context:
        """Prompt + edit instruction as text, and each image's latent as reference tokens with ids of its own."""
        context = self.student_context(encoders, f"{prompt} {self.conditioning.edit_instruction}".strip())
        if images:
            latents = [self.encode_image(encoders.vae, self._reference_image(image)) for image in images]
            context["reference"] = torch.cat([latent.flatten(1).T for latent in latents])
            context["reference_ids"] = torch.cat(
                [grid_ids(REFERENCE_STEP * (i + 1), *latent.shape[1:]) for i, latent in enumerate(latents)]
            )
        return context

    def _reference_image(self, image: Image.Image) -> Image.Image:
        """As the pipeline prepares image input: at most 1024 * 1024 pixels, then the centre at whole multiples."""
        area = image.width * image.height
        if area > REFERENCE_PIXELS:
            scale = math.sqrt(REFERENCE_PIXELS / area)
            image = image.resize((int(image.width * scale), int(image.height * scale)), Image.Resampling.LANCZOS)
        width, height = (side // self.pixel_multiple * self.pixel_multiple for side in image.size)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        return image.crop((left, top, left + width, top + height))

    def _teacher_parts(self) -> tuple[list[Path], dict[str, Any]]:
        return [self.path / "vae"], {"context": self.context, "instruction": self.conditioning.edit_instruction}

    def _from_vae(self, vae: Any, latent: Tensor) -> Tensor:
        batch, channels, height, width = latent.shape
        latent = latent.reshape(batch, channels, height // 2, 2, width // 2, 2).permute(0, 1, 3, 5, 2, 4)
        mean, std = _statistics(vae)
        return (latent.reshape(batch, channels * 4, height // 2, width // 2) - mean) / std

    def _to_vae(self, vae: Any, latent: Tensor) -> Tensor:
        mean, std = _statistics(vae)
        batch, channels, height, width = latent.shape
        latent = (latent * std + mean).reshape(batch, channels // 4, 2, 2, height, width).permute(0, 1, 4, 2, 5, 3)
        return latent.reshape(batch, channels // 4, height * 2, width * 2)


def grid_ids(time: int, height: int, width: int) -> Tensor:
    """Position ids (time, row, column, 0) of height x width tokens in row-major order, int64 `[height * width, 4]`."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.full_like(rows, time), rows, columns, torch.zeros_like(rows)], dim=-1).reshape(-1, 4)


def _statistics(vae: Any) -> tuple[Tensor, Tensor]:
    shape = (1, -1, 1, 1)
    return vae.bn.running_mean.view(shape), torch.sqrt(vae.bn.running_var.view(shape) + vae.config.batch_norm_eps)
