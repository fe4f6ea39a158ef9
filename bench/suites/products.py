"""The matrix products of a training step, which no program that computes it is spared.

Recorded in diffusers' forward: of a linear layer, and for backward dx where its input has a gradient and dW where its weight
trains; two of attention, and four for its backward. Nothing is recomputed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class Products(TorchFunctionMode):
    """`flops` of all linear layers and attention that run inside, and of their backward."""

    flops = 0

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        grad = torch.is_grad_enabled()
        if function is torch.nn.functional.linear:
            x, weight = args[0], args[1]
            self.flops += 2 * x.numel() * len(weight) * (1 + (grad and x.requires_grad) + (grad and weight.requires_grad))
        elif function is torch.nn.functional.scaled_dot_product_attention:
            named = dict(zip(("query", "key"), args)) | (kwargs or {})
            q, k = named["query"], named["key"]
            self.flops += 2 * q.numel() * k.shape[-2] * (6 if grad and q.requires_grad else 2)
        return function(*args, **(kwargs or {}))
