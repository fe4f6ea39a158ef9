"""Hashes model folders by content, so that the cache notices when an encoder has changed."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dopsd_fast.errors import UserError
from dopsd_fast.storage.digests import digest, hash_file

NOT_READ = {".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".md", ".txt~"}  # no loader reads them, so they decide nothing


def hash_folder(folder: Path) -> str:
    """Returns the sha256 over the sorted pairs (relative name, sha256 of the content) of every file that a loader may read.

    Hidden files and formats that are never loaded are left out. Files are streamed, several at a time. Raises UserError where
    there is no folder.
    """
    if not folder.is_dir():
        raise UserError(f"model part missing: {folder} is not a folder")
    files = sorted(
        file
        for file in folder.rglob("*")
        if file.is_file()
        and file.suffix not in NOT_READ
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    )
    with ThreadPoolExecutor(4) as pool:  # threads help because hashlib releases the GIL
        digests = list(pool.map(hash_file, files))
    return digest([[file.relative_to(folder).as_posix(), value] for file, value in zip(files, digests, strict=True)])
