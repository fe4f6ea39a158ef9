"""Counts what a program would do on a GPU, by running it on the meta device: kernels, GEMMs, bytes, FLOPs, saved tensors.

    trace = Trace()
    trace.watch(model.layers, "block")           # modules whose work is told apart
    with trace:
        step()
    trace.cost(region="block", phase="backward").elementwise_bytes

Rules. A custom op of `dopsd::` costs what it declares (dopsd_kernels.costs); everything else is what PyTorch's eager CUDA
kernels do: a view or an allocation is nothing, a matrix product is one GEMM, a flash attention one kernel forward and
three backward, a `_foreach_` op as many kernels as its tensors need, anything else one kernel that reads its inputs and
writes its outputs once (a dimension broadcast with stride 0 is read once). Work on CPU tensors, and copies from them, are
no kernels. scaled_dot_product_attention is taken for a flash kernel. `.item()` and `.tolist()` give 0.
"""

from __future__ import annotations

import bisect
from collections import Counter, defaultdict
from collections.abc import Iterable
from contextlib import ExitStack
from functools import partial
from operator import itemgetter
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry

from dopsd_fast.memory.activations import id_of, on_meta
from dopsd_kernels.costs import COSTS, Cost

aten = torch.ops.aten

FREE = {
    aten.detach, aten.alias, aten.lift_fresh, aten._unsafe_view, aten._reshape_alias, aten.empty, aten.empty_like,
    aten.empty_strided, aten.empty_permuted, aten.new_empty, aten.new_empty_strided, aten.set_, aten.resize_,
    aten._local_scalar_dense, aten.equal, aten.is_same_size,
}
GEMMS = {aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.mv, aten.addmv, aten._scaled_mm, aten.convolution}
OVERWRITES = {aten.copy_, aten.fill_, aten.zero_, aten.normal_, aten.uniform_}
"""In-place ops that do not read what they write."""
ZERO_THEN_COPY = {aten.slice_backward, aten.select_backward}
GATHERS = {aten.index, aten.index_select, aten.embedding, aten.gather}
FOREACH_TENSORS = (110, 64, 48, 36, 30)
FOREACH_CHUNK, FOREACH_BLOCKS = 65536, 320
"""torch's multi-tensor kernels: tensors a launch by the number of lists, elements a block, blocks a launch."""


class Trace(TorchDispatchMode):
    """One traced program. Regions nest: work belongs to the innermost. Phases: "student forward" and "teacher forward" inside a
    watched module, with and without gradients; "recompute", the same during backward; "backward"; "accumulate", adding a
    parameter's gradient to its `.grad`; "other", outside of every watched module."""

    def __init__(self) -> None:
        super().__init__()
        self.costs: dict[tuple[str, str, str], Cost] = defaultdict(Cost)
        """(region, phase, op) -> sum of its calls; the region is "" outside of the watched modules."""
        self.saved: Counter[str] = Counter()
        """Bytes kept for backward, by the region that first kept them; parameters are not counted."""
        self._forward: list[tuple[str, str]] = []
        self._backward = ""
        self._begins: list[tuple[int, str]] = [(0, "")]
        """(sequence number of autograd, the region whose nodes are numbered from there on)."""
        self._parameters: set[int] = set()
        self._kept: dict[int, Any] = {}

    def watch(self, modules: nn.Module | Iterable[nn.Module], region: str) -> None:
        """The forward and backward of these modules is `region`; their parameters are no saved activations."""
        for module in [modules] if isinstance(modules, nn.Module) and not isinstance(modules, nn.ModuleList) else modules:
            self.ignore(module)
            module.register_forward_pre_hook(partial(self._enter, region), with_kwargs=True)
            module.register_forward_hook(self._leave, always_call=True)

    def ignore(self, module: nn.Module) -> None:
        """The parameters and buffers of `module` are not counted as saved."""
        self._parameters |= {id_of(tensor) for tensor in (*module.parameters(), *module.buffers())}

    def cost(self, region: str | None = None, phase: str | None = None, op: str = "") -> Cost:
        """Sum over the ops whose name contains `op`; None: all."""
        total = Cost()
        for (where, when, what), cost in self.costs.items():
            if region in (None, where) and phase in (None, when) and op in what:
                total += cost
        return total

    # ---- running -----------------------------------------------------------------------------------------------------

    def __enter__(self) -> Trace:
        self._stack = ExitStack()
        self._stack.enter_context(on_meta(bodies=False))
        self._stack.enter_context(mock.patch.object(functional, "scaled_dot_product_attention", _attention))
        self._stack.enter_context(saved_tensors_hooks(self._keep, lambda tensor: tensor))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._stack.close()
        self._kept.clear()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is aten._local_scalar_dense.default and args[0].is_meta:
            return 0.0
        out = function(*args, **kwargs)
        place, cost = self._place(), cost_of(function, args, kwargs, out)
        if cost != Cost():
            self.costs[*place, function.overloadpacket._qualified_op_name] += cost
        return out

    def _place(self) -> tuple[str, str]:
        """Region and phase of what runs now. A node's backward belongs to the region whose forward made the node."""
        node = torch._C._current_autograd_node()  # type: ignore[attr-defined]
        if self._forward:
            region, branch = self._forward[-1]
            return region, branch if node is None else "recompute"
        if node is None:
            return "", "other"
        if "AccumulateGrad" in node.name():
            return self._backward, "accumulate"
        place = bisect.bisect_right(self._begins, node._sequence_nr(), key=itemgetter(0))
        self._backward = self._begins[place - 1][1]
        return self._backward, "backward"

    def _enter(self, region: str, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """What arrives is seen through views of the region outside: what autograd does to a tensor's gradient on its way, to
        add up several or to cast, belongs to the node that the gradient comes from."""
        seen = [one.view_as(one) if isinstance(one, Tensor) else one for one in (*args, *kwargs.values())]
        branch = "student" if torch.is_grad_enabled() else "teacher"
        self._forward.append((region, f"{branch} forward"))
        self._begin()
        return tuple(seen[: len(args)]), dict(zip(kwargs, seen[len(args) :]))

    def _leave(self, module: nn.Module, args: tuple, out: Any) -> Any:
        """Likewise, through views of the region inside."""
        out = tree_map_only(Tensor, lambda tensor: tensor.view_as(tensor), out)
        self._forward.pop()
        self._begin()
        return out

    def _begin(self) -> None:
        self._begins.append((torch.autograd._get_sequence_nr(), self._forward[-1][0] if self._forward else ""))

    def _keep(self, tensor: Tensor) -> Tensor:
        identity = id_of(tensor)
        if tensor.is_meta and identity not in self._parameters and identity not in self._kept:
            self._kept[identity] = tensor.untyped_storage()  # held, so that no later storage gets its identity
            self.saved[self._forward[-1][0] if self._forward else ""] += tensor.untyped_storage().nbytes()
        return tensor


def _attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, **_: Any,
) -> Tensor:
    """scaled_dot_product_attention as one fused kernel of a GPU, whatever the mask."""
    return aten._scaled_dot_product_flash_attention(query, key, value, 0.0, is_causal, scale=scale)[0]


