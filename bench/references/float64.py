"""diffusers' models in float64 all through: the yardstick of errors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch


@contextlib.contextmanager
def wide(dtype: torch.dtype) -> Iterator[None]:
    """For float64, keeps diffusers from casting to fp32 inside RoPE and RMSNorm; nothing for any other dtype."""
    if dtype != torch.float64:
        yield
        return
    from diffusers.models.normalization import RMSNorm

    to_float = torch.Tensor.float

    def rms_norm(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight

    def keep_wide(tensor, *args, **kwargs):
        return tensor if tensor.dtype in (torch.float64, torch.complex128) else to_float(tensor, *args, **kwargs)

    with mock.patch.object(torch.Tensor, "float", keep_wide), mock.patch.object(RMSNorm, "forward", rms_norm):
        yield
