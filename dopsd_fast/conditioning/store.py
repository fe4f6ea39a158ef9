"""The folder of cached contexts."""

from __future__ import annotations

import json
import time
import uuid
import zlib
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from dopsd_fast.conditioning.context import Context
from dopsd_fast.errors import UserError
from dopsd_fast.storage.atomic import replace

FORMAT = 1
STALE_SECONDS = 3600.0  # a temporary file older than this has no living writer


class ShardStore:
    """The folder of shards. Several processes may write into it at once: nobody changes or renames another's shard."""

    def __init__(self, folder: Path, shard_bytes: int, shard_seconds: float, log: Callable[[str], None]):
        self.folder, self.shard_bytes, self.shard_seconds, self.log = folder, shard_bytes, shard_seconds, log
        self._where: dict[str, list[str]] = {}
        self._checked: set[tuple[str, str]] = set()
        self._bad: set[tuple[str, str]] = set()
        self._pending: dict[str, Context] = {}
        self._pending_bytes = 0
        self._since = time.monotonic()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"conditioning.folder={folder}: {error.strerror}") from error

    def __contains__(self, key: str) -> bool:
        return key in self._where

    def scan(self) -> list[Path]:
        """Learns which keys lie where; returns the shards that cannot be read, which are treated as absent."""
        known: dict[str, dict[str, Any]] = {}
        try:
            known = json.loads((self.folder / "index.json").read_text())["shards"]
        except (OSError, ValueError, KeyError, TypeError):
            pass
        where: dict[str, list[str]] = {}
        damaged: list[Path] = []
        for shard in sorted(self.folder.glob("contexts-*.safetensors")):
            entry = known.get(shard.name, {})
            keys = entry.get("keys")
            if keys is None or entry.get("bytes") != shard.stat().st_size:
                try:
                    keys = sorted(_checksums(shard))
                except (OSError, ValueError, KeyError) as error:
                    reason = " ".join(str(error).split())[:120]
                    self.log(f"cache: {shard} is damaged ({reason}): its contexts are computed again")
                    damaged.append(shard)
                    continue
            for key in keys:
                if (key, shard.name) not in self._bad:
                    where.setdefault(key, []).append(shard.name)
        self._where = where
        return damaged

    def clean(self, damaged: Sequence[Path]) -> None:
        """Removes unreadable shards, and temporary files that a killed run left behind."""
        old = time.time() - STALE_SECONDS
        leftovers = [file for file in self.folder.glob("*.tmp") if file.stat().st_mtime < old]
        for file in [*damaged, *leftovers]:
            file.unlink(missing_ok=True)

    def add(self, key: str, context: Context) -> None:
        self._pending[key] = context
        self._pending_bytes += sum(tensor.nbytes for tensor in context.values())
        if self._pending_bytes >= self.shard_bytes or time.monotonic() - self._since >= self.shard_seconds:
            self.flush()

    def flush(self) -> None:
        """Writes what is pending as one shard: temporary file, fsync, rename."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        self._since = time.monotonic()
        if not self._pending:
            return
        pending = self._pending.items()
        tensors = {f"{key}/{name}": tensor for key, context in pending for name, tensor in context.items()}
        sums = {key: str(checksum(context)) for key, context in pending}
        shard = self.folder / f"contexts-{uuid.uuid4().hex[:16]}.safetensors"
        temporary = shard.with_suffix(".tmp")
        try:
            save_file(tensors, temporary, metadata={"format": "pt", "checksums": json.dumps(sums)})
            replace(temporary, shard)
        except (OSError, SafetensorError) as error:
            temporary.unlink(missing_ok=True)
            raise UserError(f"cannot write the conditioning cache {shard}: {' '.join(str(error).split())}") from error
        for key in self._pending:
            self._where.setdefault(key, []).append(shard.name)
            self._checked.add((key, shard.name))
        self._pending, self._pending_bytes = {}, 0

    def read(self, key: str) -> Context | None:
        """The value, verified against its checksum at the first reading; None where there is none or it is damaged."""
        for name in list(self._where.get(key, ())):
            try:
                context = self._read(key, name, verify=(key, name) not in self._checked)
            except (OSError, ValueError, KeyError, TypeError) as error:
                reason = " ".join(str(error).split())[:120]
                self.log(f"cache: a context in {self.folder / name} is damaged ({reason}): it is computed again")
                self._bad.add((key, name))
                self._where[key].remove(name)
                continue
            self._checked.add((key, name))
            return context
        self._where.pop(key, None)
        return None

    def _read(self, key: str, name: str, verify: bool) -> Context:
        with open_shard(self.folder / name) as file:
            names = [n for n in file.keys() if n.startswith(f"{key}/")]  # noqa: SIM118
            context = {n.split("/", 1)[1]: file.get_tensor(n) for n in names}
            if not context:
                raise ValueError("it is not there")
            if verify and checksum(context) != int(json.loads(file.metadata()["checksums"])[key]):
                raise ValueError("its checksum differs")
        return context

    def write_index(self) -> None:
        """Atomically replaces index.json: {"format", "shards": {name: {"bytes", "keys"}}}."""
        shards: dict[str, dict[str, Any]] = {}
        for key, names in sorted(self._where.items()):
            for name in names:
                entry = shards.setdefault(name, {"bytes": (self.folder / name).stat().st_size, "keys": []})
                entry["keys"].append(key)
        temporary = self.folder / f"index-{uuid.uuid4().hex[:16]}.tmp"
        try:
            temporary.write_text(json.dumps({"format": FORMAT, "shards": shards}, indent=1))
            replace(temporary, self.folder / "index.json")
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise UserError(f"cannot write {self.folder / 'index.json'}: {error.strerror}") from error


def checksum(context: Context) -> int:
    """crc32 over names, shapes, dtypes and bytes, in the order of names."""
    value = 0
    for name in sorted(context):
        tensor = context[name].contiguous()
        value = zlib.crc32(f"{name}{list(tensor.shape)}{tensor.dtype}".encode(), value)
        value = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, value)
    return value


def _checksums(shard: Path) -> dict[str, str]:
    with open_shard(shard) as file:
        return json.loads((file.metadata() or {})["checksums"])


@contextmanager
def open_shard(shard: Path):
    """`safe_open`, whose own error (a header that is damaged or promises more bytes than there are) is a ValueError."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(shard, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(str(error)) from error
