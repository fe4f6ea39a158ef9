"""Suite `cost`: what one full-size training step launches, moves, keeps and multiplies, counted on the meta device.

Z-Image-Turbo at its full size in bf16, 1024x1024 pixels (latent 16 x 128 x 128), batch 1, text 256 and teacher 768 tokens,
K = 4 states, LoRA r64 alpha 128 and full fine-tuning, activations kept (no recomputation). `R1` is the published step,
bench/peers/reference_eager.py; `ours` the pair forward under the D-OPSD objective, with the engine's own clipping, AdamW,
EMA and teacher refresh, one process, DeepSpeed itself left out. How a kernel is counted: meta_trace.py.

    launches_per_step                           kernels and GEMMs, optimizer included, encoders not; R1 as published,
                                                so with gradient checkpointing
    elementwise_bytes_per_token_block_forward   per token processed (student and teacher) and main block
    elementwise_bytes_per_token_block_backward  per student token and main block; without recomputation, and without
                                                what adds a parameter's gradient to its `.grad`
    accumulation_bytes_per_token_block          that, also per student token and main block (R1: of one state, so 0)
    saved_bytes_per_token_block                 per student token and main block, parameters left out
    gemm_tflop_per_step                         GEMMs and attention's products; R1 with what it recomputes

A main block is one of the 30 `layers`. Ours closes a block's last residual sum in the next block or in the final part;
that last one counts as a block's, too.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from bench.cases.meta_trace import Trace
from bench.peers.reference_eager import ZIMAGE_TARGETS, Adapter, Condition, ReferenceStep
from bench.results import Options, Row

GRID = [0.0, 0.1, 0.25, 0.5, 1.0]  # K = 4, shift 3
LATENT = (1, 16, 128, 128)
IMAGE_TOKENS, TEXT, TEACHER_TEXT, TEXT_WIDTH = 64 * 64, 256, 768, 2560
STUDENT_TOKENS, TEACHER_TOKENS = IMAGE_TOKENS + TEXT, IMAGE_TOKENS + TEACHER_TEXT
RANK, ALPHA = 64, 128.0

FLOOR_TFLOP = {"lora": 811.0, "full": 987.0}
"""Of a step without recomputation, batch 1 at 1024x1024."""


@dataclass(frozen=True)
class Target:
    """`reference`: measured before this suite existed. Lower is better."""

    metric: str
    unit: str
    solid: float
    moonshot: float
    reference: float


TARGETS = (
    Target("launches_per_step", "", 8000, 5000, 64000),
    Target("elementwise_bytes_per_token_block_forward", "B", 230e3, 170e3, 1546e3),
    Target("elementwise_bytes_per_token_block_backward", "B", 600e3, 400e3, 2768e3),
    Target("saved_bytes_per_token_block", "B", 130e3, 105e3, 268e3),
)


def run(options: Options) -> list[Row]:
    size = Size(layers=2, states=2) if options.quick else Size()
    rows: list[Row] = []
    for kind in options.kinds:
        mine = [Row("cost", kind, "ours", *value) for value in metrics(trace_ours(kind, size), size)]
        theirs = [Row("cost", kind, "R1", *value) for value in reference_metrics(kind, size)]
        if not options.quick:
            compare(kind, mine, theirs)
        rows += mine + theirs
    if not options.quick:
        rows.append(Row("cost", "encoders", "R1", "launches_per_step", float(encoder_launches()), ""))
    return rows


@dataclass(frozen=True)
class Size:
    """Only depth and K can be less than full: everything counted here is proportional to them or an average over them."""

    layers: int = 30
    states: int = 4

    @property
    def grid(self) -> list[float]:
        return [*GRID[: self.states], 1.0]


# ---- the two programs ------------------------------------------------------------------------------------------------


@contextmanager
def on_meta(dtype: torch.dtype = torch.bfloat16) -> Iterator[None]:
    """New tensors are on the meta device; new floating ones are `dtype`."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            yield
    finally:
        torch.set_default_dtype(before)


def transformer(size: Size) -> Any:
    """Z-Image's transformer at its full width: the defaults of its class."""
    from diffusers import ZImageTransformer2DModel

    with on_meta():
        return ZImageTransformer2DModel(n_layers=size.layers).eval()


def text(tokens: int) -> Tensor:
    return torch.empty(tokens, TEXT_WIDTH, device="meta", dtype=torch.bfloat16)


def reference(kind: str, size: Size, checkpointing: bool) -> ReferenceStep:
    adapter = Adapter(RANK, ALPHA) if kind == "lora" else None
    model, sigmas = transformer(size), [1.0 - t for t in size.grid]
    with on_meta():
        # The released code averages in the training dtype.
        step = ReferenceStep(model, sigmas, adapter=adapter, ema_dtype=None, gradient_checkpointing=checkpointing)
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


