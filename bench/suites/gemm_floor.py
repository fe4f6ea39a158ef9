"""The matrix products of a training step and nothing else: no program that computes the step is faster.

What diffusers' forward multiplies is recorded; products that share their input are one (q, k, v; w1, w3), as a fused
implementation would run them. Backward: dx where the input has a gradient, dW where the weight trains, four products
of attention. Nothing is recomputed.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

Product = tuple[int, int, int, int]
"""(batch, m, k, n): batch times `[m, k]` x `[k, n]`."""


class Recorder(TorchFunctionMode):
    """Inside, `products` counts the products of every linear layer and attention, and of their backward."""

    def __init__(self) -> None:
        super().__init__()
        self.products: Counter[Product] = Counter()
        self._groups: dict[tuple[int, bool, bool], tuple[weakref.ref[Tensor], int, int, int]] = {}

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if function is torch.nn.functional.linear:
            x, weight = args[0], args[1]
            grad = torch.is_grad_enabled()
            key = (id(x), grad and x.requires_grad, grad and weight.requires_grad)
            before = 0
            if key in self._groups:
                if self._groups[key][0]() is x:
                    before = self._groups[key][3]
                else:  # another tensor's that is gone: its id is given anew
                    self._close(key)
            self._groups[key] = (weakref.ref(x), x.shape[:-1].numel(), x.shape[-1], before + len(weight))
        elif function is torch.nn.functional.scaled_dot_product_attention:
            named = dict(zip(("query", "key"), args)) | (kwargs or {})
            q, k = named["query"], named["key"]
            (rows, width), heads = q.shape[-2:], q.shape[:-2].numel()
            scores, values = (heads, rows, width, k.shape[-2]), (heads, rows, k.shape[-2], width)
            self.products.update([scores, values])
            if torch.is_grad_enabled() and q.requires_grad:
                self.products.update([scores, scores, values, values])  # dP and dV (transposed), dQ and dK
        return function(*args, **(kwargs or {}))

    def _close(self, key: tuple[int, bool, bool]) -> None:
        _, rows, width, out = self._groups.pop(key)
        self.products[1, rows, width, out] += 1
        self.products[1, rows, out, width] += key[1]
        self.products[1, out, rows, width] += key[2]

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for key in list(self._groups):
            self._close(key)


class GemmFloor:
    """`run()` performs the products that `forward` (both branches at one state) leads to, `states` times, in `dtype`. Nothing
    is allocated before the first `run` or after `free`."""

    def __init__(self, forward: Callable[[], Any], states: int, device: torch.device,
                 dtype: torch.dtype = torch.float32) -> None:
        with Recorder() as recorder:
            forward()
        self.products = Counter({product: count * states for product, count in recorder.products.items() if count})
        self.device, self.dtype = device, dtype
        self._work: list[tuple[Any, Tensor, Tensor, Tensor, int]] = []

    @property
    def flops(self) -> int:
        return sum(2 * batch * m * k * n * count for (batch, m, k, n), count in self.products.items())

    def run(self) -> None:
        if not self._work:
            self._allocate()
        for multiply, a, b, out, count in self._work:
            for _ in range(count):
                multiply(a, b, out=out)

    def _allocate(self) -> None:
        for (batch, m, k, n), count in self.products.items():
            several = (batch,) if batch > 1 else ()
            a, b, out = (torch.randn(*several, *shape, device=self.device, dtype=self.dtype)
                         for shape in ((m, k), (n, k), (m, n)))
            self._work.append((torch.bmm if several else torch.mm, a, b.mT, out, count))

    def free(self) -> None:
        self._work.clear()
