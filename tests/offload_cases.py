"""Cases of tests/test_offload.py for several ranks, see tests/ranks.py; streams that are late."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dopsd_fast.distributed import offload, zero_engine


class Lane(TorchDispatchMode):
    """A stream that does nothing until it is waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.queue: list[Any] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is not torch.ops.aten.copy_.default:
            return function(*args, **(kwargs or {}))
        self.queue.append(args)
        return args[0]

    def run(self, count: int | None = None) -> None:
        done, self.queue = self.queue[:count], self.queue[count:] if count is not None else []
        for target, source, *_ in done:
            target.copy_(source)

    synchronize = run


class Late:
    """torch.cuda's streams and events, as late as they may be."""

    def __init__(self) -> None:
        self.compute = Lane()
        self.waits = 0

    def Stream(self) -> Lane:
        self.lane = Lane()
        return self.lane

    def stream(self, lane: Lane) -> Lane:
        return lane

    def current_stream(self) -> Lane:
        return self.compute

    def Event(self) -> Any:
        late = self

        class Event:
            def record(self, lane: Lane) -> None:
                self.last = lane.queue[-1]

            def synchronize(self) -> None:
                late.waits += 1
                if any(entry is self.last for entry in late.lane.queue):
                    late.lane.run(1 + next(i for i, entry in enumerate(late.lane.queue) if entry is self.last))

        return Event()


def both(rig: Any) -> None:
    """Three steps of the engine, in parts of 97 elements, and three of one whose step is DeepSpeed's own: how many tensors
    differ in a bit, by kind, over all ranks."""
    ours, offloads = rig, zero_engine.offloads
    step = ours.engine.offload
    streams = Late() if rig.case.get("late") else None
    step._transfers = offload.Transfers([buffer.dtype for buffer in step._transfers.take()], 97, streams)
    zero_engine.offloads = lambda zero: False
    try:
        theirs = type(rig)(rig.case)
    finally:
        zero_engine.offloads = offloads
    assert theirs.engine.offload is None
    before = {key: value.clone() for key, value in held(ours.engine)}
    rig.numbers["norms"], rig.numbers["their_norms"] = ours.train(0, 3), theirs.train(0, 3)
    pairs = list(zip(held(ours.engine), held(theirs.engine), strict=True))
    assert all(mine == other for (mine, _), (other, _) in pairs)
    kinds = sorted({key.split("/")[0] for (key, _), _ in pairs})

    def count(kind: str, found: list[bool]) -> int:
        mine = sum(wanted for ((key, _), _), wanted in zip(pairs, found) if key.startswith(f"{kind}/"))
        return sum(ours.engine.gather_int(mine))

    differ = [not torch.equal(a, b) for (_, a), (_, b) in pairs]
    moved = [not torch.equal(a, before[key]) for (key, a), _ in pairs]
    rig.numbers["differ"] = {kind: count(kind, differ) for kind in kinds}
    rig.numbers["moved"] = {kind: count(kind, moved) for kind in kinds}
    rig.numbers["describe"] = ours.engine.describe()
    rig.numbers["held"], rig.numbers["promised"] = memory(ours.engine)
    theirs.engine.close()


def added(rig: Any) -> None:
    """Two reductions in one step, of gradients of 1 and 2 on rank 0, 2 and 3 on rank 1: their sum, averaged over the ranks."""
    engine = rig.engine
    for value in (1.0, 2.0):
        for trained in engine._trained:
            param = trained.student
            param.data, kept = param.data.new_empty(1).expand(param.ds_shape), param.data
            param.grad = torch.full(param.ds_shape, value + engine.rank)
            param.data = kept
        engine.reducer.reduce([trained.student for trained in engine._trained])
        engine._zero.independent_gradient_partition_epilogue()
    engine.reducer.finish()
    wanted = sum(3.0 + 2 * rank for rank in range(engine.world)) / engine.world
    parts = [f.flat.grad[f.start : f.start + f.numel] for f in engine._fragments]
    rig.numbers["wrong"] = sum(engine.gather_int(sum(int((part != wanted).sum()) for part in parts)))
    rig.numbers["checked"] = sum(engine.gather_int(sum(part.numel() for part in parts)))
    rig.numbers["expected"] = wanted * rig.numbers["checked"] ** 0.5
    rig.numbers["norm"] = engine.step(0.0)


def held(engine: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Everything that a step changes on this rank, but for the padding of shards, which nobody initialises."""
    for fragment in engine._fragments:
        name = fragment.trained.name
        for kind in engine.kinds:
            yield f"{kind}/{name}", engine._state(fragment, kind)
        yield f"step/{name}", torch.tensor(engine.optimizer.state[fragment.flat]["step"])
        for which, param in (("student", fragment.trained.student), ("teacher", fragment.trained.teacher)):
            if engine.stage == 3:
                yield f"{which}/{name}", param.ds_tensor.view(-1)[: fragment.numel]
            else:
                yield f"{which}/{name}", param.detach()


def memory(engine: Any) -> tuple[int, int]:
    """Bytes of the fp32 tensors and buffers in CPU memory, each storage once, and what the planner is told."""
    zero = engine._zero
    tensors = [buffer for buffers in engine.offload._transfers._sets for buffer in buffers]
    for flat in engine._flats():
        tensors += [flat, flat.grad, *(t for t in engine.optimizer.state[flat].values() if torch.is_tensor(t))]
    tensors += [t for t in (getattr(zero, "grad_partitions_flat_buffer", None),) if t is not None]
    tensors += [t for t in getattr(zero, "param_buffer_of_bit16_for_cpu_offload_groups", []) if not t.is_meta]
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    numel = sum(flat.numel() for flat in engine._flats())
    itemsize, part = engine._trained[0].student.element_size(), engine.offload._transfers.numel
    promised = offload.host_bytes(numel, itemsize, engine.keeps_ema, part)
    return sum(storages.values()), sum(promised.values())
