"""The end of a run: student and teacher exported, read back, and compared with the live model.

One tensor at a time is whole on a rank, and the files are compared with the live weights in the same way. That the exported
model draws the same picture is looked at where there is room for a second copy of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from dopsd_fast.errors import UserError
from dopsd_fast.export import DTYPES, Shard, export_full, export_lora, weight_files
from dopsd_fast.families import open_family
from dopsd_fast.families.base import scaled_lora
from dopsd_fast.sampling import rollout
from dopsd_fast.teacher import STUDENT, Pair, fuse
from dopsd_fast.telemetry import free_memory, is_out_of_memory
from dopsd_kernels.adamw_ema_triton import untie_

if TYPE_CHECKING:
    from dopsd_fast.showcase import Shown
    from dopsd_fast.trainer import Trainer

LARGEST_DIFFERENCE = 2
"""Of 255, in the worst pixel: reloaded weights are equal, what may differ is the order of sums in a merged kernel."""
LARGEST_ROUNDED_DIFFERENCE = 32
"""The same where the source pipeline, and so the export, stores fewer bits than the run computes with."""


def publish(trainer: Trainer) -> list[str]:
    """Writes `export/` (student) and, for an EMA teacher, `export_teacher/`; lines that say where and how to use them."""
    lines = []
    for branch, name in (("student", "export"), ("teacher", "export_teacher")):
        if branch == "teacher" and not trainer.engine.keeps_ema:
            continue
        out = trainer.folder / name
        _export(trainer, branch, out)
        _check_weights(trainer, branch, out)
        said = "every weight is the live one"
        if not trainer.engine.any(not _has_room(trainer)):
            difference = _compare(trainer, branch, out)
            said = f"pixels differ by at most {difference} of 255" if difference is not None else said
        lines.append(f"{name + '/':14} {branch}, read back: {said}")
    return lines + _how_to_sample(trainer)


def _export(trainer: Trainer, branch: str, out: Path) -> None:
    tensors = _tensors(trainer, branch)
    problem = ""
    if trainer.rank == 0:
        try:
            if trainer.pair.lora_config is None:
                export_full(trainer.family, tensors, out)
            else:
                export_lora(trainer.family, dict(tensors), trainer.pair.lora_config, out)
        except UserError as error:
            problem = str(error)
    for _ in tensors:  # the other ranks take part in every gather, and so does rank 0 after a failure
        pass
    trainer.agree(problem)


def _tensors(trainer: Trainer, branch: str) -> Iterator[tuple[str, Tensor]]:
    """(name, value) of every weight, so that its rounding is the live weight. A collective call."""
    low_bits = trainer.settings.train.masters == "low_bits"
    for name, tensor in trainer.engine.full_tensors(branch):
        yield name, untie_(tensor) if low_bits and tensor.dtype == torch.float32 else tensor


def _check_weights(trainer: Trainer, branch: str, out: Path) -> None:
    """Every exported tensor has the bits of the live one in the type that it is stored in. Raises UserError on every rank."""
    from safetensors import SafetensorError, safe_open

    full, problem = trainer.pair.lora_config is None, ""
    prefix = "" if full else "base_model.model."
    stored: dict[str, Any] = {}
    with ExitStack() as opened:
        if trainer.rank == 0:
            try:
                for file in weight_files(out / "transformer") if full else [out / "adapter_model.safetensors"]:
                    handle = opened.enter_context(safe_open(file, framework="pt"))
                    stored |= dict.fromkeys(handle.keys(), handle)
            except (OSError, SafetensorError, UserError) as error:
                problem = f"{out} was written but cannot be read back: {error}"
        for name, tensor in _tensors(trainer, branch):  # a collective call: nobody leaves early
            if trainer.rank or problem:
                continue
            try:
                found = stored[prefix + name].get_tensor(prefix + name)
                if not full:
                    tensor = scaled_lora(name, tensor, trainer.pair.lora_config)
                if not torch.equal(_bits(found), _bits(tensor.to(found.dtype))):
                    problem = f"{out} was read back and its {name} is not what was written: do not use this export"
            except (OSError, SafetensorError, KeyError) as error:
                problem = f"{out} was written but its {name} cannot be read back: {error}"
    trainer.agree(problem)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def _has_room(trainer: Trainer) -> bool:
    """Whether rank 0 can hold the exported model, and sample from it, beside what it trains: not where a model is sharded
    over accelerators because it does not fit, nor where the memory left is less than half as much again."""
    if trainer.rank:
        return True
    needed = 1.5 * trainer.parameters * trainer.dtype.itemsize
    if trainer.device.type != "cpu":
        if trainer.engine.stage == 3 and trainer.world > 1:
            return False
        torch.cuda.empty_cache()
        if torch.cuda.mem_get_info(trainer.device)[0] < needed:
            return False
    return _free_memory() > needed


def _free_memory() -> float:
    """Bytes of main memory that are free or can be had from the file cache; infinite where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return float("inf")


