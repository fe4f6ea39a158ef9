"""Ends a run: exports student and teacher, reads the files back, and compares them with the live model.

The export and the comparison of weights gather one tensor at a time, so that no rank needs room for a whole second model. Where
there is room for one, the exported model is also loaded, and its picture is compared with the live model's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor

from dopsd_fast.errors import UserError
from dopsd_fast.families.build import fuse
from dopsd_fast.families.registry import open_family
from dopsd_fast.method.trajectory import rollout
from dopsd_fast.pair.student_teacher import STUDENT, Pair
from dopsd_fast.run.metrics import free_memory, is_out_of_memory
from dopsd_fast.run.parts import RunParts
from dopsd_fast.run.pictures import Showcase, Shown
from dopsd_fast.storage.lora import export_lora, scaled_lora
from dopsd_fast.storage.pipeline import export_full, weight_files
from dopsd_fast.storage.safetensors_layout import DTYPES, Shard
from dopsd_kernels.adamw_ema_triton import untie_

LARGEST_DIFFERENCE = 2
"""Largest allowed difference of a pixel, of 255. Reloaded weights are equal, but a merged kernel may sum in another order."""
LARGEST_ROUNDED_DIFFERENCE = 32
"""Largest allowed difference where the source pipeline, and so the export, stores fewer bits than the run computes with."""


def export_and_verify(parts: RunParts, showcase: Showcase) -> list[str]:
    """Writes `export/` (the student) and, for an EMA teacher, `export_teacher/`, and verifies them. Returns lines that say
    where they are and how to sample from them. Raises UserError, on every rank, where an export is not the live model."""
    lines = []
    for branch, name in (("student", "export"), ("teacher", "export_teacher")):
        if branch == "teacher" and not parts.engine.keeps_ema:
            continue
        out = parts.folder / name
        _export(parts, branch, out)
        _check_weights(parts, branch, out)
        said = "every weight is the live one"
        if not parts.engine.any(not _has_room(parts)):
            difference = _compare(parts, showcase, branch, out)
            said = f"pixels differ by at most {difference} of 255" if difference is not None else said
        lines.append(f"{name + '/':14} {branch}, read back: {said}")
    return lines + _how_to_sample(parts)


def _export(parts: RunParts, branch: str, out: Path) -> None:
    tensors = _tensors(parts, branch)
    problem = ""
    if parts.rank == 0:
        try:
            if parts.pair.lora_config is None:
                export_full(parts.family.path, tensors, out)
            else:
                export_lora(parts.family.pipeline_class, dict(tensors), parts.pair.lora_config, out)
        except UserError as error:
            problem = str(error)
    for _ in tensors:  # all ranks take part in every gather, also rank 0 after a failure
        pass
    parts.consensus.agree(problem)


def _tensors(parts: RunParts, branch: str) -> Iterator[tuple[str, Tensor]]:
    """Yields (name, value) of every weight. The value is such that rounding it gives the live weight. Every rank must go
    through all, because each step is a collective call."""
    low_bits = parts.settings.train.masters == "low_bits"
    for name, tensor in parts.engine.full_tensors(branch):
        yield name, untie_(tensor) if low_bits and tensor.dtype == torch.float32 else tensor


def _check_weights(parts: RunParts, branch: str, out: Path) -> None:
    """Checks that every exported tensor has the bits of the live one, rounded to the type in which it is stored. Raises
    UserError on every rank where one has not."""
    from safetensors import SafetensorError, safe_open

    full, problem = parts.pair.lora_config is None, ""
    prefix = "" if full else "base_model.model."
    stored: dict[str, Any] = {}
    with ExitStack() as opened:
        if parts.rank == 0:
            try:
                for file in weight_files(out / "transformer") if full else [out / "adapter_model.safetensors"]:
                    handle = opened.enter_context(safe_open(file, framework="pt"))
                    stored |= dict.fromkeys(handle.keys(), handle)
            except (OSError, SafetensorError, UserError) as error:
                problem = f"{out} was written but cannot be read back: {error}"
        for name, tensor in _tensors(parts, branch):  # collective calls: no rank may leave early
            if parts.rank or problem:
                continue
            try:
                found = stored[prefix + name].get_tensor(prefix + name)
                if not full:
                    tensor = scaled_lora(name, tensor, parts.pair.lora_config)
                if not torch.equal(_bits(found), _bits(tensor.to(found.dtype))):
                    problem = f"{out} was read back and its {name} is not what was written: do not use this export"
            except (OSError, SafetensorError, KeyError) as error:
                problem = f"{out} was written but its {name} cannot be read back: {error}"
    parts.consensus.agree(problem)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def _has_room(parts: RunParts) -> bool:
    """Tells whether rank 0 can hold the exported model beside the one that it trains, and sample from it. It cannot where the
    model is sharded over several GPUs, because then it may not fit one, nor where less than 1.5 times the model's bytes are
    free."""
    if parts.rank:
        return True
    needed = 1.5 * parts.parameters * parts.dtype.itemsize
    if parts.device.type != "cpu":
        if parts.engine.stage == 3 and parts.world > 1:
            return False
        torch.cuda.empty_cache()
        if torch.cuda.mem_get_info(parts.device)[0] < needed:
            return False
    return psutil.virtual_memory().available > needed  # the file cache counts as free


def _compare(parts: RunParts, showcase: Showcase, branch: str, out: Path) -> int | None:
    """Returns the largest difference of a pixel between pictures of the live branch and of the export, drawn from the first
    record's prompt, or None where this does not fit the memory after all. Raises UserError, on every rank, where the difference
    is too large."""
    difference: int | None = 0
    with parts.consensus.together():
        try:
            difference = _difference(parts, showcase, branch, out)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            difference = None
        if parts.rank == 0 and difference is not None:
            if difference > (LARGEST_ROUNDED_DIFFERENCE if _is_rounded(parts, out) else LARGEST_DIFFERENCE):
                raise UserError(
                    f"{out} was read back and draws another picture (pixels differ by up to {difference} of 255): "
                    "the checkpoints are good, do not use this export"
                )
    free_memory(parts.device)
    return difference


def _difference(parts: RunParts, showcase: Showcase, branch: str, out: Path) -> int:
    shown = replace(showcase.row(parts.data.records[0]), record=None)
    live = showcase.latent(branch, shown, 0)  # every rank samples, because a sharded model needs all
    if parts.rank:
        return 0
    pair = [_pixels(parts, showcase, latent) for latent in (live, _read_back(parts, showcase, shown, out))]
    return int(np.abs(pair[0] - pair[1]).max())


def _read_back(parts: RunParts, showcase: Showcase, shown: Shown, out: Path) -> Tensor:
    """Samples a latent from the exported files, from the same noise as the live branch."""
    family = parts.family
    model: Any
    if parts.pair.lora_config is None:
        model = open_family(out, family.conditioning).load_transformer(parts.dtype)
    else:
        model = family.load_transformer(parts.dtype)
        model.load_lora_adapter(out, weight_name="pytorch_lora_weights.safetensors", prefix="transformer")
        model.to(parts.dtype)
    model.to(parts.device)
    noise = showcase.noise(shown, 0)
    grid = family.sample_grid(parts.settings.sample.steps, tuple(noise.shape[1:]))
    adapter = "" if parts.pair.lora_config is None else model.active_adapters()[0]
    s = parts.settings
    pair = Pair(model, None, family.velocity, fused=fuse(family, s.backbone, s.train, {STUDENT: model}, {STUDENT: adapter}))
    return rollout(pair.sampler(STUDENT, [parts.contexts.get("student", shown.prompt)], noise.shape), noise, grid)


def _pixels(parts: RunParts, showcase: Showcase, latent: Tensor) -> np.ndarray:
    return np.asarray(parts.family.decode(showcase.vae, latent)[0], dtype=int)


def _is_rounded(parts: RunParts, out: Path) -> bool:
    """Tells whether the export may differ from the live weights by a rounding: because it stores fewer bits, or because LoRA's
    B was rounded after it was scaled by a number that is no power of two."""
    if parts.pair.lora_config is not None:
        scale = parts.pair.lora_config.lora_alpha / parts.pair.lora_config.r
        return parts.dtype == torch.bfloat16 and math.frexp(scale)[0] != 0.5
    entries = [entry for file in weight_files(out / "transformer") for entry in Shard.read(file).entries.values()]
    return any(DTYPES[entry["dtype"]].itemsize < parts.dtype.itemsize for entry in entries)


def _how_to_sample(parts: RunParts) -> list[str]:
    """Returns lines with the Python code that samples from the exported student."""
    family, out = parts.family, parts.folder / "export"
    pipeline = family.index["_class_name"]
    full = parts.pair.lora_config is None
    steps = parts.settings.sample.steps or family.deployment_steps
    half = parts.dtype == torch.bfloat16
    return [
        "to sample from it:",
        *(["  import torch"] if half else []),
        f"  from diffusers import {pipeline}",
        f'  pipe = {pipeline}.from_pretrained("{out if full else family.path}"'
        + (", torch_dtype=torch.bfloat16)" if half else ")"),
        *([] if full else [f'  pipe.load_lora_weights("{out}")']),
        f'  pipe(prompt="...", num_inference_steps={steps}, sigmas=[1 - i / {steps} for i in range({steps})], '
        + (f"guidance_scale={family.guidance_scale:g}, " if pipeline == family.pipeline_class else "") +
        f"height={parts.data.records[0].height}, width={parts.data.records[0].width}).images[0]",
    ]
