"""The layout of safetensors files: 8 bytes little-endian header length, JSON header, data.

https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch

from dopsd_fast.errors import UserError

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


def sort_metadata(file: Path) -> None:
    """Orders the metadata of a safetensors file, which its writer stores in the order of a hash table: equal weights are
    equal files. Layout: https://github.com/huggingface/safetensors#format"""
    with file.open("r+b") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        if len(text) > length:
            raise ValueError(f"{file}: the header grew from {length} to {len(text)} bytes")
        stream.seek(8)
        stream.write(text.ljust(length))
