"""What a call of an op must move and multiply, and how near each variant comes to what the machine can do.

    floor = max(bytes / copy, flops / gemm)     ceiling_share = floor / seconds     (copy, gemm: bench.machine.ceilings)

The work is counted on the meta device, where nothing is computed, and is that of ours for all variants. Bytes: what the op's
kernels on a GPU declare (dopsd_kernels.costs); of a product or attention, which declares only what goes beside it, every
argument and result once, what it adds to twice. FLOPs: those that the products declare; of an op without any, the arithmetic
of `eager`: one operation an element of each elementwise kernel and each reduction.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
import timeit
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.clock import kernel_clock
from bench.harness import Contest, Seconds, relative
from bench.machine import Ceilings
from bench.results import Options, Row
from bench.suites.meta_trace import FREE, GATHERS, _written, cost_of, moved
from dopsd_kernels import launch, native_ops
from dopsd_kernels.attention import choose_attention

SUITE = "kernels"
NO_ARITHMETIC = {*FREE, *GATHERS, torch.ops.aten._to_copy, torch.ops.aten.copy_, torch.ops.aten.clone, torch.ops.aten.cat}
Outcome = tuple[list[Tensor], list[Tensor]]
"""Results, gradients."""
SHORTEST = 5e-3
"""Seconds of a measurement on a CPU at least: as many calls as take that long."""
LIBRARY_ONLY = {"pair_linear_full", "pair_linear_accumulate_full"}
"""Products without adapters: on CUDA they are cuBLAS's, there is no kernel of ours."""
ABOVE = "above 1: its tensors stay in a cache, or its shapes suit the machine better than the ceiling's"


@dataclass(frozen=True)
class Work:
    """Of one call: bytes moved, operations."""

    bytes: int
    flops: int

    def floor(self, limits: Ceilings) -> float:
        """Seconds below which no implementation comes, unless its tensors stay in a cache."""
        return max(self.bytes / limits.bytes_per_second, self.flops / limits.flops_per_second)


