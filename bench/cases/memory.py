"""Suite `memory`: the peak of a training step's memory, by what is kept for the backward pass.

    ours                 activations=keep; in cases "...@selective" and "...@recompute" those
    R1                   the published step: K graphs, each of checkpoints. It begins at the conditions: its encoders would add
                         17 GB at full size
    R2_uncheckpointed    the same without checkpoints
    R4                   one graph at a time, not checkpointed, its blocks compiled
    planner              what dopsd_fast.plan says of ours

The tour measures R1, keep and recompute. Rows of a case, "lora" or "full":

    each         peak_bytes: all that the step holds and allocates, weights and optimizer included
    each         step_bytes: of that, what the step adds to what stays from one to the next: activations, gradients
    planner      planned_bytes: peak_bytes as planned, without what the process and the CUDA context take
    planner      planned_ratio: planned_bytes over ours' peak_bytes
    CASE/R1      ours: peak_ratio, step_ratio: ours over R1's

Z-Image at its full size and 1024^2 pixels, batch 1, bf16, K = 4, counted on the meta device, cases "...@full_size":

    each         activation_bytes: most that is alive at any time beside weights and optimizer, gradients included
    each         peak_bytes: with weights and optimizer, R1 with both encoders as published, R2 without; ours as planned, its
                 masters, moments and average in fp32, the peers' in the model's dtype
    CASE/R1, R2  ours: activation_ratio, peak_ratio

What stays is the sum of all tensors. What a step adds is, on a GPU, what PyTorch's allocator counts; on a CPU the growth of the
resident memory, in a fork of this process whose heap gives large tensors pages of their own and returns them at once.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from bench import forks
from bench.arrangements import Memory
from bench.cases import cost
from bench.cases.room import ENCODERS
from bench.cases.step import compiled_in_part
from bench.cases.workload import Cell, OurStep, Workload, peer
from bench.peers.reference_eager import Condition
from bench.results import Options, Row, Status, failed
from bench.show import step as say
from bench.show import tell_parent
from dopsd_fast.conditioning.context import Shapes
from dopsd_fast.families.published import published_family
from dopsd_fast.memory.activations import LiveBytes, on_meta
from dopsd_fast.memory.activations import measure as trace
from dopsd_fast.memory.ledger import Machine
from dopsd_fast.memory.planner import make_plan
from dopsd_fast.settings.schema import Settings

SUITE = "memory"
POLICIES = ("keep", "selective", "recompute")
FULL_SIZE = "@full_size"
LEFT_TO_SUITE = "more peers and activations=selective are measured by `bench/run.py memory`"
SECONDS = 300.0
"""After which a fork is ended."""
PAGED = 64 << 10
"""Bytes from which on a tensor has pages of its own."""
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4


def run(options: Options) -> list[Row]:
    return list(measure(options))


def measure(options: Options) -> Iterator[Row]:
    """Rows as they are found."""
    yield from measured_apart(options) if options.device.type == "cpu" else measured_all(options)
    for kind in options.kinds:
        yield from counted(kind, options)


def measured_all(options: Options) -> Iterator[Row]:
    for kind in options.kinds:
        yield from measured(kind, options)


def measured_apart(options: Options) -> list[Row]:
    """`measured_all` in a process of its own, whose forks inherit no threads and process groups of other suites.
    RuntimeError: it failed as a whole."""
    work = asdict(options) | {"device": str(options.device), "threads": 1}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.json"
        lost = forks.apart(f"{__name__}:lead", [json.dumps(work), str(out)], Path(folder) / "log", {"DS_ACCELERATOR": "cpu"})
        if lost:
            raise RuntimeError(lost)
        return [Row(**row) for row in json.loads(out.read_text())]


def lead(work: str, out: str) -> None:
    """What that process does. work: the options in JSON; out: file for the rows."""
    tell_parent()
    found = json.loads(work)
    several = {name: tuple(found[name]) for name in ("peers", "kinds", "ranks")}
    options = Options(**{**found, **several, "device": torch.device(found["device"])})
    torch.set_num_threads(1)
    Path(out).write_text(json.dumps([asdict(row) for row in measured_all(options)]))


def ends_of(options: Options) -> dict[str, str]:
    """What the cases' names get, and the policy that it stands for."""
    policies = [policy for policy in POLICIES if policy != "selective" or not options.tour]
    return {f"@{policy}" if policy != "keep" else "": policy for policy in policies}


