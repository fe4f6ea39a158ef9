"""Triton where it is installed and of use: there is a GPU, the interpreter is asked for (TRITON_INTERPRET=1), or kernels are
to be compiled only (DOPSD_TRITON=1). Elsewhere stand-ins, so that the modules import, without Triton's second of start-up, and
their other backends work."""

from __future__ import annotations

import os
from typing import Any

import torch

try:
    if not torch.cuda.is_available() and "1" not in (os.environ.get("TRITON_INTERPRET"), os.environ.get("DOPSD_TRITON")):
        raise ImportError("nothing here runs Triton")
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ImportError:
    HAS_TRITON = False

    class _Missing:
        constexpr = Any

        def __getattr__(self, name: str) -> Any:
            return self

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return args[0] if len(args) == 1 and callable(args[0]) and not kwargs else self

    triton = tl = _Missing()  # type: ignore[assignment]

__all__ = ["HAS_TRITON", "tl", "triton"]
