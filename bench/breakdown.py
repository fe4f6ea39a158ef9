"""Where the wall time of a training step goes: torch.profiler's trace of the standard step, and its parts.

    gemm           matrix products
    attention
    elementwise    norms, activations, rotations, sums, copies, casts
    optimizer      clipping, AdamW, EMA and the teacher's refresh
    communication  between ranks, while nothing of the above runs
    other          what no rule knows
    idle           none of these runs

They add up to the step: of several that run at once, the first in this order takes the time. On a GPU a part is its kernels,
on any stream, and `idle` is a GPU without work. On a CPU a part is its operators' own time on the step's thread, without the
operators that they call; `idle` is Python, dispatch and the autograd engine, and the whole of the optimizer's call is the
optimizer's, since its native code is no operator. The trace is written, gzipped, as torch.profiler exports it.

Rows of "lora" or "full", "ours" and "R1": seconds_<part> and share_<part>, seconds_per_step (profiled), profiler_overhead (that
over the step without profiler); on a GPU also seconds_launch, which passes at the same time, and launches_per_step.
"""

from __future__ import annotations

import gzip
import json
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from bench.clock import interleaved, synchronize
from bench.harness import Contest, free
from bench.live import say
from bench.results import Options, Row, failed

SUITE = "profile"
PARTS = ("gemm", "attention", "elementwise", "optimizer", "communication", "other", "idle")
STEP, OPTIMIZER = "bench::step", "bench::optimizer"
"""Names of the trace's ranges: one whole step, and what belongs to the optimizer in it."""
NOTES = {f"{what}_communication": "one rank: the calls alone, nothing is sent" for what in ("seconds", "share")} | {
    "seconds_launch": "CPU time, while kernels run or not: no part of the sum"}
Event = Mapping[str, Any]
Span = tuple[float, float, str]
"""Microseconds at which it starts and ends, and its part."""

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


def part_of(name: str, rules: Sequence[tuple[str, str]]) -> str:
    """Of a GPU kernel, copy or fill by KERNELS, of a CPU operator by OPERATORS; "" for one that only calls others or looks at
    tensors."""
    return next((part for part, pattern in rules if re.search(pattern, name.lower())), "other")


def break_down(events: Iterable[Event]) -> dict[str, float]:
    """The metrics of a step, the mean of all in the trace. `events`: "traceEvents" of an exported one with STEP and OPTIMIZER
    ranges. ValueError: no step in it."""
    of: dict[str, list[Event]] = defaultdict(list)
    for event in events:
        if event.get("ph") == "X":
            of[event.get("cat", "")].append(event)
    steps = [event for event in of["user_annotation"] if event["name"] == STEP]
    if not steps:
        raise ValueError(f"the trace has no range {STEP!r}")
    windows = [(step["ts"], step["ts"] + step["dur"]) for step in steps]
    device = [*of["kernel"], *of["gpu_memcpy"], *of["gpu_memset"]]
    calls = [*of["cuda_runtime"], *of["cuda_driver"]]
    if device:
        spans = device_spans(device, calls, of["user_annotation"])
        parts = [occupied(spans, *window) for window in windows]
    else:
        thread = [event for event in of["cpu_op"] + of["user_annotation"] if event.get("tid") == steps[0].get("tid")]
        parts = [host_times(thread)]
    seconds = {part: sum(times[part] for times in parts) / 1e6 / len(steps) for part in PARTS}
    found = {"seconds_per_step": (total := sum(seconds.values()))}
    found |= {f"seconds_{part}": value for part, value in seconds.items()}
    found |= {f"share_{part}": value / total for part, value in seconds.items()}
    if device:
        launches = [event["dur"] for event in within(calls, windows) if LAUNCH.search(event["name"])]
        found |= {"seconds_launch": sum(launches) / 1e6 / len(steps),
                  "launches_per_step": len(within(device, windows)) / len(steps)}
    return found


def within(events: Iterable[Event], windows: Sequence[tuple[float, float]]) -> list[Event]:
    return [event for event in events if any(start <= event["ts"] < end for start, end in windows)]


def device_spans(kernels: Iterable[Event], calls: Iterable[Event], ranges: Iterable[Event]) -> list[Span]:
    """Kernels by name; those that were launched inside an OPTIMIZER range are the optimizer's, communication left out."""
    regions = [(event["ts"], event["ts"] + event["dur"]) for event in ranges if event["name"] == OPTIMIZER]
    theirs = {call["args"]["correlation"] for call in within(calls, regions) if "correlation" in call.get("args", {})}
    found = []
    for kernel in kernels:
        part = part_of(kernel["name"], KERNELS)
        if part != "communication" and kernel.get("args", {}).get("correlation") in theirs:
            part = "optimizer"
        found.append((kernel["ts"], kernel["ts"] + kernel["dur"], part))
    return found


