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
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from torch import Tensor

from .errors import UserError

if TYPE_CHECKING:
    from .families import Family

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
SINGLE = "diffusion_pytorch_model.safetensors"
INDEX = f"{SINGLE}.index.json"
MOST_FILES = 500
"""All files of an export are open while it is written; a process may usually have 1024."""
CAST_AT_ONCE = 1 << 20
"""Numbers: beside the tensor that is written, only a piece of it is in memory in another type."""
WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf"}


def export_full(family: Family, named_tensors: Iterable[tuple[str, Tensor]], out: Path) -> None:
    """Writes `out`: the family's pipeline folder with `named_tensors` as its transformer, see `write_full`. On an error
    `out` is as it was."""
    with atomic_folder(out) as folder:
        write_full(family, named_tensors, folder)


def export_lora(family: Family, state: dict[str, Tensor], peft_config, out: Path) -> None:
    """Writes `out`: one adapter in PEFT's and in diffusers' format (`Family.save_lora`)."""
    with atomic_folder(out) as folder:
        family.save_lora(folder, state, peft_config)


def write_full(
    family: Family, named_tensors: Iterable[tuple[str, Tensor]], folder: Path, shards: list[Shard] | None = None
) -> None:
    """Fills `folder` with the family's pipeline and `named_tensors` as its transformer.

    Everything but the transformer's weights is a hard link to the source's file (a copy where links are impossible),
    `vlm/` included. The weights keep the source's shards, dtypes and order, unless `shards` (see `arrange`) says otherwise;
    each tensor goes to its place as it arrives, so that one tensor is in memory at a time. Raises `UserError` for a name or
    shape the source does not have and for missing names, OSError for a full disk.
    """
    source = family.path / "transformer"
    link_tree(family.path, folder, skip=source)
    link_tree(source, folder / "transformer", skip_suffixes=WEIGHT_SUFFIXES)
    if shards is not None:
        _write_index(shards, folder / "transformer" / INDEX)
    _write_weights(shards or source_shards(family), folder / "transformer", named_tensors)


