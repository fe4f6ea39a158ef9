"""A custom op and its autograd without the dispatch of a custom op, which costs 20 to 40 us a call: as much as a kernel at
small sizes. The op itself runs wherever its registration counts: fake and meta tensors, torch.compile, functorch, any
TorchDispatchMode.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dopsd_kernels.backend import _traced


def watched(arguments: tuple[Any, ...]) -> bool:
    """Whether somebody wants to see the op: then it is called, else its function."""
    if torch.compiler.is_compiling():
        return True
    return bool(torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active()) or _traced(arguments)


def unrecorded(op: Any) -> Callable[..., Any]:
    """A custom op for calls inside a backward: its function itself, unless watched or a graph of the backward is recorded."""
    function = getattr(op, "_init_fn", op)

    def call(*arguments: Any) -> Any:
        return (op if torch.is_grad_enabled() or watched(arguments) else function)(*arguments)

    return call


def differentiable(
    op: Any, setup_context: Callable[[Any, tuple[Any, ...], Any], None], backward: Callable[..., Any]
) -> Callable[..., Any]:
    """A custom op, registered with the same `setup_context` and `backward`, for callers whose calls it may bypass. Positional
    arguments only, all of them; tensors in lists are not differentiated. The backward cannot be differentiated again."""
    function = getattr(op, "_init_fn", op)

    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            output = function(*inputs)
            setup_context(ctx, inputs, output)
            return output

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, *gradients: Any) -> Any:
            return backward(ctx, *gradients)

    Direct.__name__ = Direct.__qualname__ = getattr(function, "__name__", "Direct")

    def call(*arguments: Any) -> Any:
        if watched(arguments):
            return op(*arguments)
        if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in arguments):
            return Direct.apply(*arguments)
        return function(*arguments)

    return call