# ---- measured --------------------------------------------------------------------------------------------------------


class Ours:
    """A step of ours under a policy."""

    def __init__(self, kind: str, work: Workload) -> None:
        self.ours = OurStep(kind, work, work.cell.activations)

    def step(self) -> None:
        self.ours.step()

    def fell_back(self) -> str:
        return self.ours.fell_back()


class Peer:
    """A step of peer `name` that begins at the conditions. Its moments exist before the first step, as ours do."""

    def __init__(self, name: str, kind: str, work: Workload, checkpoint: bool) -> None:
        self.work, self.compiled = work, name == "R4"
        self.reference = peer(name, kind, work)
        if not checkpoint:
            self.reference.model.disable_gradient_checkpointing()
        optimizer = self.reference.optimizer
        for parameter in self.reference.trainable.values():
            optimizer.state[parameter] = {"step": torch.tensor(0.0), "exp_avg": torch.zeros_like(parameter),
                                          "exp_avg_sq": torch.zeros_like(parameter)}  # fmt: skip

    def step(self) -> None:
        self.reference.step(self.work.noise, self.work.student, self.work.teacher)
        for parameter in self.reference.trainable.values():
            parameter.grad = None

    def fell_back(self) -> str:
        return compiled_in_part() if self.compiled else ""


PEERS: dict[str, Callable[[str, Workload], Any]] = {
    "R1": lambda kind, work: Peer("R2", kind, work, True),
    "R2_uncheckpointed": lambda kind, work: Peer("R2", kind, work, False),
    "R4": lambda kind, work: Peer("R4", kind, work, False),
}


def measured(kind: str, options: Options) -> Iterator[Row]:
    """Of the model that the options name."""
    torch.set_num_threads(options.threads)
    work = Workload(options)
    work.forget_encoders()
    case = f"{kind}{{}}{work.model.suffix}"
    peaks: dict[tuple[str, str], tuple[float, float]] = {}
    ends = ends_of(options)
    if work.model.device.type != "cuda":
        preload()
    peers = [name for name in PEERS if name == "R1" or not options.tour]
    for name, end in [*((name, "") for name in peers), *(("ours", end) for end in ends)]:
        place = case.format(end)
        say(f"{SUITE}: {place}, {name}")
        work.cell = Cell(activations=ends[end] if name == "ours" else "keep")
        build = Ours if name == "ours" else PEERS[name]
        try:
            peak, growth, note = in_turn(build, kind, work)
        except Exception as error:
            for metric in ("peak_bytes", "step_bytes"):
                yield failed(SUITE, place, name, metric, "B", str(error) if isinstance(error, Lost) else error)
            continue
        peaks[name, end] = peak, growth
        status: Status = "fallback" if note else "ok"
        said = LEFT_TO_SUITE if options.tour and (name, end) == ("ours", "") else ""
        yield Row(SUITE, place, name, "peak_bytes", peak, "B", status=status, note=note or said)
        yield Row(SUITE, place, name, "step_bytes", growth, "B", status=status, note=note)
    for end, policy in ends.items():
        yield from ratios(case.format(f"/R1{end}"), "peak_ratio step_ratio", peaks.get(("ours", end)), peaks.get(("R1", "")))
        try:
            expected = planned(kind, work, policy)
            yield Row(SUITE, case.format(end), "planner", "planned_bytes", expected, "B")
            if ("ours", end) in peaks:
                yield Row(SUITE, case.format(end), "planner", "planned_ratio", expected / peaks["ours", end][0], "x")
        except Exception as error:
            yield failed(SUITE, case.format(end), "planner", "planned_bytes", "B", error)


def preload() -> None:
    """Loads what every fork needs."""
    import peft.tuners.lora  # noqa: F401
    import torch._inductor.config  # noqa: F401
    from diffusers.models.transformers import transformer_z_image  # noqa: F401

    with contextlib.suppress(ImportError):
        import deepspeed  # noqa: F401


