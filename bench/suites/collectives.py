"""Counts what ranks send each other: every collective of every process group, and the weights that were gathered."""

from __future__ import annotations

import bisect
import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor

GATHER, REDUCE = "all_gather", ("reduce_scatter", "all_reduce", "reduce")

METHODS: dict[str, tuple[str, int | None]] = {
    "all_gather_single": (GATHER, 0), "_allgather_base": (GATHER, 0), "allgather": (GATHER, 0),
    "allgather_coalesced": (GATHER, 0), "all_gather_single_coalesced": (GATHER, 0),
    "allgather_into_tensor_coalesced": (GATHER, 0),
    "reduce_scatter_single": ("reduce_scatter", 1), "_reduce_scatter_base": ("reduce_scatter", 1),
    "reduce_scatter": ("reduce_scatter", 1), "reduce_scatter_single_coalesced": ("reduce_scatter", 1),
    "reduce_scatter_tensor_coalesced": ("reduce_scatter", 1),
    "allreduce": ("all_reduce", 0), "allreduce_coalesced": ("all_reduce", 0), "reduce": ("reduce", 0),
    "broadcast": ("broadcast", 0), "gather": ("gather", 1), "scatter": ("scatter", 0),
    "alltoall": ("all_to_all", 1), "alltoall_base": ("all_to_all", 1), "all_to_all_single": ("all_to_all", 1),
    "send": ("send", 0), "recv": ("recv", 0), "recv_anysource": ("recv", 0), "barrier": ("barrier", None),
}
"""Method of torch's ProcessGroup, the one way to a backend -> what it is, and which of its arguments holds the whole: the
gathered output, the input that is reduced."""


class Unaccounted(RuntimeError):
    """The collectives and the parameters that DeepSpeed says it gathered do not agree."""


@dataclass
class Call:
    """One collective: `elements` and `bytes` of the whole, gathered or to be reduced. `weights`: stock name -> elements of it,
    of a gather whose parameters are known."""

    kind: str
    elements: int
    bytes: int
    floating: bool
    weights: dict[str, int] | None = None
    part: bool = False
    """Belongs to the gather before it (the scales of quantised weights)."""


