"""Suite `rollout`: the states of a trajectory with both velocities, ours against the eager reference. No backward pass.

One measurement goes from x_0 = noise through K states: student and teacher velocity, the loss term, Euler's step, and the mean
loss as a number. R1 runs its encoders first, every time, as published; the others have the conditions computed once. Ours
also refines the captions in every measurement: once for its K states, diffusers in every state. Teacher and student differ,
LoRA's B is not zero. Rows of a case, "lora" or "full", with "@K8" for eight states:

    each       seconds_per_rollout, states_per_second (K * batch / seconds)
    each       final_state_relative_error, loss_relative_error: of x_K and of the mean loss, against float64 (for bf16 models
               against fp32 without TF32), R1 from the same conditions as the others
    CASE/PEER  ours: speedup, the peer's seconds over ours, round by round
    student    sampling alone, against the published pipeline: bench/suites/sampling.py

On a GPU each peer is measured in turns with ours alone, since not all fit together, else all together.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.harness import Contest, exact_dtype, exact_note, exactly, free, new_compiler, relative
from bench.live import say
from bench.references.reference_eager import Condition, ReferenceStep
from bench.results import Options, Row, failed
from bench.suites import sampling
from bench.suites.workload import (
    MATRIX_PEERS,
    Cell,
    OurStep,
    PeerStep,
    Workload,
    asked_peers,
    fill,
    pair_on_device,
    peer,
    settings_of,
    stock_name,
)
from dopsd_fast.method.objective import StepInputs
from dopsd_fast.method.registry import make_objective

SUITE = "rollout"
MORE_STATES = 8
APART = 0.02
"""Of a full teacher's weights: the part of each tensor's root mean square that is added to it at random."""
Outcome = tuple[float, Tensor]
"""(mean loss, x_K `[B, C, h, w]`)."""


def measure(options: Options) -> Iterator[Row]:
    """Rows as they are found."""
    for kind in options.kinds:
        yield from of_kind(kind, options, one_by_one=options.device.type == "cuda")
    yield from sampling.measure(options)


# ---- the programs ----------------------------------------------------------------------------------------------------


class OurPair(OurStep):
    """Our pair with a teacher of its own, and no optimizer: what a rollout needs."""

    def __init__(self, kind: str, work: Workload) -> None:
        settings = settings_of(kind, work, method={"weight": "v"})
        self.work, self.objective, self.engine = work, make_objective(settings.method), None  # type: ignore[assignment]
        self.pair = pair_on_device(work.model, settings)
        for trained in self.pair.trained():
            trained.student.grad_dtype = torch.float32
            if kind == "lora":
                fill(trained.name, trained.student, work.model.dtype)
            set_teacher(kind, trained.name, trained.teacher, work.model.dtype)

    @torch.no_grad()
    def rollout(self, grid: Sequence[float]) -> Outcome:
        report = self.objective.accumulate(StepInputs(self.work.noise, grid, self.open()), lambda loss: None)
        return report.loss, report.states[-1]

    outcome = rollout

    def close(self) -> None:
        pass


class PeerPair(PeerStep):
    """A peer with the same teacher, and no average: it can make no training step."""

    def __init__(self, name: str, kind: str, work: Workload, dtype: torch.dtype | None = None) -> None:
        self.work, self.dtype, self.reference = work, dtype or torch.float32, peer(name, kind, work, dtype)
        self.reference.ema.clear()
        for full, weight in self.reference.teacher_weights.items():
            set_teacher(kind, stock_name(full), weight, work.model.dtype)

    def rollout(self, grid: Sequence[float]) -> Outcome:
        """What is timed."""
        work, encoders = self.work, self.reference.encoders
        if encoders is None:
            return self.outcome(grid)
        return self.outcome(grid, encoders.student(work.prompts), encoders.teacher(work.prompts, work.images))

    def outcome(self, grid: Sequence[float], student: Sequence[Condition] = (), teacher: Sequence[Condition] = ()) -> Outcome:
        """From the work's conditions if none are given."""
        work = self.work
        return published(self.reference, work.noise.to(self.dtype), grid, student or work.student, teacher or work.teacher)


