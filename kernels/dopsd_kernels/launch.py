"""The one place where Triton kernels are launched: counts them, and says so in one line where Triton is missing."""

from __future__ import annotations

from typing import Any

from dopsd_kernels.triton_compat import HAS_TRITON

count = 0
"""Triton kernels launched by this process."""


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """kernel[grid](*args, **options); nothing for an empty grid. `options`: constexprs, num_warps, num_stages."""
    global count
    if 0 in grid:
        return
    if not HAS_TRITON:
        name = getattr(kernel, "__name__", kernel)
        raise RuntimeError(f"kernel {name}: Triton is not there: pip install triton, on a machine with a GPU")
    count += 1
    kernel[grid](*args, **options)
