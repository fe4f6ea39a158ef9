"""Suite `cost`: what one full-size training step launches, moves, keeps and multiplies, counted on the meta device.

Z-Image-Turbo at its full size in bf16, 1024x1024 pixels (latent 16 x 128 x 128), batch 1, text 256 and teacher 768 tokens,
K = 4 states, LoRA r64 alpha 128 and full fine-tuning, activations kept (no recomputation). `R1` is the published step,
references/reference_eager.py; `ours` the pair forward under the D-OPSD objective, with the engine's own clipping, AdamW,
EMA and teacher refresh, one process, DeepSpeed itself left out. How a kernel is counted: meta_trace.py.

    launches_per_step                           kernels and GEMMs, the optimizer's too; R1 as published, with checkpointing
    elementwise_bytes_per_token_block_forward   per token processed (student and teacher) and main block
    elementwise_bytes_per_token_block_backward  per student token and main block; without recomputation, and without
                                                what adds a parameter's gradient to its `.grad`
    accumulation_bytes_per_token_block          that, also per student token and main block (R1: of one state, so 0)
    saved_bytes_per_token_block                 per student token and main block, parameters left out
    gemm_tflop_per_step                         GEMMs and attention's products; R1 with what it recomputes

A main block is one of the 30 `layers`. Ours closes a block's last residual sum in the next block or in the final part;
that last one counts as a block's, too. The counts are the same on every machine: --model and --device change nothing. What
must not become more is in bench/baseline.json.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.live import say
from bench.models import building
from bench.references.reference_eager import Adapter, Condition, ReferenceStep
from bench.results import Options, Row, failed
from bench.suites.meta_trace import Trace
from dopsd_fast.distributed.plain_engine import PlainEngine
from dopsd_fast.distributed.process_group import Ranks
from dopsd_fast.families.published import published_family
from dopsd_fast.memory.activations import meta_pair
from dopsd_fast.method.dopsd import DOPSD
from dopsd_fast.method.objective import StepInputs
from dopsd_fast.settings.schema import ConditioningSettings, Settings

GRID = [0.0, 0.1, 0.25, 0.5, 1.0]  # K = 4, shift 3
LATENT = (1, 16, 128, 128)
IMAGE_TOKENS, TEXT, TEACHER_TEXT, TEXT_WIDTH = 64 * 64, 256, 768, 2560
STUDENT_TOKENS, TEACHER_TOKENS = IMAGE_TOKENS + TEXT, IMAGE_TOKENS + TEACHER_TEXT
RANK, ALPHA = 64, 128.0

TARGETS = {
    "launches_per_step": 8000,
    "elementwise_bytes_per_token_block_forward": 230e3,
    "elementwise_bytes_per_token_block_backward": 600e3,
    "saved_bytes_per_token_block": 130e3,
}
"""What ours must not exceed."""
FLOOR_TFLOP = {"lora": 811.0, "full": 987.0}
"""Of a step without recomputation, batch 1 at 1024x1024: what ours must come within 5 % of."""


def measure(options: Options) -> Iterator[Row]:
    """Rows as they are found."""
    size = Size(layers=2, states=2) if options.quick else Size()
    for kind in options.kinds:
        say(f"cost: {kind}, ours")
        yield from ours(kind, size)
        say(f"cost: {kind}, R1")
        yield from _rows(kind, "R1", partial(reference_metrics, kind, size))


def ours(kind: str, size: Size) -> list[Row]:
    return _rows(kind, "ours", lambda: metrics(trace_ours(kind, size), size))


def _rows(case: str, variant: str, measured: Callable[[], list[tuple[str, float, str]]]) -> list[Row]:
    try:
        return [Row("cost", case, variant, *value) for value in measured()]
    except Exception as error:
        return [failed("cost", case, variant, "launches_per_step", "", error)]


@dataclass(frozen=True)
class Size:
    """Only depth and K can be less than full: everything counted here is proportional to them or an average over them."""

    layers: int = 30
    states: int = 4

    @property
    def grid(self) -> list[float]:
        return [*GRID[: self.states], 1.0]


# ---- the two programs ------------------------------------------------------------------------------------------------


def zimage(size: Size) -> Any:
    family = published_family("zimage", ConditioningSettings())
    family.transformer_config = family.transformer_config | {"n_layers": size.layers}
    return family


def text(tokens: int) -> Tensor:
    return torch.empty(tokens, TEXT_WIDTH, device="meta", dtype=torch.bfloat16)


def reference(kind: str, size: Size, checkpointing: bool) -> ReferenceStep:
    adapter = Adapter(RANK, ALPHA) if kind == "lora" else None
    model = torch.nn.Module.to(zimage(size).meta_transformer(), torch.bfloat16)
    with building("meta", torch.bfloat16):
        # The released code averages in the training dtype.
        step = ReferenceStep(model, [1.0 - t for t in size.grid], adapter=adapter, ema_dtype=None,
                             gradient_checkpointing=checkpointing)
    for group in step.optimizer.param_groups:
        group["foreach"] = True  # what AdamW chooses on a GPU
    return step


def trace_reference(kind: str, size: Size, checkpointing: bool) -> Trace:
    step, trace = reference(kind, size, checkpointing), Trace()
    for model in [step.model] if step.teacher is None else [step.model, step.teacher]:
        trace.watch(model, "model")
        trace.watch(model.layers, "block")
    noise = torch.empty(LATENT, device="meta", dtype=torch.bfloat16)
    with trace:
        step.step(noise, [Condition(text(TEXT))], [Condition(text(TEACHER_TEXT))])
    return trace


def trace_ours(kind: str, size: Size) -> Trace:
    adapter = {"kind": kind} | ({"rank": RANK, "alpha": ALPHA} if kind == "lora" else {})
    settings = Settings.model_validate({"adapter": adapter, "train": {"precision": "bf16"}})
    pair, trace = meta_pair(zimage(size), settings), Trace()
    engine = PlainEngine(pair, settings.train, settings.teacher, Ranks(0, 1, 0, torch.device("meta")))
    trace.ignore(pair)
    fused: Any = pair.fused
    for modules, region in ((fused, "model"), (fused.layers, "block"), (fused.exit, "exit")):
        trace.watch(modules, region)
    noise = torch.empty(LATENT, device="meta")
    with trace:
        forward = pair.open([{"text": text(TEXT)}], [{"text": text(TEACHER_TEXT)}], noise.shape)
        DOPSD("x1").accumulate(StepInputs(noise, size.grid, forward), engine.backward)
        engine.step(1e-4)
    return trace


# ---- what to say about them ------------------------------------------------------------------------------------------


def metrics(trace: Trace, size: Size) -> list[tuple[str, float, str]]:
    """(metric, value, unit) of a traced step."""
    blocks = size.layers * size.states

    def moved(phase: str) -> float:
        closing = trace.cost("exit", phase, "gated_residual_norm").elementwise_bytes
        return (trace.cost("block", phase).elementwise_bytes + closing) / blocks

    total = trace.cost()
    forward = moved("student forward") + moved("teacher forward")
    return [
        ("launches_per_step", float(total.launches), ""),
        ("elementwise_bytes_per_token_block_forward", forward / (STUDENT_TOKENS + TEACHER_TOKENS), "B"),
        ("elementwise_bytes_per_token_block_backward", moved("backward") / STUDENT_TOKENS, "B"),
        ("accumulation_bytes_per_token_block", moved("accumulate") / STUDENT_TOKENS, "B"),
        ("saved_bytes_per_token_block", trace.saved["block"] / blocks / STUDENT_TOKENS, "B"),
        ("gemm_tflop_per_step", total.flops / 1e12, "TFLOP"),
        ("gemms_per_step", float(total.gemms), ""),
        ("launches_outside_model", float(trace.cost("", "other").launches), ""),
    ]


def reference_metrics(kind: str, size: Size) -> list[tuple[str, float, str]]:
    """Of the published step; what recomputation would distort is from one state without it."""
    one = Size(size.layers, 1)
    kept = {name: value for name, value, _ in metrics(trace_reference(kind, one, checkpointing=False), one)}
    same = {name for name in kept if name.startswith(("elementwise", "saved"))}
    whole = metrics(trace_reference(kind, size, checkpointing=True), size)
    return [(name, kept[name] if name in same else value, unit) for name, value, unit in whole]
