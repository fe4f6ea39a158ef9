"""`open_family` is the only place that chooses a model family; all else speaks to the `Family` interface."""

from __future__ import annotations

import importlib
from pathlib import Path

from dopsd_fast.errors import UserError
from dopsd_fast.families.base import Family
from dopsd_fast.families.pipeline_folder import read_json
from dopsd_fast.settings.names import FAMILIES
from dopsd_fast.settings.schema import ConditioningSettings


def family_class(name: str) -> type[Family]:
    """The class of the family `name`, a key of `settings.names.FAMILIES`, imported now."""
    names = FAMILIES[name]
    return getattr(importlib.import_module(names.module), names.name)


def open_family(model_path: str | Path, conditioning: ConditioningSettings, name: str = "auto") -> Family:
    """The family of the pipeline folder `model_path`, known by the pipeline class in its model_index.json.

    conditioning: the `conditioning` settings. Raises `UserError` for a folder without a needed part, an unknown
    pipeline, or a `name` that contradicts the folder.
    """
    path = Path(model_path)
    if not path.is_dir():
        raise UserError(f"model.path={path}: no such folder")
    if name not in ("auto", *FAMILIES):
        raise UserError(f"model.family={name}: expected auto, {', '.join(FAMILIES)}")
    pipeline = read_json(path / "model_index.json").get("_class_name")
    found = next((family for family, names in FAMILIES.items() if pipeline in names.pipelines), None)
    if found is None:
        known = ", ".join(names.pipelines[0] for names in FAMILIES.values())
        raise UserError(f"{path}: pipeline {pipeline} is not supported, expected one of {known}")
    if name not in ("auto", found):
        raise UserError(f"model.family={name} but {path} holds a {pipeline} ({found})")
    return family_class(found)(path, conditioning)
