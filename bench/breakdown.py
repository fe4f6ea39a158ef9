"""Where the wall time of a training step goes: torch.profiler's trace of the standard step, and its parts.

    gemm           matrix products
    attention
    elementwise    norms, activations, rotations, sums, copies, casts
    optimizer      clipping, AdamW, EMA and the teacher's refresh
    communication  between ranks, while nothing of the above runs
    other          what no rule knows
    idle           none of these runs

They add up to the step: of several that run at once, the first in this order takes the time. On a GPU a part is its kernels,
on any stream, and `idle` is a GPU without work. On a CPU a part is its operators' own time, without the operators that they
call; `idle` is Python, dispatch and the autograd engine, and the whole of the optimizer's call is the optimizer's, since its
native code is no operator.

The trace is written as torch.profiler exports it (for Chrome's tracing page or perfetto.dev), gzipped from 4 MiB on.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from bench.clock import interleaved, summary, synchronize
from bench.harness import free
from bench.live import say
from bench.results import Options, Row, Status, failed

if TYPE_CHECKING:
    from bench.suites.workload import Workload

SUITE = "profile"
WORK = ("gemm", "attention", "elementwise", "optimizer", "communication", "other")
PARTS = (*WORK, "idle")
"""Metrics `seconds_<part>` and `share_<part>`; the shares of a step sum to 1."""
VARIANTS = ("ours", "R1")
STEP, OPTIMIZER = "bench::step", "bench::optimizer"
"""Names of the trace's ranges: one whole step, and what belongs to the optimizer in it."""
LARGE = 4 << 20

Marks = Sequence[tuple[Any, str]]
"""Object and name of the callables that are the optimizer's."""


# ---- what a kernel and an operator are -------------------------------------------------------------------------------

KERNELS = (
    ("communication", r"nccl|rccl|allreduce|all_reduce|allgather|all_gather|reducescatter|reduce_scatter"),
    ("attention", r"flash|fmha|sdpa|attention|attn"),
    ("optimizer", r"adam"),
    ("gemm", r"gemm|gemv|cutlass|ampere_|xmma|cublas|nvjet|splitk|cijk|implicit_convolve|wgrad|dgrad"
             r"|^(project|through|input_gradient|adapter_gradients)_kernel"),
    ("elementwise", r"elementwise|vectorized|unrolled|reduce|copy|memcpy dtod|memset|fill|functor|cat|softmax|norm|index"
                    r"|gather|scatter|scan|sort|distribution|arange|foreach|multi_tensor|triton|embedding|quantise"
                    r"|swiglu|rope|modulate|divergence|^(forward|backward|finish)_kernel"),
)
"""The first rule whose pattern is found in a kernel's name, in small letters, decides."""

OPERATORS = (
    ("communication", r"^(c10d|_c10d_functional|nccl|gloo)\b|record_param_comms"),
    ("attention", r"^aten::.*attention|^dopsd::attention"),
    ("optimizer", r"adam|optimizer\.step"),
    ("gemm", r"^aten::_?(mm|addmm|bmm|baddbmm|linear|matmul|mv|addmv|einsum|scaled_mm|convolution|conv\dd)(_|_backward)?$"
             r"|^aten::(mkldnn|thnn|slow)_(linear|conv)|^dopsd::pair_linear|^dopsd::fp8_(matmul|linear)|^mkldnn"),
    ("", r"^aten::(view|_unsafe_view|reshape|_reshape_alias|as_strided|expand|expand_as|t|transpose|permute|slice|select"
         r"|narrow|chunk|split|split_with_sizes|unbind|unsqueeze|squeeze|flatten|unflatten|detach|alias|lift_fresh|empty"
         r"|empty_like|empty_strided|new_empty|resize_|set_|to|result_type|is_nonzero|item|_local_scalar_dense|view_as\w*"
         r"|movedim|contiguous|can_cast|resolve_\w+|view_as_\w+|real|imag|numpy_t|broadcast_to)$"),
    ("elementwise", r"^(aten|dopsd)::"),
    ("", r"backward\d*$|^autograd::|^torch::autograd|^(?!.*::)"),
)
"""The same for operators; "": no work of its own, its time is its caller's."""

