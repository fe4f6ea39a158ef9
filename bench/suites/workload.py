"""What the suite `step` runs: one configuration's batch, our training step on it, and the peers' steps.

All start from the same weights and adapters, see the same noise, prompts and pictures, and train the same tensors. The
trained tensors, moments and gradients of the peers have the model's own dtype, which is the least work; ours has fp32
masters, moments and gradient sums. Bytes a trained parameter in bf16, teacher included: ours 24 (20 with masters as low
bits), a peer's 14.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor

from bench.models import Model
from bench.references.reference_eager import STRONGER, Adapter, Condition, ReferenceEncoders, ReferenceStep
from bench.results import Options
from dopsd_fast.conditioning.context import Context
from dopsd_fast.data.images import load_image
from dopsd_fast.data.records import read_records
from dopsd_fast.distributed.engine import Engine
from dopsd_fast.distributed.plain_engine import PlainEngine
from dopsd_fast.distributed.process_group import Ranks
from dopsd_fast.errors import UserError
from dopsd_fast.families.base import Family
from dopsd_fast.families.build import build_pair
from dopsd_fast.method.objective import StepInputs
from dopsd_fast.method.registry import make_objective
from dopsd_fast.pair.student_teacher import Pair
from dopsd_fast.settings.schema import DataSettings, Settings
from dopsd_kernels.triton_compat import HAS_TRITON

LEARNING_RATE, GRAD_CLIP, EMA_DECAY = 1e-5, 1.0, 0.9999
B_SPREAD = 0.01
"""Standard deviation of every adapter's B: at the published zero, half of the gradients would be zero."""


@dataclass(frozen=True)
class Cell:
    """A configuration. What is None is as in the model's standard one; `activations` concerns ours alone. layers: the depth of
    the transformer's main stack."""

    layers: int | None = None
    pixels: int | None = None
    batch: int | None = None
    states: int | None = None
    activations: str = "keep"

    @property
    def name(self) -> str:
        """What the case's name gets: "@512px@batch4", nothing for the standard configuration."""
        known = [(self.layers, "{}layers"), (self.pixels, "{}px"), (self.batch, "batch{}"), (self.states, "K{}"),
                 (self.activations if self.activations != "keep" else None, "{}")]
        return "".join(f"@{text.format(value)}" for value, text in known if value is not None)


class Workload:
    """The batch that every variant steps on, and what it is made of. UserError: a depth that the weights do not have."""

    def __init__(self, options: Options, cell: Cell = Cell()) -> None:
        torch.set_num_threads(options.threads)
        self.options, self.cell = options, cell
        self.model = Model(options.model, options.device)
        if cell.layers is not None:
            if not self.model.random:
                raise UserError(f"step: {self.model.name} has weights of its own, its depth cannot be {cell.layers} layers")
            self.model.family.transformer_config = self.model.family.transformer_config | {"n_layers": cell.layers}
        standard = self.model.standard
        self.batch, self.pixels = cell.batch or standard.batch, cell.pixels or standard.pixels
        self.states = cell.states or standard.states
        self.grid = self.model.grid(self.states, self.pixels)
        self.noise = self.model.noise(self.batch, self.pixels)
        records = read_records(DataSettings(), 1).records
        records = list(islice(cycle(records), self.batch))
        self.prompts = [next(iter(record.prompts.values())) for record in records]
        self.images = [load_image(record.images[0], self.pixels, self.pixels) for record in records]
        if self.has_encoders:
            self.student = self.encoders.student(self.prompts)
            self.teacher = self.encoders.teacher(self.prompts, self.images)
        else:
            tokens = standard.text_tokens, standard.teacher_tokens
            found = (self.model.features(self.batch, count, seed) for seed, count in enumerate(tokens, 1))
            self.student, self.teacher = ([Condition(text) for text in texts] for texts in found)

    @property
    def family(self) -> Family:
        return self.model.family

    @property
    def suffix(self) -> str:
        return self.cell.name + self.model.suffix

    @property
    def has_encoders(self) -> bool:
        """Whether they lie in the model's folder; else R1 runs random ones of the published shape."""
        return self.model.folder is not None and (self.family.vlm_folder).is_dir()

    @cached_property
    def encoders(self) -> FixedLength:
        """Built when first asked for; `forget_encoders` frees them."""
        standard = self.model.standard
        found: Any
        if self.has_encoders:
            folder = self.family.path
            model = self.model
            found = ReferenceEncoders(folder, self.family.vlm_folder, device=model.device, dtype=model.dtype,
                                      max_pixels=model.shown_pixels)
        else:
            from bench.references.random_encoders import RandomEncoders

            found = RandomEncoders(self.model)
        return FixedLength(found, standard.text_tokens, standard.teacher_tokens)

    def forget_encoders(self) -> None:
        self.__dict__.pop("encoders", None)

    def contexts(self, conditions: Sequence[Condition]) -> list[Context]:
        return [{"text": condition.text} for condition in conditions]

    @cached_property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.family.meta_transformer().parameters())

    def trained(self, kind: str) -> int:
        """Numbers that the step trains."""
        if kind == "full":
            return self.parameters
        rank, targets = self.model.standard.rank, self.family.lora_targets
        layers = dict(self.family.meta_transformer().named_modules())
        adapted: list[Any] = [layer for name, layer in layers.items() if name.endswith(tuple(targets))]
        return sum(rank * (layer.in_features + layer.out_features) for layer in adapted)