def occupied(spans: Iterable[Span], start: float, end: float) -> dict[str, float]:
    """Microseconds of `start` ... `end` by part, "idle" included; together end - start. Of spans that overlap, the part that
    is first in PARTS takes the time."""
    changes = [(end, 0, 0)]
    for begin, stop, part in spans:
        a, b, place = max(begin, start), min(stop, end), PARTS.index(part)
        changes += [(a, place, 1), (b, place, -1)] if a < b else []
    found, running, at = dict.fromkeys(PARTS, 0.0), [0] * len(PARTS), start
    for time, place, change in sorted(changes):
        found[next((part for part, count in zip(PARTS, running) if count), "idle")] += time - at
        running[place] += change
        at = time
    return found


def host_times(events: Iterable[Event]) -> dict[str, float]:
    """Microseconds by part of what one thread does in STEP ranges, without what each event calls.

    An event without a part ("") has its caller's; attention's and the optimizer's keep what they call, but for communication.
    """
    found, stack = dict.fromkeys(PARTS, 0.0), list[Span]()
    for event in sorted(events, key=lambda one: (one["ts"], -one["dur"])):
        name, start, end = event["name"], event["ts"], event["ts"] + event["dur"]
        part = {STEP: "idle", OPTIMIZER: "optimizer"}.get(name) or part_of(name, OPERATORS)
        while stack and stack[-1][1] <= start:
            stack.pop()
        if stack:
            _, last, caller = stack[-1]
            end = min(end, last)  # clocks are read a little apart
            if not part or (caller in ("attention", "optimizer") and part != "communication"):
                part = caller
            found[caller] -= end - start
        elif name != STEP:
            continue
        found[part] += end - start
        stack.append((start, end, part))
    return found


# ---- the step --------------------------------------------------------------------------------------------------------


def profile_step(options: Options, out: Path) -> Iterator[Row]:
    """Rows of options.kinds; traces in `out`/profile/<kind>-<variant>.json.gz."""
    from bench.suites.workload import OurStep, PeerStep, Workload

    work, rounds = Workload(options), options.repeats(3, 1, 1)
    for kind in options.kinds:
        contest = Contest(SUITE, f"{kind}{{}}{work.suffix}", options)
        for name in ("ours", "R1"):
            say(f"{SUITE}: {kind}, {name}")
            work.forget_encoders()
            try:
                one: Any = OurStep(kind, work) if name == "ours" else PeerStep(name, kind, work)
                contest.notes[name] = one.fell_back()
                plain = interleaved({"": one.step}, max(rounds, 2), 1 if options.quick else 3, options.device)[""]
                found = break_down(traced(one, out / "profile" / f"{kind}-{name}.json.gz", options.device, rounds))
                found["profiler_overhead"] = found["seconds_per_step"] / median(plain)
                for metric, value in found.items():
                    unit = "s" if metric.startswith("seconds") else "x" if metric == "profiler_overhead" else ""
                    yield contest.row(name, metric, unit, value, NOTES.get(metric, f"mean of {rounds} profiled"))
            except Exception as error:
                yield failed(SUITE, contest.place(), name, contest.seconds, "s", error)
            one = None
            free(options.device)


def traced(one: Any, file: Path, device: torch.device, steps: int = 1) -> list[Event]:
    """The events of `steps` training steps of `one` under the profiler, also written to `file`, which ends in .gz."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it tells of every start and stop on the terminal
    marks = [(one.engine, "step")] if hasattr(one, "engine") else [
        (one.reference.optimizer, "step"), (one.reference, "update_teacher"), (torch.nn.utils, "clip_grad_norm_")]
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with marked(marks, device), profile(activities=activities) as recorded:
        for _ in range(steps):
            with record_function(STEP):
                one.step()
                synchronize(device)
    file.parent.mkdir(parents=True, exist_ok=True)
    recorded.export_chrome_trace(str(file))
    with gzip.open(file, "rt", encoding="utf-8") as text:
        return json.load(text)["traceEvents"]


@contextmanager
def marked(marks: Sequence[tuple[Any, str]], device: torch.device) -> Iterator[None]:
    """Inside, calls of `marks` are OPTIMIZER ranges, and on a CPU our native kernels, which step around the dispatcher, are
    ranges of their own names."""
    from dopsd_kernels import native_ops

    labels = [(owner, name, OPTIMIZER) for owner, name in marks]
    if device.type == "cpu":
        labels += [(native_ops, name, f"dopsd::{name}") for name in vars(native_ops) if name.endswith(("_fwd", "_bwd"))]
    with ExitStack() as stack:
        for owner, name, label in labels:
            stack.enter_context(mock.patch.object(owner, name, record_function(label)(getattr(owner, name))))
        yield
