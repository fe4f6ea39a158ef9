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
that last one counts as a block's, too. The counts are the same on every machine: --model and --device change nothing. What
must not become more is in bench/baseline.json.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from bench.cases.meta_trace import Trace
from bench.peers.reference_eager import ZIMAGE_TARGETS, Adapter, Condition, ReferenceStep, StepResult
from bench.results import Options, Row, failed
from bench.show import step as showing
from dopsd_kernels.costs import Cost

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
        showing(f"{kind}, ours")
        mine = ours(kind, size)
        showing(f"{kind}, R1")
        theirs = _rows(kind, "R1", partial(reference_metrics, kind, size))
        rows += (mine if options.quick else [judged(row) for row in mine]) + theirs
    if not options.quick:
        showing("encoders")
        rows += _rows("encoders", "R1", lambda: [("launches_per_step", float(encoder_launches()), "")])
    return rows


def ours(kind: str, size: Size) -> list[Row]:
    return _rows(kind, "ours", lambda: metrics(trace_ours(kind, size), size))


def _rows(case: str, variant: str, measured: Callable[[], list[tuple[str, float, str]]]) -> list[Row]:
    try:
        return [Row("cost", case, variant, *value) for value in measured()]
    except Exception as error:
        return [failed("cost", case, variant, "launches_per_step", "", error)]


def judged(row: Row) -> Row:
    """With the targets, and whether they are met, in its note."""
    found = next((target for target in TARGETS if target.metric == row.metric), None)
    if row.metric == "gemm_tflop_per_step":
        floor = FLOOR_TFLOP[row.case]
        found = Target(row.metric, row.unit, 1.05 * floor, floor, floor)
    if found is None or row.value is None:
        return row
    said = ", ".join(f"{name} {limit:,.0f} {'met' if row.value <= limit else 'MISSED'}"
                     for name, limit in (("solid", found.solid), ("moonshot", found.moonshot)))  # fmt: skip
    return replace(row, note=said)


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
    """A whole step of the published program."""
    step = reference(kind, size, checkpointing)
    return _traced(step, step.step)


def extrapolated(kind: str, size: Size, checkpointing: bool) -> Trace:
    """Forward and backward of `trace_reference`, from models of one and two layers: each count is a sum over layers, so it is
    affine in their number. Equal to the last kernel at the full depth."""
    one, two = (reference(kind, Size(layers, size.states), checkpointing) for layers in (1, 2))
    first, second, whole = _traced(one, one.backward), _traced(two, two.backward), Trace()

    def at_depth(a: float, b: float) -> Any:
        return a + (size.layers - 1) * (b - a)

    for key in {*first.costs, *second.costs}:
        whole.costs[key] = Cost(*map(at_depth, astuple(first.costs[key]), astuple(second.costs[key])))
    for key in {*first.calls, *second.calls}:
        whole.calls[key] = at_depth(first.calls[key], second.calls[key])
    for region in {*first.saved, *second.saved}:
        whole.saved[region] = at_depth(first.saved[region], second.saved[region])
    return whole


def trace_update(kind: str, size: Size) -> Trace:
    """The rest of the published step: clipping, AdamW, average. How many multi-tensor kernels there are depends on all tensors
    together, so this one is traced at the whole depth."""
    step = reference(kind, size, checkpointing=False)

    def gradients(*_: Any) -> StepResult:
        for parameter in step.trainable.values():
            parameter.grad = torch.empty_like(parameter)
        return StepResult(0.0, [], [])

    step.backward = gradients  # type: ignore[method-assign, assignment]
    return _traced(step, step.step)


def _traced(step: ReferenceStep, call: Callable[..., Any]) -> Trace:
    trace = Trace()
    for model in [step.model] if step.teacher is None else [step.model, step.teacher]:
        trace.watch(model, "model")
        trace.watch(model.layers, "block")
    noise = torch.empty(LATENT, device="meta", dtype=torch.bfloat16)
    with trace:
        call(noise, [Condition(text(TEXT))], [Condition(text(TEACHER_TEXT))])
    return trace


def pair(kind: str, size: Size) -> Any:
    """As `dopsd_fast.families.build.build_pair` makes it."""
    from dopsd_fast.families.zimage.pair import ZImagePair
    from dopsd_fast.pair.lora import add_adapters
    from dopsd_fast.pair.student_teacher import STUDENT, TEACHER, Pair

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
    from dopsd_fast.method.dopsd import DOPSD
    from dopsd_fast.method.objective import StepInputs

    made, trace = pair(kind, size), Trace()
    running = engine(made)
    trace.ignore(made)
    trace.watch(made.fused, "model")
    trace.watch(made.fused.layers, "block")
    trace.watch(made.fused.exit, "exit")
    noise = torch.empty(LATENT, device="meta")
    contexts = [{"text": text(TEXT)}], [{"text": text(TEACHER_TEXT)}]
    with trace:
        forward = made.open(*contexts, noise.shape)
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
    kept = {name: value for name, value, _ in metrics(extrapolated(kind, one, checkpointing=False), one)}
    same = {name for name in kept if name.startswith(("elementwise", "saved"))}
    whole = extrapolated(kind, size, checkpointing=True)
    for (region, phase, op), cost in trace_update(kind, size).costs.items():
        whole.costs[region, phase, op] += cost
    return [(name, kept[name] if name in same else value, unit) for name, value, unit in metrics(whole, size)]
