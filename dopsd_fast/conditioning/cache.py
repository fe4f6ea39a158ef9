"""Contexts and latents, computed once and found again by content.

A key is the hash of everything that decides the value: kind, encoder fingerprint, prompt, and the digests of the
cropped images. Values lie in `contexts-*.safetensors` shards (tensors `key/name`, a checksum per key in the metadata),
each written under a temporary name and renamed; `index.json` maps keys to shards. The index is only a shortcut: a shard
that it does not know, as a killed run leaves them, is read from its header.
"""

from __future__ import annotations

import json
import os
import time
import uuid
import zlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ..errors import UserError
from ..families.base import Context, Encoders, Family
from .fingerprint import digest

Kind = Literal["student", "teacher", "latents"]
Crop = tuple[Path, int, int]
"""An image file and the height and width in pixels that it is cropped to."""

FORMAT = 1
STALE_SECONDS = 3600.0  # a temporary file older than this has no living writer


@dataclass(frozen=True)
class Request:
    kind: Kind
    prompt: str
    crops: tuple[Crop, ...]


class ContextCache:
    """`request` what will be needed, `complete` it, then `get` it, on CPU.

    policy: "disk" (shards in `folder`, shared by ranks and runs), "memory" (each rank computes and keeps its own), "off"
    (nothing is kept: encoders stay, `get` computes). `barrier` waits for all ranks, which must pass the same keys to
    `complete`. `progress` wraps the keys that are computed there, to show how far that is. A value is the same whoever
    computes it, in whatever order.
    """

    def __init__(
        self,
        policy: Literal["off", "memory", "disk"],
        folder: Path | None,
        family: Family,
        rank: int = 0,
        world: int = 1,
        log: Callable[[str], None] = print,
        *,
        barrier: Callable[[], None] = lambda: None,
        progress: Callable[[Sequence[str]], Iterable[str]] = iter,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        shard_bytes: int = 256 * 2**20,
        shard_seconds: float = 20.0,
    ):
        if policy == "disk" and folder is None:
            raise UserError("conditioning.cache=disk needs conditioning.folder")
        self.policy, self.family, self.rank, self.world = policy, family, rank, world
        self.log, self.barrier, self.device, self.dtype = log, barrier, device, dtype
        self.progress = progress
        self._requests: dict[str, Request] = {}
        self._digests: dict[Crop, str] = {}
        self._encoders: Encoders | None = None
        self._memory: dict[str, Context] = {}
        self._shards: ShardStore | None = None
        if policy == "disk" and folder is not None:
            self._shards = ShardStore(Path(folder), shard_bytes, shard_seconds, log)

    def request(self, kind: Kind, prompt: str = "", image: Crop | Sequence[Crop] | None = None) -> str:
        """The key of one value. kind: "student" (prompt), "teacher" (prompt, images) or "latents" (one image)."""
        crops: Any = () if image is None else image
        if crops and isinstance(crops[0], str | Path):
            crops = (crops,)
        request = Request(kind, prompt, tuple((Path(path), int(h), int(w)) for path, h, w in crops))
        images = [self._image_digest(crop) for crop in request.crops]
        key = digest([FORMAT, kind, self.family.fingerprint(kind, self.dtype), prompt, images])[:40]
        self._requests[key] = request
        return key

    def complete(self, keys: Iterable[str]) -> int:
        """Verifies what is there, computes what is missing or damaged, frees the encoders; on disk the ranks share this.

        Returns how many values this rank computed. Killed at any moment, the next call goes on where this one was.
        """
        wanted = list(dict.fromkeys(keys))
        if self.policy == "off":
            return 0
        if self._shards is None:
            missing = [key for key in wanted if key not in self._memory]
            for key, context in self._compute_all(missing):
                self._memory[key] = context
        else:
            self.barrier()
            damaged = self._shards.scan()
            present = [key for key in wanted if key in self._shards]
            absent = [key for key in wanted if key not in self._shards]
            self.barrier()
            if self.rank == 0:
                self._shards.clean(damaged)
            missing = absent[self.rank :: self.world]
            missing += [key for key in present[self.rank :: self.world] if self._shards.read(key) is None]
            try:
                for key, context in self._compute_all(missing):
                    self._shards.add(key, context)
            finally:
                self._shards.flush()
            self.barrier()
            self._shards.scan()
            if self.rank == 0:
                self._shards.write_index()
            self.barrier()
        self.release()
        return len(missing)

    def get(self, key: str) -> Context:
        """The value of a requested key. Computed now if the policy is off, or if its shard turns out to be damaged."""
        if key in self._memory:
            return self._memory[key]
        if self._shards is not None:
            found = self._shards.read(key)
            if found is not None:
                return found
        if key not in self._requests:
            raise KeyError(f"{key} was never requested")
        context = self._compute(self._requests[key])
        if self._shards is not None:
            self._shards.add(key, context)
            self._shards.flush()
        if self.policy != "off":
            self.release()
        return context

    def release(self) -> None:
        """Frees the encoders; a later need loads them again."""
        if self._encoders is not None:
            self._encoders.release()
            self._encoders = None

    def _compute_all(self, keys: list[str]):
        for key in self.progress(sorted(keys, key=lambda k: self._requests[k].kind)) if keys else ():
            yield key, self._compute(self._requests[key])

    def _compute(self, request: Request) -> Context:
        from ..images import load_image

        if self._encoders is None:
            self._encoders = self.family.load_encoders(self.device, self.dtype)
        pictures = [load_image(*crop) for crop in request.crops]
        if request.kind == "student":
            return self._encoders.student([request.prompt])[0]
        if request.kind == "teacher":
            return self._encoders.teacher([request.prompt], [pictures])[0]
        return {"latent": self._encoders.latents(pictures)[0]}

    def _image_digest(self, crop: Crop) -> str:
        from ..images import image_digest

        if crop not in self._digests:
            self._digests[crop] = image_digest(*crop)
        return self._digests[crop]


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
            publish(temporary, shard)
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
            publish(temporary, self.folder / "index.json")
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


def publish(temporary: Path, final: Path) -> None:
    """fsync, rename, fsync of the folder: after a crash the final name holds the old or the whole new content."""
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, final)
    folder = os.open(final.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
