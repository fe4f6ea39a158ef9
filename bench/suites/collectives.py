"""Counts what ranks send each other: every collective of every process group, and the weights that were gathered."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import wraps
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Unaccounted(RuntimeError):
    """The collectives and the parameters that DeepSpeed says it gathered do not agree."""


@dataclass
class Call:
    """One collective, an operator of `torch.ops.c10d`: `elements` and `bytes` of the whole, gathered or to be reduced; whether
    it gathers floating-point numbers. `weights`: stock name -> elements of it, of a gather whose parameters are known."""

    name: str
    elements: int
    bytes: int
    gathers: bool
    weights: dict[str, int] | None = None


class Collectives(TorchDispatchMode):
    """Counts inside `with`; `weights`: (stock name, parameter) of student and teacher alike, None as the name of what is
    sharded but no weight of the model, an adapter.

        with Collectives(weights) as counted:
            engine.step(...)
        counted.counts()

    `gathers` = sum over the gathers of (elements of the distinct stock names in it) / (elements of the model): a collective
    that gathers student and teacher of all weights counts 1, and so does one that gathers the student alone. Which parameters
    a gather holds is what DeepSpeed's handle of it says (ZeRO-3), or where its output lies in memory (ZeRO-1 and 2). Bytes are
    those of the whole: of W ranks, each receives (W - 1) / W of them. A process group of one rank sends nothing and is not
    counted.

    On leaving, raises Unaccounted if a gather of floating-point numbers belongs to no known parameter, if a gather's elements
    are not those of its parameters and their padding, or if parameters were said to be gathered and no collective did it."""

    def __init__(self, weights: Iterable[tuple[str | None, Any]]) -> None:
        super().__init__()
        self._parameters = list(weights)
        self._names = {id(parameter): name for name, parameter in self._parameters}
        self._sizes = {name: _numel(parameter) for name, parameter in self._parameters if name is not None}
        self._problems: list[str] = []
        self.log: list[Call] = []

    # ---- results ---------------------------------------------------------------------------------------------------------

    @property
    def gathers(self) -> float:
        """Whole-model gathers."""
        return sum(sum(call.weights.values()) for call in self.log if call.weights) / sum(self._sizes.values())

    @property
    def times(self) -> Counter[str]:
        """Stock name -> in how many gathers it was."""
        return Counter(name for call in self.log for name in call.weights or ())

    def counts(self) -> dict[str, float]:
        """The metrics of suite `zero`. Gathered bytes are those of parameters, adapters too, without what ranks tell each other
        about themselves."""
        return {
            "gathers_per_step": self.gathers,
            "gathers_of_one_weight_per_step": max(self.times.values(), default=0),
            "gathered_bytes_per_step": sum(call.bytes for call in self.log if call.weights is not None),
            "reduced_bytes_per_step": sum(call.bytes for call in self.log if "reduce" in call.name),
            "collectives_per_step": len(self.log),
        }

    # ---- hooks -----------------------------------------------------------------------------------------------------------

    def __enter__(self) -> Collectives:
        from deepspeed.runtime.zero import partition_parameters as zero

        self._patches = ExitStack()
        for owner, method, around in (
            (zero.AllGatherCoalescedHandle, "__init__", self._with_handle),
            (zero.AllGatherHandle, "__init__", self._with_handle),
            (zero.Init, "_allgather_params_coalesced", self._at_once),
            (zero.Init, "_allgather_params_sequential", self._at_once),
        ):
            self._patches.enter_context(mock.patch.object(owner, method, around(getattr(owner, method))))
        super().__enter__()
        return self

    def __exit__(self, kind: Any, *error: Any) -> None:
        super().__exit__(kind, *error)
        self._patches.close()
        if kind is not None:
            return
        if nameless := [call for call in self.log if call.gathers and call.weights is None]:
            size = sum(call.bytes for call in nameless)
            self._problems.append(f"{len(nameless)} all-gathers of {size} bytes belong to no parameter that was named")
        if self._problems:
            raise Unaccounted(f"{self._problems[0]} ({len(self._problems)} such)")

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.name().startswith("c10d::"):
            group = next(one for one in args if isinstance(one, torch.ScriptObject))  # a reduction's operator comes after it
            if torch.distributed.ProcessGroup.unbox(group).size() > 1:
                self._note(function.overloadpacket.__name__, args)
        return function(*args, **(kwargs or {}))

    def _note(self, name: str, args: Any) -> None:
        """The whole is the gathered output, or the input that is reduced or scattered: the second argument of the latter."""
        whole = [one for one in tree_leaves(args["reduce_scatter" in name]) if isinstance(one, Tensor)]
        gathers = "allgather" in name and any(one.is_floating_point() for one in whole)
        sizes = sum(one.numel() for one in whole), sum(one.nbytes for one in whole)
        self.log.append(Call(name, *sizes, gathers, self._lying_in(whole) if gathers else None))

    def _lying_in(self, whole: list[Tensor]) -> dict[str, int] | None:
        """Elements of each weight that lie in `whole`; None if nothing does. Parameters of ZeRO-3 lie nowhere yet."""
        spans = [(one.data_ptr(), one.data_ptr() + one.nbytes) for one in whole]
        found: dict[str, int] = {}
        known = False
        for name, parameter in self._parameters:
            start = 0 if hasattr(parameter, "ds_id") else parameter.data_ptr()
            end = start + parameter.nbytes
            inside = sum(max(0, min(end, last) - max(start, first)) for first, last in spans) if start else 0
            known = known or inside > 0
            if inside and name is not None:
                found[name] = max(found.get(name, 0), inside // parameter.element_size())
        return found if known else None

    def _with_handle(self, original: Callable[..., None]) -> Callable[..., None]:
        """A handle is made right after its collective."""

        @wraps(original)
        def made(handle: Any, *args: Any, **kwargs: Any) -> None:
            original(handle, *args, **kwargs)
            several = list(handle.params) if hasattr(handle, "params") else [args[1]]
            self._claim(self.log[-1] if self.log else None, several)

        return made

    def _at_once(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Parameters that are gathered without a handle, one collective each."""

        @wraps(original)
        def called(init: Any, parameters: list[Any], *args: Any, **kwargs: Any) -> Any:
            before = len(self.log)
            result = original(init, parameters, *args, **kwargs)
            if torch.distributed.get_world_size() > 1:
                for number, parameter in enumerate(parameters, before):
                    self._claim(self.log[number] if number < len(self.log) else None, [parameter])
            return result

        return called

    def _claim(self, call: Call | None, parameters: list[Any]) -> None:
        """Says that this collective gathered `parameters`."""
        if call is None or not call.gathers or call.weights is not None:
            self._problems.append(f"{len(parameters)} parameters were gathered by no collective")
            return
        elements = sum(map(_numel, parameters))
        if not elements <= call.elements < elements + len(parameters) * torch.distributed.get_world_size():
            self._problems.append(
                f"{len(parameters)} parameters of {elements} elements were gathered by a collective of {call.elements}"
            )
        if unknown := sum(id(one) not in self._names for one in parameters):
            self._problems.append(f"{unknown} gathered parameters are none of those that were named")
        names = {self._names.get(id(one)) for one in parameters}
        call.weights = {name: self._sizes[name] for name in names if name is not None}


def _numel(parameter: Any) -> int:
    return getattr(parameter, "ds_numel", parameter.numel())
