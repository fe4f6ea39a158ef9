"""Suite `forward`: both velocities at one state of the trajectory, with and without the student's backward pass.

    ours        the pair forward: student and teacher packed into one
    two_calls   the same kernels, the teacher and then the student, each by itself
    diffusers   diffusers' own forward twice, as its pipeline calls it; not checkpointed
    compiled    the same, its blocks compiled, with RoPE in real numbers (R4)

All begin at the conditions, so that captions are refined in every measurement; along a trajectory ours does that once. Teacher
and student differ. Rows of a case, "lora" or "full" with what differs from the standard configuration ("@batch1", for models as
wide as the published ones "@512px@batch4"):

    each            seconds_forward: both velocities, no gradient; tokens_per_second: of student and teacher
    each            seconds_backward: both velocities, the student's with its graph, and the gradients of all that trains
    each            flops_per_second, ceiling_share, and with _backward: the products' (bench/suites/gemm_floor.py), over the
                    seconds; their share of a large product's speed in this run
    each            velocity_relative_error, gradient_relative_error: of both velocities and the whole gradient, against float64
                    (for bf16 models against fp32 without TF32)
    CASE/VARIANT    ours: speedup_forward, speedup_backward, the variant's seconds over ours, round by round

On a GPU each variant is measured in turns with ours alone, since not all fit together, else all together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.harness import Contest, Seconds, compare, exact_dtype, exact_note, exactly, free, new_compiler, relative
from bench.live import say
from bench.machine import ceilings
from bench.models import Model
from bench.results import Options, Row, failed
from bench.suites.gemm_floor import GemmFloor
from bench.suites.rollout import OurPair, PeerPair
from bench.suites.workload import Cell, Workload
from dopsd_fast.pair.student_teacher import TEACHER

SUITE = "forward"
OTHERS = ("two_calls", "diffusers", "compiled")
METRICS = {"forward": "", "backward": "_backward"}
"""What is timed, and what the names of its speeds end in."""
STATE = 1
"""The state of the standard trajectory whose time is taken."""
Velocities = tuple[Tensor, Tensor]
"""(v_s, v_t) `[B, C, h, w]`."""


def measure(options: Options) -> Iterator[Row]:
    """Rows as they are found."""
    for kind in options.kinds:
        for cell in cells(options):
            yield from Measurement(kind, options, cell).rows()


def cells(options: Options) -> list[Cell]:
    """The standard one, and unless it is the tour or a test another batch."""
    standard = Model(options.model, options.device).standard
    if options.tour or options.quick:
        return [Cell()]
    return [Cell(), Cell(batch=1) if standard.batch > 1 else Cell(pixels=standard.pixels // 2, batch=4)]


# ---- the programs ----------------------------------------------------------------------------------------------------


class Both:
    """Both velocities, and the gradients of the mean of (v_s - v_t)^2, of whoever has `velocities`: (both, what is to be done
    after the backward pass of v_s)."""

    velocities: Callable[[], tuple[Velocities, Callable[[], Any]]]
    clear: Callable[[], None]

    def forward(self) -> Velocities:
        with torch.no_grad():
            return self.velocities()[0]

    def backward(self) -> None:
        self.clear()
        (v_s, v_t), finish = self.velocities()
        (v_s - v_t).square().mean().backward()
        finish()


class Ours(Both, OurPair):  # type: ignore[misc]
    """Packed."""

    def velocities(self) -> tuple[Velocities, Callable[[], Any]]:  # type: ignore[override]
        forward = self.open()
        v_s, v_t = forward(self.work.noise, self.time())
        assert v_t is not None
        return (v_s, v_t), lambda: forward.finish(torch.Tensor.backward)

    def time(self) -> Tensor:
        return self.work.noise.new_full((self.work.batch,), self.work.grid[STATE])


class TwoCalls(Ours):
    def velocities(self) -> tuple[Velocities, Callable[[], Any]]:  # type: ignore[override]
        work, shape = self.work, self.work.noise.shape
        v_t = self.pair.sampler(TEACHER, work.contexts(work.teacher), shape)(work.noise, self.time())
        forward = self.pair.open(work.contexts(work.student), [], shape)
        return (forward(work.noise, self.time())[0], v_t), lambda: forward.finish(torch.Tensor.backward)


class Diffusers(Both, PeerPair):  # type: ignore[misc]
    """`name`: the peer whose model it is; not checkpointed."""

    def __init__(self, name: str, kind: str, work: Workload, dtype: torch.dtype | None = None) -> None:
        super().__init__(name, kind, work, dtype)
        self.noise = work.noise if dtype is None else work.noise.to(dtype)
        self.reference.model.disable_gradient_checkpointing()

    def velocities(self) -> tuple[Velocities, Callable[[], Any]]:  # type: ignore[override]
        step, sigma = self.reference, 1.0 - self.work.grid[STATE]
        v_t = -step.teacher_prediction(self.noise, sigma, self.work.teacher)
        return (-step.student_prediction(self.noise, sigma, self.work.student), v_t), lambda: None


VARIANTS: dict[str, Callable[[str, Workload], Any]] = {
    "ours": Ours,
    "two_calls": TwoCalls,
    "diffusers": partial(Diffusers, "R2"),
    "compiled": partial(Diffusers, "R4"),
}


# ---- the measurement -------------------------------------------------------------------------------------------------


class Measurement:
    """Of one kind, "lora" or "full"."""

    def __init__(self, kind: str, options: Options, cell: Cell | None = None) -> None:
        self.kind, self.options = kind, options
        self.one_by_one = options.device.type == "cuda"
        self.work = Workload(options, cell or Cell())
        self.work.forget_encoders()
        self.velocities: Velocities | None = None
        self.gradients: dict[str, Tensor] = {}
        self.flops: dict[str, int] = {}

    @property
    def tokens(self) -> int:
        work = self.work
        standard, side = work.model.standard, work.pixels // work.family.pixel_multiple
        return work.batch * (2 * side**2 + standard.text_tokens + standard.teacher_tokens)

    def rows(self) -> Iterator[Row]:
        new_compiler()
        yield from self.find_exact()
        for names in [[name] for name in OTHERS] if self.one_by_one else [OTHERS]:
            yield from self.group(names)
            free(self.options.device)

    def find_exact(self) -> Iterator[Row]:
        """And the products. The gradients are kept on the CPU."""
        say(f"{SUITE}: {self.kind}, the exact velocities and gradient")
        device, dtype = self.options.device, self.work.model.dtype
        wide = exact_dtype(dtype)
        try:
            with exactly(wide):
                exact = Diffusers("R2", self.kind, self.work, wide)
                exact.reference.model.enable_gradient_checkpointing()
                self.velocities = exact.forward()
                self.flops["forward"] = GemmFloor(exact.forward, 1, device, dtype).flops
                self.flops["backward"] = GemmFloor(exact.velocities, 1, device, dtype).flops
                exact.backward()
            self.gradients = {name: gradient.to("cpu") for name, gradient in exact.gradients().items()}
        except Exception as error:
            for metric in ["gradient_relative_error", *([] if self.velocities else ["velocity_relative_error"])]:
                yield failed(SUITE, f"{self.kind}{self.work.suffix}", "exact", metric, "", error)

    def group(self, names: Sequence[str]) -> Iterator[Row]:
        """The variants `names` and ours, in turns. Ours is built last: the others need most while they are built."""
        notes: dict[str, str] = {}
        case = f"{self.kind}{{}}{self.work.suffix}"
        made = {what: Contest(SUITE, case, self.options, f"seconds_{what}", f"speedup_{what}", notes) for what in METRICS}
        first, back = made["forward"], made["backward"]
        first.peers = back.peers = OTHERS
        unable: dict[str, Exception] = {}
        for name in (*names, "ours"):
            for row in first.build(name, partial(VARIANTS[name], self.kind, self.work), partial(self.check, name, unable)):
                yield row
                if row.metric == first.seconds:  # it was not built
                    yield from back.lost(name, row.note)
            if name in unable:
                yield failed(SUITE, first.place(), name, "gradient_relative_error", "", unable[name])
        for what, contest in made.items():
            calls = {name: partial(once, one, what) for name, one in first.alive.items()}
            if calls:
                yield from contest.time(calls, partial(self.speeds, contest, what))

    def check(self, name: str, unable: dict[str, Exception], one: Any) -> dict[str, tuple[float, str]]:
        """Runs both, and compares what they give with the exact ones."""
        note, found = exact_note(self.work.model.dtype), {}
        velocities = one.forward()
        if self.velocities is not None:
            wrong = max(relative(v, true) for v, true in zip(velocities, self.velocities, strict=True))
            found["velocity_relative_error"] = (wrong, note)
        try:
            one.backward()
            if gradients := self.gradients and one.gradients():
                found["gradient_relative_error"] = (compare(gradients, self.gradients)[1], note)
        except Exception as error:
            unable[name] = error
        one.clear()
        return found

    def speeds(self, contest: Contest, what: str, found: Seconds) -> Iterator[Row]:
        amounts: dict[str, tuple[str, float]] = {"tokens_per_second": ("1/s", self.tokens)} if what == "forward" else {}
        if what in self.flops:
            flops, end = self.flops[what], METRICS[what]
            ceiling = ceilings(self.options.device, self.work.model.dtype, self.options.quick).flops_per_second
            amounts |= {f"flops_per_second{end}": ("FLOP/s", flops), f"ceiling_share{end}": ("", flops / ceiling)}
        yield from contest.speeds(found, amounts)


def once(one: Any, what: str) -> None:
    """The gradients are dropped at once: the next variant has the memory."""
    getattr(one, what)()
    one.clear()