def cost_of(function: Any, args: tuple, kwargs: dict, out: Any) -> Cost:
    """Of one call of an operator."""
    packet = function.overloadpacket
    name = packet._qualified_op_name
    if name.startswith("dopsd::"):
        if name not in COSTS:
            raise ValueError(f"{name} declares no cost: add @declares to its module")
        return COSTS[name](*args, **kwargs, out=out)
    inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
    on_device = all(tensor.is_meta for tensor in outputs) and not any(not t.is_meta and t.ndim for t in inputs)
    if packet in FREE or function.is_view or not on_device or not (inputs or outputs):
        return Cost()
    if packet in GEMMS:
        return Cost(1, 1, 0, flop_registry[packet](*args, **kwargs, out_val=out) if packet in flop_registry else 0)
    if "attention" in name:
        flops = flop_registry[packet](*args, **kwargs, out_val=out)
        return Cost(3 if "backward" in name else 1, 0, 0, flops)
    if name.startswith("aten::_foreach"):
        return _foreach(args, kwargs, out)
    written = _written(function, args, kwargs) or outputs
    if not any(tensor.numel() for tensor in written):
        return Cost()
    return _elementwise(packet, inputs, written)


def _elementwise(packet: Any, inputs: list[Tensor], written: list[Tensor]) -> Cost:
    write = sum(map(moved, written))
    if packet in ZERO_THEN_COPY:
        return Cost(2, 0, write + 2 * sum(map(moved, inputs)))
    if packet in OVERWRITES:
        inputs = [tensor for tensor in inputs if all(tensor is not other for other in written)]
    if packet in GATHERS:
        return Cost(1, 0, 2 * write + sum(map(moved, inputs[1:])))
    distinct = {id(tensor): tensor for tensor in inputs}
    return Cost(1, 0, write + sum(map(moved, distinct.values())))


def moved(tensor: Tensor) -> int:
    """Bytes of the distinct elements: dimensions of stride 0 count once."""
    count = tensor.element_size()
    for size, stride in zip(tensor.shape, tensor.stride()):
        count *= size if stride or not size else 1
    return count


def _written(function: Any, args: tuple, kwargs: dict) -> list[Tensor]:
    """The arguments that the operator writes to."""
    found: list[Tensor] = []
    for i, argument in enumerate(function._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            found += [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
    return found


def _foreach(args: tuple, kwargs: dict, out: Any) -> Cost:
    """torch/csrc/.../MultiTensorApply.cuh: a launch ends when its table of tensors or of blocks is full."""
    lists = [value for value in (*args, *kwargs.values(), out) if isinstance(value, (list, tuple)) and value]
    lists = [value for value in lists if isinstance(value[0], Tensor) and value[0].ndim + value[0].numel() > 1]
    lists = [value for value in lists if value[0].is_meta]
    if not lists:
        return Cost()
    most = FOREACH_TENSORS[min(len(lists), len(FOREACH_TENSORS)) - 1]
    launches = tensors = blocks = 0
    for tensor in lists[0]:
        tensors += 1
        for _ in range(-(-tensor.numel() // FOREACH_CHUNK)):
            blocks += 1
            if blocks == FOREACH_BLOCKS:
                launches, tensors, blocks = launches + 1, 1, 0
        if tensors == most:
            launches, tensors, blocks = launches + 1, 0, 0
    read_and_written = 1 if out is not None else 2  # without a result, the first list is updated in place
    extra = (read_and_written - 1) * sum(map(moved, lists[0]))
    return Cost(launches + bool(blocks), 0, sum(moved(tensor) for value in lists for tensor in value) + extra)
