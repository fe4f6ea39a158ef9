"""Suite `memory`: the peak of a training step's memory, by what is kept for the backward pass.

    ours                 activations=keep; in cases "...@selective" and "...@recompute" those
    R1                   the published step: K graphs, each of checkpoints, from its conditions
    R2_uncheckpointed    the same without checkpoints
    R4                   one graph at a time, not checkpointed, its blocks compiled; on a GPU
    planner              what dopsd_fast.plan says of ours

The tour has R1, keep and recompute. Rows of a case, "lora" or "full":

    each         peak_bytes: all that the step holds and allocates, weights and optimizer included
    each         step_bytes: of that, what the step adds to what stays from one to the next: activations, gradients
    planner      planned_bytes: peak_bytes as planned, without what the process and the CUDA context take
    planner      planned_ratio: planned_bytes over ours' peak_bytes
    CASE/R1      ours: peak_ratio, step_ratio: ours over R1's

On a GPU they are measured, by PyTorch's allocator. On a CPU they are counted: what stays is the sum of all tensors, what a step
adds follows from forward and backward on the meta device. Z-Image at full size (1024^2 pixels, batch 1, bf16, K = 4) is counted
on every machine, cases "...@full_size", with activation_bytes and activation_ratio for what a step adds. There R1 holds both
encoders, R2 is R1 without them, and ours is as planned: its masters, moments and average are in fp32, a peer's in the model's
dtype.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import torch

from bench.harness import Contest, compiled_in_part, free, new_compiler
from bench.live import say
from bench.models import Model, building
from bench.references.reference_eager import Adapter, Condition, ReferenceStep
from bench.results import Options, Row, failed
from bench.suites.room import ENCODERS
from bench.suites.workload import OurStep, PeerStep, Workload, settings_of
from dopsd_fast.conditioning.context import Shapes
from dopsd_fast.distributed.plain_engine import PlainEngine
from dopsd_fast.distributed.process_group import Ranks
from dopsd_fast.memory.activations import LiveBytes, meta_pair, on_meta
from dopsd_fast.memory.activations import measure as trace
from dopsd_fast.memory.ledger import Machine
from dopsd_fast.memory.planner import make_plan

SUITE = "memory"
POLICIES = {"": "keep", "@selective": "selective", "@recompute": "recompute"}
"""What a case's name gets, and the activations that it stands for."""
Sizes = tuple[float, float, str]
"""Bytes at the peak, of those what the step adds; what runs otherwise than it is meant to."""


def measure(options: Options) -> Iterator[Row]:
    """Rows as they are found."""
    model, cuda = Model(options.model, options.device), options.device.type == "cuda"
    peers = ["R1"] if options.tour else ["R1", "R2_uncheckpointed", *(["R4"] if cuda else [])]
    for kind in options.kinds:
        step, case = Counted(kind, model), f"{kind}{{}}{{}}{model.suffix}"
        find: Callable[..., Sizes] = functools.partial(allocated, kind, options) if cuda else step.sizes
        remarks = {} if cuda else {(name, metric): "counted" for name in ("ours", *peers) for metric in ("peak", "step")}
        found = yield from compared(case, options, "step", peers, find, remarks)
        for end, policy in ends(options).items():
            place = case.format("", end)
            try:
                planned = step.planned(policy)
                yield Row(SUITE, place, "planner", "planned_bytes", planned, "B")
                if ("ours", end) in found:
                    yield Row(SUITE, place, "planner", "planned_ratio", planned / found["ours", end][0], "x")
            except Exception as error:
                yield failed(SUITE, place, "planner", "planned_bytes", "B", error)
        yield from counted(kind, options)


def counted(kind: str, options: Options) -> Iterator[Row]:
    """Of Z-Image at full size, as on a GPU, though none is asked for."""
    step = Counted(kind, Model("zimage-turbo", torch.device("cuda")), published=True)
    remarks = {("R1", "peak"): f"{ENCODERS / 1e9:.1f} GB encoders"}
    yield from compared(f"{kind}{{}}@full_size{{}}", options, "activation", ["R1", "R2"], step.sizes, remarks)


def ends(options: Options) -> dict[str, str]:
    return {end: policy for end, policy in POLICIES.items() if policy != "selective" or not options.tour}


def compared(case: str, options: Options, added: str, peers: Sequence[str], find: Callable[[str, str], Sizes],
             remarks: Mapping[tuple[str, str], str]) -> Generator[Row, None, dict[tuple[str, str], tuple[float, float]]]:
    """Rows of the peers and of ours, and of ours over R1 and R2. Gives both sizes by (variant, end of the case's name).

    case: with places for a peer and the end. added: what the metrics of what a step adds are called."""
    found, metrics = dict[tuple[str, str], tuple[float, float]](), ("peak", added)
    for name, end, policy in [*((peer, "", "keep") for peer in peers), *(("ours", *pair) for pair in ends(options).items())]:
        contest = Contest(SUITE, case.format("{}", end), options)
        say(f"{SUITE}: {contest.place()}, {name}")
        try:
            peak, more, contest.notes[name] = find(name, policy)
            found[name, end] = peak, more
            for metric, size in zip(metrics, found[name, end]):
                yield contest.row(name, f"{metric}_bytes", "B", size, remarks.get((name, metric), ""))
        except Exception as error:
            for metric in metrics:
                yield failed(SUITE, contest.place(), name, f"{metric}_bytes", "B", error)
        for peer in (peer for peer in peers if name == "ours" and peer in ("R1", "R2")):
            ours, theirs = found.get((name, end)), found.get((peer, ""))
            for number, metric in enumerate(metrics):
                if ours and theirs:
                    yield contest.row("ours", f"{metric}_ratio", "x", ours[number] / theirs[number], peer=peer)
                else:
                    why = f"{peer if ours else 'ours'} was not measured"
                    yield failed(SUITE, contest.place(peer), "ours", f"{metric}_ratio", "x", why)
    return found


