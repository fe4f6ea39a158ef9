"""The student and its teacher as one module: two modules (full), or one with two low-rank adapters (LoRA)."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dopsd_fast.errors import UserError
from dopsd_fast.gradient_sums import GradientSums
from dopsd_fast.objective import Forward, TwoCalls
from dopsd_fast.tape import Tape
from dopsd_kernels.fp8_linear import require_fp8

if TYPE_CHECKING:
    from dopsd_fast.families.base import Context, Family
    from dopsd_fast.settings import Settings

STUDENT, TEACHER = "student", "teacher"

Sampler = Callable[[Tensor, Tensor], Tensor]
Turns = Sequence[tuple[Sequence[nn.Module], Callable[[], None]]]
"""(units, what to do while their weights are there), one after the other."""


@dataclass(frozen=True)
class Trained:
    """One trained tensor: its stock name (for an adapter without the adapter's name), and the teacher's counterpart or
    None."""

    name: str
    student: Any  # nn.Parameter; Any because DeepSpeed hangs its own attributes on it
    teacher: Any


class Pair(nn.Module):
    """`student`: the transformer that trains. `teacher`: a frozen module of the same class, or None.

    teacher  kind=ema, frozen  kind=student
    full     a second module   None: the student's live weights, without gradient
    LoRA     None: adapter "teacher" inside `student`; kind=student: only adapter "student"

    Both live in one module because ZeRO-3 partitions what is given to it, frozen weights too.
    `lora_config`: PEFT's LoraConfig, None for full fine-tuning. `fused`: the family's pair forward over both, or None:
    then each runs by itself, through diffusers' own forward. `gather`: how ZeRO-3 holds the weights (see `fetching`), None
    where it does not shard them; `sweep`: under gather=sweep, goes through turns of units (`Fetcher.sweep`).
    """

    def __init__(self, student: nn.Module, teacher: nn.Module | None, lora_config: Any = None, fused: Any = None) -> None:
        super().__init__()
        self.fused = fused
        self.student = student
        self.teacher = teacher
        self.lora_config = lora_config
        self.gather: str | None = None
        self.sweep: Callable[[Turns], None] | None = None
        self._adapted = _adapter_layers(student) if lora_config is not None else []
        self.has_teacher_adapter = any(TEACHER in layer.lora_A for layer in self._adapted)

    def forward(self, x: Tensor, t: Tensor, *, call: Callable[[Tensor, Tensor], Any]) -> Any:
        """`call(x, t)`. ZeRO-3 records one trace from each call of this module to the next."""
        return call(x, t)

    def open(self, family: Family, student: Sequence[Context], teacher: Sequence[Context], shape: Sequence[int]) -> Forward:
        """The velocities along one trajectory of latents `[B, C, h, w]` = `shape`, one context per item; without teacher
        contexts the student's alone."""
        if self.fused is None:
            call = partial(self.teacher_velocity, family) if teacher else None
            return TwoCalls(partial(self.student_velocity, family), student, call, teacher)
        branches = {STUDENT: student, TEACHER: teacher} if teacher else {STUDENT: student}
        return FusedForward(self, branches, shape)

    def sampler(self, family: Family, branch: str, contexts: Sequence[Context], shape: Sequence[int]) -> Sampler:
        """v of one branch, without gradient, for `sampling.rollout`."""
        if self.fused is None:
            return partial(self._alone, family, branch, contexts)
        with torch.no_grad():
            forward = FusedForward(self, {branch: contexts}, shape)
        return lambda x, t: forward(x, t)[0].to(x.dtype)

    @torch.no_grad()
    def _alone(self, family: Family, branch: str, contexts: Sequence[Context], x: Tensor, t: Tensor) -> Tensor:
        with self.branch(branch) as transformer:
            return family.velocity(transformer, x, t, contexts)

    def student_velocity(self, family: Family, x: Tensor, t: Tensor, contexts: Sequence[Context]) -> Tensor:
        """v_s `[B, C, h, w]` at x `[B, C, h, w]`, t `[B]`, with gradient."""
        return self(x, t, call=lambda x, t: family.velocity(self.student, x, t, contexts))

    def teacher_velocity(self, family: Family, x: Tensor, t: Tensor, contexts: Sequence[Context]) -> Tensor:
        """v_t, shaped as x, without gradient. Not through `forward`: teacher, student, backward is the sequence that
        repeats."""
        return self._alone(family, TEACHER, contexts, x, t)

    @contextmanager
    def branch(self, name: str) -> Iterator[nn.Module]:
        """The transformer to call for "student" or "teacher"; the student's adapter is active again afterwards, so a
        later backward recomputes with it. PEFT's own set_adapter is not used because it turns requires_grad on and
        off."""
        if name == TEACHER and self.has_teacher_adapter:
            self._activate(TEACHER)
            try:
                yield self.student
            finally:
                self._activate(STUDENT)
        elif name == TEACHER and self.teacher is not None:
            yield self.teacher
        else:
            yield self.student

    def trained(self) -> list[Trained]:
        """Every trained tensor, in the module's order."""
        if self.lora_config is None:
            teachers = dict(self.teacher.named_parameters()) if self.teacher is not None else {}
            return [Trained(name, param, teachers.get(name)) for name, param in self.student.named_parameters()]
        parameters = dict(self.student.named_parameters())
        mine = f".{STUDENT}."
        return [
            Trained(name.replace(mine, "."), param, parameters.get(name.replace(mine, f".{TEACHER}.")))
            for name, param in parameters.items()
            if param.requires_grad
        ]

    def describe(self) -> dict[str, Any]:
        """What was chosen, for the run's files."""
        if self.fused is None:
            return {"backbone": "diffusers", "attention": "torch scaled_dot_product_attention (diffusers)"}
        return {"backbone": "pair", **self.fused.describe()}

    def _activate(self, adapter: str) -> None:
        for layer in self._adapted:
            layer._active_adapter = [adapter]


class FusedForward:
    """The family's pair forward along one trajectory (see `objective.Forward`). The first branch of `branches` (contexts by
    branch) carries gradient.

    What the states share, the refined captions, is computed here, once, and given to each state without its graph; the
    states' gradients for it are summed (fp32) and `finish` back-propagates them once. So are the gradients of the blocks'
    parameters, except where ZeRO-3 takes them away between two uses (`Pair.gather`): there each state delivers its own
    (unit), or the states' graphs wait, cut at the blocks, for `finish` (sweep)."""

    def __init__(self, pair: Pair, branches: dict[str, Sequence[Context]], shape: Sequence[int]) -> None:
        self.pair = pair
        fused = pair.fused
        weight = next(pair.student.parameters())
        self.dtype, self.names = weight.dtype, tuple(branches)
        contexts = list(branches.values())
        self.layouts = [fused.layout(ours, shape[-2], shape[-1], weight.device) for ours in contexts]
        self.shared = fused.captions_of(self.names, contexts, self.layouts, self.dtype)
        self.given = [captions.detach() for captions in self.shared]
        if self.shared[0].requires_grad:
            self.given[0].requires_grad_()
            self.given[0].grad_dtype = torch.promote_types(self.dtype, torch.float32)
        self.sums = self.tape = None
        if torch.is_grad_enabled() and pair.gather in (None, "step"):
            self.sums = GradientSums(fused.summed_parameters(self.names[0]))
        elif torch.is_grad_enabled() and pair.gather == "sweep":
            self.tape = Tape()

    def __call__(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor | None]:
        v = self.pair(x.to(self.dtype), t, call=self._state)
        return v[0], v[1] if len(v) > 1 else None

    def _state(self, x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        sums, tape = (self.sums, self.tape) if torch.is_grad_enabled() else (None, None)
        return self.pair.fused(x, t, self.names, self.given, self.layouts, sums, tape)

    def finish(self, backward: Callable[[Tensor], object]) -> None:
        if self.tape is not None:
            fused, sweep = self.pair.fused, self.pair.sweep
            assert sweep is not None
            turns = [([unit], partial(self.tape.back, unit)) for unit in reversed(fused.path)]
            sweep([*turns, (fused.caption_path, partial(self._finish_shared, backward))])
        else:
            self._finish_shared(backward)

    def _finish_shared(self, backward: Callable[[Tensor], object]) -> None:
        rest = self.sums.finish() if self.sums is not None else []
        gradient = self.given[0].grad
        if gradient is not None:
            rest.append((self.shared[0] * gradient.to(self.dtype)).sum())  # whose gradient is `gradient`
            self.given[0].grad = None
        if rest:
            backward(sum(rest[1:], rest[0]))


def build_pair(family: Family, settings: Settings, dtype: torch.dtype, device: torch.device | str | None = None) -> Pair:
    """Loads the student in `dtype` onto `device` (None: where the family loads it) and gives it its teacher there: initially
    equal, bit for bit.

    Raises UserError when an entry of `adapter.targets` matches no linear layer.
    """
    student = family.load_transformer(dtype)
    if device is not None:
        student.to(device)
    student.requires_grad_(False)
    kind = settings.teacher.kind
    if settings.adapter.kind == "lora":
        adapters = [STUDENT] if kind == "student" else [STUDENT, TEACHER]
        targets = settings.adapter.targets or family.lora_targets
        config = add_adapters(student, targets, settings.adapter.rank, settings.adapter.alpha, settings.train.seed, adapters)
        teacher = None
        names = {STUDENT: STUDENT, TEACHER: adapters[-1]}
    else:
        config = None
        teacher = None if kind == "student" else copy.deepcopy(student)
        student.requires_grad_(True)
        names = {STUDENT: "", TEACHER: ""}
    modules = {STUDENT: student, TEACHER: student if teacher is None else teacher}
    pair = Pair(student, teacher, config, fuse(family, settings, modules, names))
    for param in pair.parameters():
        if param.is_floating_point() and param.dtype != dtype:
            param.data = param.data.to(dtype)
    if pair.fused is None and settings.train.activations == "recompute":
        student.enable_gradient_checkpointing()  # type: ignore[operator]
    return pair


def fuse(family: Family, settings: Settings, modules: dict[str, nn.Module], adapters: dict[str, str]) -> Any:
    """The pair forward that `backbone` asks for, or None for diffusers' own forward. UserError where the family has none."""
    train = settings.train
    fused = None
    if train.fp8 != "off" and torch.cuda.is_available():
        try:
            require_fp8(torch.device("cuda"))
        except RuntimeError as error:
            raise UserError(str(error)) from None
        if train.precision != "bf16":
            raise UserError(f"train.fp8={train.fp8} on a GPU needs train.precision=bf16, it is {train.precision}")
    if settings.backbone != "diffusers":
        fused = family.pair_forward(modules, adapters, train.activations, train.attention, train.fp8)
    if fused is None and settings.backbone == "pair":
        raise UserError(f"backbone=pair: {family.name} has no pair forward: leave backbone=auto")
    if fused is None and train.activations == "selective":
        raise UserError(f"train.activations=selective: only the pair forward has it, {family.name} runs diffusers' forward: "
                        "use keep or recompute")
    if fused is None and train.fp8 != "off":
        raise UserError(f"train.fp8={train.fp8}: only the pair forward has it, {family.name} runs diffusers' forward: use off")
    return fused


def lora_coverage(transformer: nn.Module, targets: Sequence[str]) -> dict[str, int]:
    """How many linear layers each target matches: by full name, or by the end of it after a dot (PEFT's rule for a
    list)."""
    names = _linear_names(transformer)
    return {target: sum(_matches(name, target) for name in names) for target in targets}


def coverage_by_kind(
    transformer: nn.Module, targets: Sequence[str], kinds: Mapping[str, str]
) -> dict[str, tuple[int, int]]:
    """Kind of matrix -> (linear layers that `targets` match, linear layers of the kind). kinds: as `Family.lora_kinds`;
    layers of none of them are "other", and left out where none of those is adapted."""
    counts = {kind: [0, 0] for kind in (*kinds, "other")}
    for name in _linear_names(transformer):
        kind = next((kind for kind, pattern in kinds.items() if re.search(pattern, name)), "other")
        counts[kind][0] += any(_matches(name, target) for target in targets)
        counts[kind][1] += 1
    return {kind: (adapted, there) for kind, (adapted, there) in counts.items() if there and (adapted or kind != "other")}


def add_adapters(
    transformer: nn.Module, targets: Sequence[str], rank: int, alpha: float, seed: int, adapters: Sequence[str]
) -> Any:
    """Injects LoRA adapters y = W x + (alpha / rank) B A x, A gaussian (std 1 / rank, from `seed`), B zero, all of them
    equal.

    Only the first adapter is active, and only its weights require gradients. Works on the meta device. Returns the
    LoraConfig.
    """
    from peft import LoraConfig, inject_adapter_in_model

    coverage = lora_coverage(transformer, targets)
    unmatched = [target for target, count in coverage.items() if count == 0]
    if unmatched:
        matched = ", ".join(f"{target} ({count})" for target, count in coverage.items() if count) or "nothing"
        endings = sorted({_ending(name) for name in _linear_names(transformer)})
        raise UserError(
            f"adapter.targets: {', '.join(unmatched)} match no linear layer of {type(transformer).__name__}; "
            f"matched: {matched}; the layers end in: {', '.join(endings)}"
        )
    alpha = int(alpha) if float(alpha).is_integer() else alpha  # as PEFT and diffusers write it
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), init_lora_weights="gaussian")
    on_meta = any(param.is_meta for param in transformer.parameters())
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "already found a peft_config": meant, it is the second adapter
        torch.manual_seed(seed)
        for adapter in adapters:
            try:
                inject_adapter_in_model(config, transformer, adapter_name=adapter, low_cpu_mem_usage=on_meta)
            except ValueError as error:
                raise UserError(f"adapter.targets: {error}") from error
    first = adapters[0]
    for layer in _adapter_layers(transformer):
        layer._active_adapter = [first]
        for parts in (layer.lora_A, layer.lora_B):
            for adapter, part in parts.items():
                part.requires_grad_(adapter == first)
                if adapter != first and not on_meta:
                    part.load_state_dict(parts[first].state_dict())
    return config


def _adapter_layers(transformer: nn.Module) -> list[Any]:
    from peft.tuners.lora import LoraLayer

    return [module for module in transformer.modules() if isinstance(module, LoraLayer)]


def _linear_names(transformer: nn.Module) -> list[str]:
    return [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith("." + target)


def _ending(name: str) -> str:
    """`layers.3.attention.to_out.0` -> `attention.to_out.0`: what follows the block number."""
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts[:-1]) if part.isdigit()]
    return ".".join(parts[numbers[0] + 1 :] if numbers else parts)
