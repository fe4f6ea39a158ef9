"""Runs the optimizer's step in CPU memory (deepspeed.config: zero_optimization.offload_optimizer.device = "cpu").

The masters, the two moments, the average and one fp32 gradient, 20 bytes a parameter, stay in CPU memory. The step goes over
them part by part. One pass of `adamw_ema` clips, updates and averages a part, and writes the rounded student and teacher into
one of two buffers; from there they travel to the device's shards while the next part is computed.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from dopsd_fast.distributed.fragments import Fragment
from dopsd_fast.distributed.process_group import Ranks
from dopsd_fast.errors import UserError
from dopsd_kernels.adamw_ema import AdamWEMA

PART = 1 << 24
"""Elements of one part: the CPU computes one part while the part before travels to the device."""

Targets = Sequence[tuple[int, Tensor]]
"""Where the copies of a flat tensor's elements go, in order: (index of the first element, flat tensor that takes the elements
from there on). Elements between two targets are not copied."""


def take_pinning(config: dict[str, Any]) -> bool:
    """Returns whether to pin the gradients' memory: `pin_memory` (default true) of offload_optimizer in DeepSpeed's `config`.

    The field is then set to false in `config`, and we pin by ourselves, because DeepSpeed would also pin memory that never
    travels, and would pin through torch, which rounds allocations up to a power of two."""
    section = config["zero_optimization"].get("offload_optimizer")
    if not isinstance(section, dict) or section.get("device") != "cpu":
        return False
    pinned, section["pin_memory"] = bool(section.get("pin_memory", True)), False
    return pinned


def offloads(zero: Any) -> bool:
    """Whether `zero`, a newly made DeepSpeed optimizer, keeps ours in CPU memory, so that `Offload` can take over its step.
    False where DeepSpeed's NVMe or ZenFlow step must run."""
    in_cpu_memory = getattr(zero, "offload_optimizer", getattr(zero, "cpu_offload", False))
    return bool(in_cpu_memory) and not getattr(zero, "swap_optimizer", False) and not getattr(zero, "zenflow", False)


def host_bytes(numel: int, itemsize: int, ema: bool = True, part: int = PART) -> dict[str, int]:
    """Returns the bytes of CPU memory, by kind, of a rank whose shard holds `numel` trained parameters. ZeRO 1, 2 and 3 need
    the same. `itemsize`: bytes of a weight on the device."""
    staging = 2 * (1 + ema) * itemsize * min(part, numel)
    return dict(masters=4 * numel, moments=8 * numel, ema=4 * numel * ema, gradients=4 * numel, staging=staging)


