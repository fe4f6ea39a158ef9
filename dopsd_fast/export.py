"""Writing trained weights in the layouts that other programs load: a complete pipeline folder, or a LoRA folder.

Both appear under their final name only when they are complete; what was there before stays until then.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .errors import UserError
from .families import Family

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf"}


def export_full(family: Family, named_tensors: Iterable[tuple[str, Tensor]], out: Path) -> None:
    """Writes `out`: the family's pipeline folder with `named_tensors` as its transformer.

    Everything but the transformer's weights is a hard link to the source's file (a copy where links are impossible),
    `vlm/` included. The weights keep the source's shards, dtypes and order; each tensor goes to its place as it
    arrives, so that one tensor is in memory at a time. Raises `UserError` for a name or shape the source does not have, for
    missing names, and for a full disk; `out` is then as it was.
    """
    source = family.path / "transformer"
    shards = [Shard.read(file) for file in weight_files(source)]
    with atomic_folder(out) as folder:
        link_tree(family.path, folder, skip=source)
        link_tree(source, folder / "transformer", skip_suffixes=WEIGHT_SUFFIXES)
        _write_weights(shards, folder / "transformer", named_tensors)


def export_lora(family: Family, state: dict[str, Tensor], peft_config, out: Path) -> None:
    """Writes `out`: one adapter in PEFT's and in diffusers' format (`Family.save_lora`)."""
    with atomic_folder(out) as folder:
        family.save_lora(folder, state, peft_config)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that `from_pretrained` reads: those of the index, or the only one."""
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    single = folder / "diffusion_pytorch_model.safetensors"
    if index.is_file():
        return [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    if single.is_file():
        return [single]
    raise UserError(f"{folder}: neither {single.name} nor its index is there")


@dataclass
class Shard:
    """Layout of one safetensors file: 8 bytes little-endian header length, JSON header, data."""

    name: str
    header: bytes
    entries: dict[str, dict]

    @classmethod
    def read(cls, file: Path) -> Shard:
        try:
            with file.open("rb") as stream:
                prefix = stream.read(8)
                header = prefix + stream.read(struct.unpack("<Q", prefix)[0])
            entries = json.loads(header[8:])
        except (OSError, ValueError, struct.error, MemoryError) as error:
            raise UserError(f"{file} cannot be read as safetensors: {error}") from error
        entries.pop("__metadata__", None)
        return cls(file.name, header, entries)


def _write_weights(shards: list[Shard], folder: Path, named_tensors: Iterable[tuple[str, Tensor]]) -> None:
    place = {name: (shard, entry) for shard in shards for name, entry in shard.entries.items()}
    streams = {}
    try:
        for shard in shards:
            streams[shard.name] = (folder / shard.name).open("wb")
            streams[shard.name].write(shard.header)
        for name, tensor in named_tensors:
            if name not in place:
                raise UserError(f"export: {name} is not a weight of the source transformer, or came twice")
            shard, entry = place.pop(name)
            if list(tensor.shape) != entry["shape"]:
                raise UserError(f"export: {name} has shape {[*tensor.shape]}, the source has {entry['shape']}")
            data = tensor.detach().to("cpu", DTYPES[entry["dtype"]]).contiguous().reshape(-1).view(torch.uint8)
            streams[shard.name].seek(len(shard.header) + entry["data_offsets"][0])
            streams[shard.name].write(data.numpy().data)
        if place:
            raise UserError(f"export: {len(place)} weights of the transformer were not given, first {min(place)}")
        for stream in streams.values():
            stream.flush()
            os.fsync(stream.fileno())
    finally:
        for stream in streams.values():
            _close(stream)


def _close(stream) -> None:
    try:
        stream.close()
    except OSError as error:  # closing flushes: on a full disk the error that led here is the one to tell
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise


def link_tree(source: Path, target: Path, skip: Path | None = None, skip_suffixes: Iterable[str] = ()) -> None:
    """Hard-links (else copies) the files below `source`; hidden files, `skip` and `skip_suffixes` are left out."""
    target.mkdir(parents=True, exist_ok=True)
    for entry in sorted(source.iterdir()):
        if entry.name.startswith(".") or entry == skip:
            continue
        if entry.is_dir():
            link_tree(entry, target / entry.name, skip, skip_suffixes)
        elif entry.suffix not in skip_suffixes:
            link_or_copy(entry, target / entry.name)


def link_or_copy(source: Path, target: Path) -> None:
    real = source.resolve()  # a hub snapshot holds symbolic links
    try:
        os.link(real, target)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        shutil.copy2(real, target)


@contextmanager
def atomic_folder(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its place at the end; on an error it vanishes and `out` stays."""
    out = Path(out)
    temporary, old = out.with_name(out.name + ".tmp"), out.with_name(out.name + ".old")
    try:
        if old.exists() and not out.exists():  # a run was killed between the two renames below
            old.rename(out)
        for leftover in (temporary, old):
            if leftover.exists():
                shutil.rmtree(leftover)
        temporary.mkdir(parents=True)
        yield temporary
        if out.exists():
            out.rename(old)
        temporary.rename(out)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError):
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            hint = "free some space and run again with resume" if full else "check the folder"
            raise UserError(f"cannot write {out}: {error.strerror or error}; {hint}") from error
        raise
