"""Decides which weights ZeRO-3 holds gathered, and when (`deepspeed.gather`).

    step    A fetch unit is gathered at its first use after an optimizer step, while the unit before it computes, and stays
            gathered until the optimizer steps. So a step gathers the model once.
    sweep   The forwards of all states gather as under step. Then everything is released, and the student's units are gathered
            one by one, in reverse order, for the backwards of all states. So a step gathers the model twice, but a whole
            gradient exists only during its unit's turn.
    unit    DeepSpeed's own hooks gather a unit before each use and release it afterwards.

A fetch unit is one part of the pair, such as a block, with the student's and the teacher's weights together: one collective
gathers both. With adapters, step and sweep do not shard the frozen base. Which gradients are delivered by whom in each mode is
the table in `pair.passes`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from dopsd_fast.pair.passes import Turns
from dopsd_fast.pair.student_teacher import Pair


class Holder(nn.Module):
    """Holds parameters without their modules. DeepSpeed is given this module to shard, so that it finds the parameters but no
    forward to hang its gathering hooks on."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__()
        self.held = nn.ParameterList(parameters)


def sharded_parameters(pair: Pair) -> list[nn.Parameter]:
    """Lists the parameters that ZeRO-3 splits across ranks when gather is step or sweep. Full fine-tuning: all of the pair's.
    LoRA: only the adapters, because the frozen base fits on each rank and gathering it would cost one collective per block."""
    if pair.lora_config is None:
        return list(pair.parameters())
    return [p for trained in pair.trained() for p in (trained.student, trained.teacher) if p is not None]