def source_shards(family: Family) -> list[Shard]:
    """The files of the source's transformer weights."""
    return [Shard.read(file) for file in weight_files(family.path / "transformer")]


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that `from_pretrained` reads: those of the index, or the only one."""
    index, single = folder / INDEX, folder / SINGLE
    if index.is_file():
        return [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    if single.is_file():
        return [single]
    raise UserError(f"{folder}: neither {single.name} nor its index is there")


@dataclass
class Shard:
    """Layout of one safetensors file: 8 bytes little-endian header length, JSON header, data.

    https://github.com/huggingface/safetensors#format. `header` is everything before the data; `entries` maps a tensor's name
    to its dtype, shape and data_offsets, in the order of the file.
    """

    name: str
    header: bytes
    entries: dict[str, dict]
    metadata: dict[str, str]

    @classmethod
    def read(cls, file: Path) -> Shard:
        try:
            with file.open("rb") as stream:
                size = os.fstat(stream.fileno()).st_size
                prefix = stream.read(8)
                length = struct.unpack("<Q", prefix)[0]
                if length > size - 8:
                    raise ValueError(f"a header of {length} bytes in a file of {size}")
                header = prefix + stream.read(length)
            entries = json.loads(header[8:])
            metadata = entries.pop("__metadata__", {})
            entries = dict(sorted(entries.items(), key=lambda item: item[1]["data_offsets"]))
            end = 0
            for name, entry in entries.items():
                begin, (low, end) = end, entry["data_offsets"]
                wanted = prod(entry["shape"]) * DTYPES[entry["dtype"]].itemsize if entry["dtype"] in DTYPES else end - low
                if low != begin or end - low != wanted:
                    raise ValueError(f"{name} is not where it should be")
            if end != size - len(header):
                raise ValueError(f"{size} bytes, its header describes {len(header) + end}")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
            raise UserError(f"{file} cannot be read as safetensors: {error}") from error
        return cls(file.name, header, entries, metadata)

    @classmethod
    def of(cls, name: str, tensors: Iterable[tuple[str, str, list[int]]], metadata: dict[str, str]) -> Shard:
        """The layout of (tensor name, dtype, shape) one after the other, as the safetensors library writes it."""
        entries: dict[str, dict] = {}
        end = 0
        for tensor, dtype, shape in tensors:
            begin, end = end, end + prod(shape) * DTYPES[dtype].itemsize
            entries[tensor] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
        text = json.dumps({"__metadata__": metadata} | entries, ensure_ascii=False, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return cls(name, len(text).to_bytes(8, "little") + text, entries, metadata)


def arrange(shards: list[Shard], dtype: str = "", max_bytes: int = 0) -> list[Shard]:
    """The tensors of `shards` in another arrangement: floating-point ones as `dtype` (a key of DTYPES; empty: as they are),
    and in files of at most `max_bytes` of data (0: the given files), named and indexed as diffusers does. A tensor that is
    larger has a file of its own. UserError where that makes more than MOST_FILES files."""
    parts = [[_stored(name, entry, dtype) for name, entry in shard.entries.items()] for shard in shards]
    if not max_bytes:
        return [Shard.of(shard.name, part, shard.metadata) for shard, part in zip(shards, parts)]
    groups: list[list[tuple[str, str, list[int]]]] = [[]]
    filled = 0
    for tensor in (tensor for part in parts for tensor in part):
        size = prod(tensor[2]) * DTYPES[tensor[1]].itemsize
        if filled + size > max_bytes and groups[-1]:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += size
    count = len(groups)
    if count > MOST_FILES:
        raise UserError(f"{max_bytes} bytes a file make {count} files, more than {MOST_FILES}: allow larger ones")
    stem = SINGLE.removesuffix(".safetensors")
    names = [f"{stem}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)] if count > 1 else [SINGLE]
    for group in groups:  # the largest elements first: all are aligned
        group.sort(key=lambda tensor: -DTYPES[tensor[1]].itemsize)
    return [Shard.of(name, group, {"format": "pt"}) for name, group in zip(names, groups)]


def _stored(name: str, entry: dict, dtype: str) -> tuple[str, str, list[int]]:
    if entry["dtype"] not in DTYPES:
        raise UserError(f"{name} is stored as {entry['dtype']}, which cannot be rearranged: keep the source's layout")
    floating = DTYPES[entry["dtype"]].is_floating_point
    return name, dtype if dtype and floating else entry["dtype"], entry["shape"]


def _write_index(shards: list[Shard], index: Path) -> None:
    """diffusers' index of several files, in place of the source's; none where the only file needs none."""
    index.unlink(missing_ok=True)  # a link: the source keeps its own
    if [shard.name for shard in shards] == [SINGLE]:
        return
    total = sum(entry["data_offsets"][1] - entry["data_offsets"][0] for shard in shards for entry in shard.entries.values())
    names = {name: shard.name for shard in shards for name in shard.entries}
    content = {"metadata": {"total_size": total}, "weight_map": names}
    index.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


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
            streams[shard.name].seek(len(shard.header) + entry["data_offsets"][0])
            for part in tensor.detach().cpu().contiguous().view(-1).split(CAST_AT_ONCE):
                streams[shard.name].write(part.to(DTYPES[entry["dtype"]]).view(torch.uint8).numpy().data)
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
def atomic_folder(out: Path, mark: str = "") -> Iterator[Path]:
    """A temporary folder beside `out` that takes its place at the end; on an error it vanishes and `out` stays.

    `<out><mark>.tmp` and `<out><mark>.old` are this function's own: what is there from a killed run is removed."""
    out = Path(out)
    temporary, old = out.with_name(f"{out.name}{mark}.tmp"), out.with_name(f"{out.name}{mark}.old")
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
        if isinstance(error, OSError | SafetensorError):
            reason = getattr(error, "strerror", None) or str(error)
            full = any(os.strerror(number) in reason for number in (errno.ENOSPC, errno.EDQUOT))
            hint = "free some space and run again (training: with resume=auto)" if full else "check the folder"
            raise UserError(f"cannot write {out}: {reason}; {hint}") from error
        raise