class Collectives:
    """Counts inside `with`; `weights`: (stock name, parameter) of student and teacher alike, None as the name of what is
    sharded but no weight of the model, an adapter.

        with Collectives(weights) as counted:
            engine.step(...)
        counted.gathers, counted.bytes["all_gather"], counted.calls["all_reduce"]

    `gathers` = sum over the gathers of (elements of the distinct stock names in it) / (elements of the model): a collective
    that gathers student and teacher of all weights counts 1, and so does one that gathers the student alone. Which parameters
    a gather holds is what DeepSpeed's handle of it says (ZeRO-3), or where its output lies in memory (ZeRO-1 and 2). Bytes are
    those of the whole: of W ranks, each receives (W - 1) / W of them. A process group of one rank sends nothing and is not
    counted.

    On leaving, raises Unaccounted if a gather of floating-point numbers belongs to no known parameter, if a gather's elements
    are not those of its parameters and their padding, or if parameters were said to be gathered and no collective did it."""

    def __init__(self, weights: Iterable[tuple[str | None, Any]]) -> None:
        self._parameters = [(name, parameter) for name, parameter in weights]
        self._names = {id(parameter): name for name, parameter in self._parameters}
        self._sizes = {name: _numel(parameter) for name, parameter in self._parameters if name is not None}
        self._problems: list[str] = []
        self._inside = False
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

    @property
    def calls(self) -> Counter[str]:
        return Counter(call.kind for call in self.log)

    @property
    def bytes(self) -> Counter[str]:
        found: Counter[str] = Counter()
        for call in self.log:
            found[call.kind] += call.bytes
        return found

    @property
    def gathered_bytes(self) -> int:
        """Of parameters, adapters too; without what ranks tell each other about themselves."""
        return sum(call.bytes for call in self.log if call.weights is not None or call.part)

    @property
    def reduced_bytes(self) -> int:
        return sum(call.bytes for call in self.log if call.kind in REDUCE and call.weights is None)

    # ---- hooks -----------------------------------------------------------------------------------------------------------

    def __enter__(self) -> Collectives:
        from deepspeed.runtime.zero import partition_parameters as zero

        self._stack = ExitStack()
        group = torch.distributed.ProcessGroup
        for method, (kind, argument) in METHODS.items():
            if hasattr(group, method):
                self._stack.enter_context(_replaced(group, method, self._collective(kind, argument)))
        for handle in (zero.AllGatherCoalescedHandle, zero.AllGatherHandle):
            self._stack.enter_context(_replaced(handle, "__init__", self._handle(GATHER)))
        self._stack.enter_context(_replaced(zero.AllReduceCoalescedHandle, "__init__", self._handle("all_reduce")))
        for method in ("_allgather_params_coalesced", "_allgather_params_sequential", "_allgather_param"):
            self._stack.enter_context(_replaced(zero.Init, method, self._without_handle))
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        self._stack.close()
        if kind is None:
            self._check()

    def _check(self) -> None:
        gathers = [call for call in self.log if call.kind == GATHER and call.floating and not call.part]
        nameless = [call for call in gathers if call.weights is None]
        if nameless:
            size = sum(call.bytes for call in nameless)
            self._problems.append(f"{len(nameless)} all-gathers of {size} bytes belong to no parameter that was named")
        if self._problems:
            raise Unaccounted(f"{self._problems[0]} ({len(self._problems)} such)")

    def _collective(self, kind: str, argument: int | None) -> Callable[[Callable], Callable]:
        def around(original: Callable) -> Callable:
            @wraps(original)
            def called(group: Any, *args: Any, **kwargs: Any) -> Any:
                if self._inside:  # one method calling another
                    return original(group, *args, **kwargs)
                self._inside = True
                try:
                    if group.size() > 1:
                        given = [*args, *kwargs.values()]
                        self._note(kind, [] if argument is None else list(_tensors(given[argument])))
                    return original(group, *args, **kwargs)
                finally:
                    self._inside = False

            return called

        return around

    def _note(self, kind: str, whole: list[Tensor]) -> None:
        call = Call(kind, sum(t.numel() for t in whole), sum(t.nbytes for t in whole),
                    any(t.is_floating_point() for t in whole))
        if kind == GATHER and call.floating:
            call.weights = self._lying_in(whole)
        self.log.append(call)

    def _lying_in(self, whole: list[Tensor]) -> dict[str, int] | None:
        """Elements of each weight that lie in `whole`; None if nothing does. Parameters of ZeRO-3 lie nowhere yet."""
        spans = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in whole)
        starts = [start for start, _ in spans]
        found: dict[str, int] = {}
        known = False
        for name, parameter in self._parameters:
            if hasattr(parameter, "ds_id") or not parameter.numel():
                continue
            start, end = parameter.data_ptr(), parameter.data_ptr() + parameter.nbytes
            inside = 0
            for i in range(max(0, bisect.bisect_right(starts, start) - 1), len(spans)):
                if spans[i][0] >= end:
                    break
                inside += max(0, min(end, spans[i][1]) - max(start, spans[i][0]))
            if inside:
                known = True
                if name is not None:
                    found[name] = max(found.get(name, 0), inside // parameter.element_size())
        return found if known else None

    def _handle(self, kind: str) -> Callable[[Callable], Callable]:
        """A handle is made right after its collective, which is of this kind."""

        def around(original: Callable) -> Callable:
            signature = inspect.signature(original)

            @wraps(original)
            def made(*args: Any, **kwargs: Any) -> None:
                given = signature.bind(*args, **kwargs).arguments
                quantized = given.get("quantization") is not None
                parameters = list(given["params"]) if "params" in given else [given["param"]]
                self._claim(kind, len(self.log) - (2 if quantized else 1), parameters, quantized)
                original(*args, **kwargs)

            return made

        return around

    def _without_handle(self, original: Callable) -> Callable:
        """Parameters that are gathered at once, one collective each."""

        @wraps(original)
        def called(init: Any, parameters: Any, *args: Any, **kwargs: Any) -> Any:
            before = len(self.log)
            result = original(init, parameters, *args, **kwargs)
            several = parameters if isinstance(parameters, list) else [parameters]
            if several and init._partition_world_size(several[0]) > 1:
                quantized = len(self.log) - before == 2 * len(several)
                for i, parameter in enumerate(several):
                    self._claim(GATHER, before + i * (2 if quantized else 1), [parameter], quantized)
            return result

        return called

    def _claim(self, kind: str, position: int, parameters: list[Any], quantized: bool) -> None:
        """Says that the collective at `position` of the log gathered `parameters`."""
        call = self.log[position] if 0 <= position < len(self.log) else None
        if call is None or call.kind != kind or call.weights is not None:
            self._problems.append(f"{len(parameters)} parameters were gathered by no collective")
            return
        if quantized:
            self.log[position + 1].part = True
        elements = sum(_numel(p) for p in parameters)
        padding = len(parameters) * torch.distributed.get_world_size()
        if not elements <= call.elements < elements + padding:
            self._problems.append(
                f"{len(parameters)} parameters of {elements} elements were gathered by a collective of {call.elements}"
            )
        unknown = sum(id(p) not in self._names for p in parameters)
        if unknown:
            self._problems.append(f"{unknown} gathered parameters are none of those that were named")
        names = {self._names.get(id(p)) for p in parameters}
        call.weights = {name: self._sizes[name] for name in names if name is not None}


def _numel(parameter: Any) -> int:
    return getattr(parameter, "ds_numel", parameter.numel())


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _tensors(one)


@contextmanager
def _replaced(owner: Any, name: str, around: Callable[[Callable], Callable]) -> Iterator[None]:
    """`owner.name` is `around(owner.name)` inside."""
    own = vars(owner).get(name)  # not what getattr gives: a method of a C++ class would not bind any more
    setattr(owner, name, around(getattr(owner, name)))
    try:
        yield
    finally:
        if own is None:
            delattr(owner, name)
        else:
            setattr(owner, name, own)
