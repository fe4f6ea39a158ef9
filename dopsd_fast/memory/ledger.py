"""Counts the bytes that a rank holds at each moment of a run: weights, and everything that is made of them.

A run passes through moments: loading, forward and backward, reduction, optimizer step. At each moment a rank holds the tensors
that stay for the whole run and those that this moment needs; the peak is that of the fullest moment. Every term is a tensor
that this program, DeepSpeed or gloo allocates. Names of DeepSpeed's settings are those of version 0.19.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from dopsd_fast.families.base import Family
from dopsd_fast.memory.activations import Activations, meta_pair
from dopsd_fast.method.registry import make_objective
from dopsd_fast.settings.schema import Settings

CONTEXT = 1_000_000_000
"""Bytes of a GPU that are in use outside of tensors: the CUDA context with its kernels (about 0.5 GB), cuBLAS's workspaces and
NCCL's buffers."""
PROCESS = 600_000_000
"""Bytes of CPU memory that a process takes once it has loaded torch, DeepSpeed, diffusers and PEFT."""
ALL_REDUCE = 500_000_000
"""Number of elements after which stage 0 ends a bucket (`plain_engine.BUCKET`)."""

KINDS = ("weights", "gathered weights", "gather buffers", "masters", "moments", "EMA", "gradients", "reduce buffers",
         "activations for backward", "working memory", "transfer buffers", "CUDA context", "Python and libraries")


@dataclass(frozen=True)
class Machine:
    """The machine that a plan is made for. kind: "cuda", or "cpu", where the node's memory also holds what a GPU would hold.
    device_bytes: memory of one GPU. host_bytes: CPU memory of one node. None means that there is no limit."""

    ranks: int
    ranks_per_node: int
    device_bytes: int | None
    host_bytes: int | None
    kind: str

    @staticmethod
    def here(world: int, local_world: int, device: torch.device) -> Machine:
        memory = _host_memory()
        if device.type != "cuda":
            return Machine(world, local_world, None, memory, "cpu")
        return Machine(world, local_world, torch.cuda.get_device_properties(device).total_memory, memory, "cuda")


@dataclass(frozen=True)
class Moment:
    """The bytes on one rank at one moment, by kind (see KINDS)."""

    name: str
    device: Counter[str]
    host: Counter[str]


def _host_memory() -> int:
    """Returns the bytes of the node's memory, or of the part that the container lets this process use."""
    total = psutil.virtual_memory().total
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        limit = Path(name).read_text().strip() if Path(name).is_file() else "max"
        if limit.isdigit():
            total = min(total, int(limit))
    return total


# ---- what the model is made of -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sizes:
    """How many elements the tensors of a pair have, counted from the model on the meta device.

    item: bytes of an element of the weights.
    trained: elements of each trained tensor. teacher: of the teacher's tensor for each, where there is one. other: of each
        remaining frozen tensor.
    units: elements of each fetch unit, student and teacher together. adapter_units: of the adapters in each.
    swept: trained elements of each unit that gather=sweep gathers a second time.
    model: elements of the transformer without adapters.
    summed: elements of the trained tensors whose gradients `GradientSums` keeps in one allocation.
    fused: whether the family has a pair forward and it is used."""

    item: int
    trained: list[int]
    teacher: list[int]
    other: list[int]
    units: list[int]
    adapter_units: list[int]
    swept: list[int]
    model: int
    summed: int
    fused: bool

    @property
    def everything(self) -> list[int]:
        return self.trained + self.teacher + self.other


def sizes_of(family: Family, settings: Settings) -> Sizes:
    pair = meta_pair(family, settings)
    trained = pair.trained()
    mine = {id(t.student) for t in trained} | {id(t.teacher) for t in trained if t.teacher is not None}
    parts: list[list[torch.nn.Module]] = []
    swept, summed = [], 0
    if pair.fused is not None:
        kinds = pair.fused.gather_units()
        parts = [[unit] for unit in pair.fused.modules() if isinstance(unit, kinds)]
        again = [*pair.fused.state_path(), torch.nn.ModuleList(pair.fused.prepare_path())]
        swept = [sum(p.numel() for p in u.parameters() if p.requires_grad) for u in again]
        summed = sum(p.numel() for p in pair.fused.summed_parameters("student") if p.requires_grad)
    else:
        branches = [pair.student] if pair.teacher is None else [pair.student, pair.teacher]
        parts = [list(same) for same in zip(*([p for c in branch.children() for p in _opened(c)] for branch in branches))]
    named = [[item for module in part for item in module.named_parameters()] for part in parts]
    return Sizes(
        next(p for p in pair.parameters()).element_size(),
        [t.student.numel() for t in trained],
        [t.teacher.numel() for t in trained if t.teacher is not None],
        [p.numel() for p in pair.parameters() if id(p) not in mine],
        [sum(p.numel() for _, p in part) for part in named],
        [sum(p.numel() for name, p in part if ".lora_" in name) for part in named],
        swept,
        sum(p.numel() for name, p in pair.student.named_parameters() if ".lora_" not in name),
        summed, pair.fused is not None,
    )


