"""The student and its teacher, built from a family and those sections of the settings that say how."""

from __future__ import annotations

import copy

import torch
from torch import nn

from dopsd_fast.errors import UserError
from dopsd_fast.families.base import Family
from dopsd_fast.pair.contract import PairForward
from dopsd_fast.pair.lora import add_adapters
from dopsd_fast.pair.student_teacher import STUDENT, TEACHER, Pair
from dopsd_fast.settings.schema import AdapterSettings, TeacherSettings, TrainSettings
from dopsd_kernels.fp8_linear import require_fp8


def build_pair(
    family: Family, backbone: str, adapter: AdapterSettings, teacher: TeacherSettings, train: TrainSettings, dtype: torch.dtype,
    device: torch.device | str | None = None,
) -> Pair:
    """Loads the student in `dtype` onto `device` (None: where the family loads it) and gives it its teacher there: initially
    equal, bit for bit. `backbone`: the setting of that name.

    Raises UserError when an entry of `adapter.targets` matches no linear layer.
    """
    student = family.load_transformer(dtype)
    if device is not None:
        student.to(device)
    student.requires_grad_(False)
    average = None
    if adapter.kind == "lora":
        adapters = [STUDENT] if teacher.kind == "student" else [STUDENT, TEACHER]
        targets = adapter.targets or family.lora_targets
        config = add_adapters(student, targets, adapter.rank, adapter.alpha, train.seed, adapters)
        names = {STUDENT: STUDENT, TEACHER: adapters[-1]}
    else:
        config = None
        average = None if teacher.kind == "student" else copy.deepcopy(student)
        student.requires_grad_(True)
        names = {STUDENT: "", TEACHER: ""}
    modules = {STUDENT: student, TEACHER: student if average is None else average}
    pair = Pair(student, average, family.velocity, config, fuse(family, backbone, train, modules, names))
    for param in pair.parameters():
        if param.is_floating_point() and param.dtype != dtype:
            param.data = param.data.to(dtype)
    if pair.fused is None and train.activations == "recompute":
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
