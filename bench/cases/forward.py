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
    each            flops_per_second, ceiling_share, and with _backward: the products' (bench/cases/gemm_floor.py), over the
                    seconds; their share of a large product's speed in this run
    each            velocity_relative_error, gradient_relative_error: of both velocities and the whole gradient, against float64
                    (for bf16 models against fp32 without TF32)
    CASE/VARIANT    ours: speedup_forward, speedup_backward, the variant's seconds over ours, round by round

On a GPU each variant is measured in turns with ours alone, since not all fit together, else all together.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.cases.gemm_floor import GemmFloor
from bench.cases.rollout import OurPair, apart
from bench.cases.step import compare, compiled_in_part, exactly
from bench.cases.workload import Cell, Workload, peer, stock_name
from bench.clock import interleaved, ratios, summary
from bench.machine import ceilings
from bench.models import Model
from bench.results import Options, Row, Status, failed
from bench.show import step as say
from dopsd_fast.pair.student_teacher import TEACHER

SUITE = "forward"
OTHERS = ("two_calls", "diffusers", "compiled")
METRICS = {"forward": "", "backward": "_backward"}
"""What is timed, and what the names of its speeds end in."""
STATE = 1
"""The state of the standard trajectory whose time is taken."""
Velocities = tuple[Tensor, Tensor]
"""(v_s, v_t) `[B, C, h, w]`."""


def run(options: Options) -> list[Row]:
    return list(measure(options))


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


class Ours(OurPair):
    """Packed."""

    def velocities(self) -> tuple[Velocities, Callable[[], None]]:
        """Both, and what is to be done after the backward pass of v_s."""
        work = self.work
        forward = self.pair.open(work.contexts(work.student), work.contexts(work.teacher), work.noise.shape)
        v_s, v_t = forward(work.noise, self.time())
        assert v_t is not None
        return (v_s, v_t), lambda: forward.finish(torch.Tensor.backward)

    def time(self) -> Tensor:
        return self.work.noise.new_full((self.work.batch,), self.work.grid[STATE])

    def forward(self) -> Velocities:
        with torch.no_grad():
            return self.velocities()[0]

    def backward(self) -> None:  # type: ignore[override]
        """Gradients of the mean of (v_s - v_t)^2."""
        self.clear()
        (v_s, v_t), finish = self.velocities()
        (v_s - v_t).square().mean().backward()
        finish()


class TwoCalls(Ours):
    def velocities(self) -> tuple[Velocities, Callable[[], None]]:
        work, shape = self.work, self.work.noise.shape
        v_t = self.pair.sampler(TEACHER, work.contexts(work.teacher), shape)(work.noise, self.time())
        forward = self.pair.open(work.contexts(work.student), [], shape)
        return (forward(work.noise, self.time())[0], v_t), lambda: forward.finish(torch.Tensor.backward)


