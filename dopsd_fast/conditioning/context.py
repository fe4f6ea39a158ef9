"""A context: the frozen features that a velocity is computed under."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

Context = dict[str, Tensor]
"""Named tensors of one sample: `text` `[T, D]`, and what else the family's transformer reads beside the latents."""


TensorShapes = Mapping[str, tuple[int, ...]]
"""The shape of each tensor of a context. `reference_ids` are the only integers."""


@dataclass(frozen=True)
class Shapes:
    """What one item of a batch is made of. latent: (C, h, w)."""

    latent: tuple[int, int, int]
    student: TensorShapes
    teacher: TensorShapes


class ContextMaker(Protocol):
    """What the encoders and their cache ask of a model family (see `families.base.Family`, which says what each does)."""

    path: Path
    index: dict[str, Any]
    conditioning: Any

    @property
    def vlm_folder(self) -> Path: ...

    def load_vae(self, dtype: torch.dtype = torch.float32) -> Any: ...

    def encode_image(self, vae: Any, image: Image.Image) -> Tensor: ...

    def load_encoders(self, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Any: ...

    def student_context(self, encoders: Any, prompt: str) -> Context: ...

    def teacher_context(self, encoders: Any, prompt: str, images: list[Image.Image]) -> Context: ...

    def fingerprint(self, kind: str, dtype: torch.dtype = torch.float32) -> str: ...
