"""The samples of an epoch: which records make up each batch, with which prompt and which noise.

Everything random here is a function of (seed, epoch, record, repeat), never of rank or world size, so that any number of ranks
draws the same samples.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from dopsd_fast.errors import UserError

if TYPE_CHECKING:
    from dopsd_fast.data.records import Dataset


@dataclass(frozen=True)
class Item:
    """One sample of one step."""

    record: int
    """Index into Dataset.records."""
    repeat: int
    """0 the first time the record appears in this epoch, 1 the second time, and so on."""
    epoch: int
    prompt_key: str
    prompt: str
    height: int
    width: int


def item_seed(seed: int, epoch: int, record: int, repeat: int, purpose: str) -> int:
    """63-bit integer for one purpose ("noise", "time", ...) of one appearance of one record."""
    digest = hashlib.sha256(f"{seed}|{epoch}|{record}|{repeat}|{purpose}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def item_noise(seed: int, item: Item, shape: Sequence[int], purpose: str = "noise") -> torch.Tensor:
    """x_0 of an item, or its noise for another purpose: fp32 [shape] on the CPU, standard normal."""
    generator = torch.Generator().manual_seed(item_seed(seed, item.epoch, item.record, item.repeat, purpose))
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float32)


def epoch_batches(
    dataset: Dataset, epoch: int, seed: int, global_batch: int, prompt_keys: Sequence[str] = ()
) -> list[list[Item]]:
    """The global batches of one epoch, in order; each has exactly `global_batch` items of one bucket.

    Every record appears dataset.repeats times. A bucket whose items do not fill its last batch goes round again with
    the next repeat numbers, so a set smaller than a batch still fills one, each time with new noise.
    prompt_keys: the prompts to draw from; empty: all of a record's. Raises UserError when a record has none of them.
    """
    if global_batch < 1:
        raise ValueError(f"global_batch must be at least 1, not {global_batch}")
    buckets: dict[tuple[int, int], list[int]] = {}
    for index, record in enumerate(dataset.records):
        buckets.setdefault((record.height, record.width), []).append(index)
    batches = []
    for size, members in sorted(buckets.items()):
        one_round = len(members) * dataset.repeats
        needed = math.ceil(one_round / global_batch) * global_batch
        order: list[tuple[int, int]] = []
        for turn in range(math.ceil(needed / one_round)):
            repeats = range(turn * dataset.repeats, (turn + 1) * dataset.repeats)
            appearances = [(index, repeat) for index in members for repeat in repeats]
            order += sorted(appearances, key=lambda pair: item_seed(seed, epoch, pair[0], pair[1], "order"))
        items = [_item(dataset, index, repeat, epoch, seed, prompt_keys, size) for index, repeat in order[:needed]]
        batches += [items[start : start + global_batch] for start in range(0, needed, global_batch)]
    return sorted(batches, key=lambda batch: item_seed(seed, epoch, batch[0].record, batch[0].repeat, "batch order"))


def micro_batch(batch: Sequence[Item], accumulation_index: int, rank: int, world: int, batch_size: int) -> list[Item]:
    """The items of one global batch that one rank runs in one forward."""
    start = (accumulation_index * world + rank) * batch_size
    return list(batch[start : start + batch_size])


def _item(
    dataset: Dataset,
    index: int,
    repeat: int,
    epoch: int,
    seed: int,
    prompt_keys: Sequence[str],
    size: tuple[int, int],
) -> Item:
    record = dataset.records[index]
    keys = [key for key in record.prompts if not prompt_keys or key in prompt_keys]
    if not keys:
        raise UserError(f"{record.source} has none of the prompts {', '.join(prompt_keys)} (data.prompt_keys)")
    key = keys[item_seed(seed, epoch, index, repeat, "prompt") % len(keys)]
    return Item(index, repeat, epoch, key, record.prompts[key], *size)
