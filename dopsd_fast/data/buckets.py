"""The sizes that pictures are cropped to, so that those of one size form a batch."""

from __future__ import annotations

import math
from collections.abc import Sequence

# (width, height) at the nominal resolution 1024: the 11 buckets of the authors' D-OPSD training script.
_AT_1024 = (
    (1024, 1024),
    (1152, 896),
    (896, 1152),
    (1152, 864),
    (864, 1152),
    (1248, 832),
    (832, 1248),
    (1280, 720),
    (720, 1280),
    (1344, 576),
    (576, 1344),
)


def bucket_sizes(resolution: int, multiple: int) -> list[tuple[int, int]]:
    """(height, width) of every bucket, the square first: the authors' 11 sizes times resolution / 1024.

    Sides are rounded to the nearest multiple of `multiple` (at least one). At low resolutions several buckets round to
    the same size; each size is listed once. The ratios are 1:1, 9:7, 4:3, 3:2, 16:9, 21:9 and the same upright.
    """

    def snap(side: int) -> int:
        return max(1, math.floor(side * resolution / 1024 / multiple + 0.5)) * multiple

    return list(dict.fromkeys((snap(height), snap(width)) for width, height in _AT_1024))


def nearest_bucket(height: float, width: float, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The size whose aspect ratio is nearest, measured as |log ratio|; the first of equals."""
    return min(sizes, key=lambda size: abs(math.log(size[1] / size[0]) - math.log(width / height)))