def _opened(module: torch.nn.Module) -> list[torch.nn.Module]:
    return list(module.children()) if isinstance(module, torch.nn.ModuleList | torch.nn.ModuleDict) else [module]


def shard(sizes: Sequence[int], ranks: int) -> int:
    """Returns how many elements a rank holds where each tensor is divided among the ranks by itself, and padded so that all
    shares are equal."""
    return sum(-(-size // ranks) for size in sizes)


# ---- from moment to moment ---------------------------------------------------------------------------------------------


@dataclass
class Ledger:
    """Collects moments. `device` and `host` count the bytes, by kind, that stay from now on; `moments` lists the moments so
    far."""

    device: Counter[str] = field(default_factory=Counter)
    host: Counter[str] = field(default_factory=Counter)
    moments: list[Moment] = field(default_factory=list)

    def moment(self, name: str, device: dict[str, int] | None = None, host: dict[str, int] | None = None) -> None:
        """Adds a moment, which holds what stays and, beside it, `device` and `host`."""
        self.moments.append(Moment(name, self.device + Counter(device or {}), self.host + Counter(host or {})))


@dataclass(frozen=True)
class Run:
    """One arrangement of a run, whose moments and network traffic are counted.

    activations: measured by `activations.measure`. gather: as `Pair.gather`. zero: zero_optimization of DeepSpeed's dict."""

    settings: Settings
    machine: Machine
    sizes: Sizes
    activations: Activations
    gather: str | None
    zero: dict[str, Any]

    @property
    def ema(self) -> bool:
        return self.settings.teacher.kind == "ema"

    @property
    def total(self) -> int:
        return sum(self.sizes.trained)

    @property
    def whole_base(self) -> bool:
        """Tells whether each rank holds the whole frozen base. With adapters, gather=step and sweep do not shard it."""
        return self.gather != "unit" and self.settings.adapter.kind == "lora"

    @property
    def gloo(self) -> bool:
        """Tells whether collectives run on gloo. Its thread keeps the tensors of the last collective until the next."""
        return self.machine.kind == "cpu" and self.machine.ranks > 1

    @property
    def offload(self) -> bool:
        return device_of(self.zero.get("offload_optimizer")) == "cpu"

    @property
    def bucket(self) -> int:
        """Counts the elements of the reduce bucket that are used."""
        return min(int(self.zero.get("reduce_bucket_size", 500_000_000)), self.total)

    def moments(self) -> list[Moment]:
        """Lists the moments of the run, from loading to the optimizer step."""
        ledger, sizes = Ledger(), self.sizes
        ledger.host["Python and libraries"] = PROCESS
        if self.machine.kind == "cuda":
            ledger.device["CUDA context"] = CONTEXT
        whole = sizes.item * sum(sizes.everything)
        on_cuda = self.machine.kind == "cuda"
        ledger.moment("loading", {"weights": whole}, {"weights": sizes.item * sizes.model} if on_cuda else {})
        ledger.device["working memory"] += self.activations.resident
        (self._stage_3 if self.settings.deepspeed.stage == 3 else self._below_3)(ledger)
        return ledger.moments

    # ---- common to several stages

    def _state(self, ledger: Ledger, numel: int) -> None:
        """Adds the optimizer's tensors for `numel` parameters to those that stay."""
        low_bits = self.settings.train.masters == "low_bits" and self.settings.deepspeed.stage == 0
        separate = self.settings.deepspeed.stage > 0 or self.sizes.item < 4  # otherwise the weights are the masters
        kinds = {
            "masters": (2 if low_bits else 4) * numel if separate else 0,
            "moments": 8 * numel,
            "EMA": (2 if low_bits else 4) * numel if self.ema else 0,
        }
        if not self.offload:
            ledger.device.update(kinds)
            return
        from dopsd_fast.distributed.offload import host_bytes

        held = host_bytes(numel, self.sizes.item, self.ema)
        used = (1 + self.ema) * self.sizes.item * numel  # unpinned buffers take only the pages that are written
        staging = held["staging"] if self.machine.kind == "cuda" else min(held["staging"], used)
        ledger.host.update(kinds | {"gradients": held["gradients"], "transfer buffers": staging})

    def _working(self) -> dict[str, int]:
        """Counts what is held while a state is computed and back-propagated, at its peak. Gradients that do not fit below the
        peak beside the kept activations are left out, because they appear only as those activations are freed."""
        a = self.activations
        gradients = min(a.gradients, a.peak - a.kept)
        return {"activations for backward": a.kept, "gradients": gradients, "working memory": a.peak - a.kept - gradients}

    def _forward(self) -> dict[str, int]:
        """Counts what is held before the first backward."""
        a = self.activations
        return {"activations for backward": a.kept, "working memory": a.forward - a.kept}

    # ---- stages 0, 1, 2

    def _below_3(self, ledger: Ledger) -> None:
        sizes, total, ranks = self.sizes, self.total, self.machine.ranks
        part = total if self.settings.deepspeed.stage == 0 else -(-total // (2 * ranks)) * 2
        ledger.device["weights"] = sizes.item * sum(sizes.everything)
        if self.settings.deepspeed.stage and self.offload:
            largest = sizes.item * max(sizes.trained)
            ledger.device["reduce buffers"] += largest  # DeepSpeed stages one gradient on the device and on the host
            ledger.host["reduce buffers"] += largest
        self._state(ledger, part)
        if self.settings.deepspeed.stage:  # student and teacher are copied to flat tensors, one after the other
            ledger.moment("starting the engine", {"weights": sizes.item * total})
        ledger.moment("forward and backward", self._working())
        if self.settings.deepspeed.stage == 0:
            flat = min(total, ALL_REDUCE + max(sizes.trained))  # a bucket is copied to one flat tensor
            ledger.moment("reducing gradients", {"gradients": 4 * total, "reduce buffers": 4 * flat})
            return
        # Gradients are copied into a bucket, and a full bucket into the flat tensor that is reduced. The gradient sums lie
        # in one allocation, which is freed with the last of them. This rank's part of the result is collected in a partition.
        bucket = self.bucket if self.machine.kind == "cpu" else int(self.zero.get("reduce_bucket_size", 500_000_000))
        several = total > self.bucket
        kept = 0 if self.offload and sizes.item == 4 else 4 * part
        waiting = 4 * (max(sizes.summed, total - self.bucket) if several else 0)
        filled = total if several or not sizes.summed else sizes.summed
        filling = {"gradients": 4 * filled + (kept if several else 0), "reduce buffers": 4 * bucket}
        ledger.moment("filling the bucket", filling)
        early = kept if several or sizes.item < 4 else 0  # fp32 gradients go into the partition after the first reduction
        reducing = {"gradients": waiting + early, "reduce buffers": 4 * (bucket + self.bucket)}
        ledger.moment("reducing gradients", reducing)
        flattened = 4 * part if sizes.item == 4 and not self.offload else 0
        ledger.moment("optimizer step", {"gradients": kept + flattened})
        if self.ema:  # the gather needs its input and, with gloo, its output
            out = sizes.item * total if self.machine.kind == "cpu" else 0
            ledger.moment("gathering weights", {"gather buffers": sizes.item * part + out})

    # ---- stage 3

    def _stage_3(self, ledger: Ledger) -> None:
        sizes, ranks, item = self.sizes, self.machine.ranks, self.sizes.item
        sharded = sizes.trained + sizes.teacher + ([] if self.whole_base else sizes.other)
        place = ledger.host if device_of(self.zero.get("offload_param")) == "cpu" else ledger.device
        place["weights"] += item * shard(sharded, ranks)
        ledger.device["weights"] += item * (sum(sizes.other) if self.whole_base else 0)
        part = shard(sizes.trained, ranks)
        ledger.moment("starting the engine", host={"weights": item * part})  # DeepSpeed defragments through the host
        self._state(ledger, part)
        if not self.offload:
            ledger.device["gradients"] += 4 * part  # the reduced gradients
        if self.machine.kind == "cuda":
            ledger.device["reduce buffers"] += 4 * int(self.zero.get("reduce_bucket_size", 500_000_000))
        if self.machine.kind == "cpu":
            ledger.device["reduce buffers"] += 4 * self.bucket  # allocated at the start, used from the first reduction on
        gathered = sum(sharded) if ranks > 1 else 0
        near = int(self.zero.get("zero_hpz_partition_size", 1))
        second = {"weights": item * shard(sharded, near)} if near > 1 else {}
        getattr(self, f"_stage_3_{self.gather}")(ledger, gathered, second)
        if not self.offload:
            flat = min(part, int(float(self.zero.get("sub_group_size", 1e9))))
            ledger.moment("optimizer step", {"gradients": 4 * flat, **second})

    def _reduction(self, waiting: int) -> dict[str, int]:
        """Counts what a reduction holds: the part of `waiting` fp32 gradients outside the bucket, the bucket's copy in the
        ranks' order and, on gloo, gloo's own copy."""
        return {"gradients": 4 * max(0, waiting - self.bucket), "reduce buffers": 4 * self.bucket * (2 if self._clones else 1)}

    @property
    def _clones(self) -> bool:
        return self.machine.kind == "cpu"

    def _first_forward(self, ledger: Ledger, weights: dict[str, int], states: int) -> None:
        """Adds the first forward. A unit arrives as one flat tensor, which is then cut into parameters; the next unit, which is
        on its way, needs only its flat tensor."""
        units = self.sizes.adapter_units if self.whole_base else self.sizes.units
        flight = max(units, default=0) if any(weights.values()) else 0
        forward = {kind: size // states for kind, size in self._forward().items()}
        ledger.moment("first forward", weights | {"gather buffers": self.sizes.item * flight} | forward)

    def _stage_3_step(self, ledger: Ledger, gathered: int, second: dict[str, int]) -> None:
        weights = {"gathered weights": self.sizes.item * gathered}
        self._first_forward(ledger, weights, 1)
        ledger.moment("forward and backward", weights | self._working())
        ledger.moment("reducing gradients", weights | self._reduction(self.total))

    def _stage_3_sweep(self, ledger: Ledger, gathered: int, second: dict[str, int]) -> None:
        weights = {"gathered weights": self.sizes.item * gathered}
        self._first_forward(ledger, weights, self.settings.method.num_states)
        ledger.moment("forwards", weights | self._forward())
        swept = self.sizes.item * max(self.sizes.swept, default=0) if gathered else 0
        weights = {"gathered weights": swept, "gather buffers": swept}
        backwards = Counter(second) + Counter(weights | self._working())
        several = self.total > self.bucket  # then a bucket is reduced while states wait for their backward
        ledger.moment("backwards", backwards + Counter(self._reduction(0) if several else {}))
        ledger.moment("reducing gradients", self._reduction(0))

    def _stage_3_unit(self, ledger: Ledger, gathered: int, second: dict[str, int]) -> None:
        item, sizes = self.sizes.item, self.sizes
        small = int(float(self.zero.get("stage3_param_persistence_threshold", 1e5)))
        persistent = sum(n for n in sizes.everything if n <= small)
        most = int(float(self.zero.get("stage3_max_live_parameters", 1e9)))
        ahead = int(float(self.zero.get("stage3_prefetch_bucket_size", 5e7)))
        live = min(gathered, max(most, max(sizes.units, default=0)) + persistent)
        flat = item * min(ahead, gathered)
        weights = {"gathered weights": item * live}
        # Units that are gathered ahead are flat at first and have made no activations yet. Gloo keeps the last of them.
        done = 1 - min(ahead, gathered) / max(gathered, 1)
        forward = {kind: int(done * size) for kind, size in self._forward().items()}
        ledger.moment("first forward", weights | {"gather buffers": flat} | forward)
        always = flat if self.gloo or live < gathered else 0
        later = Counter(weights | {"gather buffers": always}) + Counter(second)
        ledger.moment("forward and backward", later + Counter(self._working()))
        ledger.moment("reducing gradients", Counter(self._reduction(self.total)) + Counter(second))

    # ---- what goes over the network in a step

    def traffic(self) -> tuple[float, int, int]:
        """Returns what one rank sends and receives in a step: (gathers of the whole model without adapters, bytes gathered,
        bytes reduced). Gathering student and teacher together counts as one gather."""
        sizes, s, ranks = self.sizes, self.settings, self.machine.ranks
        away = (ranks - 1) / ranks  # the share of each tensor that lies on other ranks
        full = s.adapter.kind == "full"
        reduced = int(4 * self.total * away)
        if s.deepspeed.stage < 3:  # an all-reduce moves the gradients twice
            times = (1 + self.ema) if s.deepspeed.stage and ranks > 1 else 0
            return float(times * full), int(times * sizes.item * self.total * away), 2 * reduced
        if ranks == 1:
            return 0.0, 0, 0
        states = make_objective(s.method).states(s.method.num_states)
        item = 1 if self.zero.get("zero_quantized_weights") else sizes.item
        everything = item * (self.total + sum(sizes.teacher) + (0 if self.whole_base else sum(sizes.other)))
        if self.gather == "step":
            return float(full), int(everything * away), reduced
        if self.gather == "sweep":
            again = min(sum(sizes.swept), sizes.model)
            return 1 + again / sizes.model, int((everything + item * again) * away), reduced
        limits = [int(float(self.zero.get(f"stage3_max_{name}", 1e9))) for name in ("live_parameters", "reuse_distance")]
        if sum(sizes.everything) <= min(limits):  # DeepSpeed keeps weights that it needs again soon
            return 1.0, int(everything * away), reduced
        if sizes.fused:
            return 2.0 * states, int(2 * states * everything * away), reduced
        times = states * (3 + (s.train.activations == "recompute"))
        return float(times), int(times * item * sizes.model * away), reduced


def device_of(part: Any) -> str:
    """Returns the device that an `offload_...` table of DeepSpeed names, or "none"."""
    return str(part.get("device", "none")) if isinstance(part, dict) else "none"
