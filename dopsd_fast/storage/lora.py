"""LoRA adapters on the disk, for every loader."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from dopsd_fast.storage.atomic import atomic_folder
from dopsd_fast.storage.safetensors_layout import sort_metadata


def export_lora(pipeline_class: str, state: dict[str, Tensor], peft_config: Any, out: Path) -> None:
    """Writes `out`: one adapter in PEFT's and in diffusers' format, see `save_lora`. On an error `out` is as it was."""
    with atomic_folder(out) as folder:
        save_lora(pipeline_class, state, peft_config, folder)


def save_lora(
    pipeline_class: str, state: dict[str, Tensor], peft_config: Any, folder: Path, dtype: torch.dtype | None = None
) -> None:
    """Writes one adapter for every loader into `folder`.

    `adapter_model.safetensors` + `adapter_config.json` (PEFT), and `pytorch_lora_weights.safetensors` with its
    `transformer_lora_adapter_metadata` (diffusers). The scale alpha / rank lies inside B and alpha is written as rank, so
    that W + B A is the trained weight for a reader that knows no metadata, too: alpha in metadata alone is lost outside
    diffusers, and a file with `.alpha` keys is refused by diffusers for FLUX.2. pipeline_class: diffusers' class, by name.
    `state`: LoRA tensors as trained, named as PEFT or the module tree names them, with or without the adapter's name. dtype:
    to store them in, theirs if None. ValueError where `state` holds more than one adapter.
    """
    import diffusers

    plain = {
        plain_lora_name(name): scaled_lora(name, tensor.detach().cpu(), peft_config).to(dtype or tensor.dtype).contiguous()
        for name, tensor in state.items()
    }
    if len(plain) != len(state):
        raise ValueError("state holds more than one adapter")
    config = copy.copy(peft_config)
    config.inference_mode = True
    config.lora_alpha = config.r
    config.target_modules = sorted(config.target_modules)
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(folder))
    save_file(
        {f"base_model.model.{name}": tensor for name, tensor in plain.items()},
        folder / "adapter_model.safetensors",
        metadata={"format": "pt"},
    )
    getattr(diffusers, pipeline_class).save_lora_weights(
        folder, transformer_lora_layers=plain, transformer_lora_adapter_metadata=config.to_dict()
    )
    sort_metadata(folder / "pytorch_lora_weights.safetensors")


def scaled_lora(name: str, tensor: Tensor, peft_config: Any) -> Tensor:
    """A LoRA tensor as it is exported: A as it is, B times alpha / rank, fp32."""
    return tensor.float() * (peft_config.lora_alpha / peft_config.r) if ".lora_B." in name else tensor


def plain_lora_name(name: str) -> str:
    """`base_model.model.a.b.lora_A.student.weight` -> `a.b.lora_A.weight`."""
    name = name.removeprefix("base_model.model.").removeprefix("transformer.")
    head, middle, tail = name.partition(".lora_")
    matrix, *rest = tail.split(".")
    if not middle or not rest or matrix not in ("A", "B"):
        raise ValueError(f"{name} is not the name of a LoRA matrix")
    return f"{head}.lora_{matrix}.{rest[-1]}"
