"""LoRA adapters inside a transformer: which layers they are on, and how they are injected."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dopsd_fast.errors import UserError

if TYPE_CHECKING:
    pass



def lora_coverage(transformer: nn.Module, targets: Sequence[str]) -> dict[str, int]:
    """How many linear layers each target matches: by full name, or by the end of it after a dot (PEFT's rule for a
    list)."""
    names = _linear_names(transformer)
    return {target: sum(_matches(name, target) for name in names) for target in targets}


def coverage_by_kind(
    transformer: nn.Module, targets: Sequence[str], kinds: Mapping[str, str]
) -> dict[str, tuple[int, int]]:
    """Kind of matrix -> (linear layers that `targets` match, linear layers of the kind). kinds: as `Family.lora_kinds`;
    layers of none of them are "other", and left out where none of those is adapted."""
    counts = {kind: [0, 0] for kind in (*kinds, "other")}
    for name in _linear_names(transformer):
        kind = next((kind for kind, pattern in kinds.items() if re.search(pattern, name)), "other")
        counts[kind][0] += any(_matches(name, target) for target in targets)
        counts[kind][1] += 1
    return {kind: (adapted, there) for kind, (adapted, there) in counts.items() if there and (adapted or kind != "other")}


def add_adapters(
    transformer: nn.Module, targets: Sequence[str], rank: int, alpha: float, seed: int, adapters: Sequence[str]
) -> Any:
    """Injects LoRA adapters y = W x + (alpha / rank) B A x, A gaussian (std 1 / rank, from `seed`), B zero, all of them
    equal.

    Only the first adapter is active, and only its weights require gradients. Works on the meta device. Returns the
    LoraConfig.
    """
    from peft import LoraConfig, inject_adapter_in_model

    coverage = lora_coverage(transformer, targets)
    unmatched = [target for target, count in coverage.items() if count == 0]
    if unmatched:
        matched = ", ".join(f"{target} ({count})" for target, count in coverage.items() if count) or "nothing"
        endings = sorted({_ending(name) for name in _linear_names(transformer)})
        raise UserError(
            f"adapter.targets: {', '.join(unmatched)} match no linear layer of {type(transformer).__name__}; "
            f"matched: {matched}; the layers end in: {', '.join(endings)}"
        )
    alpha = int(alpha) if float(alpha).is_integer() else alpha  # as PEFT and diffusers write it
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), init_lora_weights="gaussian")
    on_meta = any(param.is_meta for param in transformer.parameters())
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "already found a peft_config": meant, it is the second adapter
        torch.manual_seed(seed)
        for adapter in adapters:
            try:
                inject_adapter_in_model(config, transformer, adapter_name=adapter, low_cpu_mem_usage=on_meta)
            except ValueError as error:
                raise UserError(f"adapter.targets: {error}") from error
    first = adapters[0]
    for layer in adapter_layers(transformer):
        layer._active_adapter = [first]
        for parts in (layer.lora_A, layer.lora_B):
            for adapter, part in parts.items():
                part.requires_grad_(adapter == first)
                if adapter != first and not on_meta:
                    part.load_state_dict(parts[first].state_dict())
    return config


def adapter_layers(transformer: nn.Module) -> list[Any]:
    """PEFT's layers inside a transformer."""
    from peft.tuners.lora import LoraLayer

    return [module for module in transformer.modules() if isinstance(module, LoraLayer)]


def _linear_names(transformer: nn.Module) -> list[str]:
    return [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)


def _ending(name: str) -> str:
    """`layers.3.attention.to_out.0` -> `attention.to_out.0`: what follows the block number."""
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts[:-1]) if part.isdigit()]
    return ".".join(parts[numbers[0] + 1 :] if numbers else parts)
