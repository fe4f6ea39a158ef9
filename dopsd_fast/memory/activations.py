"""Measures how much memory the activations of a training step take, by running the step on the meta device.

    trace = LiveBytes()
    with trace:
        loss = step()
    trace.peak, trace.live          # most bytes that were alive at once, and the bytes that are alive now

The meta device computes nothing and allocates nothing. A storage counts from the operator that makes it until its last tensor
is gone; storages that were there before, such as the weights, do not count. A full-size model takes a second or two.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dopsd_fast.conditioning.context import Shapes
from dopsd_fast.data.buckets import bucket_sizes
from dopsd_fast.families.base import Family
from dopsd_fast.families.build import build_pair
from dopsd_fast.method.objective import StepInputs
from dopsd_fast.method.registry import make_objective
from dopsd_fast.pair.student_teacher import Pair
from dopsd_fast.settings.schema import Settings
from dopsd_kernels import backend, native_ops


@dataclass(frozen=True)
class Activations:
    """The bytes that a step needs on the device beside the weights.

    kept: what is alive when the first backward begins. That is one state's graph, or the graphs of all K states where they wait
        for each other (gather=sweep, method.backward=k_graphs).
    gradients: the most that parameters' gradients take while states are computed.
    forward: the most that is alive before the first backward.
    peak: the most that is alive at any time, including all of the above.
    resident: what stays after the step, which is the 8-bit copies of frozen matrices."""

    kept: int
    gradients: int
    forward: int
    peak: int
    resident: int


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the meta device's storages that are made while this mode is on and are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._sizes: dict[int, tuple[Any, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        known = {id_of(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.is_meta and id_of(leaf) not in known:
                self._count(leaf.untyped_storage())
        return out

    def _count(self, storage: Any) -> None:
        key = storage._cdata
        if key in self._sizes:
            return
        size = storage.nbytes()

        def gone(_: Any, key: int = key, size: int = size) -> None:
            if self._sizes.pop(key, None) is not None:
                self.live -= size

        self._sizes[key] = (weakref.ref(storage, gone), size)
        self.live += size
        self.peak = max(self.peak, self.live)


def id_of(tensor: Tensor) -> int:
    """Identifies a tensor's storage, which several tensors may share."""
    return tensor.untyped_storage()._cdata


@contextmanager
def on_meta(bodies: bool) -> Iterator[None]:
    """Makes a step run on the meta device. Code that reads values gets zeros. Attention is torch's fused kernel, because the
    meta device would otherwise choose the one that stores a whole attention matrix.

    bodies: count the tensors that the plain PyTorch versions of our operators make inside. Otherwise only the operators'
        results count, as where each is one kernel."""
    traced = mock.patch.object(backend, "_traced", lambda arguments: False) if bodies else nullcontext()
    with (
        traced,
        mock.patch.object(Tensor, "tolist", _zeros),
        mock.patch.object(nn.functional, "scaled_dot_product_attention", _attention),
    ):
        yield


_tolist = Tensor.tolist


def _zeros(tensor: Tensor) -> Any:
    return _tolist(torch.zeros(tensor.shape) if tensor.is_meta else tensor)


def _attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, dropout_p: float = 0.0,
               is_causal: bool = False, scale: float | None = None, **_: Any) -> Tensor:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
    )[0]


def largest_shapes(family: Family, resolution: int) -> Shapes:
    """Returns the shapes with the most tokens at `data.resolution`: the largest bucket and the longest contexts. Raises
    UserError for a size that the model cannot take."""
    sizes = bucket_sizes(resolution, family.pixel_multiple)
    latent = family.latent_shape(*max(sizes, key=lambda size: size[0] * size[1]))
    return Shapes(latent, *family.largest_contexts(latent))


# ---- the pair on the meta device ---------------------------------------------------------------------------------------


