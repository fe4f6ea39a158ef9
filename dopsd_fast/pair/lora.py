"""LoRA adapters inside a transformer: which layers carry them, and how they are injected."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from dopsd_fast.errors import UserError


def lora_coverage(transformer: nn.Module, targets: Sequence[str]) -> dict[str, int]:
    """Counts the linear layers that each target matches. A target matches a layer's full name, or the end of it after a dot,
    which is PEFT's rule for a list of targets."""
    names = _linear_names(transformer)
    return {target: sum(_matches(name, target) for name in names) for target in targets}


def coverage_by_kind(
    transformer: nn.Module, targets: Sequence[str], kinds: Mapping[str, str]
) -> dict[str, tuple[int, int]]:
    """Returns, for each kind of matrix, (how many of its linear layers `targets` match, how many there are).

    kinds: as `Family.lora_kinds`. Layers of no kind count as "other", which is left out where no target matches any of
    them."""
    counts = {kind: [0, 0] for kind in (*kinds, "other")}
    for name in _linear_names(transformer):
        kind = next((kind for kind, pattern in kinds.items() if re.search(pattern, name)), "other")
        counts[kind][0] += any(_matches(name, target) for target in targets)
        counts[kind][1] += 1
    return {kind: (adapted, there) for kind, (adapted, there) in counts.items() if there and (adapted or kind != "other")}


def add_adapters(
    transformer: nn.Module, targets: Sequence[str], rank: int, alpha: float, seed: int, adapters: Sequence[str]
) -> Any:
    """Injects LoRA adapters y = W x + (alpha / rank) B A x and returns PEFT's LoraConfig.

    A is gaussian with standard deviation 1 / rank, drawn from `seed`; B is zero; all `adapters` begin with equal weights. The
    first is active, and its weights alone require gradients. This also works on the meta device. Raises UserError for a target
    that matches no linear layer, or that PEFT refuses.
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
        warnings.simplefilter("ignore")  # PEFT warns that a peft_config is there, which is meant: a second adapter follows
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
    """Lists PEFT's LoRA layers inside a transformer."""
    from peft.tuners.lora import LoraLayer

    return [module for module in transformer.modules() if isinstance(module, LoraLayer)]


def _linear_names(transformer: nn.Module) -> list[str]:
    return [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)


def _ending(name: str) -> str:
    """Returns the part of a layer's name after its block number: `layers.3.attention.to_out.0` -> `attention.to_out.0`."""
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts[:-1]) if part.isdigit()]
    return ".".join(parts[numbers[0] + 1 :] if numbers else parts)
