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
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.clock import kernel_clock
from bench.harness import Contest, Seconds, free, relative
from bench.machine import Ceilings
from bench.results import Options, Row, Status
from bench.suites.meta_trace import FREE, GATHERS, _written, cost_of, moved
from dopsd_kernels import launch, native_ops
from dopsd_kernels.attention import choose_attention

SUITE = "kernels"
NO_ARITHMETIC = {*FREE, *GATHERS, torch.ops.aten._to_copy, torch.ops.aten.copy_, torch.ops.aten.clone, torch.ops.aten.cat}
Outcome = tuple[list[Tensor], list[Tensor]]
"""Results, gradients."""
SHORTEST = 5e-3
"""Seconds of a measurement on a CPU at least: as many calls as take that long."""
CACHED = "above 1: its tensors stay in a cache, those of the ceiling's copy do not"
FEWER = "above 1: it does fewer operations than it declares, or in shapes that suit the machine better than the ceiling's"


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
    ours, eager = (_count(function, op.tensors) for function in (op.ours, op.eager))
    return {phase: Work(found.bytes, found.flops or eager[phase].arithmetic) for phase, found in ours.items()}


def _count(function: Callable[..., Any], tensors: tuple[Tensor, ...]) -> dict[str, Counted]:
    found = {"forward": Counted()}
    with found["forward"]:
        outputs = differentiable(function(*tensors))
    leaves = [t for t in tensors if t.requires_grad]
    if leaves:
        seeds = [torch.empty_like(out) for out in outputs]
        found["backward"] = Counted()
        with found["backward"]:
            torch.autograd.grad(outputs, leaves, seeds)
    return found


def differentiable(results: Any) -> list[Tensor]:
    return [r for r in (results if isinstance(results, tuple) else (results,)) if isinstance(r, Tensor) and r.requires_grad]


# ---- the measurement -------------------------------------------------------------------------------------------------


def measure(
    op: Any, work: Mapping[str, Work], limits: Ceilings, options: Options, suffix: str = "", compiles: bool = True
) -> Iterator[Row]:
    """The rows of one op: speed, share of the ceiling and errors of each variant; a `failed` row for one that raises."""
    functions: dict[str, Callable[..., Any]] = {"ours": op.ours, "eager": op.eager}
    status, note = ran(op, options.device)
    notes = {"ours": note} if status == "fallback" else {}
    if compiles:
        torch._dynamo.reset()
        backend = "eager" if options.quick else "inductor"
        functions["compiled"] = torch.compile(op.eager, fullgraph=True, dynamic=False, backend=backend)
        notes |= {"compiled": "quick: traced by torch.compile, run eagerly"} if options.quick else {}
    case = f"{op.name}{{}}{suffix}"
    made = {phase: Contest(SUITE, case, options, f"seconds_{phase}", f"speedup_{phase}", notes) for phase in work}
    for contest in made.values():
        contest.peers, contest.remarks["ours"] = ("eager", "compiled"), note
    first = made["forward"]
    exact = functools.cache(lambda: outcome(op.eager, op.to(torch.float64).tensors))
    # a compiled backward that may overwrite its inputs cannot run twice
    with torch._functorch.config.patch(donated_buffer=False):
        errors, calls = {}, {}
        for name, function in functions.items():  # before any call adds to the op's tensors
            try:
                errors[name] = relative_errors(outcome(function, op.tensors), exact())
            except Exception as error:  # whatever a compiler, a library or a GPU without memory raises
                for contest in made.values():
                    yield from contest.lost(name, error)
        for name, found in errors.items():
            for metric, worst in found.items():
                yield first.row(name, metric, "", worst)
            try:
                calls[name] = phases(functions[name], op.tensors)
            except Exception as error:  # as above
                for contest in made.values():
                    yield from contest.lost(name, error)
        for phase, done in work.items():
            yield first.row("ours", f"bytes_{phase}", "B", done.bytes)
            yield first.row("ours", f"flops_{phase}", "FLOP", done.flops)
            yield from _speed(made[phase], phase, {name: found[phase] for name, found in calls.items()}, done, limits)
    calls.clear()
    free(options.device)