def ratios(
    case: str, metrics: str, ours: Sequence[float] | None, theirs: Sequence[float] | None, name: str = "R1"
) -> Iterator[Row]:
    for number, metric in enumerate(metrics.split()):
        if ours is None or theirs is None:
            yield failed(SUITE, case, "ours", metric, "x", f"{'ours' if ours is None else name} was not measured")
        else:
            yield Row(SUITE, case, "ours", metric, ours[number] / theirs[number], "x")


def in_turn(build: Callable[[str, Workload], Any], kind: str, work: Workload) -> tuple[float, float, str]:
    """(peak, of that the step's own, what fell back) of a step. Lost: it failed in its fork."""
    if work.model.device.type == "cuda":
        return examine(build, kind, work)
    if torch.distributed.is_initialized():
        raise Lost("this process has a process group, in which a fork would wait for ever: see measured_apart")
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"

        def call() -> None:
            try:
                found: Any = alone(build, kind, work)
            except Exception as error:
                found = f"{type(error).__name__}: {error}"
            result.write_text(json.dumps(found))

        (code,) = forks.wait([forks.fork(call, {}, Path(folder) / "log")], SECONDS)
        if code:
            raise Lost(f"the fork ended with {code}")
        found = json.loads(result.read_text())
    if isinstance(found, str):
        raise Lost(found)
    peak, growth, note = found
    return peak, growth, note


class Lost(Exception):
    """What went wrong in a fork, in one line."""


def alone(build: Callable[[str, Workload], Any], kind: str, work: Workload) -> tuple[float, float, str]:
    """`examine` in a fork: with one thread, since threads do not survive it."""
    import torch._inductor.config

    torch._inductor.config.compile_threads = 1
    torch.set_num_threads(1)
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # the GNU library's
        libc.mallopt(M_MMAP_THRESHOLD, PAGED)
        libc.mallopt(M_TRIM_THRESHOLD, PAGED)
        libc.mallopt(M_MMAP_MAX, 1 << 20)
        libc.malloc_trim(0)
    return examine(build, kind, work)


def examine(build: Callable[[str, Workload], Any], kind: str, work: Workload) -> tuple[float, float, str]:
    """Of the second step: the first one loads and compiles."""
    device = work.model.device
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.utils.counters.clear()
    before = tensors(device)
    program = build(kind, work)
    try:
        program.step()
        note = program.fell_back()
        held = sum(storage.nbytes() for key, storage in tensors(device).items() if key not in before)
        step = Memory(device)
        program.step()
        growth = step.growth()
        return held + growth, growth, note
    finally:
        del program
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def tensors(device: torch.device) -> dict[int, Any]:
    """Address -> storage, of all tensors that there are on `device`. What holds the storages keeps their addresses taken."""
    gc.collect()
    found = {}
    for one in gc.get_objects():
        if issubclass(type(one), torch.Tensor) and one.device.type == device.type and one.layout == torch.strided:
            storage = one.untyped_storage()
            found[storage._cdata] = storage
    return found


# ---- planned ---------------------------------------------------------------------------------------------------------


def planned(kind: str, work: Workload, activations: str) -> int:
    """Bytes of the same step by dopsd_fast.plan."""
    model, device = work.model, work.model.device
    width, standard = model.config["cap_feat_dim"], model.standard
    shapes = Shapes(
        work.family.latent_shape(work.pixels, work.pixels), {"text": (standard.text_tokens, width)},
        {"text": (standard.teacher_tokens, width)},
    )  # fmt: skip
    settings = settings_of(kind, activations, model.precision, work.batch, work.states, standard.rank, standard.alpha)
    return planned_peak(settings, device.type, work.family, shapes)


def planned_peak(settings: Settings, kind: str, family: Any, shapes: Shapes) -> int:
    """Without what the process and the CUDA context take."""
    plan = make_plan(settings, Machine(1, 1, None, None, kind), family, shapes)
    counted_in = [plan.worst.device, *([plan.worst.host] if kind == "cpu" else [])]  # on a GPU the host's are not in the peak
    return plan.device_peak - sum(part[name] for part in counted_in for name in ("CUDA context", "Python and libraries"))


def settings_of(
    kind: str, activations: str, precision: str, batch: int, states: int, rank: int, alpha: float
) -> Settings:  # fmt: skip
    return Settings.model_validate({
        "train": {"batch_size": batch, "precision": precision, "activations": activations},
        "method": {"num_states": states},
        "adapter": {"kind": kind} | ({"rank": rank, "alpha": alpha} if kind == "lora" else {}),
        "deepspeed": {"stage": 0},
    })  # fmt: skip