class Offload:
    """Replaces DeepSpeed's step in CPU memory: methods of its optimizer `zero` are exchanged for ours, and DeepSpeed goes on
    calling them in its own order.

    The numbers are those of DeepSpeed's step followed by a cast of the average, bit for bit. When DeepSpeed's engine has
    stepped, this rank's shards of student and teacher are written; the caller gathers them.

    zero: a DeepSpeed optimizer that `offloads`.
    flats: the tensors that `optimizer` steps on this rank.
    fragments: which of their elements belong to which trained tensor; empty where no EMA is kept.
    teacher_flats: at ZeRO 1 and 2, the teacher's weights laid out as the student's.
    pinned: pin the gradients' memory, on CUDA. Raises UserError where the system does not pin that much.
    """

    def __init__(
        self,
        zero: Any,
        optimizer: AdamWEMA,
        flats: Sequence[Tensor],
        fragments: Sequence[Fragment],
        teacher_flats: Sequence[Tensor],
        ranks: Ranks,
        pinned: bool,
    ) -> None:
        self._zero, self._optimizer, self._flats = zero, optimizer, list(flats)
        self._fragments, self._teacher_flats, self._ranks = fragments, teacher_flats, ranks
        sharded = hasattr(zero, "fp16_partitioned_groups_flat")  # DeepSpeed's class for ZeRO-3
        gradients = self._take_stage_3() if sharded else self._take_stage_2()
        on_cuda = ranks.device.type == "cuda"
        self._pinned = gradients if pinned and on_cuda else []
        for tensor in self._pinned:
            _pin(tensor)
        numel = min(PART, max(flat.numel() for flat in self._flats))
        dtype = (zero.fp16_partitioned_groups_flat if sharded else zero.bit16_groups_flat)[0].dtype
        averages = bool(fragments or teacher_flats)
        self._transfers = Transfers([dtype] * (1 + averages), numel, torch.cuda if on_cuda else None)

    def describe(self) -> dict[str, Any]:
        """Names what was chosen, for the run's files."""
        pinned = bool(self._pinned)
        return {"optimizer_offload": "cpu", "offload_part": self._transfers.numel, "gradients_pinned": pinned}

    def close(self) -> None:
        """Unpins the gradients' memory. It must be called before that memory is freed."""
        for tensor in self._pinned:
            torch.cuda.cudart().cudaHostUnregister(tensor.data_ptr())  # type: ignore[attr-defined]
        self._pinned = []

    # ---- one flat tensor -----------------------------------------------------------------------------------

    def _update(self, index: int, group: dict[str, Any], student: Targets, teacher: Targets) -> None:
        """Steps flat tensor `index` part by part, and starts to copy the rounded weights of each part to the device."""
        flat, transfers = self._flats[index], self._transfers
        hyper = self._optimizer.begin(flat, group)
        transfers.begin()
        for start in range(0, flat.numel(), transfers.numel):
            numel = min(transfers.numel, flat.numel() - start)
            buffers = [buffer[:numel] for buffer in transfers.take()]
            self._optimizer.update(flat, hyper, start, numel, *buffers)
            copies = zip((student, teacher), buffers)
            transfers.send([pair for targets, buffer in copies for pair in _pairs(targets, buffer, start)])

    def _factor(self, clip: Callable[[Tensor], object]) -> None:
        """Gives the optimizer the factor by which DeepSpeed would multiply every gradient to clip it. The factor is found by
        letting DeepSpeed's `clip` multiply a tensor that holds a single 1."""
        one = torch.ones(1)
        clip(one)
        self._optimizer.grad_scale = float(one)

    # ---- ZeRO 3 --------------------------------------------------------------------------------------------

    def _take_stage_3(self) -> list[Tensor]:
        """Replaces the methods of DeepSpeed's step that we change. Returns the tensors that hold the gradients."""
        zero = self._zero
        self._home = self._share_gradients()
        clip, post = zero.unscale_and_clip_grads, zero._post_step
        teachers: list[list[tuple[int, Any, int]]] = [[] for _ in self._flats]
        where = {id(flat): index for index, flat in enumerate(self._flats)}
        for fragment in self._fragments:
            teachers[where[id(fragment.flat)]].append((fragment.start, fragment.trained.teacher, fragment.numel))

        def factor(index: int, norm: Any) -> None:
            flats = zero.fp32_partitioned_groups_flat

            def of(one: Tensor) -> None:
                flats[index] = SimpleNamespace(grad=one)
                try:
                    clip(index, norm)
                finally:
                    flats[index] = self._flats[index]

            self._factor(of)

        def step(index: int) -> None:
            student = [(0, zero.fp16_partitioned_groups_flat[index].data)]
            teacher = []
            for start, param, numel in sorted(teachers[index], key=lambda entry: entry[0]):
                teacher.append((start, param.ds_tensor.data.view(-1)[:numel]))
                param.ds_secondary_tensor = None  # drop hpZ's copy, which holds the old weights
            group = self._optimizer.param_groups[zero.sub_group_to_group_id[index]]
            self._update(index, group, student, teacher)

        def finish(timers: Any) -> None:
            self._transfers.finish()
            post(timers)  # this gathers the parameters that DeepSpeed keeps gathered

        zero.unscale_and_clip_grads, zero._optimizer_step, zero._post_step = factor, step, finish
        zero._reassign_or_swap_out_partitioned_parameters = lambda index: None
        zero.partition_grads = self._take_gradients
        return [zero.grad_partitions_flat_buffer]

    def _share_gradients(self) -> dict[int, Tensor]:
        """Makes one tensor of the two that DeepSpeed keeps for every gradient in CPU memory: one in which it accumulates, one
        that the optimizer reads. Returns each parameter's part of it by the parameter's `ds_id`."""
        zero = self._zero
        params = [param for group in zero.fp16_groups for param in group]
        for flat in self._flats:
            flat.grad = None
        zero.grad_partitions_flat_buffer = None
        zero._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition = {}
        whole = torch.zeros(sum(flat.numel() for flat in self._flats), dtype=torch.float32)
        for flat, part in zip(self._flats, whole.split([flat.numel() for flat in self._flats])):
            flat.grad = part
        parts = whole.split([param.partition_numel() for param in params])
        home = {param.ds_id: part for param, part in zip(params, parts)}
        zero.grad_partitions_flat_buffer = whole
        zero._DeepSpeedZeroOptimizer_Stage3__param_id_to_grad_partition = home
        return home

    def _take_gradients(self, params: Sequence[Any], partitions: Sequence[Tensor]) -> None:
        """Moves reduced gradients to CPU memory once. DeepSpeed's own method would move them down, up and down again."""
        zero = self._zero
        for param, partition in zip(params, partitions):
            grad, param.grad = param.grad, None
            if param.partition_numel() * zero._get_param_partition_rank(param) >= param.ds_numel:
                continue  # this rank holds only padding of it
            zero._offload_boundary_param_ids.add(param.ds_id)
            home = self._home[param.ds_id][: partition.numel()]
            if zero.micro_step_id:  # not the first reduction of this step
                partition = home.to(partition.device).add_(partition.view(-1))
            home.copy_(partition.view(-1), non_blocking=True)
            zero.norm_for_param_grads[zero.get_param_id(param)] = zero._constant_buffered_norm2(partition)
            if grad is not None and grad.is_cuda:
                grad.record_stream(torch.cuda.current_stream())

    # ---- ZeRO 1 and 2 --------------------------------------------------------------------------------------

    def _take_stage_2(self) -> list[Tensor]:
        """Does the same as `_take_stage_3` for stages 1 and 2. DeepSpeed would copy the masters into a buffer, and the buffer
        to the device; tensors without memory (on the meta device) take the places of both, so that these copies do nothing."""
        zero, rank, world = self._zero, self._ranks.rank, self._ranks.world
        clip, reset = zero.unscale_and_clip_grads, zero.reset_cpu_buffers
        buffers = zero.param_buffer_of_bit16_for_cpu_offload_groups
        buffers[:] = [buffer.to("meta") for buffer in buffers]
        taken: list[tuple[list[Tensor], Tensor]] = []

        def step(index: int) -> None:
            parts = zero.parallel_partitioned_bit16_groups[index]
            student = parts[rank]
            teacher = [(0, whole.chunk(world)[rank]) for whole in self._teacher_flats[index : index + 1]]
            self._update(index, self._optimizer.param_groups[index], [(0, student.data)], teacher)
            taken.append((parts, student))
            parts[rank] = student.to("meta")

        def restore() -> None:
            """Ends the step. DeepSpeed calls it after the last group, or instead of all groups when the step is not applied."""
            self._transfers.finish()
            for parts, student in taken:
                parts[rank] = student
            taken.clear()
            for index in list(zero.averaged_gradients):
                zero.averaged_gradients[index] = None  # otherwise a step that is not applied adds its gradient to the next
            reset()

        zero.unscale_and_clip_grads = lambda grads, norm: self._factor(lambda one: clip([one], norm))
        zero._optimizer_step, zero.reset_cpu_buffers = step, restore
        return [flat.grad for flat in self._flats if flat.grad is not None]