class Diffusers:
    """`name`: the peer whose model it is."""

    def __init__(self, name: str, kind: str, work: Workload, dtype: torch.dtype | None = None) -> None:
        self.work, self.compiled = work, name == "R4"
        self.noise = work.noise if dtype is None else work.noise.to(dtype)
        self.reference = apart(kind, work, peer(name, kind, work, dtype))
        self.reference.model.disable_gradient_checkpointing()

    def velocities(self) -> Velocities:
        step, sigma = self.reference, 1.0 - self.work.grid[STATE]
        v_t = -step.teacher_prediction(self.noise, sigma, self.work.teacher)
        return -step.student_prediction(self.noise, sigma, self.work.student), v_t

    def forward(self) -> Velocities:
        with torch.no_grad():
            return self.velocities()

    def backward(self) -> None:
        self.clear()
        v_s, v_t = self.velocities()
        (v_s - v_t).square().mean().backward()

    def gradients(self) -> dict[str, Tensor]:
        return {stock_name(name): p.grad for name, p in self.reference.trainable.items() if p.grad is not None}

    def clear(self) -> None:
        for parameter in self.reference.trainable.values():
            parameter.grad = None

    def fell_back(self) -> str:
        return compiled_in_part() if self.compiled else ""


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
        torch.set_num_threads(options.threads)
        self.kind, self.options = kind, options
        self.one_by_one = options.device.type == "cuda"
        self.work = Workload(options, cell or Cell())
        self.work.forget_encoders()
        self.velocities: Velocities | None = None
        self.gradients: dict[str, Tensor] = {}
        self.exact_note = ""
        self.flops: dict[str, int] = {}
        self.notes: dict[str, str] = {}
        self.told: set[tuple[str, str, str]] = set()

    def case(self, name: str = "") -> str:
        return f"{self.kind}{name and '/' + name}{self.work.suffix}"

    @property
    def tokens(self) -> int:
        work = self.work
        standard, side = work.model.standard, work.pixels // work.family.pixel_multiple
        return work.batch * (2 * side**2 + standard.text_tokens + standard.teacher_tokens)

    def rows(self) -> Iterator[Row]:
        torch._dynamo.reset()
        torch._dynamo.config.recompile_limit = 64  # one graph per length, branch and mode; all blocks share the code
        found = [*self.find_exact()]
        for names in [[name] for name in OTHERS] if self.one_by_one else [OTHERS]:
            found += self.group(names)
            self.free()
        for row in found:  # ours, which runs beside each on a GPU, as first measured
            key = row.case, row.variant, row.metric
            if key not in self.told:
                self.told.add(key)
                yield row

    def find_exact(self) -> Iterator[Row]:
        """And the products. The gradients are kept on the CPU."""
        wide = torch.float64 if self.work.model.dtype == torch.float32 else torch.float32
        self.exact_note = "" if wide == torch.float64 else "against fp32 without TF32"
        say(f"{SUITE}: {self.case()}, the exact velocities and gradient")
        device, dtype = self.options.device, self.work.model.dtype
        exact: Any = None
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
                yield failed(SUITE, self.case(), "exact", metric, "", error)
        exact = None
        self.free()

    def group(self, names: Sequence[str]) -> Iterator[Row]:
        """The variants `names` and ours, in turns. Ours is built last: the others need most while they are built."""
        alive: dict[str, Any] = {}
        for name in (*names, "ours"):
            yield from self.build(name, alive)
        seconds: dict[str, dict[str, list[float]]] = {}
        for what in METRICS:
            yield from self.time(what, alive, seconds)

    def build(self, name: str, alive: dict[str, Any]) -> Iterator[Row]:
        """Puts a variant into `alive`, and says how exact it was; or why it could not be."""
        say(f"{SUITE}: {self.case()}, {'compiling' if name == 'compiled' else 'building'} {name}")
        try:
            torch._dynamo.utils.counters.clear()
            one = VARIANTS[name](self.kind, self.work)
            velocities = one.forward()
        except Exception as error:
            for what in METRICS:
                yield from self.lost(name, what, error)
            return
        alive[name] = one
        try:
            one.backward()
            gradients = one.gradients()
        except Exception as error:
            gradients = {}
            yield failed(SUITE, self.case(), name, "gradient_relative_error", "", error)
        self.notes[name] = one.fell_back()
        if self.velocities is not None:
            wrong = max(relative(v, true) for v, true in zip(velocities, self.velocities, strict=True))
            yield self.row(self.case(), name, "velocity_relative_error", "", [wrong], self.exact_note)
        if gradients and self.gradients:
            wrong = compare(gradients, self.gradients)[1]
            yield self.row(self.case(), name, "gradient_relative_error", "", [wrong], self.exact_note)
        one.clear()

    def time(self, what: str, alive: Mapping[str, Any], seconds: dict[str, dict[str, list[float]]]) -> Iterator[Row]:
        """What fails alone is left out; a failure of the rounds is a failure of all."""
        options, calls = self.options, {}
        say(f"{SUITE}: {self.case()}, timing {what} of {', '.join(alive)}")
        for name, one in alive.items():
            try:
                getattr(one, what)()
                calls[name] = partial(self.once, one, what)
            except Exception as error:
                yield from self.lost(name, what, error)
            one.clear()
        if not calls:
            return
        rounds, warmup = options.repeats(20, 5), 0 if options.quick or options.tour else 2
        try:
            found = interleaved(calls, rounds, warmup, options.device, options.clock)
        except Exception as error:
            for name in calls:
                yield from self.lost(name, what, error)
            return
        for name, values in found.items():
            yield from self.speeds(name, what, values)
            if name != "ours" and "ours" in found:
                yield self.row(self.case(name), "ours", f"speedup_{what}", "x", ratios(values, found["ours"]), self.notes[name])

    def once(self, one: Any, what: str) -> None:
        """The gradients are dropped at once: the next variant has the memory."""
        getattr(one, what)()
        one.clear()

    def speeds(self, name: str, what: str, seconds: Sequence[float]) -> Iterator[Row]:
        yield self.row(self.case(), name, f"seconds_{what}", "s", seconds)
        if what == "forward":
            yield self.row(self.case(), name, "tokens_per_second", "1/s", [self.tokens / s for s in seconds])
        if what in self.flops:
            rates = [self.flops[what] / s for s in seconds]
            ceiling = ceilings(self.options.device, self.work.model.dtype, self.options.quick).flops_per_second
            yield self.row(self.case(), name, f"flops_per_second{METRICS[what]}", "FLOP/s", rates)
            yield self.row(self.case(), name, f"ceiling_share{METRICS[what]}", "", [rate / ceiling for rate in rates])

    def lost(self, name: str, what: str, error: BaseException) -> Iterator[Row]:
        yield failed(SUITE, self.case(), name, f"seconds_{what}", "s", error)
        if name != "ours":
            yield failed(SUITE, self.case(name), "ours", f"speedup_{what}", "x", error)

    def row(self, case: str, name: str, metric: str, unit: str, values: Sequence[float], remark: str = "") -> Row:
        fell = self.notes.get(name, "")
        note = "; ".join(dict.fromkeys(filter(None, (fell, remark))))
        status: Status = "fallback" if fell else "ok"
        if not all(map(math.isfinite, values)):
            return failed(SUITE, case, name, metric, unit, "; ".join(filter(None, ("not finite", note))))
        return Row(SUITE, case, name, metric, unit=unit, status=status, note=note, **summary(values))

    def free(self) -> None:
        gc.collect()
        if self.options.device.type == "cuda":
            torch.cuda.empty_cache()


def relative(value: Tensor, true: Tensor) -> float:
    return float((value.double() - true.double()).norm() / true.double().norm())