def phases(function: Callable[..., Any], tensors: tuple[Tensor, ...]) -> dict[str, Callable[[], Any]]:
    """By phase: forward without gradient, backward alone."""
    calls: dict[str, Callable[[], Any]] = {"forward": torch.no_grad()(partial(function, *tensors))}
    leaves = [t for t in tensors if t.requires_grad]
    if leaves:
        outputs = differentiable(function(*tensors))
        seeds = [torch.randn_like(out) for out in outputs]
        calls["backward"] = partial(torch.autograd.grad, outputs, leaves, seeds, retain_graph=True)
    return calls


def _speed(
    contest: Contest, phase: str, calls: Mapping[str, Callable[[], Any]], work: Work, limits: Ceilings
) -> Iterator[Row]:
    options, repeats = contest.options, 1
    if kernel_clock(options.device) != "events" and not options.quick:  # which tell of a single call
        repeats = max(1, round(SHORTEST / max(_seconds(call) for call in calls.values())))
    above = CACHED if work.bytes / limits.bytes_per_second >= work.flops / limits.flops_per_second else FEWER
    amounts = {f"bytes_per_second_{phase}": ("B/s", work.bytes), f"flops_per_second_{phase}": ("FLOP/s", work.flops)}

    def rows(found: Seconds) -> Iterator[Row]:
        seconds = {name: [value / repeats for value in values] for name, values in found.items()}
        yield from contest.speeds(seconds, amounts)
        for name, values in seconds.items():
            shares = [work.floor(limits) / value for value in values]
            yield contest.row(name, f"ceiling_share_{phase}", "", shares, above if statistics.median(shares) > 1 else "")

    many = {name: partial(_repeat, call, repeats) for name, call in calls.items()}
    yield from contest.time(many, rows, usual=30, tour=10, warmup=1, kernel=True)


def _seconds(call: Callable[[], Any]) -> float:
    """Of a second call, on a CPU; one that raises is left to the timing."""
    with contextlib.suppress(Exception):
        call()
        began = time.perf_counter()
        call()
        return time.perf_counter() - began
    return SHORTEST


def _repeat(call: Callable[[], Any], count: int) -> None:
    for _ in range(count):
        call()


def ran(op: Any, device: torch.device) -> tuple[Status, str]:
    """What ours runs on: "fallback" and why, where it is not the path made for the device."""
    x = op.tensors[0]
    if op.name == "attention":
        library = choose_attention(x.device, x.dtype, x.shape[-1], True)
        return ("fallback" if library == "math" else "ok"), f"library: {library}"
    if device.type == "cuda":
        if op.name in LIBRARY_ONLY:
            return "ok", ""
        before = launch.count
        with torch.no_grad():
            op.ours(*_copies(op.tensors))
        return ("ok", "") if launch.count > before else ("fallback", "no Triton kernel ran: plain PyTorch")
    if op.name == "fp8_linear":
        return "fallback", "emulated with dequantised matrices: the 8-bit product needs a GPU"
    if hasattr(native_ops, f"{op.name}_fwd") and not native_ops.has(op.name):
        return "fallback", "dopsd_kernels._native is not built: plain PyTorch"
    return "ok", ""


LIBRARY_ONLY = {"pair_linear_full", "pair_linear_accumulate_full"}
"""Products without adapters: on CUDA they are cuBLAS's, there is no kernel of ours."""


# ---- errors ----------------------------------------------------------------------------------------------------------


def relative_errors(found: Outcome, exact: Outcome) -> dict[str, float]:
    """Metric -> the worst relative error of the results, of the gradients."""
    errors = {}
    for what, values, truth in zip(("result", "gradient"), found, exact):
        if truth:
            worst = max(relative(v, e) for v, e in zip(values, truth, strict=True))
            errors[f"{what}_relative_error"] = worst
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
