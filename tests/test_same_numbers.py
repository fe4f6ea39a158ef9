"""One global batch, one result: on 1, 2 and 4 ranks, at every ZeRO stage, with every way to gather, offloaded or not, in one
micro-batch or several, and with DeepSpeed's own fields set. fp32; toy: diffusers' way (two models); zimage: the pair
forward."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import driving, ranks
from tests.plain_steps import EPS, ROUNDING, distance, plain
from tests.tiny import shared

LAST = ranks.STEPS - 1
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}


def case(name: str, world: int, model: str, stage: int, accumulation: int = 1, gather: str = "auto", **zero: Any) -> Any:
    """Nothing stays gathered because it is small: what is tested is the gathering."""
    zero = {"stage3_param_persistence_threshold": 0, **zero} if stage == 3 else zero
    return dict(name=name, do="curves", stage=stage, accumulation=accumulation, gather=gather, eps=EPS,
                config={"zero_optimization": zero}, world=world, model=model, group="same")


def arrangements() -> list[dict[str, Any]]:
    found = []
    for world, accumulations in ((1, (1, 4)), (2, (1, 4)), (4, (1, 2))):  # global batch 8: 4 ranks have two items each
        for accumulation in accumulations:
            for stage in (0, 2):
                found.append(case(f"toy-{stage}-a{accumulation}", world, "", stage, accumulation))
            for gather in ("unit", "step") if (world, accumulation) != (4, 2) else ("step",):
                found.append(case(f"toy-3-{gather}-a{accumulation}", world, "", 3, accumulation, gather))
        found.append(case("toy-1", world, "", 1))
        for stage in (2, 3):
            found.append(case(f"toy-{stage}-offload", world, "", stage, 2, **OFFLOAD))
    for world, ways in ((2, ("unit", "step", "sweep")), (4, ("step", "sweep"))):
        for gather in ways:
            found.append(case(f"zimage-3-{gather}", world, "zimage", 3, gather=gather))
    found.append(case("zimage-2", 2, "zimage", 2))
    found.append(case("zimage-0-a4", 1, "zimage", 0, 4))
    found.append(case("zimage-3-step-a4", 2, "zimage", 3, 4, "step"))
    found.append(case("zimage-3-sweep-offload", 2, "zimage", 3, 1, "sweep", **OFFLOAD, offload_param={"device": "cpu"}))
    return found


def near_ranks() -> list[dict[str, Any]]:
    """hpZ: pairs of ranks keep a copy of the weights between them."""
    found = [case(f"toy-near-{gather}", 4, "", 3, 1, gather, zero_hpz_partition_size=2) for gather in ("unit", "step")]
    found.append(case("zimage-near-sweep", 4, "zimage", 3, 1, "sweep", zero_hpz_partition_size=2))
    return [settings | {"group": "near"} for settings in found]


def fields() -> list[dict[str, Any]]:
    """DeepSpeed's own fields, in sets that do not hide each other."""
    sharded: list[dict[str, Any]] = [
        dict(overlap_comm=False, contiguous_gradients=False, sub_group_size=50),
        dict(reduce_bucket_size=10, stage3_use_all_reduce_for_fetch_params=True),
        dict(reduce_scatter=False, stage3_allgather_sequential=True),
        dict(stage3_max_live_parameters=0, stage3_max_reuse_distance=0, stage3_prefetch_bucket_size=0),
    ]
    whole: list[dict[str, Any]] = [
        dict(round_robin_gradients=True),
        dict(overlap_comm=True, allgather_bucket_size=10, parameter_alignment=True),
        dict(contiguous_gradients=False, reduce_scatter=False, allgather_partitions=False),
    ]
    found = [case(f"field-3-{gather}-{i}", 2, "", 3, 2, gather, **zero)
             for gather in ("unit", "step") for i, zero in enumerate(sharded)]
    found += [case(f"field-{stage}-{i}", 2, "", stage, 2, **zero) for stage in (1, 2) for i, zero in enumerate(whole)]
    divided = case("field-divided", 2, "", 2, 2, reduce_scatter=False)
    divided["config"] |= {"prescale_gradients": True, "gradient_predivide_factor": 2.0}
    return [settings | {"group": "fields"} for settings in [*found, divided]]


ALL = [*arrangements(), *near_ranks(), *fields()]


@functools.cache
def results(world: int, group: str, turn: int = 0) -> dict:
    """`turn`: another run, in processes of its own."""
    chosen = [settings for settings in ALL if (settings["world"], settings["group"]) == (world, group)]
    return run(world, chosen if turn == 0 else [settings for settings in chosen if repeated(settings)])


