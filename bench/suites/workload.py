"""What the suites step, rollout and forward run: one configuration's batch, our training step on it, and the peers' steps.

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
from dopsd_fast.method.objective import StepInputs
from dopsd_fast.method.registry import make_objective
from dopsd_fast.settings.schema import DataSettings, Settings
from dopsd_kernels.triton_compat import HAS_TRITON

LEARNING_RATE, GRAD_CLIP, EMA_DECAY = 1e-5, 1.0, 0.9999
B_SPREAD = 0.01
"""Standard deviation of every adapter's B: at the published zero, half of the gradients would be zero."""
APART = 1.015625
"""A teacher's weights over its student's, of a whole model that does not train."""


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


STANDARD = Cell()


class Workload:
    """The batch that every variant steps on, and what it is made of. has_encoders: whether they lie in the model's folder;
    else R1 runs random ones of the published shape."""

    def __init__(self, options: Options, cell: Cell = STANDARD) -> None:
        torch.set_num_threads(options.threads)
        self.options, self.cell = options, cell
        self.model = Model(options.model, options.device)
        self.family, self.suffix = self.model.family, cell.name + self.model.suffix
        if cell.layers is not None:  # of random weights
            self.family.transformer_config = self.family.transformer_config | {"n_layers": cell.layers}
        standard = self.model.standard
        self.batch, self.pixels = cell.batch or standard.batch, cell.pixels or standard.pixels
        self.states = cell.states or standard.states
        self.grid = self.model.grid(self.states, self.pixels)
        self.noise = self.model.noise(self.batch, self.pixels)
        records = list(islice(cycle(read_records(DataSettings(), 1).records), self.batch))
        self.prompts = [next(iter(record.prompts.values())) for record in records]
        self.images = [load_image(record.images[0], self.pixels, self.pixels) for record in records]
        self.has_encoders = self.model.folder is not None and self.family.vlm_folder.is_dir()
        if self.has_encoders:
            self.student, self.teacher = self.encode(self.encoders)
        else:
            tokens = standard.text_tokens, standard.teacher_tokens
            found = (self.model.features(self.batch, count, seed) for seed, count in enumerate(tokens, 1))
            self.student, self.teacher = ([Condition(text) for text in texts] for texts in found)

    @cached_property
    def encoders(self) -> Any:
        """Built when first asked for; `forget_encoders` frees them."""
        model = self.model
        if self.has_encoders:
            return ReferenceEncoders(self.family.path, self.family.vlm_folder, device=model.device, dtype=model.dtype,
                                     max_pixels=model.shown_pixels)
        from bench.references.random_encoders import RandomEncoders

        return RandomEncoders(model)

    def encode(self, encoders: Any) -> tuple[list[Condition], list[Condition]]:
        """Of student and teacher, cut or repeated to the standard lengths: the transformer's work is the standard
        configuration's whatever the prompts' lengths are."""
        standard = self.model.standard
        found = ((encoders.student(self.prompts), standard.text_tokens),
                 (encoders.teacher(self.prompts, self.images), standard.teacher_tokens))
        student, teacher = (
            [Condition(one.text.repeat(-(-length // len(one.text)), 1)[:length].contiguous()) for one in conditions]
            for conditions, length in found
        )
        return student, teacher

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
        whole: Any = self.family.meta_transformer()
        adapted = [layer for name, layer in whole.named_modules() if name.endswith(tuple(self.family.lora_targets))]
        return self.model.standard.rank * sum(layer.in_features + layer.out_features for layer in adapted)


@torch.no_grad()
def begin(kind: str, name: str, student: Tensor, teacher: Tensor, dtype: torch.dtype, trains: bool) -> None:
    """Sets a trained tensor and its teacher's by its stock name and shape alone, rounded to `dtype`: of an adapter, A as
    published and B not zero. Where nothing trains the teacher's is another, so that whoever mixes them up is seen."""
    if kind == "lora":
        for side, label in ((student, name), (teacher, name if trains else f"teacher.{name}")):
            draw = torch.Generator(side.device).manual_seed(zlib.crc32(label.encode()))
            spread = 1.0 / len(side) if ".lora_A." in name else B_SPREAD
            side.copy_((torch.randn(side.shape, generator=draw, device=side.device) * spread).to(dtype))
    elif not trains:
        teacher.copy_(teacher.to(dtype) * APART)


def settings_of(kind: str, work: Any, **sections: Mapping[str, Any]) -> Settings:
    """The trainer's settings for a step on `work` (a Workload, or what has its batch, states and model), with what `sections`
    say beyond."""
    standard = work.model.standard
    made: dict[str, dict[str, Any]] = {
        "train": {"batch_size": work.batch, "learning_rate": LEARNING_RATE, "grad_clip": GRAD_CLIP,
                  "precision": work.model.precision},
        "method": {"num_states": work.states},
        "teacher": {"ema_decay": EMA_DECAY},
        "adapter": {"kind": kind} | ({"rank": standard.rank, "alpha": standard.alpha} if kind == "lora" else {}),
        "deepspeed": {"stage": 0},
    }
    return Settings.model_validate(made | {name: made.get(name, {}) | dict(more) for name, more in sections.items()})


class Program:
    """What ours and the peers have in common: the gradients of what they train, by stock name."""

    def parameters(self) -> Mapping[str, Tensor]:
        return {}

    def gradients(self) -> dict[str, Tensor]:
        """Not copied; a tensor that took no part has none."""
        return {name: p.grad for name, p in self.parameters().items() if p.grad is not None}

    def clear(self) -> None:
        for parameter in self.parameters().values():
            parameter.grad = None

    def fell_back(self) -> str:
        """What runs otherwise than it is meant to, in one line; empty: nothing."""
        return ""

    def close(self) -> None:
        pass


class OurStep(Program):
    """Pair, objective and engine as the trainer runs them (ZeRO 0, one process). A class whose `trains` is False has neither
    engine nor optimizer, which predicting velocities does not need, and a teacher of its own."""

    engine: Engine
    trains = True

    def __init__(self, kind: str, work: Workload, activations: str = "keep", masters: str = "fp32") -> None:
        settings = settings_of(kind, work, train={"masters": masters, "activations": activations})
        model, self.work, self.objective = work.model, work, make_objective(settings.method)
        self.pair = model.pair(settings)
        for one in self.pair.trained():
            begin(kind, one.name, one.student, one.teacher, model.dtype, self.trains)
        if self.trains:
            alone = Ranks(0, 1, 0, next(self.pair.parameters()).device)
            self.engine = PlainEngine(self.pair, settings.train, settings.teacher, alone)

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

    def fell_back(self) -> str:
        facts = self.pair.describe()
        said = {
            "diffusers' forward instead of the pair forward": facts["backbone"] != "pair",
            "plain PyTorch ops: dopsd_kernels._native is not built, or not for this dtype": facts.get("ops") == "torch",
            "no Triton": facts.get("ops") == "triton" and not HAS_TRITON,
            "attention by plain mathematics": facts["attention"] == "math",
        }
        return "; ".join(text for text, true in said.items() if true)

    def close(self) -> None:
        if self.trains:
            self.engine.close()


class PeerStep(Program):
    """Peer R1 ... R4. dtype: to compute in another than the model's, on the same weights. A class whose `trains` is False has
    no average."""

    trains = True

    def __init__(self, name: str, kind: str, work: Workload, dtype: torch.dtype | None = None) -> None:
        self.name, self.work, standard, model = name, work, work.model.standard, work.model.transformer()
        self.noise = work.noise if dtype is None else work.noise.to(dtype)
        if dtype is not None:
            torch.nn.Module.to(model, dtype)  # diffusers' own would keep some modules in fp32
        with work.model.device:  # as in `OurStep`
            self.reference = step = ReferenceStep(
                model, [1.0 - t for t in work.grid], weight="v",
                adapter=Adapter(standard.rank, standard.alpha) if kind == "lora" else None,
                learning_rate=LEARNING_RATE, grad_clip=GRAD_CLIP, ema_decay=EMA_DECAY,
                ema_dtype=torch.float32 if self.trains else None,
                encoders=work.encoders if name == "R1" and dtype is None else None, **STRONGER[name],
            )
        for full, parameter in step.trainable.items():
            begin(kind, stock_name(full), parameter, step.teacher_weights[full], work.model.dtype, self.trains)
            step.ema[full].copy_(step.teacher_weights[full])
        if not self.trains:
            step.ema.clear()

    def conditions(self) -> tuple[list[Condition], list[Condition]]:
        """What a step begins with: R1 runs its encoders, the others have them."""
        encoders = self.reference.encoders
        return (self.work.student, self.work.teacher) if encoders is None else self.work.encode(encoders)

    def backward(self) -> None:
        self.reference.backward(self.noise, self.work.student, self.work.teacher)

    def step(self) -> None:
        self.reference.step(self.noise, *self.conditions())

    def parameters(self) -> dict[str, Tensor]:
        return {stock_name(name): p for name, p in self.reference.trainable.items()}


def stock_name(name: str) -> str:
    """PEFT's `...lora_A.student.weight` -> `...lora_A.weight`, as our pair names it."""
    return name.replace(".student.", ".")
