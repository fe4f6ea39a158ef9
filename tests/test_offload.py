"""The offloaded step against DeepSpeed's own, on one and two ranks; its transfers on streams that are late; low-bit masters."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from dopsd_fast.distributed import offload
from dopsd_fast.distributed.offload import Transfers, host_bytes, take_pinning
from tests import ranks
from tests.offload_cases import Late
from tests.tiny import shared

BOTH = "tests.offload_cases:both"


def offloaded(**changes: Any) -> dict[str, Any]:
    """`zero`: further fields of zero_optimization. `late`: copies on a stream that does nothing until it is waited for."""
    zero = {"offload_optimizer": {"device": "cpu"}, "sub_group_size": 300, **changes.pop("zero", {})}
    return dict(precision="bf16", config={"zero_optimization": zero}) | changes


STEPPED = [
    offloaded(name="bf16-1", do=BOTH, stage=1),
    offloaded(name="bf16-2", do=BOTH, late=True, stage=2),
    offloaded(name="bf16-3", do=BOTH, late=True, stage=3),
    offloaded(name="fp32-2", do=BOTH, stage=2, precision="fp32"),
    offloaded(name="fp32-3", do=BOTH, stage=3, precision="fp32", grad_clip=0.0),
    offloaded(name="unit-3", do=BOTH, late=True, stage=3, gather="unit"),
    offloaded(name="lora-3", do=BOTH, stage=3, adapter="lora", teacher="frozen"),
]
SWEEP = offloaded(name="sweep-3", do=BOTH, late=True, stage=3, gather="sweep", accumulation=1, recompute=True,
                  zero={"sub_group_size": 20_000})
BAD = [offloaded(name=f"bad-{stage}", do="not_finite", stage=stage, factor="inf") for stage in (2, 3)]
ADDED = offloaded(name="added-3", do="tests.offload_cases:added", stage=3)
LOW = [dict(name=f"masters-{masters}", stage=0, precision="bf16", masters=masters) for masters in ("fp32", "low_bits")]


@functools.cache
def results(world: int) -> dict[str, Any]:
    low = [case | dict(do="equal_to_one_process") for case in LOW]
    good = [case | dict(name=f"never-{case['name']}", do="never_bad") for case in BAD]
    more = [*BAD, *good, SWEEP | dict(model=str(shared("zimage")))] if world == 2 else []
    with tempfile.TemporaryDirectory() as folder:
        saved = [
            case | dict(name=f"saved-{case['masters']}", do="save_and_go_on", folder=f"{folder}/{case['masters']}")
            for case in LOW
        ]
        loaded = [
            ours | dict(name=f"{ours['masters']}-from-{theirs['masters']}", do="load_only",
                        folder=f"{folder}/{theirs['masters']}/step-000002")
            for ours, theirs in (LOW, LOW[::-1])
        ]
        exchanged = [*saved, *loaded] if world == 1 else []
        return ranks.run(world, [*STEPPED, ADDED, *more, *low, *exchanged], Path(folder) / "run")


@pytest.mark.parametrize("case, world", [*((case, world) for case in STEPPED for world in (1, 2)), (SWEEP, 2)],
                         ids=lambda value: value["name"] if isinstance(value, dict) else str(value))
def test_step_equals_deepspeeds_own(case: dict[str, Any], world: int) -> None:
    """Masters, moments, average, student and teacher, bit for bit; gradients are clipped, except where the case says."""
    numbers = results(world)[case["name"]].numbers
    assert numbers["norms"] == numbers["their_norms"]
    assert min(numbers["norms"]) > 0.05
    frozen = case.get("teacher") == "frozen"
    moved = {"master", "exp_avg", "exp_avg_sq", "step", "student", *(() if frozen else ("ema", "teacher"))}
    assert numbers["differ"] == {kind: 0 for kind in moved | {"teacher"}}
    assert {kind for kind, count in numbers["moved"].items() if count} == moved
    assert numbers["describe"]["optimizer_offload"] == "cpu" and numbers["describe"]["offload_part"] == 97


@pytest.mark.parametrize("world", [1, 2])
def test_gradients_that_are_reduced_in_turns_add_up(world: int) -> None:
    numbers = results(world)["added-3"].numbers
    assert numbers == {"wrong": 0, "checked": numbers["checked"], "norm": pytest.approx(numbers["expected"], rel=1e-6),
                       "expected": numbers["expected"], "seconds": numbers["seconds"]}
    assert numbers["checked"] > 500


@pytest.mark.parametrize("world", [1, 2])
def test_cpu_memory_is_what_the_planner_is_told(world: int) -> None:
    """One gradient, no second copy of the weights."""
    for case in STEPPED:
        numbers = results(world)[case["name"]].numbers
        assert numbers["held"] == numbers["promised"], case["name"]


def test_memory_of_the_largest_set_up() -> None:
    """6.15 B parameters on one GPU beside 128 GiB."""
    found = host_bytes(6_150_000_000, 2)
    assert found["masters"] + found["moments"] + found["ema"] == 16 * 6_150_000_000
    assert sum(found.values()) < 130e9


def test_deepspeed_pins_nothing() -> None:
    cpu, off, none = {"device": "cpu"}, {"device": "cpu", "pin_memory": False}, {"device": "none"}
    for section, wanted in ((cpu, True), (off, False), (none, False)):
        config = {"zero_optimization": {"offload_optimizer": section}}
        assert take_pinning(config) is wanted
        assert section["device"] == "none" or section["pin_memory"] is False
    assert not take_pinning({"zero_optimization": {}})


@pytest.mark.parametrize("case", BAD, ids=lambda case: case["name"])
def test_a_gradient_that_is_not_finite_changes_nothing(case: dict[str, Any]) -> None:
    result, never = results(2)[case["name"]], results(2)[f"never-{case['name']}"]
    assert float(result.numbers["bad"]) == float("inf")
    for key, tensor in result.tensors.items():
        if key.startswith("before/"):
            assert torch.equal(tensor, result.tensors[key.replace("before/", "after/")]), key
    assert result.numbers["next"] == never.numbers["next"]


# ---- streams -----------------------------------------------------------------------------------------------


def through(transfers: Transfers, source: torch.Tensor, target: torch.Tensor) -> None:
    transfers.begin()
    for start in range(0, len(source), transfers.numel):
        (buffer,) = transfers.take()
        part = source[start : start + transfers.numel]
        buffer[: len(part)].copy_(part)
        transfers.send([(target[start : start + len(part)], buffer[: len(part)])])
    transfers.finish()


@pytest.mark.parametrize("length", [3, 10, 41])
def test_a_buffer_is_not_written_before_it_has_left(length: int) -> None:
    late = Late()
    transfers = Transfers([torch.float32], 10, late)
    for step in range(2):
        source, target = torch.arange(float(length)) + 100 * step, torch.zeros(length)
        late.compute.queue.append((target, torch.full((length,), -1.0)))  # a reader of the old weights, still to run
        through(transfers, source, target)
        assert torch.equal(target, source) and not late.lane.queue
    assert late.waits == 2 * -(-length // 10) - 2  # all but the first use of each buffer


def test_the_late_streams_find_a_missing_wait() -> None:
    class Hasty(Transfers):
        def take(self) -> list[torch.Tensor]:
            self._sent = [None, None]
            return super().take()

    source, target = torch.arange(41.0), torch.zeros(41)
    through(Hasty([torch.float32], 10, Late()), source, target)
    assert not torch.equal(target, source)


def test_parts_meet_their_targets() -> None:
    """Targets that begin, end or lie within a part, span several, and have gaps between them."""
    places = [(2, 3), (5, 14), (25, 1), (26, 9)]
    targets = [(start, torch.zeros(numel)) for start, numel in places]
    for start in range(0, 40, 7):
        buffer = torch.arange(float(start), min(start + 7, 40))
        for target, source in offload._pairs(targets, buffer, start):
            target.copy_(source)
    for start, target in targets:
        assert torch.equal(target, torch.arange(float(start), start + len(target)))


# ---- low bits ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2])
def test_low_bits_give_the_masters_of_fp32(world: int) -> None:
    """Masters and averages bit for bit; the weights are their nearest bf16, which of two equally near may be the other."""
    whole, low = (results(world)[case["name"]] for case in LOW)
    assert whole.numbers["norms"] == low.numbers["norms"]
    assert low.numbers["describe"]["masters"] == "low_bits"
    assert whole.tensors.keys() == low.tensors.keys()
    for key, tensor in low.tensors.items():
        prefix, _, which_and_name = key.partition("/weights/")
        if not which_and_name:
            assert torch.equal(tensor, whole.tensors[key]), key
            continue
        exact = low.tensors[f"{prefix}/{which_and_name}"].double()
        error = (tensor.double() - exact).abs()
        assert bool((error <= (exact.bfloat16().double() - exact).abs()).all()), key


def test_low_bits_and_fp32_take_each_others_checkpoints() -> None:
    found = results(1)
    for ours, theirs in (("fp32", "low_bits"), ("low_bits", "fp32")):
        loaded, saved = found[f"{ours}-from-{theirs}"], found[f"saved-{theirs}"]
        for which in ("student", "teacher"):
            for key, tensor in loaded.tensors.items():
                if key.startswith(f"loaded/{which}/"):
                    assert torch.equal(tensor, saved.tensors[key.replace("loaded/", "saved/")]), key
        # A weight that lies between two bf16 may start as the other one: 2^-8 of one weight.
        assert loaded.numbers["resumed_norms"] == pytest.approx(saved.numbers["norms"], rel=2.0**-8)
    assert found["saved-low_bits"].numbers["resumed_norms"] == found["saved-low_bits"].numbers["norms"]