LAUNCH = re.compile(r"launch|memcpy|memset", re.IGNORECASE)
_KERNELS = [(part, re.compile(pattern)) for part, pattern in KERNELS]
_OPERATORS = [(part, re.compile(pattern)) for part, pattern in OPERATORS]


def kernel_part(name: str) -> str:
    """The part of a GPU kernel, copy or fill."""
    name = name.lower()
    return next((part for part, pattern in _KERNELS if pattern.search(name)), "other")


def operator_part(name: str) -> str:
    """The part of a CPU operator; "" for one that only calls others or looks at tensors."""
    name = name.lower()
    return next((part for part, pattern in _OPERATORS if pattern.search(name)), "other")


# ---- intervals -------------------------------------------------------------------------------------------------------


class Span(NamedTuple):
    """Microseconds."""

    start: float
    end: float
    part: str


def occupied(spans: Iterable[Span], start: float, end: float) -> dict[str, float]:
    """Microseconds of `start` ... `end` by part, "idle" included; together end - start. Of spans that overlap, the part that
    is first in PARTS takes the time."""
    order = {part: place for place, part in enumerate(PARTS)}
    changes: list[tuple[float, int, int]] = []
    for span in spans:
        a, b = max(span.start, start), min(span.end, end)
        if a < b:
            changes += [(a, order[span.part], 1), (b, order[span.part], -1)]
    changes.sort()
    found, running, at = dict.fromkeys(PARTS, 0.0), [0] * len(PARTS), start
    for time, place, change in [*changes, (end, 0, 0)]:
        if time > at:
            found[next((part for part, count in zip(PARTS, running) if count), "idle")] += time - at
            at = time
        running[place] += change
    return found


def own_time(events: Iterable[Span]) -> list[Span]:
    """Nested spans of one thread -> spans that do not overlap, each of the innermost that is running there.

    A span without a part ("") has its caller's; attention's and the optimizer's keep what they call, but for communication.
    """
    found: list[Span] = []
    stack: list[Span] = []
    at = 0.0

    def advance(to: float) -> None:
        nonlocal at
        if stack and stack[-1].part and to > at:
            found.append(Span(at, to, stack[-1].part))
        at = max(at, to)

    for event in sorted(events, key=lambda span: (span.start, -span.end)):
        while stack and stack[-1].end <= event.start:
            advance(stack[-1].end)
            stack.pop()
        advance(event.start)
        part, caller = event.part, stack[-1] if stack else None
        if caller is not None:
            if not part or (caller.part in ("attention", "optimizer") and part != "communication"):
                part = caller.part
            event = event._replace(end=min(event.end, caller.end))  # clocks are read a little apart
        stack.append(event._replace(part=part))
    while stack:
        advance(stack[-1].end)
        stack.pop()
    return found


# ---- traces ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Breakdown:
    """Of one step, the mean of all in the trace.

    seconds  by part, PARTS; together the step's
    launch   seconds that the CPU spends in calls that launch kernels and copies, at the same time as the above; None on a CPU
    kernels  launched; None on a CPU
    steps    how many the trace holds
    """

    seconds: dict[str, float]
    launch: float | None
    kernels: float | None
    steps: int

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    @property
    def shares(self) -> dict[str, float]:
        return {part: seconds / self.total for part, seconds in self.seconds.items()}


DEVICE_CATEGORIES = ("kernel", "gpu_memcpy", "gpu_memset")
RUNTIME_CATEGORIES = ("cuda_runtime", "cuda_driver")


