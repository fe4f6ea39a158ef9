"""Makes the accounts by which ranks find out whether they all run the same program, with the same settings, on the same model
and data (`distributed.consensus` compares them).

An account is {section: {name: value}} and can be written as JSON. It names each thing separately, so that a rank that differs
can say what differs.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dopsd_fast.conditioning.fingerprint import NOT_READ
from dopsd_fast.distributed.consensus import Account
from dopsd_fast.errors import UserError
from dopsd_fast.settings.source import by_path
from dopsd_fast.storage.digests import sampled_digest

if TYPE_CHECKING:
    from dopsd_fast.data.records import Dataset
    from dopsd_fast.families.base import Family
    from dopsd_fast.settings.schema import Settings


OWN_ON_EACH_RANK = ("resume", "output.dir", "model.path", "data.path", "data.root", "conditioning.folder",
                    "conditioning.vlm_path", "train.threads")
"""Settings that may differ between ranks: rank 0 alone uses them, or they name places whose contents are compared instead. The
number of threads may differ too."""
LIBRARIES = ("torch", "deepspeed", "diffusers", "transformers", "peft", "numpy", "pillow")


# ---- accounts ----------------------------------------------------------------------------------------------------------------


def of_program(settings: Settings) -> Account:
    """Returns the account of the program: versions, and settings that must be equal on all ranks."""
    flat = {name: value for name, value in by_path(settings.model_dump()).items() if name not in OWN_ON_EACH_RANK}
    return {"versions": _versions(), "settings": flat}


def of_input(family: Family, data: Dataset) -> Account:
    """Returns the account of the input: the digests of the model's files, and the records as this rank has read them. Raises
    UserError for a file that cannot be read."""
    return {"model": _model_files(family), "records": of_records(data)}


def of_contexts(data: Dataset, keys: dict[tuple, str], fingerprints: dict[str, str]) -> Account:
    """Returns the account of the contexts: the encoders' fingerprints, and the cache keys of each record, which are hashes of
    the encoders' files, the prompts and the pictures' bytes."""
    records: dict[str, Any] = {}
    for key, value in keys.items():
        if key[0] == "student":  # its key depends on the prompt alone, which has been compared
            continue
        record = data.records[key[1]]
        entry = records.setdefault(str(record.index), {"file": record.images[0].name, "picture": []})
        entry["picture"].append(value)
    return {"model": {f"the encoder of {kind} contexts": value for kind, value in fingerprints.items()}, "pictures": records}


def _versions() -> dict[str, str]:
    from dopsd_fast import __version__

    found = {"dopsd_fast": f"{__version__} (source {_source_digest()})"}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "that is not installed"
    return found


def _source_digest() -> str:
    """Returns a digest of this program's own modules, because their version number does not change with every edit."""
    import dopsd_fast
    import dopsd_kernels

    hasher = hashlib.sha256()
    for package in (dopsd_fast, dopsd_kernels):
        root = Path(str(package.__file__)).parent
        for file in sorted(root.rglob("*.py")):
            hasher.update(f"{file.relative_to(root)}|".encode() + file.read_bytes())
    return hasher.hexdigest()[:12]


def _model_files(family: Family) -> dict[str, str]:
    from dopsd_fast.families.pipeline_folder import PARTS

    folders = {part: family.path / part for part in PARTS}
    if family.vlm_folder.is_dir():
        folders["vlm"] = family.vlm_folder
    files = {"model_index.json": family.path / "model_index.json"}
    for part, folder in folders.items():
        for file in sorted(folder.rglob("*")):
            name = file.relative_to(folder)
            if file.is_file() and file.suffix not in NOT_READ and not any(word.startswith(".") for word in name.parts):
                files[f"{part}/{name.as_posix()}"] = file
    return {name: sampled_digest(file) for name, file in files.items()}


def of_records(data: Dataset) -> dict[str, Any]:
    """Returns, by the record's index, everything that each record was read as, with digests of its images' contents."""
    found = {}
    for record in data.records:
        names = [str(file.relative_to(data.root) if file.is_relative_to(data.root) else file) for file in record.images]
        found[str(record.index)] = {
            "file": names[0],
            "images": names,
            "prompts": record.prompts,
            "order of prompts": list(record.prompts),
            "size": record.size,
            "bucket": [record.height, record.width],
            "size in bytes": [_bytes(file) for file in record.images],
            "picture": record.content,
        }
    return found


def _bytes(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from error