# ---- counted ---------------------------------------------------------------------------------------------------------


def counted(kind: str, options: Options) -> Iterator[Row]:
    """Of Z-Image at full size."""
    case = f"{kind}{{}}{FULL_SIZE}{{}}"
    say(f"{SUITE}: {case.format('', '')}, R1")
    theirs: dict[str, float] = {}
    try:
        activations, held = reference_bytes(kind), reference_held(kind)
        theirs = {"R1": held + ENCODERS + activations, "R2": held + activations, "activations": activations}
        yield Row(SUITE, case.format("", ""), "R1", "activation_bytes", theirs["activations"], "B")
        yield Row(SUITE, case.format("", ""), "R1", "peak_bytes", theirs["R1"], "B", note=f"{ENCODERS / 1e9:.1f} GB encoders")
        yield Row(SUITE, case.format("", ""), "R2", "peak_bytes", theirs["R2"], "B")
    except Exception as error:
        for metric in ("activation_bytes", "peak_bytes"):
            yield failed(SUITE, case.format("", ""), "R1", metric, "B", error)
    for end, policy in ends_of(options).items():
        say(f"{SUITE}: {case.format('', end)}, ours")
        ours: dict[str, float] = {}
        try:
            ours = {"activation": our_bytes(kind, policy), "peak": our_peak(kind, policy)}
            for what, value in ours.items():
                yield Row(SUITE, case.format("", end), "ours", f"{what}_bytes", value, "B")
        except Exception as error:
            for what in ("activation", "peak"):
                yield failed(SUITE, case.format("", end), "ours", f"{what}_bytes", "B", error)
        for name, what, against in (("R1", "activation", "activations"), ("R1", "peak", "R1"), ("R2", "peak", "R2")):
            mine, his = ([of[key]] if of else None for of, key in ((ours, what), (theirs, against)))
            yield from ratios(case.format(f"/{name}", end), f"{what}_ratio", mine, his, name)


def full_size(kind: str, activations: str) -> tuple[Settings, Any, Shapes]:
    settings = settings_of(kind, activations, "bf16", cost.LATENT[0], 4, cost.RANK, cost.ALPHA)
    family = published_family("zimage", settings.conditioning)
    student, teacher = ({"text": (tokens, cost.TEXT_WIDTH)} for tokens in (cost.TEXT, cost.TEACHER_TEXT))
    return settings, family, Shapes(cost.LATENT[1:], student, teacher)


def our_bytes(kind: str, activations: str) -> int:
    settings, family, shapes = full_size(kind, activations)
    return trace(family, settings, shapes, None).peak


def our_peak(kind: str, activations: str) -> int:
    """As planned for one GPU."""
    settings, family, shapes = full_size(kind, activations)
    return planned_peak(settings, "cuda", family, shapes)


def reference_held(kind: str) -> int:
    """Weights and, of what trains, two moments and the average, in the model's dtype."""
    step = cost.reference(kind, cost.Size(), checkpointing=True)
    models = [model for model in (step.model, step.teacher) if model is not None]
    weights = sum(p.numel() * p.element_size() for model in models for p in model.parameters())
    return weights + 3 * sum(p.numel() * p.element_size() for p in step.trainable.values())


def reference_bytes(kind: str) -> int:
    """Follows from few layers, since what is alive at the peak is affine in them."""
    size = cost.Size()
    few, more = (traced_bytes(kind, replace(size, layers=layers)) for layers in (2, 3))
    return few + (more - few) * (size.layers - 2)


def traced_bytes(kind: str, size: cost.Size) -> int:
    step = cost.reference(kind, size, checkpointing=True)
    noise = torch.empty(cost.LATENT, device="meta", dtype=torch.bfloat16)
    conditions = [[Condition(cost.text(tokens))] for tokens in (cost.TEXT, cost.TEACHER_TEXT)]
    live = LiveBytes()
    with on_meta(False), mock.patch.object(torch.Tensor, "item", lambda tensor: 0.0), live:
        step.backward(noise, *conditions)
    return live.peak
