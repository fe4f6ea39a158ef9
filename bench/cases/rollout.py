"""Suite `rollout`: the states of a trajectory with both velocities, ours against the eager reference. No backward pass.

One measurement goes from x_0 = noise through K states: student and teacher velocity, the loss term, Euler's step, and the mean
loss as a number. R1 runs its encoders first, every time, as published; the others have the conditions computed once. Ours
also refines the captions in every measurement: once for its K states, diffusers in every state. Teacher and student differ,
LoRA's B is not zero. Rows of a case, "lora" or "full", with "@K8" for eight states:

    each       seconds_per_rollout, states_per_second (K * batch / seconds)
    each       final_state_relative_error, loss_relative_error: of x_K and of the mean loss, against float64 (for bf16 models
               against fp32 without TF32), R1 from the same conditions as the others
    CASE/PEER  ours: speedup, the peer's seconds over ours, round by round
    student    sampling alone, against the published pipeline: bench/cases/sampling.py

On a GPU each peer is measured in turns with ours alone, since not all fit together, else all together.
"""

from __future__ import annotations

import gc
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.cases import sampling
from bench.cases.step import LEFT_TO_SUITE, MATRIX_PEERS, compiled_in_part, exactly
from bench.cases.workload import Cell, OurStep, Workload, fill, pair_on_device, peer, stock_name
from bench.clock import interleaved, ratios, summary
from bench.peers.reference_eager import STRONGER, Condition, ReferenceStep
from bench.results import Options, Row, Status, failed
from bench.show import step as say
from dopsd_fast.method.objective import StepInputs
from dopsd_fast.method.registry import make_objective
from dopsd_fast.settings.schema import Settings

SUITE = "rollout"
MORE_STATES = 8
APART = 0.02
"""Of a full teacher's weights: the part of each tensor's root mean square that is added to it at random."""
Outcome = tuple[float, Tensor]
"""(mean loss, x_K `[B, C, h, w]`)."""


def run(options: Options) -> list[Row]:
    return list(measure(options))


def measure(options: Options) -> Iterator[Row]:
    """Rows as they are found."""
    for kind in options.kinds:
        yield from Measurement(kind, options).rows()
    yield from sampling.measure(options)


# ---- the programs ----------------------------------------------------------------------------------------------------


class OurPair(OurStep):
    """Our pair with a teacher of its own, and no optimizer: what a rollout needs."""

    def __init__(self, kind: str, work: Workload) -> None:
        standard = work.model.standard
        adapter = {"rank": standard.rank, "alpha": standard.alpha} if kind == "lora" else {}
        settings = Settings.model_validate({
            "train": {"batch_size": work.batch, "precision": work.model.precision},
            "method": {"num_states": work.states, "weight": "v"},
            "adapter": {"kind": kind, **adapter},
        })  # fmt: skip
        self.work, self.objective, self.engine = work, make_objective(settings.method), None  # type: ignore[assignment]
        self.pair = pair_on_device(work.model, settings)
        for trained in self.pair.trained():
            trained.student.grad_dtype = torch.float32
            if kind == "lora":
                fill(trained.name, trained.student, work.model.dtype)
            set_teacher(kind, trained.name, trained.teacher, work.model.dtype)

    @torch.no_grad()
    def rollout(self, grid: Sequence[float]) -> Outcome:
        work = self.work
        student, teacher = work.contexts(work.student), work.contexts(work.teacher)
        forward = self.pair.open(student, teacher, work.noise.shape)
        report = self.objective.accumulate(StepInputs(work.noise, grid, forward), lambda loss: None)
        return report.loss, report.states[-1]

    outcome = rollout

    def close(self) -> None:
        pass


class PeerPair:
    """A peer with the same teacher, and no average."""

    def __init__(self, name: str, kind: str, work: Workload, dtype: torch.dtype | None = None) -> None:
        self.name, self.work, self.dtype = name, work, dtype or torch.float32
        self.reference = apart(kind, work, peer(name, kind, work, dtype))

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

    def fell_back(self) -> str:
        return compiled_in_part() if STRONGER[self.name].get("compile_blocks") else ""


def apart(kind: str, work: Workload, step: ReferenceStep) -> ReferenceStep:
    """`step` with the teacher that `OurPair` has. Its average is dropped: it can make no training step."""
    step.ema.clear()
    for full, weight in step.teacher_weights.items():
        set_teacher(kind, stock_name(full), weight, work.model.dtype)
    return step


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