class Fetcher:
    """Gathers the fetch units of `pair`, whose parameters DeepSpeed has sharded through a `Holder`.

    Gathers are collective: all ranks must ask for the same units in the same order, which they do because they run the same
    forward. quantize: send the weights as 8 bits (DeepSpeed's zero_quantized_weights)."""

    def __init__(self, pair: Pair, quantize: bool = False) -> None:
        from deepspeed.accelerator import get_accelerator

        self._accelerator = get_accelerator()
        self._stream = self._accelerator.Stream() if self._accelerator.device_name() == "cuda" else None
        self.units: list[list[Any]] = []
        self._position: dict[int, int] = {}
        self._order: list[int] = []
        self._flying: dict[int, list[Any]] = {}
        self._quantize = quantize
        self._hooks = []
        for modules, parameters in _units(pair):
            sharded = [p for p in dict.fromkeys(parameters) if hasattr(p, "ds_id")]
            if sharded:
                for module in modules:
                    self._position[id(module)] = len(self.units)
                    self._hooks.append(module.register_forward_pre_hook(self._before))
                self.units.append(sharded)
        self.parameters = list(dict.fromkeys(p for unit in self.units for p in unit))

    def _before(self, module: nn.Module, arguments: Any) -> None:
        """Runs before a unit's forward: waits until the unit is gathered, and starts to gather the unit that followed it in the
        first forward."""
        position = self._position[id(module)]
        self.gather(position)
        if position not in self._order:
            self._order.append(position)
        following = self._order.index(position) + 1
        if following < len(self._order):
            self._launch(self._order[following], self.units[self._order[following]])

    def gather(self, position: int, wanted: Sequence[Any] | None = None) -> None:
        """Gathers unit `position`, or only the parameters `wanted`, and returns when they are there."""
        wanted = self.units[position] if wanted is None else wanted
        for unit in list(self._flying):
            if unit == position or any(p.ds_status.name == "INFLIGHT" for p in wanted):
                self._land(unit)
        self._launch(position, wanted)
        self._land(position)

    def sweep(self, turns: Turns, done: Callable[[list[Any]], None]) -> None:
        """Releases everything, then takes the turns (units, action) one by one. A turn gathers the units' parameters that
        train, starts to gather those of the next turn, calls `action`, calls `done` with the parameters that no later turn
        needs, and releases these."""
        self.release()
        sets = [self._trained(units) for units, _ in turns]
        last = {id(p): i for i, parameters in enumerate(sets) for p in parameters}
        for i, (_, action) in enumerate(turns):
            self.gather(i, sets[i])
            if i + 1 < len(turns):
                self._launch(i + 1, sets[i + 1])
            action()
            done([p for p in sets[i] if last[id(p)] == i])
            self.release([p for p in sets[i] if last[id(p)] == i])

    def _trained(self, units: Sequence[nn.Module]) -> list[Any]:
        """Lists the parameters of `units` that train, each once."""
        return [p for p in dict.fromkeys(p for unit in units for p in unit.parameters()) if p.requires_grad]

    def _launch(self, position: int, parameters: Sequence[Any]) -> None:
        """Starts to gather those of `parameters` that are not there, as unit `position`. `_land` waits for them."""
        missing = [p for p in parameters if p.ds_status.name == "NOT_AVAILABLE"]
        if not missing or position in self._flying:
            return
        if self._stream is not None:
            self._stream.wait_stream(self._accelerator.current_stream())  # this stream may just have written the shards
        # Under hpZ some parameters lie whole within a node and others do not. They need collectives of different groups.
        near = [p for p in missing if p.ds_secondary_tensor is not None]
        far = [p for p in missing if p.ds_secondary_tensor is None]
        with self._on_stream():
            self._flying[position] = [
                part[0].all_gather_coalesced(part, quantize=self._quantize) for part in (near, far) if part
            ]

    def _land(self, position: int) -> None:
        """Waits until unit `position` has arrived, if it is on its way."""
        handles = self._flying.pop(position, [])
        with self._on_stream():
            for handle in handles:
                handle.wait()
        if self._stream is not None and handles:
            self._accelerator.current_stream().wait_stream(self._stream)

    def _on_stream(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._stream is None else self._accelerator.stream(self._stream)

    def release(self, parameters: Iterable[Any] | None = None) -> None:
        """Frees everything that is gathered, or only `parameters`. This rank's shards stay."""
        if parameters is None:
            for position in list(self._flying):
                self._land(position)
            parameters = self.parameters
        held = [p for p in parameters if p.ds_status.name == "AVAILABLE"]
        if held:
            held[0].partition(held)

    def close(self) -> None:
        """Frees everything that is gathered and removes the hooks."""
        self.release()
        for hook in self._hooks:
            hook.remove()


class Reducer:
    """Sums the gradients of `parameters` over the ranks into the shards of `zero`, DeepSpeed's stage 3 optimizer. It replaces
    DeepSpeed's backward hooks, which would reduce a gradient at each state's backward: this one reduces when it is told to."""

    def __init__(self, zero: Any, parameters: Sequence[Any]) -> None:
        self._zero, self._parameters = zero, parameters
        self._reduced: set[int] = set()
        zero.set_gradient_accumulation_boundary(True)
        zero.persistent_parameters.clear()  # DeepSpeed gathers them right after its step, before the EMA is written
        for hook in zero._grad_acc_hooks:
            hook.remove()
        zero._grad_acc_hooks.clear()

    def reduce(self, parameters: Iterable[Any]) -> None:
        """Reduces the gradients of `parameters`, bucket by bucket, and frees them. Every rank must call it with the same
        parameters. A gradient that is missing here counts as zeros, because another rank may have it."""
        parameters = list(parameters)
        if any(id(p) in self._reduced for p in parameters):  # the next micro-batch: its gradients are added
            self._zero.independent_gradient_partition_epilogue()
            self._zero.micro_step_id += 1
            self._reduced.clear()
        for parameter in parameters:
            if parameter.grad is None:
                give_zeros(parameter)
            self._zero.reduce_ready_partitions_and_remove_grads(parameter)
            self._reduced.add(id(parameter))

    def reduce_rest(self) -> None:
        """Reduces the gradients of this micro-batch that have not been reduced yet."""
        self.reduce([p for p in self._parameters if id(p) not in self._reduced])

    def finish(self) -> None:
        """Reduces the remaining gradients and the last bucket. The gradients of the step are then complete."""
        self.reduce_rest()
        self._zero.independent_gradient_partition_epilogue()
        self._reduced.clear()

    def forget(self) -> None:
        """Discards the gradients that have been reduced, after an exception."""
        if self._reduced:
            self._zero.independent_gradient_partition_epilogue()
            self._zero.micro_step_id = 0
        self._reduced.clear()


def give_zeros(parameter: Any) -> None:
    """Gives a parameter, which may be sharded, an fp32 gradient of zeros."""
    data = parameter.data
    if data.shape != parameter.ds_shape:  # torch requires that a gradient has the shape of the data
        parameter.data = data.new_empty(1).expand(parameter.ds_shape)
    parameter.grad = torch.zeros(parameter.ds_shape, dtype=torch.float32, device=data.device)
    parameter.data = data


def _units(pair: Pair) -> Iterator[tuple[list[nn.Module], list[Any]]]:
    """Yields each fetch unit: (the modules whose forward needs it, its parameters)."""
    if pair.fused is not None:
        kinds = pair.fused.gather_units()
        for module in pair.fused.modules():
            if isinstance(module, kinds):
                yield [module], list(module.parameters())
        return
    branches = [pair.student] if pair.teacher is None else [pair.student, pair.teacher]
    for name in [name for name, _ in _parts(pair.student)]:
        modules = [dict(_parts(branch))[name] for branch in branches]
        yield modules, [p for module in modules for p in module.parameters()]
    yield branches, [p for branch in branches for p in branch.parameters(recurse=False)]


def _parts(transformer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields the children of a transformer by name. A list of blocks yields its blocks, because each is a unit by itself."""
    for name, child in transformer.named_children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from ((f"{name}.{inner}", part) for inner, part in child.named_children())
        else:
            yield name, child
