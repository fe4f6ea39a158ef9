"""The layout of packed tokens: S sequences of any lengths, one after the other, without padding."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

CHUNK_ROWS = 64
"""Rows of one sequence that one program of a backward reduction handles."""


class Sequences:
    """T tokens = the sum of `lengths`; the index tensors are int32 on `device`, made when first asked for."""

    def __init__(self, lengths: Sequence[int], device: torch.device | str = "cpu") -> None:
        if any(length < 0 for length in lengths):
            raise ValueError(f"Sequences: a length is negative: {tuple(lengths)}")
        self.lengths = tuple(int(length) for length in lengths)
        self.device = torch.device(device)
        self.tokens = sum(self.lengths)

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def equal_length(self) -> int | None:
        """The length that all sequences have, or None; also None for no sequence."""
        return self.lengths[0] if len(set(self.lengths)) == 1 else None

    @property
    def longest(self) -> int:
        return max(self.lengths, default=0)

    @cached_property
    def starts(self) -> Tensor:
        """`[S + 1]`: sequence s is rows starts[s] : starts[s + 1] (flash-attn's cu_seqlens)."""
        total, starts = 0, [0]
        for length in self.lengths:
            total += length
            starts.append(total)
        return self._index(starts)

    @cached_property
    def row_sequence(self) -> Tensor:
        """`[T]`: the sequence of each row."""
        return self._index([s for s, length in enumerate(self.lengths) for _ in range(length)])

    @cached_property
    def chunks(self) -> Tensor:
        """`[C, 3]`: (first row, one past the last, sequence) of pieces of at most CHUNK_ROWS rows, none across a
        boundary, in order; an empty sequence has none."""
        pieces, start = [], 0
        for s, length in enumerate(self.lengths):
            pieces += [(a, min(a + CHUNK_ROWS, start + length), s) for a in range(start, start + length, CHUNK_ROWS)]
            start += length
        return self._index(pieces).view(-1, 3)

    def _index(self, values: Sequence) -> Tensor:
        return torch.tensor(values, dtype=torch.int32).to(self.device)
