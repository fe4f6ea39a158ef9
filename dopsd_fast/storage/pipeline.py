"""Writing trained weights in the layouts that other programs load: a complete pipeline folder, or a LoRA folder.

Both appear under their final name only when they are complete; what was there before stays until then.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from dopsd_fast.errors import UserError
from dopsd_fast.storage.atomic import atomic_folder, link_tree
from dopsd_fast.storage.safetensors_layout import DTYPES, Shard

SINGLE = "diffusion_pytorch_model.safetensors"
INDEX = f"{SINGLE}.index.json"
MOST_FILES = 500
"""All files of an export are open while it is written; a process may usually have 1024."""
CAST_AT_ONCE = 1 << 20
"""Numbers: beside the tensor that is written, only a piece of it is in memory in another type."""
WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf"}


def export_full(source: Path, named_tensors: Iterable[tuple[str, Tensor]], out: Path) -> None:
    """Writes `out`: the pipeline folder `source` with `named_tensors` as its transformer, see `write_full`. On an error
    `out` is as it was."""
    with atomic_folder(out) as folder:
        write_full(source, named_tensors, folder)


def write_full(
    source: Path, named_tensors: Iterable[tuple[str, Tensor]], folder: Path, shards: list[Shard] | None = None
) -> None:
    """Fills `folder` with the pipeline folder `source` and `named_tensors` as its transformer.

    Everything but the transformer's weights is a hard link to the source's file (a copy where links are impossible),
    `vlm/` included. The weights keep the source's shards, dtypes and order, unless `shards` (see `arrange`) says otherwise;
    each tensor goes to its place as it arrives, so that one tensor is in memory at a time. Raises `UserError` for a name or
    shape the source does not have and for missing names, OSError for a full disk.
    """
    weights = source / "transformer"
    link_tree(source, folder, skip=weights)
    link_tree(weights, folder / "transformer", skip_suffixes=WEIGHT_SUFFIXES)
    if shards is not None:
        _write_index(shards, folder / "transformer" / INDEX)
    _write_weights(shards or source_shards(source), folder / "transformer", named_tensors)


def source_shards(source: Path) -> list[Shard]:
    """The files of the source's transformer weights."""
    return [Shard.read(file) for file in weight_files(source / "transformer")]


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that `from_pretrained` reads: those of the index, or the only one."""
    index, single = folder / INDEX, folder / SINGLE
    if index.is_file():
        return [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    if single.is_file():
        return [single]
    raise UserError(f"{folder}: neither {single.name} nor its index is there")


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