@torch.no_grad()
def set_teacher(kind: str, name: str, weight: Tensor, dtype: torch.dtype) -> None:
    """Makes one of the teacher's tensors another than the student's, by its stock name and shape alone, rounded to `dtype`."""
    if kind == "lora":
        fill(f"teacher.{name}", weight, dtype)
        return
    draw = torch.Generator(weight.device).manual_seed(zlib.crc32(name.encode()))
    own = weight.to(dtype)
    spread = APART * own.float().square().mean().sqrt()
    weight.copy_(own + (spread * torch.randn(weight.shape, generator=draw, device=weight.device)).to(dtype))


@torch.no_grad()
def published(
    step: ReferenceStep, noise: Tensor, grid: Sequence[float], student: Sequence[Condition], teacher: Sequence[Condition]
) -> Outcome:
    """The published loop (`ReferenceStep.backward`) without its graph. grid: t_0 = 0 ... t_K = 1."""
    x, losses = noise, []
    for now, then in zip(grid[:-1], grid[1:], strict=True):
        prediction = step.student_prediction(x, 1.0 - now, student)
        losses.append(F.mse_loss(prediction, step.teacher_prediction(x, 1.0 - now, teacher)))
        x = x + (now - then) * prediction
    return torch.stack(losses).mean().item(), x


# ---- the measurement -------------------------------------------------------------------------------------------------


def of_kind(kind: str, options: Options, one_by_one: bool) -> Iterator[Row]:
    """Rows of "lora" or "full". one_by_one: each peer is alone with ours."""
    new_compiler()
    work = Workload(options)
    work.forget_encoders()
    peers, remark = asked_peers(options, SUITE)
    grids = {"": work.grid}
    if not (options.tour or options.quick):
        grids[Cell(states=MORE_STATES).name] = work.model.grid(MORE_STATES, work.pixels)
    exact: dict[str, Outcome] = {}
    wide = exact_dtype(work.model.dtype)
    say(f"{SUITE}: {kind}, the exact trajectory")
    try:
        with exactly(wide):
            reference = PeerPair("R2", kind, work, wide)
            exact = {cell: reference.outcome(grid) for cell, grid in grids.items()}
            del reference
    except Exception as error:
        for metric in ("final_state_relative_error", "loss_relative_error"):
            yield failed(SUITE, f"{kind}{work.model.suffix}", "exact", metric, "", error)
    for names in [[name] for name in peers] if one_by_one and peers else [peers]:
        yield from group(names, kind, work, grids, exact, remark)
        work.forget_encoders()
        free(options.device)


def group(
    names: Sequence[str], kind: str, work: Workload, grids: Mapping[str, Sequence[float]], exact: Mapping[str, Outcome],
    remark: str,
) -> Iterator[Row]:
    """The peers `names` and ours, in turns, along each of the grids. Peers are built first: they need most while they
    are built."""
    notes: dict[str, str] = {}
    made = {cell: Contest(SUITE, f"{kind}{{}}{cell}{work.model.suffix}", work.options, "seconds_per_rollout", notes=notes)
            for cell in grids}
    contest, outcomes = made[""], {}
    contest.remarks["ours"] = remark

    def check(name: str, one: Any) -> dict[str, tuple[float, str]]:
        outcomes[name] = {cell: one.outcome(grid) for cell, grid in grids.items()}
        return errors(outcomes[name][""], exact.get(""), work)

    for name in (*names, "ours"):
        make = partial(OurPair, kind, work) if name == "ours" else partial(PeerPair, name, kind, work)
        yield from contest.build(name, make, partial(check, name))
    for cell, grid in grids.items():
        chosen = {name: one for name, one in contest.alive.items() if not cell or name in ("ours", *MATRIX_PEERS)}
        for name in chosen if cell else ():
            for metric, (value, note) in errors(outcomes[name][cell], exact.get(cell), work).items():
                yield made[cell].row(name, metric, "", value, note)
        amounts = {"states_per_second": ("1/s", float((len(grid) - 1) * work.batch))}
        if chosen:
            calls = {name: partial(one.rollout, grid) for name, one in chosen.items()}
            yield from made[cell].time(calls, partial(made[cell].speeds, amounts=amounts))


def errors(outcome: Outcome, exact: Outcome | None, work: Workload) -> dict[str, tuple[float, str]]:
    if exact is None:
        return {}
    note = exact_note(work.model.dtype)
    loss = abs(outcome[0] - exact[0]) / exact[0] if exact[0] else math.nan
    return {"final_state_relative_error": (relative(outcome[1], exact[1]), note), "loss_relative_error": (loss, note)}
