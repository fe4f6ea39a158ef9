"""The folder of cached contexts: one safetensors file for each, named by its key."""

from __future__ import annotations

import time
import uuid
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from dopsd_fast.conditioning.context import Context
from dopsd_fast.errors import UserError
from dopsd_fast.storage.atomic import replace_all

STALE_SECONDS = 3600.0  # a temporary file older than this has no living writer
SUFFIX = ".safetensors"


class ContextStore:
    """`add` contexts, `flush` them, `read` them. Several processes may use one folder at once.

    A file appears under its name only when it is whole: it is written as `<key>.<random>.tmp`, and a batch of such files is
    flushed to the disk in one go and then renamed. A batch is written when it holds `batch_bytes` or is `batch_seconds` old, so
    a killed run loses no more than that. Each file carries a checksum, which the first reading verifies: what a crashed machine
    or a bad disk has left is computed again, with a line that names the file."""

    def __init__(self, folder: Path, batch_bytes: int, batch_seconds: float, log: Callable[[str], None]) -> None:
        self.folder, self.batch_bytes, self.batch_seconds, self.log = folder, batch_bytes, batch_seconds, log
        self._present: set[str] = set()
        self._checked: set[str] = set()
        self._pending: dict[str, Path] = {}
        self._pending_bytes = 0
        self._since = time.monotonic()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"conditioning.folder={folder}: {error.strerror}") from error

    def __contains__(self, key: str) -> bool:
        return key in self._present

    def scan(self) -> None:
        """Learns which contexts are there, those of other processes included."""
        self._present = {file.name.removesuffix(SUFFIX) for file in self.folder.glob(f"*{SUFFIX}")}

    def clean(self) -> None:
        """Removes the temporary files that a killed run has left."""
        old = time.time() - STALE_SECONDS
        for file in self.folder.glob("*.tmp"):
            if file.stat().st_mtime < old:
                file.unlink(missing_ok=True)

    def add(self, key: str, context: Context) -> None:
        """Writes a context, which appears with the next `flush`."""
        file = self.folder / f"{key}.{uuid.uuid4().hex[:16]}.tmp"
        try:
            save_file(context, file, metadata={"format": "pt", "crc32": str(checksum(context))})
        except (OSError, SafetensorError) as error:
            file.unlink(missing_ok=True)
            raise self._unwritten(file, error) from error
        self._pending[key] = file
        self._pending_bytes += sum(tensor.nbytes for tensor in context.values())
        if self._pending_bytes >= self.batch_bytes or time.monotonic() - self._since >= self.batch_seconds:
            self.flush()

    def flush(self) -> None:
        """Everything that was added is on the disk, under its name."""
        self._since = time.monotonic()
        pending, self._pending, self._pending_bytes = self._pending, {}, 0
        try:
            replace_all({file: self._file(key) for key, file in pending.items()})
        except OSError as error:
            for file in pending.values():
                file.unlink(missing_ok=True)
            raise self._unwritten(self.folder, error) from error
        self._present |= pending.keys()
        self._checked |= pending.keys()

    def read(self, key: str) -> Context | None:
        """The context, verified at the first reading; None where there is none or it is damaged."""
        if key not in self._present:
            return None
        try:
            with safe_open(self._file(key), framework="pt") as file:
                context = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                if key not in self._checked and checksum(context) != int(file.metadata()["crc32"]):
                    raise ValueError("its checksum differs")
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            reason = " ".join(str(error).split())[:120]
            self.log(f"cache: {self._file(key)} is damaged ({reason}): it is computed again")
            self._present.discard(key)
            return None
        self._checked.add(key)
        return context

    def _file(self, key: str) -> Path:
        return self.folder / f"{key}{SUFFIX}"

    def _unwritten(self, file: Path, error: Exception) -> UserError:
        return UserError(f"cannot write the conditioning cache {file}: {' '.join(str(error).split())}")


def checksum(context: Context) -> int:
    """crc32 over names, shapes, dtypes and bytes, in the order of names."""
    value = 0
    for name in sorted(context):
        tensor = context[name].contiguous()
        value = zlib.crc32(f"{name}{list(tensor.shape)}{tensor.dtype}".encode(), value)
        value = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, value)
    return value