class FixedLength:
    """Encoders' features cut or repeated to the standard lengths: the transformer's work is the standard configuration's
    whatever the prompts' lengths are."""

    def __init__(self, encoders: Any, text_tokens: int, teacher_tokens: int) -> None:
        self.encoders, self.text_tokens, self.teacher_tokens = encoders, text_tokens, teacher_tokens

    def student(self, prompts: Sequence[str]) -> list[Condition]:
        return [Condition(to_length(c.text, self.text_tokens)) for c in self.encoders.student(prompts)]

    def teacher(self, prompts: Sequence[str], images: Sequence[Any]) -> list[Condition]:
        return [Condition(to_length(c.text, self.teacher_tokens)) for c in self.encoders.teacher(prompts, images)]


def to_length(text: Tensor, length: int) -> Tensor:
    return text.repeat(-(-length // len(text)), 1)[:length].contiguous()


@torch.no_grad()
def fill(name: str, adapter: Tensor, dtype: torch.dtype) -> None:
    """Values of one adapter matrix, by its stock name and shape alone, rounded to `dtype`: A as published, B not zero."""
    draw = torch.Generator(adapter.device).manual_seed(zlib.crc32(name.encode()))
    spread = 1.0 / len(adapter) if ".lora_A." in name else B_SPREAD
    values = torch.randn(adapter.shape, generator=draw, device=adapter.device) * spread
    adapter.copy_(values.to(dtype))


def pair_on_device(model: Model, settings: Settings) -> Pair:
    """`build_pair`, the adapters drawn on the model's device: PEFT draws them on the default device and then moves them, which
    for the 952 matrices of Z-Image's two adapters keeps a GPU waiting for the CPU."""
    with model.device:
        s, family = settings, model.family
        return build_pair(family, s.backbone, s.adapter, s.teacher, s.train, model.dtype, model.device)


MATRIX_PEERS = ("R1", "R4")
"""Who is compared with away from the standard configuration, too."""


def asked_peers(options: Options, suite: str) -> tuple[list[str], str]:
    """Whom to compare with, and what is said of ours about that: the tour leaves R3, whose compilation takes longest, out."""
    peers = list(options.peers)
    if options.tour and "R3" in peers:
        peers.remove("R3")
        return peers, f"R3 is measured by `bench/run.py {suite}`"
    return peers, ""


def settings_of(kind: str, work: Any, **sections: Mapping[str, Any]) -> Settings:
    """The trainer's settings for a step on `work` (a Workload, or what has its batch, states and model), with what `sections`
    say beyond."""
    standard = work.model.standard
    adapter = {"rank": standard.rank, "alpha": standard.alpha} if kind == "lora" else {}
    made: dict[str, dict[str, Any]] = {
        "train": {"batch_size": work.batch, "learning_rate": LEARNING_RATE, "grad_clip": GRAD_CLIP,
                  "precision": work.model.precision},
        "method": {"num_states": work.states},
        "teacher": {"ema_decay": EMA_DECAY},
        "adapter": {"kind": kind, **adapter},
        "deepspeed": {"stage": 0},
    }
    for name, section in sections.items():
        made[name] = made.get(name, {}) | dict(section)
    return Settings.model_validate(made)


# ---- ours ------------------------------------------------------------------------------------------------------------


class OurStep:
    """Pair, objective and engine as the trainer runs them (ZeRO 0, one process)."""

    def __init__(self, kind: str, work: Workload, activations: str = "keep", masters: str = "fp32") -> None:
        settings = settings_of(kind, work, train={"masters": masters, "activations": activations})
        self.work, self.objective = work, make_objective(settings.method)
        self.pair = pair_on_device(work.model, settings)
        if kind == "lora":
            for trained in self.pair.trained():
                for side in (trained.student, trained.teacher):
                    fill(trained.name, side, work.model.dtype)
        alone = Ranks(0, 1, 0, next(self.pair.parameters()).device)
        self.engine: Engine = PlainEngine(self.pair, settings.train, settings.teacher, alone)

    def open(self) -> Any:
        """The pair's forward on the batch's contexts."""
        work = self.work
        return self.pair.open(work.contexts(work.student), work.contexts(work.teacher), work.noise.shape)

    def backward(self) -> None:
        with self.engine.accumulating():
            inputs = StepInputs(noise=self.work.noise, grid=self.work.grid, forward=self.open())
            self.report = self.objective.accumulate(inputs, self.engine.backward)

    def step(self) -> None:
        self.backward()
        self.engine.any(False)
        self.engine.step(LEARNING_RATE)
        self.engine.mean([self.report.loss, self.report.gap, *self.report.state_losses])

    def parameters(self) -> dict[str, Tensor]:
        return {trained.name: trained.student for trained in self.pair.trained()}

    def gradients(self) -> dict[str, Tensor]:
        """By stock name, not copied."""
        return {name: p.grad for name, p in self.parameters().items() if p.grad is not None}

    def clear(self) -> None:
        for parameter in self.parameters().values():
            parameter.grad = None

    def fell_back(self) -> str:
        """What runs otherwise than ours is meant to, in one line; empty: nothing."""
        return fallbacks(self.pair)

    def close(self) -> None:
        self.engine.close()


def fallbacks(pair: Pair) -> str:
    """What of a pair runs otherwise than it is meant to."""
    facts, found = pair.describe(), []
    if facts["backbone"] != "pair":
        found.append("diffusers' forward instead of the pair forward")
    if facts.get("ops") == "torch":
        found.append("plain PyTorch ops: dopsd_kernels._native is not built, or not for this dtype")
    if facts.get("ops") == "triton" and not HAS_TRITON:
        found.append("no Triton")
    if facts["attention"] == "math":
        found.append("attention by plain mathematics")
    return "; ".join(found)


# ---- the peers -------------------------------------------------------------------------------------------------------


def peer(name: str, kind: str, work: Workload, dtype: torch.dtype | None = None) -> ReferenceStep:
    """Peer R1 ... R4; the teacher begins as the student. dtype: to compute in another than the model's, on the same weights."""
    standard, own = work.model.standard, work.model.dtype
    model = work.model.transformer()
    if dtype is not None:
        torch.nn.Module.to(model, dtype)  # diffusers' own would keep some modules in fp32
    encoders: Any = work.encoders if name == "R1" and dtype is None else None
    with work.model.device:  # as in `pair_on_device`
        step = ReferenceStep(
            model,
            [1.0 - t for t in work.grid],
            weight="v",
            adapter=Adapter(standard.rank, standard.alpha) if kind == "lora" else None,
            learning_rate=LEARNING_RATE,
            grad_clip=GRAD_CLIP,
            ema_decay=EMA_DECAY,
            encoders=encoders,
            **STRONGER[name],
        )
    if kind == "lora":
        for full, parameter in step.trainable.items():
            fill(stock_name(full), parameter, own)
        step.copy_student_to_teacher()
        for full, average in step.ema.items():
            average.copy_(step.teacher_weights[full])
    return step


class PeerStep:
    """`peer` with the methods of `OurStep`."""

    def __init__(self, name: str, kind: str, work: Workload) -> None:
        self.name, self.work, self.reference = name, work, peer(name, kind, work)

    def backward(self) -> None:
        self.reference.backward(self.work.noise, self.work.student, self.work.teacher)

    def step(self) -> None:
        """R1 begins at the prompts and pictures, the others at their conditions."""
        work = self.work
        if self.name == "R1":
            self.reference.step_from_inputs(work.noise, work.prompts, work.images)
        else:
            self.reference.step(work.noise, work.student, work.teacher)

    def gradients(self) -> dict[str, Tensor]:
        """By stock name, not copied; a tensor that took no part has none."""
        return {stock_name(name): p.grad for name, p in self.reference.trainable.items() if p.grad is not None}

    def clear(self) -> None:
        for parameter in self.reference.trainable.values():
            parameter.grad = None

    def fell_back(self) -> str:
        return ""

    def close(self) -> None:
        pass


def stock_name(name: str) -> str:
    """PEFT's `...lora_A.student.weight` -> `...lora_A.weight`, as our pair names it."""
    return name.replace(".student.", ".")
