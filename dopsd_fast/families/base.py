"""The contract that every model family fulfils, in this project's convention: t = 0 is noise, t = 1 is the image, and the
velocity is v = image - noise. Shapes: B batch, C channels, h x w latent."""

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
"""Transformers of at least this width are taken to be published ones, whose sizes are known and checked. Smaller ones are taken
to be somebody's own, of any size."""


class Family(ABC):
    """One pipeline folder, read as a model of this family. The constructor reads configuration files only; weights are read
    when a `load_*` method is called. Raises UserError for a folder or a setting that the family cannot take."""

    name: ClassVar[str]
    pipeline_class: ClassVar[str]
    transformer_class: ClassVar[str]
    vae_class: ClassVar[str]
    contexts: ClassVar[tuple[str, ...]]
    """Accepted values of `conditioning.context`. "auto" means the first of them."""
    deployment_steps: ClassVar[int]
    """How many steps, each one function evaluation, ordinary sampling takes."""
    guidance_scale: ClassVar[float]
    """The value of the pipeline's `guidance_scale` that samples without classifier-free guidance."""
    thinking: ClassVar[bool]
    hidden_layers: ClassVar[tuple[int, ...]]
    """The layers of the text encoder whose hidden states make a text context."""

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
        """Lists, one line each, why this folder is not the few-step model that the family deploys. Every reason that is listed
        is allowed by `allowed` (`model.allow`); raises UserError for the others. Only configuration files are read."""
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
        """Yields (the value of `model.allow` that allows it, the reason) for each difference from the model that the family
        deploys."""

    # ---- geometry and schedule -------------------------------------------------------------------------------------

    @property
    def pixel_multiple(self) -> int:
        """The number of pixels that both image sides must be multiples of: the VAE's reduction times the transformer's 2x2
        patch."""
        return 2 * 2 ** (len(self.vae_config["block_out_channels"]) - 1)

    @abstractmethod
    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Returns (C, h, w) of the latent of an image of height x width pixels. Raises UserError for a size that the model
        cannot take."""

    def _check_size(self, height: int, width: int) -> None:
        if height < 1 or width < 1 or height % self.pixel_multiple or width % self.pixel_multiple:
            raise UserError(f"image size {height}x{width}: both sides must be multiples of {self.pixel_multiple}")

    @abstractmethod
    def _model_shift(self, steps: int, latent_shape: tuple[int, ...]) -> float:
        """Returns the shift s that the model's own scheduler applies: sigma' = s*sigma / (1 + (s-1)*sigma)."""

    def train_grid(self, num_states: int, shift: float, latent_shape: tuple[int, ...]) -> list[float]:
        """Returns the K + 1 times t_0 = 0 .. t_K = 1 of a trajectory with K = `num_states`. Their spacing follows `shift`, or
        the model's own scheduler where it is 0."""
        return shifted_grid(num_states, shift or self._model_shift(num_states, latent_shape))

    def sample_grid(self, steps: int, latent_shape: tuple[int, ...]) -> list[float]:
        """Returns the times that the pipeline goes through when it is called with sigmas 1, 1 - 1/steps, .., 1/steps. Where
        `steps` is 0, `deployment_steps` is used."""
        return self.train_grid(steps or self.deployment_steps, 0.0, latent_shape)

    @abstractmethod
    def largest_contexts(self, latent: tuple[int, int, int]) -> tuple[TensorShapes, TensorShapes]:
        """Returns the shapes of the longest student context and the longest teacher context that the settings allow for a
        latent (C, h, w)."""

    # ---- transformer -----------------------------------------------------------------------------------------------

    lora_kinds: ClassVar[dict[str, str]]
    """Maps each kind of matrix to a regular expression, which is searched for in a linear layer's name. The first kind that
    fits is the layer's."""

    @property
    @abstractmethod
    def lora_targets(self) -> tuple[str, ...]:
        """The names, or ends of names, of the linear layers that LoRA adapts unless `adapter.targets` names others."""

    def load_transformer(self, dtype: torch.dtype) -> nn.Module:
        """Loads the transformer onto the CPU, in `dtype` and in eval mode, from one or several safetensors files. There is
        never a second copy of the weights in memory."""
        return load_pretrained(
            diffusers_class(self.transformer_class), self.path / "transformer", torch_dtype=dtype, low_cpu_mem_usage=True
        ).requires_grad_(True)

    def meta_transformer(self) -> Any:
        """Builds the same model on the meta device, from its configuration alone, without memory for weights."""
        with torch.device("meta"):
            return diffusers_class(self.transformer_class).from_config(self.transformer_config).eval()

    @abstractmethod
    def velocity(self, transformer: nn.Module, x: Tensor, t: Tensor, contexts: Sequence[Context]) -> Tensor:
        """Returns the velocity v `[B, C, h, w]` at the states x `[B, C, h, w]` and the times t `[B]` in [0, 1], with one
        context per item.

        It is computed in the transformer's dtype and returned in x's. Items may have contexts of unequal length.
        """

    def pair_forward(
        self, modules: dict[str, Any], adapters: dict[str, str], activations: str, attention: str, fp8: str
    ) -> PairForward | None:
        """Returns the module that computes the velocities of several branches at once (see `pair.contract`). A family without
        one returns None, and its branches run one after the other through `velocity`.

        modules: each branch's transformer; the same one for all branches that differ only in their adapter.
        adapters: the name of each branch's adapter.
        activations, attention, fp8: the settings of these names under `train`."""
        return None

    # ---- latents and pixels ----------------------------------------------------------------------------------------

    def load_vae(self, dtype: torch.dtype = torch.float32) -> Any:
        return load_pretrained(diffusers_class(self.vae_class), self.path / "vae", torch_dtype=dtype)

    @torch.no_grad()
    def decode(self, vae: Any, latents: Tensor) -> list[Image.Image]:
        """Decodes latents `[B, C, h, w]` of t = 1 to B images. The VAE takes one latent at a time, to need less memory."""
        images: list[Image.Image] = []
        for latent in latents.to(vae.device, vae.dtype).split(1):
            pixels = vae.decode(self._to_vae(vae, latent), return_dict=False)[0]
            images += self._image_processor().postprocess(pixels, output_type="pil")
        return images

    @torch.no_grad()
    def encode_image(self, vae: Any, image: Image.Image) -> Tensor:
        """Returns x_1 `[C, h, w]` of an image: the mode of the VAE's distribution, normalised as the transformer expects it.
        Raises UserError where a side of the image is no multiple of `pixel_multiple`."""
        self._check_size(image.height, image.width)
        pixels = self._image_processor().preprocess(image).to(vae.device, vae.dtype)
        return self._from_vae(vae, vae.encode(pixels).latent_dist.mode())[0]

    @abstractmethod
    def _from_vae(self, vae: Any, latent: Tensor) -> Tensor:
        """Converts the VAE's latent to the normalised one that the transformer reads."""

    @abstractmethod
    def _to_vae(self, vae: Any, latent: Tensor) -> Tensor:
        """Converts a normalised latent back to the VAE's. It is the inverse of `_from_vae`."""

    def _image_processor(self):
        from diffusers.image_processor import VaeImageProcessor

        return VaeImageProcessor(vae_scale_factor=self.pixel_multiple)

    # ---- conditioning ----------------------------------------------------------------------------------------------

    def load_encoders(self, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Encoders:
        """Returns the frozen encoders. Each is read from the disk when it is first used."""
        return Encoders(self, torch.device(device), dtype)

    @abstractmethod
    def student_context(self, encoders: Encoders, prompt: str) -> Context: ...

    @abstractmethod
    def teacher_context(self, encoders: Encoders, prompt: str, images: list[Image.Image]) -> Context: ...

    @abstractmethod
    def _teacher_parts(self) -> tuple[list[Path], dict[str, Any]]:
        """Returns the folders and the settings that decide a teacher context in addition to those that decide a student
        context."""

    @property
    def vlm_folder(self) -> Path:
        given = self.conditioning.vlm_path
        return embedded(given, "pipeline") if given else self.path / "vlm"

    def fingerprint(self, kind: str, dtype: torch.dtype = torch.float32) -> str:
        """Returns a hash of everything except the record that decides values of `kind` ("student" or "teacher" contexts, or
        "latents"): the encoders' files, by content, the precision and the settings."""
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
