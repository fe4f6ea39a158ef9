"""Suite `correctness`: are the numbers right on this machine? For bench/full_size.py; the other suites have their errors too.

Rows, variants "ours" and "eager", the same dtype for both; OP is an op of dopsd_kernels at a sixteenth of the standard tokens:

    OP                each    result_relative_error, gradient_relative_error: against float64, the worst of all tensors
    lora, full        each    student_velocity_relative_error, teacher_...: of the pair forward, two layers deep, packed;
                              eager is diffusers' forward; against that in fp32, for a model in fp32 in float64
    all but fp8       ours    error_over_eager: ours over eager's worst error; this project's rule is at most 2
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from bench.cases import ops, roofline
from bench.cases.step import exactly
from bench.cases.workload import Cell, OurStep, Workload, peer
from bench.models import Model
from bench.results import Options, Row, failed
from bench.show import step as say

SUITE = "correctness"
RULE = 2.0
"""Our error may be this many times eager's (against an exact reference, same dtype)."""
LAYERS = 2


def run(options: Options) -> list[Row]:
    return list(measure(options))


def measure(options: Options) -> Iterator[Row]:
    torch.set_num_threads(options.threads)
    model = Model(options.model, options.device)
    size = ops.Size.of(model)
    size = replace(size, length=_short(size.length), teacher_length=_short(size.teacher_length), latents=(4, *size.latents[1:]))
    for name, build in ops.OPS.items():
        say(f"correctness: {name}")
        try:
            torch.manual_seed(0)
            op = build(ops.Draw(size, options.device, model.dtype))
            exact = roofline.outcome(op.eager, op.to(torch.float64).tensors)
            found = {variant: roofline.relative_errors(roofline.outcome(function, op.tensors), exact)
                     for variant, function in (("ours", op.ours), ("eager", op.eager))}  # fmt: skip
            status, note = roofline.ran(op, options.device)
            yield from tabulate(f"{name}{model.suffix}", found, status, note)
        except Exception as error:
            yield failed(SUITE, f"{name}{model.suffix}", "ours", "result_relative_error", "", error)
    for kind in options.kinds:
        say(f"correctness: pair forward, {kind}")
        try:
            found, note = velocities(kind, options)
            yield from tabulate(f"{kind}{model.suffix}", found, "fallback" if note else "ok", note)
        except Exception as error:
            yield failed(SUITE, f"{kind}{model.suffix}", "ours", "student_velocity_relative_error", "", error)
        gc.collect()
        if options.device.type == "cuda":
            torch.cuda.empty_cache()


def _short(length: int) -> int:
    return max(33, length // 16 + 1)  # no multiple of a power of two


def velocities(kind: str, options: Options) -> tuple[dict[str, dict[str, float]], str]:
    """Errors of each variant by metric; what ours fell back to."""
    work = Workload(options, Cell(layers=LAYERS) if Model(options.model, options.device).random else Cell())
    work.forget_encoders()
    time = work.grid[1]
    wide = torch.float64 if work.model.dtype == torch.float32 else torch.float32
    results: dict[str, tuple[Tensor, ...]] = {}
    for variant, dtype in (("exact", wide), ("eager", None)):
        with exactly(dtype or work.model.dtype), torch.no_grad():
            step = peer("R2", kind, work, dtype)
            noise = work.noise.to(wide) if dtype else work.noise
            student = step.student_prediction(noise, 1.0 - time, work.student)
            results[variant] = (-student, -step.teacher_prediction(noise, 1.0 - time, work.teacher))
        del step
    ours = OurStep(kind, work)
    with torch.no_grad():
        forward = ours.pair.open(work.contexts(work.student), work.contexts(work.teacher), work.noise.shape)
        v_s, v_t = forward(work.noise, work.noise.new_full((work.batch,), time))
        assert v_t is not None
        results["ours"] = (v_s, v_t)
    names = ("student_velocity_relative_error", "teacher_velocity_relative_error")
    errors = {
        variant: {name: float((v.double() - exact.double()).norm() / exact.double().norm())
                  for name, v, exact in zip(names, results[variant], results["exact"], strict=True)}
        for variant in ("ours", "eager")
    }  # fmt: skip
    note = ours.fell_back()
    ours.close()
    return errors, note


def tabulate(case: str, found: dict[str, dict[str, float]], status: roofline.Status, note: str) -> Iterator[Row]:
    for variant, errors in found.items():
        for metric, value in errors.items():
            if value == value and value != float("inf"):
                fell = status if variant == "ours" else "ok"
                yield Row(SUITE, case, variant, metric, value, "", status=fell, note=note if variant == "ours" else "")
            else:
                yield failed(SUITE, case, variant, metric, "", "not finite")
    if case.startswith("fp8"):  # it changes the numbers on purpose
        return
    ours, eager = (max(found[variant].values()) for variant in ("ours", "eager"))
    if 0 < eager < float("inf") and ours == ours and ours < float("inf"):
        word = "" if ours <= RULE * eager else f"above the rule of {RULE:.0f}"
        yield Row(SUITE, case, "ours", "error_over_eager", ours / eager, "", note=word)
