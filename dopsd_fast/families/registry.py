"""Model families. `open_family` is the only place that chooses one; all else speaks to the `Family` interface."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dopsd_fast.conditioning.context import Context
from dopsd_fast.conditioning.encoders import Encoders
from dopsd_fast.errors import UserError
from dopsd_fast.families.base import Family
from dopsd_fast.families.flux2.family import Flux2Klein
from dopsd_fast.families.pipeline_folder import read_json
from dopsd_fast.families.zimage.family import ZImage

__all__ = ["Context", "Encoders", "FAMILIES", "Family", "open_family"]

FAMILIES: dict[str, type[Family]] = {family.name: family for family in (ZImage, Flux2Klein)}


def open_family(model_path: str | Path, conditioning: Any, name: str = "auto") -> Family:
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
    found = next((family for family in FAMILIES.values() if pipeline in (family.pipeline_class, *family.other_pipelines)), None)
    if found is None:
        known = ", ".join(family.pipeline_class for family in FAMILIES.values())
        raise UserError(f"{path}: pipeline {pipeline} is not supported, expected one of {known}")
    if name not in ("auto", found.name):
        raise UserError(f"model.family={name} but {path} holds a {pipeline} ({found.name})")
    return found(path, conditioning)
