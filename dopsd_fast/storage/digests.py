"""Hashes of values and files."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from dopsd_fast.errors import UserError

SAMPLES, SAMPLE_BYTES = 64, 4096
WHOLE_BYTES = 1 << 20
"""Files up to this size are read whole; of larger ones the beginning, SAMPLES pieces and the size: training a model changes
nearly every byte, and reading 12 GB again on every rank would cost a minute."""


def digest(value: object) -> str:
    """sha256 of a JSON-able value, independent of dict order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def hash_file(file: Path) -> str:
    """sha256 of all of a file."""
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from error


def sampled_digest(file: Path) -> str:
    """sha256 of a small file; of a large one its size, its first WHOLE_BYTES / 16 bytes, and pieces spread evenly over it."""
    try:
        with open(file, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            hasher = hashlib.sha256(f"{size}|".encode())
            hasher.update(stream.read(WHOLE_BYTES if size <= WHOLE_BYTES else WHOLE_BYTES // 16))
            for i in range(SAMPLES if size > WHOLE_BYTES else 0):
                stream.seek((size - SAMPLE_BYTES) * (i + 1) // SAMPLES)
                hasher.update(stream.read(SAMPLE_BYTES))
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from error
    return hasher.hexdigest()
