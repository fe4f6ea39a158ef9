"""Suite `optimizer`: one pass of AdamW + fp32 EMA + bf16 copies of student and teacher, against torch's fused AdamW followed
by a foreach EMA and two foreach casts (`torch`), on the same numbers at a size that no cache holds.

Cases: the gradients' dtype, and how ours stores the masters and the average. torch's fused AdamW wants gradients of the
parameters' dtype, so bf16 ones are cast first. Rows of a case:

    each        seconds_per_step, bytes_per_second, ceiling_share: the bytes that ours declares (bytes_per_step), over the
                seconds and over what a copy moves in them; above 1: on a CPU the copy fetches what it overwrites
    each        master_relative_error, ema_relative_error: after ten steps, relative to float64 in the 2-norm
    CASE/torch  ours: speedup
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.harness import Contest, Exact, free, relative
from bench.machine import ceilings
from bench.results import Options, Row
from bench.suites.roofline import Counted
from bench.suites.workload import Program
from dopsd_kernels.adamw_ema import AdamWEMA

TENSORS = 8
ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 23}
"""Of each tensor: 1.3 and 2.5 GB a step, a multiple of any cache."""
HYPER: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
DECAY = 0.9999
CASES = [(torch.bfloat16, "fp32"), (torch.float32, "fp32"), (torch.bfloat16, "low_bits")]
Drawn = tuple[list[Tensor], list[Tensor]]  # weights and gradients


class Ours(Program):
    """bf16 parameters and teachers, fp32 masters and average, or halves of them."""

    def __init__(self, drawn: Drawn, masters: str) -> None:
        self.params = [torch.nn.Parameter(weight.bfloat16()) for weight in drawn[0]]
        self.teachers = {param: torch.empty_like(param) for param in self.params}
        self.optimizer = AdamWEMA(self.params, **HYPER, ema_decay=DECAY, masters=masters, teachers=self.teachers)
        for param, grad in zip(self.params, drawn[1]):
            param.grad_dtype = grad.dtype
            param.grad = grad
            self.optimizer.init_state(param, True)
        self.step = self.optimizer.step

    def fell_back(self) -> str:
        return "neither Triton nor dopsd_kernels._native: plain PyTorch" if self.optimizer.ema_backend == "torch" else ""

    def results(self) -> list[Tensor]:
        """Masters and average."""
        return [torch.cat([self.optimizer.read(p, kind) for p in self.params]) for kind in ("master", "ema")]


class Torch(Program):
    """The same numbers; gradients of the masters' dtype are used as they are. `dtype` float64 serves as the oracle."""

    def __init__(self, drawn: Drawn, masters: str = "fp32", dtype: torch.dtype = torch.float32) -> None:
        weights, self.grads = drawn
        self.masters = [torch.nn.Parameter(weight.bfloat16().to(dtype)) for weight in weights]
        self.ema = [master.detach().clone() for master in self.masters]
        self.students, self.teachers = ([weight.bfloat16() for weight in weights] for _ in range(2))
        for master, grad in zip(self.masters, self.grads):
            master.grad = grad if grad.dtype == dtype else torch.empty_like(master, requires_grad=False)
        self.optimizer = torch.optim.AdamW(self.masters, **HYPER, fused=True)

    @torch.no_grad()
    def step(self) -> None:
        if self.grads[0].dtype != self.masters[0].dtype:
            torch._foreach_copy_([master.grad for master in self.masters if master.grad is not None], self.grads)
        self.optimizer.step()
        theta = [master.detach() for master in self.masters]
        torch._foreach_lerp_(self.ema, theta, 1 - DECAY)
        torch._foreach_copy_(self.students, theta)
        torch._foreach_copy_(self.teachers, self.ema)

    def results(self) -> list[Tensor]:
        return [torch.cat([master.detach() for master in self.masters]), torch.cat(self.ema)]


VARIANTS: dict[str, Callable[[Drawn, str], Any]] = {"ours": Ours, "torch": Torch}


def measure(options: Options) -> Iterator[Row]:
    device, elements = options.device, 1 << 16 if options.quick else ELEMENTS[options.device.type]
    for dtype, masters in CASES[:1] if options.tour else CASES:
        case = f"{str(dtype).removeprefix('torch.')}_gradients{{}}" + ("" if masters == "fp32" else f"@{masters}")
        contest = Contest("optimizer", case, options)
        contest.peers, drawn = ["torch"], draw(elements, dtype, device)
        for name, make in VARIANTS.items():
            yield from contest.build(name, partial(make, drawn, masters), partial(errors, make, dtype, masters, device))
        ours = Ours(draw(elements, dtype, torch.device("meta")), masters)
        with Counted() as counted:
            ours.step()
        yield contest.row("ours", "bytes_per_step", "B", counted.bytes)
        amounts = {"bytes_per_second": ("B/s", float(counted.bytes)),
                   "ceiling_share": ("", counted.bytes / ceilings(device, torch.float32, options.quick).bytes_per_second)}
        calls = {name: one.step for name, one in contest.alive.items()}
        yield from contest.time(calls, partial(contest.speeds, amounts=amounts), usual=15, tour=7, warmup=1, kernel=True)
        contest.alive.clear()
        free(device)


def draw(elements: int, dtype: torch.dtype, device: torch.device) -> Drawn:
    torch.manual_seed(0)
    weights, grads = ([torch.randn(elements, device=device) for _ in range(TENSORS)] for _ in range(2))
    return weights, [grad.mul_(1e-3).to(dtype) for grad in grads]


def errors(make: Callable[[Drawn, str], Any], dtype: torch.dtype, masters: str, device: torch.device, built: Any) -> Exact:
    """Of ten steps on small tensors; and `built` runs once."""
    built.step()
    weights, grads = draw(1 << 12, dtype, device)
    exact, one = Torch((weights, [grad.double() for grad in grads]), dtype=torch.float64), make((weights, grads), masters)
    for _ in range(10):
        exact.step()
        one.step()
    metrics = ("master_relative_error", "ema_relative_error")
    return {metric: (relative(value, true), "") for metric, value, true in zip(metrics, one.results(), exact.results())}
