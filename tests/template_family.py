"""A model family, complete and as small as one can be: copy it, and replace what it computes. `docs/extending.md` says where
each part of a real one goes; `tests/test_template_family.py` builds this one, trains it by one D-OPSD step and samples with it.

Shapes: B items, C latent channels, h x w latent pixels, N = h * w image tokens, R reference tokens, T text tokens of width D.

Who calls what, in the order of a run:

1. `open_family` reads model_index.json, finds the class by the pipeline that is named there, imports it and makes it:
   `__init__` reads the configuration files. The trainer then calls `check_variant`, which asks `_variants`.
2. The data set is read: each bucket's sides are multiples of `pixel_multiple`, and `latent_shape` may refuse a size. For a
   LoRA, `lora_targets` and `lora_kinds` are looked up in `meta_transformer()`. The planner traces a step of the same model
   with `largest_contexts`. Nothing large has been read so far.
3. The context cache asks `fingerprint` (which asks `_teacher_parts`) for what a context depends on. For what it has not got it
   calls `load_encoders`, then `student_context`, `teacher_context` and `encode_image` once a prompt or picture, and frees
   the encoders. From here on a context is a dict of tensors, and nobody but the family knows what its names mean.
4. `build_pair` calls `load_transformer` once. The teacher is a copy (full) or a second adapter (LoRA). It asks
   `pair_forward` for a forward that computes student and teacher together; None means two calls of `velocity` a state.
5. At each step the trainer asks `latent_shape` and `train_grid` (which asks `_model_shift`), draws the noise x_0, and hands
   `Pair.open(...)` to the objective. The objective calls it once a state: `velocity` for the teacher, without gradient, then
   `velocity` for the student.
6. Pictures: `sample_grid`, `velocity` once a step of it, and `decode` (which asks `_to_vae`) of what comes out.
7. At the end the weights are exported under the names that they have in `load_transformer()`; an adapter is written by
   `pipeline_class`, which must be a class of diffusers for that.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from dopsd_fast.conditioning.context import Context, TensorShapes
from dopsd_fast.conditioning.encoders import Encoders
from dopsd_fast.families.base import Family, model_dtype
from dopsd_fast.families.pipeline_folder import PARTS

CHANNELS, WIDTH, TEXT_WIDTH, SHIFT = 4, 16, 12, 3.0


class TemplateTransformer(nn.Module):
    """One block of attention. It speaks the schedulers' language: it takes sigma = 1 - t (1 is noise) and predicts
    noise - image. Its parameter names are those of the checkpoint, and an export keeps them."""

    def __init__(self, channels: int, width: int, text_width: int) -> None:
        super().__init__()
        self.image_in = nn.Linear(channels, width)
        self.text_in = nn.Linear(text_width, width)
        self.time_in = nn.Linear(1, width)
        names = ("to_q", "to_k", "to_v", "to_out")
        self.attention = nn.ModuleDict({name: nn.Linear(width, width, bias=False) for name in names})
        self.out = nn.Linear(width, channels)

    def forward(self, image: Tensor, reference: Tensor, text: Tensor, sigma: Tensor) -> Tensor:
        """noise - image `[N, C]`, of image tokens `[N, C]`, reference `[R, C]` (R may be 0), text `[T, D]`, sigma `[1]`."""
        tokens = self.image_in(torch.cat([image, reference])) + self.time_in(sigma)
        tokens = torch.cat([tokens, self.text_in(text)])
        # [batch, heads, tokens, head width]: the planner's trace on the meta device takes no other shape.
        q, k, v = (self.attention[name](tokens)[None, None] for name in ("to_q", "to_k", "to_v"))
        tokens = tokens + self.attention["to_out"](F.scaled_dot_product_attention(q, k, v)[0, 0])
        return self.out(tokens[: len(image)])


class TemplateVae(nn.Module):
    """Averages 2 x 2 pixels and appends their brightness as a fourth channel; what `Family.encode_image` and `decode` call."""

    device, dtype = torch.device("cpu"), torch.float32

    def encode(self, pixels: Tensor) -> Any:
        small = F.avg_pool2d(pixels, 2)
        latent = torch.cat([small, small.mean(1, keepdim=True)], 1)
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: latent))

    def decode(self, latent: Tensor, return_dict: bool = False) -> tuple[Tensor]:
        return (F.interpolate(latent[:, :3], scale_factor=2.0),)


class TemplateEncoders(Encoders):
    """A pipeline whose text encoder is a Qwen3, as both real families' are, needs no class of its own: `Encoders` loads it."""

    @cached_property
    def text_encoder(self) -> nn.Embedding:
        return nn.Embedding.from_pretrained(load_file(self.family.path / "text_encoder" / "model.safetensors")["weight"])