class Transfers:
    """Copies results from the CPU to the device while the CPU computes the next ones. It owns two sets of CPU buffers, each
    with one buffer of `numel` elements for each of `dtypes`, and uses them in turn.

        transfers.begin()
        for ...:
            buffers = transfers.take()      # written by the CPU
            transfers.send([(target, part of a buffer), ...])
        transfers.finish()

    streams: torch.cuda, where buffers are pinned and sent on a stream of their own; or None, where `send` copies at once.
    """

    def __init__(self, dtypes: Sequence[torch.dtype], numel: int, streams: Any = None) -> None:
        self.numel, self._streams = numel, streams
        self._lane = streams.Stream() if streams is not None else None
        pinned = streams is torch.cuda
        self._sets = [[torch.empty(numel, dtype=dtype, pin_memory=pinned) for dtype in dtypes] for _ in range(2)]
        self._sent: list[Any] = [None, None]
        self._turn = 0

    def begin(self) -> None:
        """Waits until the device has delivered the gradients and no longer reads the weights that will be overwritten."""
        if self._lane is not None:
            self._streams.current_stream().synchronize()

    def take(self) -> list[Tensor]:
        """Returns the other set of buffers to write to, after waiting until everything sent from it has arrived."""
        self._turn = 1 - self._turn
        if self._sent[self._turn] is not None:
            self._sent[self._turn].synchronize()
        return self._sets[self._turn]

    def send(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Starts copies, given as pairs (target, source). The sources are parts of the buffers that were taken last."""
        if self._lane is None:
            for target, source in pairs:
                target.copy_(source)
            return
        with self._streams.stream(self._lane):
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
        self._sent[self._turn] = self._streams.Event()
        self._sent[self._turn].record(self._lane)

    def finish(self) -> None:
        """Waits until everything has arrived."""
        if self._lane is not None:
            self._lane.synchronize()


def _pairs(targets: Targets, buffer: Tensor, start: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields pairs (part of a target, the same elements in `buffer`), where `buffer` holds the elements from `start` on."""
    stop = start + buffer.numel()
    first = max(0, bisect_right(targets, start, key=lambda entry: entry[0]) - 1)
    for begin, target in targets[first:]:
        if begin >= stop:
            return
        low, high = max(begin, start), min(begin + target.numel(), stop)
        if low < high:
            yield target[low - begin : high - begin], buffer[low - start : high - start]


def _pin(tensor: Tensor) -> None:
    """Pins the memory of a CPU tensor where it lies, because torch rounds its own pinned allocations up to a power of two.
    Raises UserError where the system does not pin that much."""
    error = int(torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0))  # type: ignore[attr-defined]
    if error:
        raise UserError(
            f"zero_optimization.offload_optimizer.pin_memory: the system does not pin {tensor.nbytes / 1e9:.1f} GB of CPU "
            f"memory (CUDA error {error}): set it to false in deepspeed.config"
        )
