"""Whole-model gathers and reductions of a training step, counted on 2 and 3 CPU ranks, and the counter itself."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import time
from typing import Any

import pytest
import torch
from torch import nn

from bench.models import Model
from bench.references.reference_eager import ZIMAGE_TARGETS
from bench.suites import zero
from bench.suites.collectives import Collectives, Unaccounted
from bench.suites.zero import STATES, Arrangement, Batch, Job, Ours, RankFailed, launch
from tests import tiny

SWEEP, STEP, UNIT = (Arrangement(f"full/{gather}", gather=gather) for gather in ("sweep", "step", "unit"))
STAGE_2, LORA, PLAIN = Arrangement("full/stage2", stage=2), Arrangement("lora", "lora"), Arrangement("full", plain=True)
RUN = {2: [SWEEP, STEP, UNIT, STAGE_2, LORA, PLAIN], 3: [SWEEP, STEP, LORA, PLAIN]}
WORLDS = pytest.mark.parametrize("world", RUN)
ALL = [pytest.param(one, world, id=f"{one.case}-{one.variant}-{world}") for world, made in RUN.items() for one in made]


@functools.cache
def results() -> dict[tuple[int, Arrangement], dict[str, Any]]:
    ours = [one for one in RUN[2] if one != PLAIN]
    model = str(tiny.shared("zimage"))
    jobs = [Job(2, ours, model, counted=2, timed=0), Job(2, [PLAIN], model, counted=1, timed=0)]
    jobs.append(Job(3, RUN[3], model, counted=1, timed=0))
    jobs.append(Job(2, [STEP], model, counted=0, timed=0, call=tamper))
    return {(job.world if job.counted else 0, one): result
            for job, several in zip(jobs, launch("cpu", jobs)) for one, result in zip(job.arrangements, several)}


def without_memory(one: Arrangement, model: Model, rank: int, *_: int) -> dict[str, Any]:
    if rank == 1:
        raise MemoryError("no\nmore")
    return time.sleep(100) or {}


def telling(one: Arrangement, model: Model, rank: int, *_: int) -> dict[str, Any]:
    print(f"of a library\n{zero.TOLD}ours|step 2 of 5|{40 + rank}.5", flush=True)
    time.sleep(4 * zero.LOOKING)
    return {"first_loss": 1.0, "steps": [], "seconds_per_step": [], "peak_bytes": []}


def killed(one: Arrangement, model: Model, rank: int, *_: int) -> dict[str, Any]:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return time.sleep(100) or {}


def test_what_ended_a_rank_is_said_the_others_end_and_the_next_job_begins(monkeypatch):
    """And how far a job is, as its first rank tells it."""
    told: list[tuple[str, str, float]] = []
    monkeypatch.setattr(zero, "tick", lambda *said: told.append(said))
    jobs = [Job(2, [STEP], str(tiny.shared("zimage")), 0, 0, call) for call in (telling, without_memory, killed)]
    began = time.monotonic()
    whole, *errors = launch("cpu", jobs)
    assert whole == [{"first_loss": 1.0, "steps": [], "seconds_per_step": [], "peak_bytes": []}]
    assert set(told) == {("ours", "step 2 of 5", 40.5)}
    assert time.monotonic() - began < 90 and all(isinstance(error, RankFailed) for error in errors)
    assert list(map(str, errors)) == ["rank 1: MemoryError: no more", "rank 1: process 1 terminated with signal SIGKILL"]


def steady(world: int, one: Arrangement) -> dict[str, float]:
    """The counts of a step after the first, which are those of every such step."""
    first, *others = results()[world, one]["steps"]
    assert all(other == first for other in others)
    return first


@functools.cache
def transformer() -> nn.Module:
    from diffusers import ZImageTransformer2DModel

    return ZImageTransformer2DModel.from_pretrained(tiny.shared("zimage") / "transformer")


def elements(kind: str) -> list[int]:
    """Of the trained tensors."""
    if kind == "full":
        return [parameter.numel() for parameter in transformer().parameters()]
    adapted = [module for name, module in transformer().named_modules() if name.endswith(ZIMAGE_TARGETS)]
    rank = Model(str(tiny.shared("zimage")), torch.device("cpu")).standard.rank
    return [rank * features for linear in adapted for features in (linear.in_features, linear.out_features)]


# ---- what a step gathers and reduces ---------------------------------------------------------------------------------


@WORLDS
def test_whole_model_gathers(world):
    step, sweep = steady(world, STEP)["gathers_per_step"], steady(world, SWEEP)["gathers_per_step"]
    assert step == 1
    assert 1 < sweep <= 2  # what has no gradient need not be gathered again
    assert steady(world, SWEEP)["gathers_of_one_weight_per_step"] == 2
    assert steady(world, LORA)["gathers_per_step"] == 0


@WORLDS
def test_the_straightforward_arrangement_gathers_4k_times(world):
    """Blocks: forward, teacher, recomputation and backward of each state. What is not checkpointed, and is much of a tiny
    model, less: at least forward and teacher. Student and teacher once more for the average."""
    plain = steady(world, PLAIN)
    assert plain["gathers_of_one_weight_per_step"] == 4 * STATES
    blocks = sum(p.numel() for name, p in transformer().named_parameters() if name.startswith("layers."))
    total = sum(elements("full"))
    assert 4 * STATES * blocks + 2 * STATES * (total - blocks) < plain["gathers_per_step"] * total < 4 * STATES * total
    assert plain["gathers_for_average_per_step"] == 2


def test_the_other_arrangements():
    """DeepSpeed's own hooks gather for every forward of a pair and every backward. ZeRO-2 gathers nothing but the new student
    and its teacher."""
    assert STATES < steady(2, UNIT)["gathers_per_step"] <= 2 * STATES
    assert steady(2, STAGE_2)["gathers_per_step"] == 2


@pytest.mark.parametrize(("one", "world"), ALL)
def test_every_gradient_is_reduced_once(one, world):
    """In fp32; a tensor is padded to a multiple of the ranks, and of two numbers for each a buffer may be. The rest are the
    norm and whether all are finite: a few numbers."""
    sizes = elements(one.kind)
    reduced = steady(world, one)["reduced_bytes_per_step"]
    assert 4 * sum(sizes) <= reduced <= 4 * sum(sizes) + 8 * world * len(sizes) + 64


@WORLDS
def test_gathered_bytes(world):
    """Student and teacher once, in fp32 and padded; the adapters of both."""
    for one in {STEP, LORA, STAGE_2}.intersection(RUN[world]):
        sizes = elements(one.kind)
        assert 0 <= steady(world, one)["gathered_bytes_per_step"] - 2 * 4 * sum(sizes) < 2 * 8 * world * len(sizes)


@pytest.mark.parametrize(("one", "world"), ALL)
def test_every_arrangement_does_the_same_work(one, world):
    """fp32 through some five blocks, summed in another order: 1e-5 is 170 units of roundoff."""
    plain = results()[world, PLAIN]["first_loss"]
    assert results()[world, one]["first_loss"] == pytest.approx(plain, rel=1e-5)


# ---- the counter -----------------------------------------------------------------------------------------------------


def tamper(one: Arrangement, model: Model, rank: int, *_: int) -> dict[str, Any]:
    """On every rank: what the counter says of a step with something added or hidden."""
    import deepspeed
    from deepspeed.runtime.zero import partition_parameters

    ours = Ours(one, Batch(model, rank))
    weights = list(ours.weights())
    students = [parameter for _, parameter in weights[: len(weights) // 2]]
    whole = torch.empty(8 * torch.distributed.get_world_size())
    said: dict[str, Any] = {}

    def again() -> None:
        students[0].all_gather_coalesced(students).wait()
        students[0].partition(students)

    def one_by_one() -> None:
        with deepspeed.zero.GatheredParameters(students):
            pass

    def unseen() -> None:
        gather = partition_parameters._dist_allgather_fn
        partition_parameters._dist_allgather_fn = lambda *_: contextlib.nullcontext()
        try:
            with contextlib.suppress(AttributeError):  # there is nothing to wait for
                again()
        finally:
            partition_parameters._dist_allgather_fn = gather

    def count(name: str, more, known=weights) -> None:
        try:
            with Collectives(known) as counted:
                ours.step()
                more()
            said[name] = [counted.gathers, max(counted.times.values()), len(counted.log)]
        except Unaccounted as error:
            said[name] = str(error)

    ours.step()
    count("nothing", lambda: None)
    count("again", again)
    count("one by one", one_by_one)
    count("metadata", lambda: ours.engine.gather_int(1))
    count("raw", lambda: torch.distributed.all_gather_into_tensor(whole, torch.zeros(8)))
    count("as objects", lambda: torch.distributed.all_gather(list(whole.chunk(len(whole) // 8)), torch.zeros(8)))
    count("a stranger", lambda: None, weights[:-1])
    count("nothing again", lambda: None)
    said["removed"] = not hasattr(partition_parameters.AllGatherHandle.__init__, "__wrapped__")
    count("unseen", unseen)  # last: leaves parameters in flight
    return {"first_loss": 0.0, "steps": [said], "seconds_per_step": [], "peak_bytes": []}


def test_the_counter_sees_what_is_added():
    said = results()[0, STEP]["steps"][0]
    gathers, most, calls = said["nothing"]
    assert (gathers, most) == (1, 1)
    assert said["again"] == [2, 2, calls + 1]
    gathers, most, more = said["one by one"]
    assert (gathers, most) == (2, 2) and more >= calls + len(elements("full"))
    assert said["metadata"] == [1, 1, calls + 1]
    assert said["nothing again"] == said["nothing"] and said["removed"]


def test_the_counter_refuses_what_does_not_agree():
    said = results()[0, STEP]["steps"][0]
    for name in ("raw", "as objects"):
        assert said[name] == "1 all-gathers of 64 bytes belong to no parameter that was named (1 such)"
    assert said["a stranger"] == "1 gathered parameters are none of those that were named (1 such)"
    assert said["unseen"] == f"{len(elements('full'))} parameters were gathered by no collective (1 such)"


# ---- what is held during a sweep back --------------------------------------------------------------------------------------


def test_a_sweep_holds_what_acts_and_what_comes_next():
    """Four units of one parameter each; the last turn comes back to the first unit."""
    from dopsd_fast.distributed.fetching import Fetcher

    units = [nn.Linear(1, 1, bias=False) for _ in range(4)]
    names = {id(unit.weight): number for number, unit in enumerate(units)}
    fetcher, held, seen, finished = Fetcher.__new__(Fetcher), set(range(4)), [], []
    fetcher.gather = lambda position, wanted: held.update(names[id(p)] for p in wanted)
    fetcher._launch = lambda position, wanted: held.update(names[id(p)] for p in wanted)

    def release(parameters=None):
        held.difference_update(range(4) if parameters is None else [names[id(p)] for p in parameters])

    fetcher.release = release
    turns = [([units[number]], lambda: seen.append(set(held))) for number in (3, 2, 1, 0, 3)]
    fetcher.sweep(turns, lambda parameters: finished.append([names[id(p)] for p in parameters]))
    assert seen == [{3, 2}, {3, 2, 1}, {3, 1, 0}, {3, 0}, {3}]
    assert finished == [[], [2], [1], [0], [3]] and not held
