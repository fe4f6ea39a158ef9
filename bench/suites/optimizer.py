"""Suite `optimizer`: one pass of AdamW + fp32 EMA + bf16 copies of student and teacher, against torch's fused AdamW followed
by a foreach EMA and two foreach casts, on the same numbers at a size that no cache holds.

Cases: the gradients' dtype, and how ours stores the masters and the average. torch's fused AdamW wants gradients of the
parameters' dtype, so bf16 ones are cast first. Peers: `torch` averages by `_foreach_lerp_`, `torch_mul_add` as published
implementations do, by `_foreach_mul_` and `_foreach_add_`.

Rows of a case: seconds_per_step, bytes_per_second and ceiling_share of each variant, for the bytes that ours declares
(bytes_per_step); copy's bytes_per_second, of a copy that no cache holds, timed in the same rounds: ceiling_share = the bytes
at that rate over the seconds. CASE/PEER: speedup. After ten steps, relative to float64 in the 2-norm: master_relative_error,
ema_relative_error.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.harness import Contest, Seconds, free, relative
from bench.results import Options, Row, failed
from bench.suites.roofline import Counted
from dopsd_kernels.adamw_ema import AdamWEMA

SUITE = "optimizer"
TENSORS = 8
ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 23}
"""Of each tensor: 1.3 and 2.5 GB a step, a multiple of any cache."""
COPY = {"cpu": 1 << 28, "cuda": 1 << 30}
"""Bytes that the ceiling's copy reads."""
ABOVE = "above 1: it writes what it has just read, a copy on a CPU also fetches the lines that it overwrites"
HYPER: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
DECAY = 0.9999
CASES = [(torch.bfloat16, "fp32"), (torch.float32, "fp32"), (torch.bfloat16, "low_bits")]


def measure(options: Options) -> Iterator[Row]:
    """Rows as they are found, case by case."""
    for dtype, masters in CASES[:1] if options.tour else CASES:
        case = f"{str(dtype).removeprefix('torch.')}_gradients{{}}" + ("" if masters == "fp32" else f"@{masters}")
        contest = Contest(SUITE, case, options)
        contest.peers = [name for name in VARIANTS if name != "ours"]
        yield from speed(contest, dtype, masters)
        yield from errors(contest, dtype, masters)
        free(options.device)


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

    def fell_back(self) -> str:
        plain = self.optimizer.ema_backend == "torch"
        return "neither Triton nor dopsd_kernels._native: plain PyTorch" if plain else ""

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

    def fell_back(self) -> str:
        return ""

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


VARIANTS: dict[str, Callable[[list[Tensor], list[Tensor], str], Ours | Torch]] = {
    "ours": Ours,
    "torch": lambda weights, grads, masters: Torch(weights, grads, lerp=True),
    "torch_mul_add": lambda weights, grads, masters: Torch(weights, grads, lerp=False),
}


def draw(elements: int, dtype: torch.dtype, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    torch.manual_seed(0)
    weights, grads = ([torch.randn(elements, device=device) for _ in range(TENSORS)] for _ in range(2))
    return weights, [grad.mul_(1e-3).to(dtype) for grad in grads]


def speed(contest: Contest, dtype: torch.dtype, masters: str) -> Iterator[Row]:
    options, device = contest.options, contest.options.device
    elements = 1 << 16 if options.quick else ELEMENTS[device.type]
    weights, grads = draw(elements, dtype, device)
    for name, make in VARIANTS.items():
        yield from contest.build(name, partial(make, weights, grads, masters), lambda side: side.step())
    del weights
    needed = declared_bytes(elements, dtype, masters)
    source = torch.zeros(1 << 20 if options.quick else COPY[device.type], dtype=torch.uint8, device=device)

    def rows(found: Seconds) -> Iterator[Row]:
        copied = found["copy"]
        yield contest.row("copy", "bytes_per_second", "B/s", [2 * source.nbytes / s for s in copied])
        yield contest.row("ours", "bytes_per_step", "B", needed)
        timed = {name: taken for name, taken in found.items() if name != "copy"}
        yield from contest.speeds(timed, {"bytes_per_second": ("B/s", needed)})
        for name, taken in timed.items():
            shares = [needed / s / (2 * source.nbytes / c) for s, c in zip(taken, copied, strict=True)]
            yield contest.row(name, "ceiling_share", "", shares, ABOVE if statistics.median(shares) > 1 else "")

    calls: dict[str, Callable[[], Any]] = {name: side.step for name, side in contest.alive.items()}
    calls["copy"] = partial(torch.empty_like(source).copy_, source)
    yield from contest.time(calls, rows, usual=15, tour=7, warmup=1, kernel=True)
    contest.alive.clear()


def declared_bytes(elements: int, dtype: torch.dtype, masters: str) -> int:
    """That one step of ours reads and writes."""
    ours = Ours(*draw(elements, dtype, torch.device("meta")), masters)
    with Counted() as counted:
        ours.step()
    return counted.bytes


def errors(contest: Contest, dtype: torch.dtype, masters: str) -> Iterator[Row]:
    """Of the masters and the average after ten steps, against float64's."""
    weights, grads = draw(1 << 12, dtype, contest.options.device)
    exact = Torch(weights, [grad.double() for grad in grads], lerp=True, dtype=torch.float64)
    for _ in range(10):
        exact.step()
    for name, make in VARIANTS.items():
        try:
            side = make(weights, grads, masters)
            for _ in range(10):
                side.step()
        except Exception as error:  # whatever a kernel, a compiler or a GPU without memory raises
            yield failed(SUITE, contest.place(), name, "master_relative_error", "", error)
            continue
        for metric, value, true in zip(("master", "ema"), side.results(), exact.results()):
            yield contest.row(name, f"{metric}_relative_error", "", relative(value, true))
