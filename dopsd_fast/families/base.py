"""What every model family offers, in the convention t = 0 noise, t = 1 image, v = image - noise."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn

from dopsd_fast.conditioning.context import Context, TensorShapes
from dopsd_fast.conditioning.encoders import Encoders
from dopsd_fast.conditioning.fingerprint import hash_folder
from dopsd_fast.conditioning.text import load_pretrained
from dopsd_fast.errors import UserError
from dopsd_fast.families.pipeline_folder import PARTS, diffusers_class, read_json
from dopsd_fast.method.trajectory import shifted_grid
from dopsd_fast.pair.contract import PairForward
from dopsd_fast.settings.schema import ConditioningSettings, embedded
from dopsd_fast.storage.digests import digest

OTHER_SCHEDULES = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "invert_sigmas", "shift_terminal")

WIDE = 2048
"""Transformers from this width on are taken for published ones, whose sizes are known; smaller ones for somebody's own."""


class Family(ABC):
    """One pipeline folder, seen through its family's eyes. Nothing heavy is read before a `load_*` method is called."""

    name: ClassVar[str]
    pipeline_class: ClassVar[str]
    transformer_class: ClassVar[str]
    vae_class: ClassVar[str]
    contexts: ClassVar[tuple[str, ...]]
    """Accepted values of `conditioning.context`; the first is what "auto" means."""
    deployment_steps: ClassVar[int]
    """Function evaluations of ordinary sampling."""
    guidance_scale: ClassVar[float]
    """What the pipeline must be called with to sample without classifier-free guidance."""
    thinking: ClassVar[bool]
    hidden_layers: ClassVar[tuple[int, ...]]
    """Which hidden states of the text encoder make a text context."""

    def __init__(self, path: Path, conditioning: ConditioningSettings):
        self.path = path
        self.conditioning = conditioning
        self.index = read_json(path / "model_index.json")
        for part in PARTS:
            if not (path / part).is_dir():
                raise UserError(f"{path}: part {part}/ is missing, a {self.pipeline_class} folder has {', '.join(PARTS)}")
        wanted = conditioning.context
        if wanted not in ("auto", *self.contexts):
            raise UserError(f"conditioning.context={wanted}: {self.name} has {', '.join(self.contexts)}")
        self.context = self.contexts[0] if wanted == "auto" else wanted
        self.transformer_config = read_json(path / "transformer" / "config.json")
        self.vae_config = read_json(path / "vae" / "config.json")
        self.scheduler_config = read_json(path / "scheduler" / "scheduler_config.json")
        unknown = [field for field in OTHER_SCHEDULES if self.scheduler_config.get(field)]
        if unknown:
            raise UserError(f"{path / 'scheduler'}: {unknown[0]} is not supported, only plain flow-matching sigmas are")
        self._fingerprints: dict[tuple[str, torch.dtype], str] = {}
        self._hashes: dict[Path, str] = {}

    # ---- which model it is -----------------------------------------------------------------------------------------

    def check_variant(self, allowed: Sequence[str]) -> list[str]:
        """What makes this folder another model than the few-step one that the family deploys, a line each, all of it allowed
        by `model.allow`. UserError for what is not. Reads configuration files alone."""
        try:
            found = list(self._variants())
        except (TypeError, ValueError) as error:
            raise UserError(f"model.path={self.path}: model_index.json, transformer/config.json or "
                            f"scheduler/scheduler_config.json holds a value of another type than it should: {error}") from error
        refused = {name: why for name, why in found if name not in allowed}
        if refused:
            names = [*dict.fromkeys([*allowed, *refused])]
            value = names[0] if len(names) == 1 else json.dumps(names, separators=(",", ":"))
            raise UserError(
                f"model.path={self.path}: {'; '.join(refused.values())}. D-OPSD keeps the few steps of a distilled model, so "
                f"this is probably not the one that was meant: name the distilled one, or allow this with model.allow={value}"
            )
        return [why for _, why in found]

    @abstractmethod
    def _variants(self) -> Iterator[tuple[str, str]]:
        """(value of `model.allow`, reason) for everything that is otherwise than in the model that the family deploys."""

    # ---- geometry and schedule -------------------------------------------------------------------------------------

    @property
    def pixel_multiple(self) -> int:
        """Image sides are multiples of this: the VAE's reduction times the transformer's 2x2 patch."""
        return 2 * 2 ** (len(self.vae_config["block_out_channels"]) - 1)

    @abstractmethod
    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) of the latent of a height x width pixel image; `UserError` for a size the model cannot take."""

    def _check_size(self, height: int, width: int) -> None:
        if height < 1 or width < 1 or height % self.pixel_multiple or width % self.pixel_multiple:
            raise UserError(f"image size {height}x{width}: both sides must be multiples of {self.pixel_multiple}")

    @abstractmethod
    def _model_shift(self, steps: int, latent_shape: tuple[int, ...]) -> float:
        """The scheduler's own shift s of sigma' = s*sigma / (1 + (s-1)*sigma)."""

    def train_grid(self, num_states: int, shift: float, latent_shape: tuple[int, ...]) -> list[float]:
        """t_0 = 0 .. t_K = 1 (K + 1 values) at static `shift`; 0 means the model's own scheduler."""
        return shifted_grid(num_states, shift or self._model_shift(num_states, latent_shape))

    def sample_grid(self, steps: int, latent_shape: tuple[int, ...]) -> list[float]:
        """The pipeline's grid when called with sigmas 1, 1 - 1/steps, .., 1/steps; 0 steps: the usual count."""
        return self.train_grid(steps or self.deployment_steps, 0.0, latent_shape)

    @abstractmethod
    def largest_contexts(self, latent: tuple[int, int, int]) -> tuple[TensorShapes, TensorShapes]:
        """Shapes of the longest student and teacher context that the settings allow, beside a latent (C, h, w)."""

    # ---- transformer -----------------------------------------------------------------------------------------------

    lora_kinds: ClassVar[dict[str, str]]
    """Kind of matrix -> regular expression that finds it in a linear layer's name; the first that fits decides."""

    @property
    @abstractmethod
    def lora_targets(self) -> tuple[str, ...]:
        """Module names (or their endings) that LoRA adapts unless `adapter.targets` says otherwise."""

    def load_transformer(self, dtype: torch.dtype) -> nn.Module:
        """The transformer in `dtype`, eval mode, on CPU, from (sharded) safetensors; never a second copy in memory."""
        return load_pretrained(
            diffusers_class(self.transformer_class), self.path / "transformer", torch_dtype=dtype, low_cpu_mem_usage=True
        ).requires_grad_(True)

    def meta_transformer(self) -> Any:
        """The same model on the meta device, from its config alone."""
        with torch.device("meta"):
            return diffusers_class(self.transformer_class).from_config(self.transformer_config).eval()

    @abstractmethod
    def velocity(self, transformer: nn.Module, x: Tensor, t: Tensor, contexts: Sequence[Context]) -> Tensor:
        """v `[B, C, h, w]` at states `x` `[B, C, h, w]`, times `t` `[B]` in [0, 1]; one context per item.

        Computed in the transformer's dtype, returned in x's. Items may have contexts of unequal length.
        """

    def pair_forward(
        self, modules: dict[str, Any], adapters: dict[str, str], activations: str, attention: str, fp8: str
    ) -> PairForward | None:
        """What computes the velocities of several branches at once (see `pair.contract`), or None
        where the family has none: then the branches run one after the other through `velocity`.

        modules: a transformer for each branch, the same one where only adapters differ; adapters: the name of each branch's
        adapter; activations, attention, fp8: the settings of these names under `train`."""
        return None

    # ---- latents and pixels ----------------------------------------------------------------------------------------

    def load_vae(self, dtype: torch.dtype = torch.float32) -> Any:
        return load_pretrained(diffusers_class(self.vae_class), self.path / "vae", torch_dtype=dtype)

    @torch.no_grad()
    def decode(self, vae: Any, latents: Tensor) -> list[Image.Image]:
        """PIL images of latents `[B, C, h, w]` (at t = 1), one by one."""
        images: list[Image.Image] = []
        for latent in latents.to(vae.device, vae.dtype).split(1):
            pixels = vae.decode(self._to_vae(vae, latent), return_dict=False)[0]
            images += self._image_processor().postprocess(pixels, output_type="pil")
        return images

    @torch.no_grad()
    def encode_image(self, vae: Any, image: Image.Image) -> Tensor:
        """x_1 `[C, h, w]` of an image whose sides are multiples of `pixel_multiple`: the VAE's mode, normalised."""
        self._check_size(image.height, image.width)
        pixels = self._image_processor().preprocess(image).to(vae.device, vae.dtype)
        return self._from_vae(vae, vae.encode(pixels).latent_dist.mode())[0]

    @abstractmethod
    def _from_vae(self, vae: Any, latent: Tensor) -> Tensor:
        """The VAE's latent -> the transformer's normalised one."""

    @abstractmethod
    def _to_vae(self, vae: Any, latent: Tensor) -> Tensor:
        """Inverse of `_from_vae`."""

    def _image_processor(self):
        from diffusers.image_processor import VaeImageProcessor

        return VaeImageProcessor(vae_scale_factor=self.pixel_multiple)

    # ---- conditioning ----------------------------------------------------------------------------------------------

    def load_encoders(self, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Encoders:
        """The frozen encoders; each is read when first asked for."""
        return Encoders(self, torch.device(device), dtype)

    @abstractmethod
    def student_context(self, encoders: Encoders, prompt: str) -> Context: ...

    @abstractmethod
    def teacher_context(self, encoders: Encoders, prompt: str, images: list[Image.Image]) -> Context: ...

    @abstractmethod
    def _teacher_parts(self) -> tuple[list[Path], dict[str, Any]]:
        """Folders and settings that decide a teacher context, beyond what decides a student context."""

    @property
    def vlm_folder(self) -> Path:
        given = self.conditioning.vlm_path
        return embedded(given, "pipeline") if given else self.path / "vlm"

    def fingerprint(self, kind: str, dtype: torch.dtype = torch.float32) -> str:
        """Content hash of everything but the record that decides contexts of `kind` (student | teacher | latents)."""
        if (kind, dtype) not in self._fingerprints:
            text = [self.path / "text_encoder", self.path / "tokenizer"], {"tokens": self.conditioning.max_text_tokens}
            if kind == "student":
                folders, settings = text
            elif kind == "teacher":
                folders, settings = self._teacher_parts()
                folders, settings = folders + text[0], settings | text[1]
            elif kind == "latents":
                folders, settings = [self.path / "vae"], {}
            else:
                raise ValueError(f"unknown kind of context {kind!r}")
            hashes = [self._hash(folder) for folder in folders]
            precision = "float32" if kind == "latents" else str(dtype)
            self._fingerprints[kind, dtype] = digest([self.name, kind, precision, hashes, settings])
        return self._fingerprints[kind, dtype]

    def _hash(self, folder: Path) -> str:
        if folder not in self._hashes:
            self._hashes[folder] = hash_folder(folder)
        return self._hashes[folder]


def model_dtype(transformer: nn.Module) -> torch.dtype:
    return next(p.dtype for p in transformer.parameters() if p.is_floating_point())
