"""Suite `step`: a whole training step, ours against the published one and its stronger variants, in one process.

Same weights, noise, prompts and pictures for all; every step holds the K states, clipping, AdamW, the EMA and the
teacher's refresh. R1 runs its encoders in every step, the others have the conditions computed once. `floor` is the
step's matrix products alone, `encoders` the share of R1 that conditioning takes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.cases.gemm_floor import GemmFloor
from bench.peers.float64 import wide
from bench.peers.reference_eager import (
    STRONGER,
    Adapter,
    Condition,
    ReferenceEncoders,
    ReferenceStep,
    predict_noise_direction,
)
from bench.results import Options, Row, interleaved, ratios, summary
from dopsd_fast.errors import UserError
from dopsd_fast.families import Context, Family, open_family
from dopsd_fast.images import load_image
from dopsd_fast.objective import StepInputs, make_objective
from dopsd_fast.records import read_records
from dopsd_fast.settings import DataSettings, Settings

STATES, BATCH, PIXELS = 4, 8, 32
TEXT_TOKENS, TEACHER_TOKENS = 20, 80
NANO_LORA = {"rank": 16, "alpha": 32.0}  # as in recipes/nano_lora.toml
LORA = {"rank": 64, "alpha": 128.0}  # as published
LEARNING_RATE, GRAD_CLIP, EMA_DECAY = 1e-5, 1.0, 0.9999


def run(options: Options) -> list[Row]:
    work = Workload(options)
    rows = []
    for kind in options.kinds:
        rows += measure(kind, work, options)
    return rows


class Workload:
    """The batch that every variant steps on, and what it is made of."""

    def __init__(self, options: Options) -> None:
        torch.set_num_threads(options.threads)
        self.options = options
        standard = options.model == Settings().model.folder
        self.suffix = "" if standard else f"@{options.model.name}"
        self.lora = NANO_LORA if standard else LORA
        self.family: Family = open_family(options.model, Settings().conditioning)
        if self.family.name != "zimage":
            raise UserError(f"step: {options.model} is {self.family.name}, the published step is written for zimage pipelines")
        self.shape = self.family.latent_shape(PIXELS, PIXELS)
        self.grid = self.family.train_grid(STATES, 0.0, self.shape)
        data = read_records(DataSettings(resolution=PIXELS), self.family.pixel_multiple)
        records = data.records[:BATCH]
        self.prompts = [next(iter(record.prompts.values())) for record in records]
        self.images = [load_image(record.images[0], PIXELS, PIXELS) for record in records]
        noise = torch.randn((BATCH, *self.shape), generator=torch.Generator().manual_seed(0))
        self.noise = noise.to(options.device)
        self.encoders = FixedLength(options)
        self.student = self.encoders.student(self.prompts)
        self.teacher = self.encoders.teacher(self.prompts, self.images)

    def contexts(self, conditions: list[Condition]) -> list[Context]:
        return [{"text": condition.text} for condition in conditions]


class FixedLength(ReferenceEncoders):
    """The real encoders on the real prompts and pictures, their features cut or repeated to TEXT_TOKENS and
    TEACHER_TOKENS: the transformer's work is the standard configuration's whatever the prompts' lengths are."""

    def __init__(self, options: Options) -> None:
        super().__init__(options.model, device=options.device)

    def student(self, *args: Any, **kwargs: Any) -> list[Condition]:
        return [Condition(to_length(c.text, TEXT_TOKENS)) for c in super().student(*args, **kwargs)]

    def teacher(self, *args: Any, **kwargs: Any) -> list[Condition]:
        return [Condition(to_length(c.text, TEACHER_TOKENS)) for c in super().teacher(*args, **kwargs)]


