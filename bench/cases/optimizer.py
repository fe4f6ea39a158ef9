"""Suite `optimizer`: one pass of AdamW + fp32 EMA + bf16 copies of student and teacher, against torch's fused AdamW followed
by a foreach EMA and two foreach casts, on the same numbers at a size that no cache holds.

Cases: the gradients' dtype, and how ours stores the masters and the average. torch's fused AdamW wants gradients of the
parameters' dtype, so bf16 ones are cast first. Peers: `torch` averages by `_foreach_lerp_`, `torch_mul_add` as published
implementations do, by `_foreach_mul_` and `_foreach_add_`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.results import Options, Row, interleaved, ratios, summary
from dopsd_kernels.adamw_ema import AdamWEMA

TENSORS, ELEMENTS = 8, 1 << 23
HYPER: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
DECAY = 0.9999
CASES = [(torch.bfloat16, "fp32"), (torch.float32, "fp32"), (torch.bfloat16, "low_bits")]


def run(options: Options) -> list[Row]:
    torch.set_num_threads(options.threads)
    rows = []
    for dtype, masters in CASES:
        case = f"{str(dtype).removeprefix('torch.')}_gradients" + ("" if masters == "fp32" else f"@{masters}")
        rows += [*speed(case, dtype, masters, options), *errors(case, dtype, masters, options)]
    return rows


class Ours:
    """bf16 parameters and teachers, fp32 masters and average, or halves of them."""

    def __init__(self, weights: list[Tensor], grads: list[Tensor], masters: str) -> None:
        self.params = [torch.nn.Parameter(weight.bfloat16()) for weight in weights]
        self.teachers = {param: torch.empty_like(param) for param in self.params}
        self.optimizer = AdamWEMA(self.params, **HYPER, ema_decay=DECAY, masters=masters, teachers=self.teachers)
        for param, grad in zip(self.params, grads):
            param.grad_dtype = grad.dtype
            param.grad = grad
            self.optimizer.init_state(param, True)
        self.step = self.optimizer.step

    def results(self) -> tuple[Tensor, Tensor]:
        masters, averages = ([self.optimizer.read(p, kind) for p in self.params] for kind in ("master", "ema"))
        return torch.cat(masters), torch.cat(averages)


class Torch:
    """The same numbers; fp32 gradients are used as they are. `dtype` float64 serves as the oracle."""

    def __init__(self, weights: list[Tensor], grads: list[Tensor], lerp: bool, dtype: torch.dtype = torch.float32) -> None:
        self.masters = [torch.nn.Parameter(weight.bfloat16().to(dtype)) for weight in weights]
        self.ema = [master.detach().clone() for master in self.masters]
        self.students = [weight.bfloat16() for weight in weights]
        self.teachers = [weight.bfloat16() for weight in weights]
        self.grads, self.lerp = grads, lerp
        for master, grad in zip(self.masters, grads):
            master.grad = grad if grad.dtype == dtype else torch.empty_like(master, requires_grad=False)
        self.optimizer = torch.optim.AdamW(self.masters, **HYPER, fused=True)

    @torch.no_grad()
    def step(self) -> None:
        if self.grads[0].dtype != self.masters[0].dtype:
            torch._foreach_copy_([master.grad for master in self.masters if master.grad is not None], self.grads)
        self.optimizer.step()
        theta = [master.detach() for master in self.masters]
        if self.lerp:
            torch._foreach_lerp_(self.ema, theta, 1 - DECAY)
        else:
            torch._foreach_mul_(self.ema, DECAY)
            torch._foreach_add_(self.ema, theta, alpha=1 - DECAY)
        torch._foreach_copy_(self.students, theta)
        torch._foreach_copy_(self.teachers, self.ema)

    def results(self) -> tuple[Tensor, Tensor]:
        return torch.cat([master.detach() for master in self.masters]), torch.cat(self.ema)


def draw(elements: int, dtype: torch.dtype, options: Options) -> tuple[list[Tensor], list[Tensor]]:
    torch.manual_seed(0)
    weights, grads = ([torch.randn(elements, device=options.device) for _ in range(TENSORS)] for _ in range(2))
    return weights, [grad.mul_(1e-3).to(dtype) for grad in grads]


def speed(case: str, dtype: torch.dtype, masters: str, options: Options) -> list[Row]:
    elements = 1 << 16 if options.quick else ELEMENTS
    weights, grads = draw(elements, dtype, options)
    ours = Ours(weights, grads, masters)
    peers = {"torch": Torch(weights, grads, lerp=True), "torch_mul_add": Torch(weights, grads, lerp=False)}
    del weights
    calls: dict[str, Callable[[], Any]] = {"ours": ours.step, **{name: peer.step for name, peer in peers.items()}}
    source = torch.zeros(2 * elements, device=options.device)
    calls["copy"] = partial(torch.empty_like(source).copy_, source)
    rounds = options.rounds or (2 if options.quick else 15)
    seconds = interleaved(calls, rounds, warmup=2, device=options.device)

    total = TENSORS * elements
    moved = total * ((32 if masters == "low_bits" else 36) + grads[0].element_size())
    copied = seconds.pop("copy")
    rows = [row(case, name, "seconds_per_step", "s", taken) for name, taken in seconds.items()]
    rows += [row(f"{case}/{name}", "ours", "speedup", "x", ratios(seconds[name], seconds["ours"])) for name in peers]
    rows.append(row(case, "ours", "gigabytes_per_second", "GB/s", [moved / s / 1e9 for s in seconds["ours"]]))
    rows.append(row(case, "copy", "gigabytes_per_second", "GB/s", [2 * source.nbytes / s / 1e9 for s in copied]))
    return rows


def row(case: str, variant: str, metric: str, unit: str, values: list[float]) -> Row:
    statistics: Any = summary(values)
    return Row("optimizer", case, variant, metric, unit=unit, **statistics)


def errors(case: str, dtype: torch.dtype, masters: str, options: Options) -> list[Row]:
    """Of the masters and the average after ten steps, relative to float64's, in the 2-norm."""
    weights, grads = draw(1 << 12, dtype, options)
    exact = Torch(weights, [grad.double() for grad in grads], lerp=True, dtype=torch.float64)
    runs: dict[str, Ours | Torch] = {"ours": Ours(weights, grads, masters), "torch": Torch(weights, grads, lerp=True)}
    for _ in range(10):
        exact.step()
        for side in runs.values():
            side.step()
    rows = []
    for name, side in runs.items():
        for metric, value, true in zip(("master", "ema"), side.results(), exact.results()):
            error = float((value.double() - true).norm() / true.norm())
            rows.append(Row("optimizer", case, name, f"{metric}_relative_error", error, ""))
    return rows