class Counted(TorchDispatchMode):
    """Sums the work of what runs inside, on meta tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.flops = self.arithmetic = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        cost = cost_of(function, args, kwargs, out)
        self.flops += cost.flops
        tensors = list({id(t): t for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)}.values())
        if cost.flops:
            self.bytes += sum(map(moved, [*tensors, *_written(function, args, kwargs)]))
        else:
            self.bytes += cost.elementwise_bytes
        if cost.launches and not cost.flops and function.overloadpacket not in NO_ARITHMETIC:
            self.arithmetic += max(t.numel() for t in tensors)
        return out


def work(op: Any) -> dict[str, Work]:
    """By phase, of an op (bench.suites.ops.Op) with meta tensors. An op without gradients has no backward."""
    ours, eager = ({phase: _count(call) for phase, call in phases(function, op.tensors).items()}
                   for function in (op.ours, op.eager))
    return {phase: Work(found.bytes, found.flops or eager[phase].arithmetic) for phase, found in ours.items()}


def _count(call: Callable[[], Any]) -> Counted:
    with Counted() as counted:
        call()
    return counted


def differentiable(results: Any) -> list[Tensor]:
    return [r for r in (results if isinstance(results, tuple) else (results,)) if isinstance(r, Tensor) and r.requires_grad]


# ---- the measurement -------------------------------------------------------------------------------------------------


class Variant:
    """An op by one of its functions, as `Contest` has it."""

    def __init__(self, op: Any, function: Callable[..., Any], device: torch.device) -> None:
        self.op, self.function, self.device = op, function, device
        self.calls = phases(function, op.tensors)

    def fell_back(self) -> str:
        """Why ours does not run on the path that is made for the device; empty: it does."""
        name, x = self.op.name, self.op.tensors[0]
        if self.function is not self.op.ours:
            return ""
        if name == "attention":
            library = choose_attention(x.device, x.dtype, x.shape[-1], True)
            return "attention by plain mathematics" if library == "math" else ""
        if self.device.type == "cuda":
            before = launch.count
            with torch.no_grad():
                self.function(*_copies(self.op.tensors))
            return "" if launch.count > before or name in LIBRARY_ONLY else "no Triton kernel ran: plain PyTorch"
        if name == "fp8_linear":
            return "emulated with dequantised matrices: the 8-bit product needs a GPU"
        missing = hasattr(native_ops, f"{name}_fwd") and not native_ops.has(name)
        return "dopsd_kernels._native is not built: plain PyTorch" if missing else ""

    def close(self) -> None:
        self.calls.clear()


def measure(
    op: Any, work: Mapping[str, Work], limits: Ceilings, options: Options, suffix: str = "", compiles: bool = True
) -> Iterator[Row]:
    """The rows of one op: speed, share of the ceiling and errors of each variant; a `failed` row for one that raises."""
    contest = Contest(SUITE, f"{op.name}{{}}{suffix}", options, "seconds_forward", "speedup_forward")
    contest.peers = "eager", "compiled"
    functions: dict[str, Callable[..., Any]] = {"ours": op.ours, "eager": op.eager}
    if compiles:
        torch._dynamo.reset()
        backend = "eager" if options.quick else "inductor"
        functions["compiled"] = torch.compile(op.eager, fullgraph=True, dynamic=False, backend=backend)
    exact = functools.cache(lambda: outcome(op.eager, op.to(torch.float64).tensors))

    def errors(one: Variant) -> dict[str, tuple[float, str]]:
        found = relative_errors(outcome(one.function, op.tensors), exact())
        return {metric: (worst, "") for metric, worst in found.items()}

    # a compiled backward that may overwrite its inputs cannot run twice
    with torch._functorch.config.patch(donated_buffer=False):
        for name, function in functions.items():  # all before any call adds to the op's tensors
            yield from contest.build(name, partial(Variant, op, function, options.device), errors)
        if options.quick:
            contest.notes["compiled"] = "quick: traced by torch.compile, run eagerly"
        for phase, done in work.items():
            contest.seconds, contest.ratio = f"seconds_{phase}", f"speedup_{phase}"
            yield contest.row("ours", f"bytes_{phase}", "B", done.bytes)
            yield contest.row("ours", f"flops_{phase}", "FLOP", done.flops)
            yield from _speed(contest, phase, done, limits)
    contest.forget()


def phases(function: Callable[..., Any], tensors: tuple[Tensor, ...]) -> dict[str, Callable[[], Any]]:
    """By phase: forward without gradient, backward alone."""
    calls: dict[str, Callable[[], Any]] = {"forward": torch.no_grad()(partial(function, *tensors))}
    leaves = [t for t in tensors if t.requires_grad]
    if leaves:
        outputs = differentiable(function(*tensors))
        seeds = [torch.randn_like(out) for out in outputs]
        calls["backward"] = partial(torch.autograd.grad, outputs, leaves, seeds, retain_graph=True)
    return calls


def _speed(contest: Contest, phase: str, work: Work, limits: Ceilings) -> Iterator[Row]:
    calls = {name: one.calls[phase] for name, one in contest.alive.items()}
    amounts = {f"bytes_per_second_{phase}": ("B/s", work.bytes), f"flops_per_second_{phase}": ("FLOP/s", work.flops)}
    count = 1
    if kernel_clock(contest.options.device) != "events" and not contest.options.quick:  # which tell of a single call
        taken = []
        for call in calls.values():
            with contextlib.suppress(Exception):  # left to the timing
                taken.append(min(timeit.repeat(call, repeat=2, number=1)))
        count = max(1, round(SHORTEST / max(taken, default=SHORTEST)))

    def rows(found: Seconds) -> Iterator[Row]:
        seconds = {name: [value / count for value in values] for name, values in found.items()}
        yield from contest.speeds(seconds, amounts)
        for name, values in seconds.items():
            shares = [work.floor(limits) / value for value in values]
            yield contest.row(name, f"ceiling_share_{phase}", "", shares, ABOVE if statistics.median(shares) > 1 else "")

    many = {name: partial(timeit.timeit, call, number=count) for name, call in calls.items()}
    yield from contest.time(many, rows, usual=30, tour=10, warmup=1, kernel=True)


# ---- errors ----------------------------------------------------------------------------------------------------------


def relative_errors(found: Outcome, exact: Outcome) -> dict[str, float]:
    """Metric -> the worst relative error of the results, of the gradients."""
    errors = {}
    for what, values, truth in zip(("result", "gradient"), found, exact):
        if truth:
            errors[f"{what}_relative_error"] = max(relative(v, e) for v, e in zip(values, truth, strict=True))
    return errors


def outcome(function: Callable[..., Any], tensors: tuple[Tensor, ...]) -> Outcome:
    """All results, and the gradients for upstream gradients that depend on the results' shapes alone."""
    tensors = _copies(tensors)
    results = function(*tensors)
    outputs = [r for r in (results if isinstance(results, tuple) else (results,)) if isinstance(r, Tensor)]
    leaves = [t for t in tensors if t.requires_grad]
    gradients: tuple[Tensor, ...] = ()
    if leaves:
        flowing = differentiable(tuple(outputs))
        generator = torch.Generator().manual_seed(1)
        seeds = [torch.randn(out.shape, generator=generator).to(out) for out in flowing]
        gradients = torch.autograd.grad(flowing, leaves, seeds)
    return [out.detach() for out in outputs], list(gradients)


def _copies(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """An op may add to its tensors in place."""
    return tuple(t.detach().clone().requires_grad_(t.requires_grad) for t in tensors)