def to_length(text: Tensor, length: int) -> Tensor:
    return text.repeat(-(-length // len(text)), 1)[:length].contiguous()


# ---- the steps -------------------------------------------------------------------------------------------------------


class OurStep:
    """Pair, objective and engine as the trainer runs them (ZeRO 0, one process)."""

    def __init__(self, kind: str, work: Workload) -> None:
        from dopsd_fast.sharding import Engine
        from dopsd_fast.teacher import build_pair

        settings = Settings.model_validate({
            "model": {"path": str(work.options.model)},
            "train": {"batch_size": BATCH, "learning_rate": LEARNING_RATE, "grad_clip": GRAD_CLIP},
            "method": {"num_states": STATES},
            "teacher": {"ema_decay": EMA_DECAY},
            "adapter": {"kind": kind, **work.lora},
            "deepspeed": {"stage": 0},
        })  # fmt: skip
        self.pair = build_pair(work.family, settings, torch.float32).to(work.options.device)
        self.objective = make_objective(settings)
        self.engine = Engine(self.pair, settings)
        self.work = work

    def backward(self) -> None:
        work = self.work
        with self.engine.accumulating():
            student, teacher = work.contexts(work.student), work.contexts(work.teacher)
            forward = self.pair.open(work.family, student, teacher, work.noise.shape)
            inputs = StepInputs(noise=work.noise, grid=work.grid, forward=forward)
            self.report = self.objective.accumulate(inputs, self.engine.backward)

    def step(self) -> None:
        self.backward()
        self.engine.any(False)
        self.engine.step(LEARNING_RATE)
        self.engine.mean([self.report.loss, self.report.gap, *self.report.state_losses])

    def parameters(self) -> dict[str, Tensor]:
        return {trained.name: trained.student for trained in self.pair.trained()}


def peer(name: str, kind: str, work: Workload, start: dict[str, Tensor], dtype=torch.float32) -> ReferenceStep:
    """Peer R1 ... R4 with the trained tensors `start`; the teacher begins as the student."""
    model = work.family.load_transformer(dtype).to(work.options.device)
    step = ReferenceStep(
        model,
        [1.0 - t for t in work.grid],
        weight="v",
        adapter=Adapter(int(work.lora["rank"]), work.lora["alpha"]) if kind == "lora" else None,
        learning_rate=LEARNING_RATE,
        grad_clip=GRAD_CLIP,
        ema_decay=EMA_DECAY,
        encoders=work.encoders,
        **STRONGER[name],
    )
    with torch.no_grad():
        for full, parameter in step.trainable.items():
            parameter.copy_(start[stock_name(full)])
    step.copy_student_to_teacher()
    for full, average in step.ema.items():
        average.copy_(step.teacher_weights[full])
    return step


def stock_name(name: str) -> str:
    """PEFT's `...lora_A.student.weight` -> `...lora_A.weight`, as our pair names it."""
    return name.replace(".student.", ".")


def runner(name: str, step: ReferenceStep, work: Workload) -> Callable[[], Any]:
    if name == "R1":
        return lambda: step.step_from_inputs(work.noise, work.prompts, work.images)
    return lambda: step.step(work.noise, work.student, work.teacher)


# ---- the measurement -------------------------------------------------------------------------------------------------


def measure(kind: str, work: Workload, options: Options) -> list[Row]:
    """Rows of one kind, "lora" or "full"."""
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = 64  # one graph per length, branch and mode; all blocks share the code
    ours = OurStep(kind, work)
    start = {name: parameter.detach().clone() for name, parameter in ours.parameters().items()}
    exact = exact_gradient(kind, work, start)
    calls: dict[str, Callable[[], Any]] = {"ours": ours.step}
    ours.backward()
    errors = {"ours": compare({name: p.grad for name, p in ours.parameters().items() if p.grad is not None}, exact)}
    ours.step()
    for name in options.peers:
        step = peer(name, kind, work, start)
        if STRONGER[name].get("compile_blocks"):
            print(f"step: compiling {name} ({kind}), which can take minutes", file=sys.stderr)
        try:
            step.backward(work.noise, work.student, work.teacher)
        except Exception as error:
            if not STRONGER[name].get("compile_blocks"):
                raise
            print(f"step: {name} ({kind}) is left out, torch.compile failed: {one_line(error)}", file=sys.stderr)
            continue
        errors[name] = compare({stock_name(full): gradient for full, gradient in step.gradients().items()}, exact)
        calls[name] = runner(name, step, work)
    calls["encoders"] = lambda: (work.encoders.student(work.prompts), work.encoders.teacher(work.prompts, work.images))
    gemms = floor(kind, work, start)
    calls["floor"] = gemms.run
    rounds, warmup = (2, 1) if options.quick else (options.rounds or 30, 5)
    seconds = interleaved(calls, rounds, warmup, options.device, options.clock)
    case = kind + "{peer}" + work.suffix
    flops = Row("step", case.format(peer=""), "floor", "gemm_gflop_per_step", gemms.flops / 1e9, "GFLOP")
    return [*tabulate(case, seconds, errors), flops]


def one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def exact_gradient(kind: str, work: Workload, start: dict[str, Tensor]) -> dict[str, Tensor]:
    """The published step's gradient in float64."""
    with wide(torch.float64):
        step = peer("R2", kind, work, start, torch.float64)
        step.backward(work.noise.double(), work.student, work.teacher)
    return {stock_name(name): gradient for name, gradient in step.gradients().items()}


def compare(gradients: dict[str, Tensor], exact: dict[str, Tensor]) -> tuple[float, float]:
    """(1 - cosine, relative error) of the whole gradient against float64."""
    dot = squares = exact_squares = difference = 0.0
    for name, true in exact.items():
        value = gradients[name].double()
        dot += (value * true).sum().item()
        squares += value.square().sum().item()
        exact_squares += true.square().sum().item()
        difference += (value - true).square().sum().item()
    return 1.0 - dot / (squares * exact_squares) ** 0.5, (difference / exact_squares) ** 0.5


def floor(kind: str, work: Workload, start: dict[str, Tensor]) -> GemmFloor:
    step = peer("R2", kind, work, start)

    def forward() -> None:
        predict_noise_direction(step.model, work.noise, step.sigmas[1], work.student)
        step.teacher_prediction(work.noise, step.sigmas[1], work.teacher)

    return GemmFloor(forward, STATES, work.options.device)


def tabulate(case: str, seconds: dict[str, list[float]], errors: dict[str, tuple[float, float]]) -> list[Row]:
    """`case` holds "{peer}", which stands for "/R1" and so on in the rows of a ratio."""
    plain, rows = case.format(peer=""), []
    for name, values in seconds.items():
        rows.append(Row("step", plain, name, "seconds_per_step", unit="s", **summary(values)))
        if name in errors:
            flaw, error = errors[name]
            rows.append(Row("step", plain, name, "gradient_one_minus_cosine", flaw, ""))
            rows.append(Row("step", plain, name, "gradient_relative_error", error, ""))
    for name in [name for name in seconds if name in errors and name != "ours"]:
        values = ratios(seconds[name], seconds["ours"])
        rows.append(Row("step", case.format(peer=f"/{name}"), "ours", "speedup", unit="x", **summary(values)))
    for name, against in (("floor", "ours"), ("encoders", "R1")):
        if against in seconds:
            share = ratios(seconds[name], seconds[against])
            rows.append(Row("step", plain, against, f"{name}_share", unit="", **summary(share)))
    return rows
