"""How much memory a training step's activations take, measured by running it on the meta device.

    trace = LiveBytes()
    with trace:
        loss = step()
    trace.peak, trace.live          # bytes of the storages that were, or are, alive

Nothing is computed and nothing allocated; a storage counts from the operator that makes it until its last tensor is gone.
What lived before, the weights, is not counted. A full-size model takes a second or two.
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
    """Bytes on the device beside the weights.

    kept: alive from the last forward to its backward; of all K states where their graphs wait for each other
    (gather=sweep, method.backward=k_graphs). gradients: of parameters, the most there are while states are computed. forward:
    most alive until the first backward. peak: most alive at any time, all of these included. resident: what stays after
    the step, 8-bit copies of frozen matrices."""

    kept: int
    gradients: int
    forward: int
    peak: int
    resident: int


class LiveBytes(TorchDispatchMode):
    """Sums the bytes of the meta device's storages that appear while it is on, and that still live."""

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
    return tensor.untyped_storage()._cdata


@contextmanager
def on_meta(bodies: bool) -> Iterator[None]:
    """What reads values gets zeros, and attention is a fused kernel: without it, the meta device would choose the one that
    stores a whole attention matrix. `bodies`: our own operators count by what their plain PyTorch does inside, else by
    their results, as where they are one kernel."""
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


def largest_shapes(family: Family, settings: Settings) -> Shapes:
    """The most tokens that the settings allow: the largest bucket, the longest prompts. UserError for a size that the model
    cannot take."""
    sizes = bucket_sizes(settings.data.resolution, family.pixel_multiple)
    latent = family.latent_shape(*max(sizes, key=lambda size: size[0] * size[1]))
    return Shapes(latent, *family.largest_contexts(latent))


# ---- the pair on the meta device ---------------------------------------------------------------------------------------


def meta_pair(family: Family, settings: Settings) -> Pair:
    """The pair as `build_pair` makes it, without memory."""
    model = family.meta_transformer()
    without = SimpleNamespace(
        name=family.name, lora_targets=family.lora_targets, pair_forward=family.pair_forward, velocity=family.velocity,
        load_transformer=lambda dtype: nn.Module.to(model, dtype).requires_grad_(True),
    )
    dtype = torch.bfloat16 if settings.train.precision == "bf16" else torch.float32
    return build_pair(without, settings, dtype)  # type: ignore[arg-type]


def measure(family: Family, settings: Settings, shapes: Shapes, gather: str | None, kind: str = "cuda") -> Activations:
    """`gather`: as `Pair.gather`. `kind`: of the machine; on a CPU we have no kernels for bf16. One or two states are traced,
    the others follow from them."""
    pair = meta_pair(family, settings)
    pair.gather = gather
    bodies = kind == "cpu" and not native_ops.usable(torch.empty(1, dtype=next(pair.parameters()).dtype))
    dopsd = settings.method.name == "dopsd"
    states = settings.method.num_states if dopsd else 1
    if states == 1 or (gather != "sweep" and not (dopsd and settings.method.backward == "k_graphs")):
        return Activations(*_states(family, settings, shapes, pair, min(states, 2), bodies))
    one, two = (_states(family, settings, shapes, pair, count, bodies) for count in (1, 2))
    return Activations(*(a + (states - 1) * (b - a) for a, b in zip(one, two)))


def _states(family: Family, settings: Settings, shapes: Shapes, pair: Pair, states: int, bodies: bool) -> list[int]:
    """Of one micro-batch, or of two where gradients are accumulated: the second finds those of the first."""
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