class Measurement:
    """Of one kind, "lora" or "full"."""

    def __init__(self, kind: str, options: Options) -> None:
        torch.set_num_threads(options.threads)
        self.kind, self.options = kind, options
        self.work = Workload(options)
        self.work.forget_encoders()
        self.one_by_one = options.device.type == "cuda"
        self.remark, self.peers = "", list(options.peers)
        if options.tour and "R3" in self.peers:
            self.peers.remove("R3")
            self.remark = LEFT_TO_SUITE.replace("step", SUITE)
        self.grids = {"": self.work.grid}
        if not (options.tour or options.quick):
            self.grids[Cell(states=MORE_STATES).name] = self.work.model.grid(MORE_STATES, self.work.pixels)
        self.exact: dict[str, Outcome] = {}
        self.exact_note = ""
        self.told: set[tuple[str, str]] = set()

    def case(self, cell: str, name: str = "") -> str:
        return f"{self.kind}{name and '/' + name}{cell}{self.work.model.suffix}"

    def rows(self) -> Iterator[Row]:
        torch._dynamo.reset()
        torch._dynamo.config.recompile_limit = 64  # one graph per length, branch and mode; all blocks share the code
        yield from self.find_exact()
        for names in [[name] for name in self.peers] if self.one_by_one and self.peers else [self.peers]:
            yield from self.group(names)
            self.free()

    def find_exact(self) -> Iterator[Row]:
        wide = torch.float64 if self.work.model.dtype == torch.float32 else torch.float32
        self.exact_note = "" if wide == torch.float64 else "against fp32 without TF32"
        say(f"{SUITE}: {self.case('')}, the exact trajectory")
        try:
            with exactly(wide):
                exact = PeerPair("R2", self.kind, self.work, wide)
                self.exact = {cell: exact.outcome(grid) for cell, grid in self.grids.items()}
        except Exception as error:
            for metric in ("final_state_relative_error", "loss_relative_error"):
                yield failed(SUITE, self.case(""), "exact", metric, "", error)
        exact = None  # type: ignore[assignment]
        self.free()

    def group(self, names: Sequence[str]) -> Iterator[Row]:
        """The peers `names` and ours, in turns. Peers are built first: they need most while they are built."""
        alive: dict[str, Any] = {}
        notes: dict[str, str] = {}
        for name in (*names, "ours"):
            yield from self.build(name, alive, notes)
        for cell, grid in self.grids.items():
            chosen = {name: one for name, one in alive.items() if not cell or name == "ours" or name in MATRIX_PEERS}
            if chosen:
                yield from self.time(cell, {name: partial(one.rollout, grid) for name, one in chosen.items()}, notes)

    def build(self, name: str, alive: dict[str, Any], notes: dict[str, str]) -> Iterator[Row]:
        """Puts a variant that has made one rollout into `alive`, and says how exact it was; or why it could not."""
        compiled = bool(name != "ours" and STRONGER[name].get("compile_blocks"))
        say(f"{SUITE}: {self.case('')}, {'compiling' if compiled else 'building'} {name}")
        try:
            torch._dynamo.utils.counters.clear()
            one: Any = OurPair(self.kind, self.work) if name == "ours" else PeerPair(name, self.kind, self.work)
            found = {cell: one.outcome(grid) for cell, grid in self.grids.items()}
            notes[name] = one.fell_back()
        except Exception as error:
            yield from self.lost("", name, error)
            return
        alive[name] = one
        for cell, outcome in found.items():
            if cell in self.exact and (not cell or name == "ours" or name in MATRIX_PEERS):
                yield from self.errors(cell, name, outcome, notes[name])

    def errors(self, cell: str, name: str, outcome: Outcome, note: str) -> Iterator[Row]:
        loss, state = self.exact[cell]
        found = {"final_state_relative_error": float((outcome[1].double() - state.double()).norm() / state.double().norm()),
                 "loss_relative_error": abs(outcome[0] - loss) / loss if loss else math.nan}  # fmt: skip
        for metric, value in found.items():
            yield from self.row(self.case(cell), name, metric, "", [value], note, self.exact_note)

    def time(self, cell: str, calls: Mapping[str, Callable[[], Any]], notes: Mapping[str, str]) -> Iterator[Row]:
        """In turns; where one of them fails, those that do not."""
        say(f"{SUITE}: {self.case(cell)}, timing {', '.join(calls)}")
        options, able = self.options, {}
        for name, call in calls.items():  # R1's encoders run here for the first time
            try:
                call()
                able[name] = call
            except Exception as error:
                yield from self.lost(cell, name, error)
        if not able:
            return
        rounds, warmup = options.repeats(20, 5), 0 if options.quick or options.tour else 2
        try:
            seconds = interleaved(able, rounds, warmup, options.device, options.clock)
        except Exception as error:
            for name in able:
                yield from self.lost(cell, name, error)
            return
        states = (len(self.grids[cell]) - 1) * self.work.batch
        for name, values in seconds.items():
            note, remark = notes[name], self.remark if name == "ours" and not cell else ""
            yield from self.row(self.case(cell), name, "seconds_per_rollout", "s", values, note, remark)
            yield from self.row(self.case(cell), name, "states_per_second", "1/s", [states / s for s in values], note)
            if name != "ours" and "ours" in seconds:
                quicker = ratios(values, seconds["ours"])
                fell = "; ".join(filter(None, (notes["ours"], note and f"{name}: {note}")))
                yield from self.row(self.case(cell, name), "ours", "speedup", "x", quicker, fell)

    def lost(self, cell: str, name: str, error: BaseException | str) -> Iterator[Row]:
        if name == "ours" and (self.case(cell), "failed") in self.told:
            return
        self.told.add((self.case(cell), "failed" if name == "ours" else name))
        yield failed(SUITE, self.case(cell), name, "seconds_per_rollout", "s", error)
        if name != "ours":
            yield failed(SUITE, self.case(cell, name), "ours", "speedup", "x", error)

    def row(
        self, case: str, name: str, metric: str, unit: str, values: Sequence[float], fell: str, remark: str = ""
    ) -> Iterator[Row]:
        """Of ours, which runs beside each peer on a GPU, what was measured first."""
        if (case, f"{name} {metric}") in self.told:
            return
        self.told.add((case, f"{name} {metric}"))
        note = "; ".join(filter(None, (fell, remark)))
        status: Status = "fallback" if fell else "ok"
        if not all(map(math.isfinite, values)):
            yield failed(SUITE, case, name, metric, unit, "; ".join(filter(None, ("not finite", note))))
        else:
            yield Row(SUITE, case, name, metric, unit=unit, status=status, note=note, **summary(values))

    def free(self) -> None:
        self.work.forget_encoders()
        gc.collect()
        if self.options.device.type == "cuda":
            torch.cuda.empty_cache()