def _compare(trainer: Trainer, branch: str, out: Path) -> int | None:
    """Largest pixel difference between the live branch and what was read back, on the first record's prompt; None where that
    does not fit the memory after all."""
    difference: int | None = 0
    with trainer.together():
        try:
            difference = _difference(trainer, branch, out)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            difference = None
        if trainer.rank == 0 and difference is not None:
            if difference > (LARGEST_ROUNDED_DIFFERENCE if _is_rounded(trainer, out) else LARGEST_DIFFERENCE):
                raise UserError(
                    f"{out} was read back and draws another picture (pixels differ by up to {difference} of 255): "
                    "the checkpoints are good, do not use this export"
                )
    free_memory(trainer.device)
    return difference


def _difference(trainer: Trainer, branch: str, out: Path) -> int:
    shown = replace(trainer.showcase.row(trainer.data.records[0]), record=None)
    live = trainer.showcase.latent(branch, shown, 0)  # on every rank: a sharded model needs them all
    if trainer.rank:
        return 0
    pair = [_pixels(trainer, latent) for latent in (live, _read_back(trainer, shown, out))]
    return int(np.abs(pair[0] - pair[1]).max())


def _read_back(trainer: Trainer, shown: Shown, out: Path) -> Tensor:
    family = trainer.family
    model: Any
    if trainer.pair.lora_config is None:
        model = open_family(out, family.conditioning).load_transformer(trainer.dtype)
    else:
        model = family.load_transformer(trainer.dtype)
        model.load_lora_adapter(out, weight_name="pytorch_lora_weights.safetensors", prefix="transformer")
        model.to(trainer.dtype)
    model.to(trainer.device)
    noise = trainer.showcase.noise(shown, 0)
    grid = family.sample_grid(trainer.settings.sample.steps, tuple(noise.shape[1:]))
    adapter = "" if trainer.pair.lora_config is None else model.active_adapters()[0]
    pair = Pair(model, None, fused=fuse(family, trainer.settings, {STUDENT: model}, {STUDENT: adapter}))
    return rollout(pair.sampler(family, STUDENT, [trainer.context("student", shown.prompt)], noise.shape), noise, grid)


def _pixels(trainer: Trainer, latent: Tensor) -> np.ndarray:
    return np.asarray(trainer.family.decode(trainer.showcase.vae, latent)[0], dtype=int)


def _is_rounded(trainer: Trainer, out: Path) -> bool:
    """What was read back may differ from the live weights by a rounding: it is stored in fewer bits, or B was rounded after it
    was scaled by what is no power of two."""
    if trainer.pair.lora_config is not None:
        scale = trainer.pair.lora_config.lora_alpha / trainer.pair.lora_config.r
        return trainer.dtype == torch.bfloat16 and math.frexp(scale)[0] != 0.5
    entries = [entry for file in weight_files(out / "transformer") for entry in Shard.read(file).entries.values()]
    return any(DTYPES[entry["dtype"]].itemsize < trainer.dtype.itemsize for entry in entries)


def _how_to_sample(trainer: Trainer) -> list[str]:
    family, out = trainer.family, trainer.folder / "export"
    pipeline = family.index["_class_name"]
    full = trainer.pair.lora_config is None
    steps = trainer.settings.sample.steps or family.deployment_steps
    half = trainer.dtype == torch.bfloat16
    return [
        "to sample from it:",
        *(["  import torch"] if half else []),
        f"  from diffusers import {pipeline}",
        f'  pipe = {pipeline}.from_pretrained("{out if full else family.path}"'
        + (", torch_dtype=torch.bfloat16)" if half else ")"),
        *([] if full else [f'  pipe.load_lora_weights("{out}")']),
        f'  pipe(prompt="...", num_inference_steps={steps}, sigmas=[1 - i / {steps} for i in range({steps})], '
        + (f"guidance_scale={family.guidance_scale:g}, " if pipeline == family.pipeline_class else "") +
        f"height={trainer.data.records[0].height}, width={trainer.data.records[0].width}).images[0]",
    ]