def break_down(events: Sequence[Mapping[str, Any]]) -> Breakdown:
    """`events`: "traceEvents" of an exported trace with STEP and OPTIMIZER ranges. ValueError: no step in it."""
    by_category: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for event in events:
        if event.get("ph") == "X":
            by_category[event.get("cat", "")].append(event)
    windows = [(e["ts"], e["ts"] + e["dur"]) for e in by_category["user_annotation"] if e["name"] == STEP]
    if not windows:
        raise ValueError(f"the trace has no range {STEP!r}")
    on_device = [event for category in DEVICE_CATEGORIES for event in by_category[category]]
    runtime = [event for category in RUNTIME_CATEGORIES for event in by_category[category]]
    spans = device_spans(on_device, runtime, by_category["user_annotation"]) if on_device else host_spans(by_category)
    sums = dict.fromkeys(PARTS, 0.0)
    for window in windows:
        for part, time in occupied(spans, *window).items():
            sums[part] += time
    launch = kernels = None
    if on_device:
        calls = [e for e in runtime if LAUNCH.search(e["name"]) and inside(e["ts"], windows)]
        launch = sum(event["dur"] for event in calls) / 1e6 / len(windows)
        kernels = sum(inside(event["ts"], windows) for event in on_device) / len(windows)
    seconds = {part: time / 1e6 / len(windows) for part, time in sums.items()}
    return Breakdown(seconds, launch, kernels, len(windows))


def inside(time: float, windows: Sequence[tuple[float, float]]) -> bool:
    return any(start <= time < end for start, end in windows)


def device_spans(
    kernels: Iterable[Mapping[str, Any]], runtime: Iterable[Mapping[str, Any]], ranges: Iterable[Mapping[str, Any]]
) -> list[Span]:
    """Kernels by name; those that were launched inside an OPTIMIZER range are the optimizer's, communication left out."""
    regions = sorted((e["ts"], e["ts"] + e["dur"]) for e in ranges if e["name"] == OPTIMIZER)
    starts = [start for start, _ in regions]
    launched = {e["args"]["correlation"]: e["ts"] for e in runtime if "correlation" in e.get("args", {})}
    found = []
    for event in kernels:
        part, called = kernel_part(event["name"]), launched.get(event.get("args", {}).get("correlation"))
        if called is not None and part != "communication":
            place = bisect_right(starts, called) - 1
            if place >= 0 and called < regions[place][1]:
                part = "optimizer"
        found.append(Span(event["ts"], event["ts"] + event["dur"], part))
    return found


def host_spans(by_category: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Span]:
    """Operators' own time on every thread."""
    threads: dict[tuple[Any, Any], list[Span]] = defaultdict(list)
    for category in ("cpu_op", "user_annotation"):
        for event in by_category.get(category, ()):
            name = event["name"]
            part = "" if name == STEP else "optimizer" if name == OPTIMIZER else operator_part(name)
            threads[event.get("pid"), event.get("tid")].append(Span(event["ts"], event["ts"] + event["dur"], part))
    return [span for spans in threads.values() for span in own_time(spans)]


# ---- the step --------------------------------------------------------------------------------------------------------


def profile_step(options: Options, out: Path) -> Iterator[Row]:
    """Rows of suite "profile" for options.kinds, "ours" and "R1"; traces in `out`/profile/<kind>-<variant>.json or .json.gz.

    case "lora" or "full"; seconds_<part> and share_<part> for PARTS, seconds_per_step (profiled), profiler_overhead (that
    over the step without profiler); on a GPU also seconds_launch and launches_per_step.
    """
    from bench.suites.workload import Workload

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it tells of every start and stop on the terminal
    work = Workload(options)
    for kind in options.kinds:
        for variant in VARIANTS:
            case = f"{kind}{work.suffix}"
            say(f"profile: {kind}, {variant}")
            work.forget_encoders()
            try:
                yield from profile_variant(case, kind, variant, work, out / "profile" / f"{kind}-{variant}.json")
            except Exception as error:
                yield failed(SUITE, case, variant, "seconds_per_step", "s", error)
            free(options.device)