def pair(kind: str, size: Size) -> Any:
    """As `dopsd_fast.teacher.build_pair` makes it."""
    from dopsd_fast.families.zimage_pair import ZImagePair
    from dopsd_fast.teacher import STUDENT, TEACHER, Pair, add_adapters

    student = transformer(size).requires_grad_(False)
    config = teacher = None
    names = {STUDENT: "", TEACHER: ""}
    if kind == "lora":
        names = {STUDENT: STUDENT, TEACHER: TEACHER}
        with on_meta():
            config = add_adapters(student, ZIMAGE_TARGETS, RANK, ALPHA, 0, list(names))
    else:
        teacher = copy.deepcopy(student)
        student.requires_grad_(True)
    made = Pair(student, teacher, config, ZImagePair({STUDENT: student, TEACHER: teacher or student}, names))
    for parameter in made.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    return made


def engine(made: Any) -> Any:
    """The engine around `made` without DeepSpeed and its process group, as for one process and ZeRO stage 0."""
    from dopsd_fast.sharding import Engine
    from dopsd_kernels.adamw_ema import AdamWEMA

    found = Engine.__new__(Engine)
    found.pair, found.rank, found.world, found.device = made, 0, 1, torch.device("meta")
    found.stage, found._zero, found._clip, found.keeps_ema = 0, None, 1.0, True
    found.gather = found.fetcher = found.offload = None
    found._trained = made.trained()
    parameters = [trained.student for trained in found._trained]
    for parameter in parameters:
        parameter.grad_dtype = torch.float32
    found.optimizer = AdamWEMA(parameters, ema_decay=0.9999)
    found._engine = SimpleNamespace(step=found.optimizer.step)
    found._fragments = list(found._find_fragments())
    for trained in found._trained:
        found.optimizer.set_teacher(trained.student, trained.teacher)
        found.optimizer.init_state(trained.student, True)
    return found


def trace_ours(kind: str, size: Size) -> Trace:
    from dopsd_fast.objective import DOPSD, StepInputs

    made, trace = pair(kind, size), Trace()
    running = engine(made)
    trace.ignore(made)
    trace.watch(made.fused, "model")
    trace.watch(made.fused.layers, "block")
    trace.watch(made.fused.exit, "exit")
    noise = torch.empty(LATENT, device="meta")
    contexts = [{"text": text(TEXT)}], [{"text": text(TEACHER_TEXT)}]
    with trace:
        forward = made.open(None, *contexts, noise.shape)
        DOPSD("x1").accumulate(StepInputs(noise, size.grid, forward), lambda loss: loss.backward())
        running.step(1e-4)
    return trace


def encoder_launches() -> int:
    """Kernels of the two language models that R1 runs in every step (512 padded text tokens, 768 teacher tokens): Qwen3-4B
    twice. The vision tower before the second is not counted."""
    from transformers import Qwen3Config, Qwen3Model

    config = Qwen3Config(
        vocab_size=151936, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128,
    )  # fmt: skip
    with on_meta():
        model = Qwen3Model(config).eval().to("meta")
    trace = Trace()
    with trace, torch.no_grad():
        for tokens in (512, TEACHER_TEXT):
            model(input_ids=torch.empty(1, tokens, dtype=torch.int64, device="meta"), output_hidden_states=True)
    return trace.cost().launches


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
    published = metrics(trace_reference(kind, size, checkpointing=True), size)
    return [(name, kept[name] if name in same else value, unit) for name, value, unit in published]


def compare(kind: str, mine: list[Row], theirs: list[Row]) -> None:
    """Prints the table of the targets, with how far the moonshot is."""
    from rich.console import Console
    from rich.table import Table

    ours = {row.metric: row.value for row in mine}
    published = {row.metric: row.value for row in theirs}
    table = Table(title=f"a full-size step, {kind}", title_justify="left")
    for heading in ("", "R1", "ours", "R1 / ours", "solid", "moonshot", "ours / moonshot"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for target in TARGETS:
        value = ours[target.metric]
        name = target.metric.replace("elementwise_bytes_per_token_block", "bytes/token/block").replace("_", " ")
        verdict = "met" if value <= target.solid else "MISSED"
        cells = [_short(published[target.metric]), _short(value), f"{published[target.metric] / value:.1f}x"]
        cells += [f"{_short(target.solid)} {verdict}", _short(target.moonshot), f"{value / target.moonshot:.2f}"]
        table.add_row(name, *cells)
    flops, floor = ours["gemm_tflop_per_step"], FLOOR_TFLOP[kind]
    verdict = "met" if flops <= 1.05 * floor else "MISSED"
    cells = [_short(published["gemm_tflop_per_step"]), _short(flops), f"{published['gemm_tflop_per_step'] / flops:.2f}x"]
    table.add_row("gemm tflop per step", *cells, f"{1.05 * floor:.0f} {verdict}", f"{floor:.0f}", f"{flops / floor:.2f}")
    Console(width=120).print(table)


def _short(value: float) -> str:
    return f"{value / 1000:,.1f}k" if value >= 1000 else f"{value:.1f}"