def run(world: int, chosen: list[dict[str, Any]]) -> dict:
    for_ranks = [settings | ({"model": str(shared(settings["model"]))} if settings["model"] else {}) for settings in chosen]
    for settings in for_ranks:
        if not settings["model"]:
            del settings["model"]
    with tempfile.TemporaryDirectory() as folder:
        return ranks.run(world, for_ranks, Path(folder))


def repeated(settings: dict[str, Any]) -> bool:
    """One of each kind: stages, ways to gather, ranks."""
    names = {2: ("toy-0-a4", "toy-2-offload", "toy-3-unit-a1", "zimage-2", "zimage-3-sweep-offload"), 4: ("toy-3-step-a2",)}
    return settings["name"] in names.get(settings["world"], ())


def identity(settings: dict[str, Any]) -> str:
    return f"{settings['name']}-{settings['world']}"


def apart(mine: dict[str, torch.Tensor], prefix: str, theirs: dict[str, torch.Tensor]) -> float:
    """Euclidean distance of all weights as one vector."""
    squares = [float((mine[prefix + name].double() - tensor.double()).square().sum()) for name, tensor in theirs.items()]
    return sum(squares) ** 0.5


@pytest.mark.parametrize("settings", ALL, ids=identity)
def test_equals_one_process(settings: dict[str, Any]) -> None:
    expected = plain("full", "fp32", model=settings["model"])
    result = results(settings["world"], settings["group"])[settings["name"]]
    for step, (loss, norm) in enumerate(zip(expected.losses, expected.norms)):
        # The weights before the step are off by at most `distance`, which moves the loss by the gradient's norm times that.
        off = distance(step - 1) if step else 0.0
        assert abs(result.numbers["losses"][step] - loss) <= ROUNDING * loss + norm * off, step
        assert abs(result.numbers["norms"][step] - norm) <= ROUNDING * 4.0**step * norm, step
    for which, weights in (("student", expected.students[LAST]), ("teacher", expected.teachers[LAST])):
        assert apart(result.tensors, f"end/{which}/", weights) <= distance(LAST), which
        moved = apart({f"/{name}": tensor for name, tensor in weights.items()}, "/", expected.start)
        assert moved > 100 * distance(LAST), which  # so much would be missing if a tenth of the weights were wrong
    assert result.numbers["ranks_agree"]


@pytest.mark.parametrize("settings", ALL, ids=identity)
def test_weights_are_the_optimizers(settings: dict[str, Any]) -> None:
    """fp32: what the forwards use is the master and the average itself, and nothing of it is left to chance."""
    tensors = results(settings["world"], settings["group"])[settings["name"]].tensors
    for which in ("student", "teacher"):
        keys = [key for key in tensors if key.startswith(f"end/weights/{which}/")]
        assert keys
        for key in keys:
            assert torch.equal(tensors[key], tensors[key.replace("weights/", "", 1)]), key


@pytest.mark.parametrize("settings", [s for s in ALL if repeated(s) and s["group"] == "same"], ids=identity)
def test_two_runs_are_bitwise_equal(settings: dict[str, Any]) -> None:
    first, second = (results(settings["world"], "same", turn)[settings["name"]] for turn in (0, 1))
    for kind in ("losses", "norms"):
        assert first.numbers[kind] == second.numbers[kind]
    assert first.tensors.keys() == second.tensors.keys()
    for key, tensor in first.tensors.items():
        assert torch.equal(tensor, second.tensors[key]), key


@functools.cache
def odd_cases() -> dict:
    """Two ranks: steps that use a part of the model, and weights gathered in 8 bits."""
    ways = [(0, "auto"), (1, "auto"), (2, "auto"), (3, "unit"), (3, "step")]
    found = [case(f"partly-{stage}-{gather}", 2, "", stage, gather=gather) for stage, gather in ways]
    found = [settings | dict(do="partly_used", grad_clip=0.0) for settings in found]
    for gather in ("unit", "step", "sweep"):
        eighth = case(f"eighth-{gather}", 2, "zimage", 3, gather=gather, zero_quantized_weights=True)
        found.append(eighth | {"quantizer": True})
    for masters in ("fp32", "low_bits"):
        found.append(case(f"masters-{masters}", 2, "", 0, 2) | dict(precision="bf16", masters=masters))
    return run(2, found)