def allocated(kind: str, options: Options, name: str, policy: str) -> Sizes:
    """Of the second step, by PyTorch's allocator: the first one loads, compiles and makes the moments."""
    device, cuda, work = options.device, torch.cuda, Workload(options)
    work.forget_encoders()
    new_compiler()
    torch._dynamo.utils.counters.clear()
    before = cuda.memory_allocated(device)
    one: Any = OurStep(kind, work, policy) if name == "ours" else PeerStep("R4" if name == "R4" else "R2", kind, work)
    try:
        if name == "R2_uncheckpointed":
            one.reference.model.disable_gradient_checkpointing()
        one.step()
        one.clear()
        fell = compiled_in_part() if name == "R4" else one.fell_back()
        stays = cuda.memory_allocated(device)
        cuda.reset_peak_memory_stats(device)
        one.step()
        peak = cuda.max_memory_allocated(device)
        return peak - before, peak - stays, fell
    finally:
        one.close()
        del one
        free(device)


class Counted:
    """A training step on a model of any size on the meta device; nothing is computed or allocated. published: R1 holds its
    encoders, and ours is as planned."""

    def __init__(self, kind: str, model: Model, published: bool = False) -> None:
        self.kind, self.model, self.is_published, standard = kind, model, published, model.standard
        self.batch, self.states, self.machine = standard.batch, standard.states, model.device.type
        width = model.config["cap_feat_dim"]
        texts = [{"text": (tokens, width)} for tokens in (standard.text_tokens, standard.teacher_tokens)]
        self.shapes = Shapes(model.family.latent_shape(standard.pixels, standard.pixels), *texts)

    def sizes(self, name: str, policy: str) -> Sizes:
        """Of a peer or of ours. What stays is all tensors that pair and engine make, whatever the planner says of them. What a
        deep peer has follows from few layers, since what is alive at its peak is affine in them."""
        if name != "ours":
            layers = self.model.config["n_layers"]
            few, more = (alive(self, name != "R2_uncheckpointed", min(depth, layers)) for depth in (2, 3))
            stays, added = (a + (b - a) * max(layers - 2, 0) for a, b in zip(few, more))
            return stays + added + (ENCODERS if name == "R1" and self.is_published else 0), added, ""
        settings = self.settings(policy)
        added = trace(self.model.family, settings, self.shapes, None, self.machine).peak
        if self.is_published:
            return self.planned(policy), added, ""
        with LiveBytes() as live:
            pair = meta_pair(self.model.family, settings)
            engine = PlainEngine(pair, settings.train, settings.teacher, Ranks(0, 1, 0, torch.device("meta")))
            stays = live.live
        del pair, engine
        return stays + added, added, ""

    def planned(self, policy: str) -> int:
        """Ours' peak by dopsd_fast.plan, without what the process and the CUDA context take."""
        plan = make_plan(self.settings(policy), Machine(1, 1, None, None, self.machine), self.model.family, self.shapes)
        counted_in = [plan.worst.device, *([plan.worst.host] if self.machine == "cpu" else [])]
        return plan.device_peak - sum(part[name] for part in counted_in for name in ("CUDA context", "Python and libraries"))

    def settings(self, policy: str) -> Any:
        return settings_of(self.kind, self, train={"activations": policy})


@functools.cache
def alive(counted: Counted, checkpoint: bool, layers: int) -> tuple[int, int]:
    """Bytes of the published step that stay, which are the weights and, of what trains, two moments and the average, in the
    model's dtype; and of forward and backward at their peak."""
    model, shapes, standard = counted.model, counted.shapes, counted.model.standard
    family = copy.copy(model.family)
    family.transformer_config = family.transformer_config | {"n_layers": layers}
    adapter = Adapter(standard.rank, standard.alpha) if counted.kind == "lora" else None
    with building("meta", model.dtype):
        sigmas = [1.0, *[0.0] * standard.states]
        step = ReferenceStep(family.meta_transformer(), sigmas, adapter=adapter, ema_dtype=None,
                             gradient_checkpointing=checkpoint)
        noise = torch.empty(standard.batch, *shapes.latent)
        conditions = [[Condition(torch.empty(texts["text"]))] * standard.batch for texts in (shapes.student, shapes.teacher)]
    with on_meta(False), mock.patch.object(torch.Tensor, "item", lambda tensor: 0.0), LiveBytes() as live:
        step.backward(noise, *conditions)
    held = [p for whole in (step.model, step.teacher) if whole is not None for p in whole.parameters()]
    return sum(p.nbytes for p in held) + 3 * sum(p.nbytes for p in step.trainable.values()), live.peak
