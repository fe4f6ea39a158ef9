"""Which implementation an op runs: Triton on CUDA, the native C++ or plain PyTorch on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

BACKENDS = ("triton", "native", "torch")

_forced: str | None = None


def choose(x: Tensor, native: bool = False) -> str:
    """"triton", "native" or "torch" for an op on `x`. `native`: the C++ can do this call (device, dtype, strides)."""
    if _forced is not None and (_forced != "native" or native):
        return _forced
    if x.is_cuda:
        return "triton"
    return "native" if native else "torch"


@contextmanager
def forced(backend: str) -> Iterator[None]:
    """Inside, every op runs `backend`; "native" falls back to "torch" where the C++ cannot. For tests and benchmarks:
    "triton" works on the CPU only under TRITON_INTERPRET=1."""
    global _forced
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is none of {', '.join(BACKENDS)}")
    before, _forced = _forced, backend
    try:
        yield
    finally:
        _forced = before
