"""A pipeline folder on the disk, in the layout of diffusers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dopsd_fast.errors import UserError

PARTS = ("scheduler", "vae", "text_encoder", "tokenizer", "transformer")


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file of the folder. UserError, naming the file, where it is missing or something else."""
    try:
        value = json.loads(file.read_text())
    except FileNotFoundError as error:
        raise UserError(f"{file} is missing: model.path must be a pipeline folder in diffusers layout") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{file} is not a JSON object")
    return value


def diffusers_class(name: str) -> Any:
    """A class of diffusers by its name, imported when it is asked for."""
    import diffusers

    return getattr(diffusers, name)