class TemplateFamily(Family):
    """Student contexts: {"text": `[T, D]`}. Teacher contexts: the same and {"reference": `[R, C]`}, the target's own latent.

    Latents: `[4, H/2, W/2]`, the VAE's times `scaling_factor`.
    """

    # Class attributes: what is the same for every folder of this family.
    name = "template"
    pipeline_class = "TemplatePipeline"  # of diffusers; _class_name in model_index.json
    transformer_class = "TemplateTransformer"  # of diffusers, for load_transformer and meta_transformer of the base class
    vae_class = "TemplateVae"  # of diffusers, for the base class's load_vae
    contexts = ("edit",)  # the values of conditioning.context that make sense; the first is what "auto" means
    deployment_steps = 4  # function evaluations of ordinary sampling
    guidance_scale = 1.0  # what the pipeline is told to sample without classifier-free guidance
    thinking = False  # of Qwen3's chat template
    hidden_layers = (-2,)  # which hidden states of a Qwen3 text encoder make a context
    lora_kinds = {"attention": r"^attention\."}  # kind -> pattern of names, for what the first screen says of coverage

    # ---- 1. which model it is ------------------------------------------------------------------------------------------

    def _variants(self) -> Iterator[tuple[str, str]]:
        """Called by `check_variant`. Yields (value of model.allow, reason) for whatever makes this folder another model than
        the few-step one: D-OPSD keeps few steps, and has nothing to keep in a base checkpoint."""
        if self.scheduler_config.get("shift") != SHIFT:
            yield "shift", f"the scheduler's shift is {self.scheduler_config.get('shift')}, the few-step model's is {SHIFT:g}"

    # ---- 2. geometry, schedule, names ----------------------------------------------------------------------------------

    @property
    def pixel_multiple(self) -> int:
        """Called for buckets, before any picture is read. The base class's own is right for a VAE of diffusers whose latent is
        patchified by 2 x 2; this model's tokens are single latent pixels of 2 x 2 pixels."""
        return 2

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Called with each bucket's sides at the start, and at every step. `_check_size` refuses other multiples."""
        self._check_size(height, width)
        return CHANNELS, height // 2, width // 2

    def _model_shift(self, steps: int, latent_shape: tuple[int, ...]) -> float:
        """Called by `train_grid` and `sample_grid`, which make t_0 = 0 (noise) to t_K = 1 (image) of it."""
        return float(self.scheduler_config["shift"])

    def largest_contexts(self, latent: tuple[int, int, int]) -> tuple[TensorShapes, TensorShapes]:
        """Called by the planner with the largest bucket's latent: what of the longest contexts has to fit into memory."""
        channels, height, width = latent
        text = {"text": (self.conditioning.max_text_tokens, TEXT_WIDTH)}
        return text, text | {"reference": (height * width, channels)}

    @property
    def lora_targets(self) -> tuple[str, ...]:
        """Called where adapter.targets is empty. Endings of the names of linear layers, after a dot."""
        return ("to_q", "to_k", "to_v", "to_out")

    # ---- 3. contexts: once a prompt or picture, then from the cache ----------------------------------------------------

    def load_encoders(self, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> TemplateEncoders:
        """Called by the context cache when something is missing. A family with the base class's encoders leaves this out."""
        return TemplateEncoders(self, torch.device(device), dtype)

    def student_context(self, encoders: Encoders, prompt: str) -> Context:
        """Called once a prompt. It must equal what the pipeline itself makes of the prompt, or the student is trained for
        another model than is deployed. Here each byte is a token."""
        tokens = list(prompt.encode())[: self.conditioning.max_text_tokens]
        return {"text": encoders.text_encoder(torch.tensor(tokens))}

    def teacher_context(self, encoders: Encoders, prompt: str, images: list[Image.Image]) -> Context:
        """Called once a record and prompt, with the target's picture. What it adds is what the student has to learn. Names are
        free; two contexts of one batch may differ in length."""
        context = self.student_context(encoders, f"{prompt} {self.conditioning.edit_instruction}")
        latents = [self.encode_image(encoders.vae, image) for image in images]
        return context | {"reference": torch.cat([latent.flatten(1).T for latent in latents])}

    def _teacher_parts(self) -> tuple[list[Path], dict[str, Any]]:
        """Called by `fingerprint`: every folder and setting that decides a teacher context and not a student's. What is
        forgotten here is a stale cache."""
        return [self.path / "vae"], {"instruction": self.conditioning.edit_instruction}

    # ---- 4. weights ----------------------------------------------------------------------------------------------------

    def load_transformer(self, dtype: torch.dtype) -> nn.Module:
        """Called by `build_pair`. Eval mode, on CPU, every parameter requires gradient. The base class does it for a
        `transformer_class` of diffusers, whose models also have the `enable_gradient_checkpointing` that
        train.activations=recompute calls where there is no pair forward."""
        model = TemplateTransformer(**self.transformer_config)
        model.load_state_dict(load_file(self.path / "transformer" / "diffusion_pytorch_model.safetensors"))
        return model.to(dtype).eval()

    def meta_transformer(self) -> nn.Module:
        """Called by the planner, and where names alone are wanted. The base class does it, too."""
        with torch.device("meta"):
            return TemplateTransformer(**self.transformer_config).eval()

    def load_vae(self, dtype: torch.dtype = torch.float32) -> TemplateVae:
        """Called by the encoders and for pictures. The base class does it for a `vae_class` of diffusers."""
        return TemplateVae()

    def pair_forward(
        self, modules: dict[str, Any], adapters: dict[str, str], activations: str, attention: str, fp8: str
    ) -> None:
        """Called by `build_pair` unless backbone=diffusers. None, as in the base class: student and teacher run one after the
        other through `velocity`. A family starts so, and its oracle is there when it gets a pair forward."""
        return None

    # ---- 5. the forward ------------------------------------------------------------------------------------------------

    def velocity(self, transformer: nn.Module, x: Tensor, t: Tensor, contexts: Sequence[Context]) -> Tensor:
        """Called K times a step for the teacher, K times for the student, and for pictures.

        v = dx/dt = image - noise, shaped as x `[B, C, h, w]`, at t `[B]` (0 is noise, 1 the image). This model predicts
        noise - image at sigma = 1 - t, hence both signs.

        `transformer` is the student, the teacher, or the student with the teacher's adapter; x is float32 and the model may be
        bf16. Each item runs by itself here, since contexts differ in length; a real family groups or pads them.
        """
        dtype = model_dtype(transformer)
        velocities = []
        for x_i, t_i, context in zip(x, t, contexts, strict=True):
            tokens = x_i.flatten(1).T.to(dtype)
            reference = context.get("reference", tokens[:0]).to(tokens)
            out = transformer(tokens, reference, context["text"].to(tokens), 1 - t_i[None].to(tokens))
            velocities.append(-out.T.reshape(x_i.shape))
        return torch.stack(velocities).to(x.dtype)

    # ---- 3. and 6. latents ---------------------------------------------------------------------------------------------

    def _from_vae(self, vae: Any, latent: Tensor) -> Tensor:
        """Called by `encode_image`: the VAE's latent to the transformer's normalised one."""
        return latent * self.vae_config["scaling_factor"]

    def _to_vae(self, vae: Any, latent: Tensor) -> Tensor:
        """Called by `decode`: the inverse."""
        return latent / self.vae_config["scaling_factor"]


def make_template(folder: Path) -> Path:
    """Writes a random pipeline of this family, as `tests/tiny.py` does for the real ones. Every parameter has a size that
    matters, since a zero would hide an error behind it."""
    sizes = {"channels": CHANNELS, "width": WIDTH, "text_width": TEXT_WIDTH}
    configs = {
        "model_index.json": {"_class_name": TemplateFamily.pipeline_class},
        "scheduler/scheduler_config.json": {"shift": SHIFT},
        "vae/config.json": {"scaling_factor": 0.5},
        "transformer/config.json": sizes,
    }
    for part in PARTS:
        (folder / part).mkdir(parents=True)
    for name, content in configs.items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    generator = torch.Generator().manual_seed(0)
    model = TemplateTransformer(**sizes)
    weights = {name: torch.randn(p.shape, generator=generator) / p.shape[-1] ** 0.5 for name, p in model.named_parameters()}
    save_file(weights, folder / "transformer" / "diffusion_pytorch_model.safetensors")
    save_file({"weight": torch.randn(256, TEXT_WIDTH, generator=generator)}, folder / "text_encoder" / "model.safetensors")
    return folder