def meta_pair(family: Family, settings: Settings) -> Pair:
    """Builds the pair as `build_pair` does, on the meta device and so without memory for weights."""
    model = family.meta_transformer()
    without = SimpleNamespace(
        name=family.name, lora_targets=family.lora_targets, pair_forward=family.pair_forward, velocity=family.velocity,
        load_transformer=lambda dtype: nn.Module.to(model, dtype).requires_grad_(True),
    )
    dtype = torch.bfloat16 if settings.train.precision == "bf16" else torch.float32
    return build_pair(without, settings.backbone, settings.adapter, settings.teacher, settings.train, dtype)  # type: ignore[arg-type]


def measure(family: Family, settings: Settings, shapes: Shapes, gather: str | None, kind: str = "cuda") -> Activations:
    """Measures the activations of a step with the largest `shapes`. One or two states are traced; where more graphs wait for
    each other, each further state adds what the second added.

    gather: as `Pair.gather`. kind: the machine's ("cuda", "cpu"). On a CPU without native kernels for the weights' dtype, such
        as bf16, the plain PyTorch versions run, and their inner tensors count."""
    pair = meta_pair(family, settings)
    pair.gather = gather
    bodies = kind == "cpu" and not native_ops.usable(torch.empty(1, dtype=next(pair.parameters()).dtype))
    objective = make_objective(settings.method)
    states = objective.trained_states(settings.method.num_states)
    if states == 1 or (gather != "sweep" and objective.per_state):
        return Activations(*_states(family, settings, shapes, pair, min(states, 2), bodies))
    one, two = (_states(family, settings, shapes, pair, count, bodies) for count in (1, 2))
    return Activations(*(a + (states - 1) * (b - a) for a, b in zip(one, two)))


def _states(family: Family, settings: Settings, shapes: Shapes, pair: Pair, states: int, bodies: bool) -> list[int]:
    """Traces a step of `states` states and returns the fields of `Activations` in their order. Where gradients are accumulated
    it traces two micro-batches, because the second runs beside the gradients of the first."""
    batch = settings.train.batch_size
    dtype = next(pair.student.parameters()).dtype
    objective, live = make_objective(settings.method), LiveBytes()
    kept = gradients = forward_peak = 0
    forward: Any = None
    for trained in pair.trained():
        trained.student.grad_dtype = torch.float32

    def backward(loss: Tensor) -> None:
        nonlocal kept, gradients, forward_peak
        if pair.gather != "sweep" and not kept:
            kept, forward_peak = live.live, live.peak
        loss.backward()
        sums = getattr(forward, "sums", None)
        found = [t.student.grad for t in pair.trained()] + (list(sums._sums.values()) if sums is not None else [])
        storages = {id_of(tensor): tensor.untyped_storage().nbytes() for tensor in found if tensor is not None}
        gradients = max(gradients, sum(storages.values()))

    def sweep(turns: Any) -> None:
        nonlocal kept, forward_peak
        kept, forward_peak = live.live, live.peak
        for _, action in turns:
            action()
            _forget_gradients(pair)

    pair.sweep = sweep
    contexts = [[_context(shape, dtype) for _ in range(batch)] for shape in (shapes.student, shapes.teacher)]
    latents = [torch.empty(batch, *shapes.latent, device="meta") for _ in range(2)]
    with on_meta(bodies), live:
        for _ in range(min(settings.train.accumulation, 2)):
            forward = pair.open(contexts[0], contexts[1] if objective.needs_teacher else [], latents[0].shape)
            inputs = StepInputs(
                noise=latents[0], grid=[k / states for k in range(states)] + [1.0], forward=forward,
                latents=latents[1] if objective.needs_latents else None,
                times=torch.empty(batch, device="meta") if objective.needs_times else None,
                second_noise=latents[0] if objective.draws else None,
            )
            objective.accumulate(inputs, backward)
        peak = live.peak
        del inputs
        forward = None
        _forget_gradients(pair)
    return [kept - live.live, gradients, forward_peak - live.live, peak - live.live, live.live]


def _forget_gradients(pair: Pair) -> None:
    for trained in pair.trained():
        trained.student.grad = None


def _context(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> dict[str, Tensor]:
    ids = {name: torch.zeros(shape, dtype=torch.int64) for name, shape in shapes.items() if name == "reference_ids"}
    return {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in shapes.items()} | ids
