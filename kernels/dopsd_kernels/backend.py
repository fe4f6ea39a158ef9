"""Which implementation an op runs: Triton on CUDA, the native C++ or plain PyTorch on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

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


def direct(op: Any) -> Callable[..., Any]:
    """A custom op for callers that do their own differentiation: on real tensors its function itself, since the dispatch of a
    custom op costs some 20 us a call; the op where it is traced (meta and fake tensors, torch.compile)."""
    function = getattr(op, "_init_fn", op)

    def call(*arguments: Any) -> Any:
        return (op if _traced(arguments) else function)(*arguments)

    return call


def _traced(arguments: tuple[Any, ...]) -> bool:
    for value in arguments:
        value = value[0] if isinstance(value, list) and value else value
        if isinstance(value, Tensor):
            return value.is_meta or type(value) not in (Tensor, Parameter) or torch.compiler.is_compiling()
    return True
