"""The student and its teacher, built from a family and the settings."""

from __future__ import annotations

import copy

import torch
from torch import nn

from dopsd_fast.errors import UserError
from dopsd_fast.families.base import Family
from dopsd_fast.pair.contract import PairForward
from dopsd_fast.pair.lora import add_adapters
from dopsd_fast.pair.student_teacher import STUDENT, TEACHER, Pair
from dopsd_fast.settings.schema import Settings, TrainSettings
from dopsd_kernels.fp8_linear import require_fp8


def build_pair(family: Family, settings: Settings, dtype: torch.dtype, device: torch.device | str | None = None) -> Pair:
    """Loads the student in `dtype` onto `device` (None: where the family loads it) and gives it its teacher there: initially
    equal, bit for bit.

    Raises UserError when an entry of `adapter.targets` matches no linear layer.
    """
    student = family.load_transformer(dtype)
    if device is not None:
        student.to(device)
    student.requires_grad_(False)
    kind = settings.teacher.kind
    if settings.adapter.kind == "lora":
        adapters = [STUDENT] if kind == "student" else [STUDENT, TEACHER]
        targets = settings.adapter.targets or family.lora_targets
        config = add_adapters(student, targets, settings.adapter.rank, settings.adapter.alpha, settings.train.seed, adapters)
        teacher = None
        names = {STUDENT: STUDENT, TEACHER: adapters[-1]}
    else:
        config = None
        teacher = None if kind == "student" else copy.deepcopy(student)
        student.requires_grad_(True)
        names = {STUDENT: "", TEACHER: ""}
    modules = {STUDENT: student, TEACHER: student if teacher is None else teacher}
    pair = Pair(student, teacher, family.velocity, config, fuse(family, settings.backbone, settings.train, modules, names))
    for param in pair.parameters():
        if param.is_floating_point() and param.dtype != dtype:
            param.data = param.data.to(dtype)
    if pair.fused is None and settings.train.activations == "recompute":
        student.enable_gradient_checkpointing()  # type: ignore[operator]
    return pair


def fuse(
    family: Family, backbone: str, train: TrainSettings, modules: dict[str, nn.Module], adapters: dict[str, str]
) -> PairForward | None:
    """The pair forward that `backbone` asks for, or None for diffusers' own forward. UserError where the family has none."""
    fused = None
    if train.fp8 != "off" and torch.cuda.is_available():
        try:
            require_fp8(torch.device("cuda"))
        except RuntimeError as error:
            raise UserError(str(error)) from None
        if train.precision != "bf16":
            raise UserError(f"train.fp8={train.fp8} on a GPU needs train.precision=bf16, it is {train.precision}")
    if backbone != "diffusers":
        fused = family.pair_forward(modules, adapters, train.activations, train.attention, train.fp8)
    if fused is None and backbone == "pair":
        raise UserError(f"backbone=pair: {family.name} has no pair forward: leave backbone=auto")
    if fused is None and train.activations == "selective":
        raise UserError(f"train.activations=selective: only the pair forward has it, {family.name} runs diffusers' forward: "
                        "use keep or recompute")
    if fused is None and train.fp8 != "off":
        raise UserError(f"train.fp8={train.fp8}: only the pair forward has it, {family.name} runs diffusers' forward: use off")
    return fused