def profile_variant(case: str, kind: str, variant: str, work: Workload, file: Path) -> list[Row]:
    from bench.suites.workload import OurStep, PeerStep

    if variant == "ours":
        ours = OurStep(kind, work)
        subject: OurStep | PeerStep = ours
        marks: Marks = [(ours.engine, "step")]
    else:
        theirs = PeerStep(variant, kind, work)
        subject, reference = theirs, theirs.reference
        marks = [(reference.optimizer, "step"), (reference, "update_teacher"), (torch.nn.utils, "clip_grad_norm_")]
    try:
        found, plain = record(subject.step, marks, file, work.options)
        return tabulate(case, variant, found, plain, subject.fell_back())
    finally:
        subject.close()


def record(call: Callable[[], Any], marks: Marks, file: Path, options: Options) -> tuple[Breakdown, float]:
    """The breakdown of `call`, one training step, and its seconds without profiler; the trace is written to `file`, with .gz
    behind its name if it is large."""
    device, steps = options.device, options.repeats(3, 1, 1)
    plain = summary(interleaved({"plain": call}, max(steps, 2), 1 if options.quick else 3, device)["plain"])["value"]
    return break_down(traced(call, marks, file, device, steps)), plain


def traced(
    call: Callable[[], Any], marks: Marks, file: Path, device: torch.device, steps: int = 1
) -> list[Mapping[str, Any]]:
    """The events of `steps` calls under the profiler, also written to `file`, with .gz behind its name if they are many."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with marked(marks, device), profile(activities=activities) as recorded:
        for _ in range(steps):
            with record_function(STEP):
                call()
                synchronize(device)
    file.parent.mkdir(parents=True, exist_ok=True)
    for old in (file, file.with_name(f"{file.name}.gz")):
        old.unlink(missing_ok=True)
    recorded.export_chrome_trace(str(file))
    events = json.loads(file.read_text(encoding="utf-8"))["traceEvents"]
    if file.stat().st_size >= LARGE:
        with file.open("rb") as source, gzip.open(f"{file}.gz", "wb", compresslevel=6) as target:
            shutil.copyfileobj(source, target)
        file.unlink()
    return events


@contextmanager
def marked(marks: Marks, device: torch.device) -> Iterator[None]:
    """Inside, calls of `marks` are OPTIMIZER ranges, and on a CPU our native kernels, which step around the dispatcher, are
    ranges of their own names."""
    from dopsd_kernels import native_ops

    with ExitStack() as stack:
        for owner, name in marks:
            stack.enter_context(mock.patch.object(owner, name, ranged(OPTIMIZER, getattr(owner, name))))
        if device.type == "cpu":
            for name in [name for name in vars(native_ops) if name.endswith(("_fwd", "_bwd"))]:
                stack.enter_context(mock.patch.object(native_ops, name, ranged(f"dopsd::{name}", getattr(native_ops, name))))
        yield


def ranged(label: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any, **options: Any) -> Any:
        with record_function(label):
            return function(*arguments, **options)

    return call


def tabulate(case: str, variant: str, found: Breakdown, plain: float, fell_back: str = "") -> list[Row]:
    """plain: seconds of a step without profiler. fell_back: what runs otherwise than it is meant to, empty: nothing."""
    status: Status = "fallback" if fell_back else "ok"
    note = fell_back or (f"mean of {found.steps} profiled steps" if found.steps > 1 else "one profiled step")
    rows = [
        Row(SUITE, case, variant, "seconds_per_step", found.total, "s", status=status, note=note),
        Row(SUITE, case, variant, "profiler_overhead", found.total / plain, "x"),
    ]
    for part in PARTS:
        note = "one rank: the calls alone, nothing is sent" if part == "communication" else ""
        rows.append(Row(SUITE, case, variant, f"seconds_{part}", found.seconds[part], "s", note=note))
        rows.append(Row(SUITE, case, variant, f"share_{part}", found.shares[part], "", note=note))
    if found.launch is not None and found.kernels is not None:
        note = "CPU time, while kernels run or not: no part of the sum"
        rows.append(Row(SUITE, case, variant, "seconds_launch", found.launch, "s", note=note))
        rows.append(Row(SUITE, case, variant, "launches_per_step", found.kernels, ""))
    return rows