@pytest.mark.parametrize("way", ["1-auto", "2-auto", "3-unit", "3-step"])
def test_a_parameter_without_a_gradient_gets_none_from_before(way: str) -> None:
    expected, result = odd_cases()["partly-0-auto"], odd_cases()[f"partly-{way}"]
    assert expected.numbers["norms"][1] < expected.numbers["norms"][0] / 2
    assert result.numbers["norms"] == pytest.approx(expected.numbers["norms"], rel=ROUNDING)
    for key, tensor in expected.tensors.items():
        # lr / eps times the error of a gradient, twice (see tolerance); here the gradients are not clipped.
        bound = 2 * 2 * 1e-2 / EPS * ROUNDING * max(expected.numbers["norms"])
        assert float((result.tensors[key] - tensor).abs().max()) <= bound, key


@pytest.mark.parametrize("gather", ["unit", "step", "sweep"])
def test_weights_gathered_in_8_bits(gather: str) -> None:
    """With the same rounding of DeepSpeed's CUDA kernels in PyTorch. A group's 256 levels span its largest weight, so that of
    the tiny model's matrices, beside norm weights of 1, some 4 bits are left: the loss is another, but the same training."""
    exact, result = plain("full", "fp32", model="zimage"), odd_cases()[f"eighth-{gather}"]
    for mine, theirs in zip(result.numbers["losses"], exact.losses):
        assert 1e-4 < abs(mine / theirs - 1) < 0.5
    tensors = result.tensors
    for name in exact.start:  # what is stored is not rounded
        assert not torch.equal(tensors[f"end/student/{name}"], tensors[f"end/student/{name}"].half().float()), name
    assert result.numbers["ranks_agree"]


def test_stage_0_sums_as_deepspeeds() -> None:
    """Bit for bit: with more than two ranks the order of a sum depends on where in the collective a gradient lies, so that
    gradients in the reverse order give other bits."""
    found = run(4, [case("sums", 4, "", 0) | {"do": "as_deepspeed_sums"}])["sums"].tensors
    ours = {key.removeprefix("ours/"): tensor for key, tensor in found.items() if key.startswith("ours/")}
    assert len(ours) == 17 and len(found) == 2 * len(ours)
    for name, tensor in ours.items():
        assert tensor.abs().max() > 0 and torch.equal(tensor, found[f"theirs/{name}"]), name


def test_masters_in_two_halves() -> None:
    whole, halves = (odd_cases()[f"masters-{masters}"] for masters in ("fp32", "low_bits"))
    assert whole.numbers["losses"] == halves.numbers["losses"] and whole.numbers["norms"] == halves.numbers["norms"]
    for key, tensor in whole.tensors.items():
        assert torch.equal(halves.tensors[key], tensor), key


def test_ranks_or_accumulation_in_the_main_job(tmp_path: Path) -> None:
    """4 ranks of 1 item, or 1 rank that adds up 4: one row of metrics."""
    data = driving.data()
    jobs = {}
    for world, accumulation in ((4, 1), (1, 4)):
        jobs[world] = driving.start(
            driving.words(
                data__path=str(data), output__dir=str(tmp_path / str(world)), conditioning__cache="memory",
                train__batch_size=1, train__accumulation=accumulation, train__steps=3, train__grad_clip=0.05, train__eps=EPS,
                train__learning_rate=1e-2, deepspeed__stage=3, checkpoint__every=0,
            ),
            ranks=world,
        )
    for job in jobs.values():
        job.succeed()
    many, one = (driving.numbers(tmp_path / str(world)) for world in (4, 1))
    assert [row["step"] for row in many] == [row["step"] for row in one] == [1, 2, 3]
    for step, (mine, theirs) in enumerate(zip(many, one)):
        off = distance(step - 1) if step else 0.0
        for name in ("loss", "gap"):
            assert abs(mine[name] - theirs[name]) <= ROUNDING * theirs[name] + theirs["grad_norm"] * off, (name, step)
        for a, b in zip(mine["state_losses"], theirs["state_losses"]):
            # The trajectory carries the rounding of a state into the later ones.
            assert abs(a - b) <= 4 * (ROUNDING * b + theirs["grad_norm"] * off), step
        assert abs(mine["grad_norm"] - theirs["grad_norm"]) <= ROUNDING * 4.0**step * theirs["grad_norm"], step
        assert mine["epoch"] == theirs["epoch"] and mine["learning_rate"] == theirs["learning_rate"]
    assert one[-1]["loss"] != one[0]["loss"]
