"""The engine at every ZeRO stage, one and two ranks, against plain PyTorch in this process."""

from __future__ import annotations

import functools
import itertools
import math
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dopsd_fast.errors import UserError
from dopsd_fast.pair.lora import lora_coverage
from dopsd_fast.settings.schema import Settings
from tests import ranks
from tests.plain_steps import EPS, plain, tolerance
from tests.tiny import pair_of, shared

ALL_PARTITIONED = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}

EQUAL = [
    dict(name=f"{adapter}-{precision}-{stage}", stage=stage, adapter=adapter, precision=precision)
    for adapter, precision, stage in [
        *itertools.product(("full", "lora"), ("fp32",), (0, 2, 3)),
        ("full", "fp32", 1),
        *itertools.product(("full",), ("bf16",), (0, 1, 2, 3)),
        ("lora", "bf16", 3),
    ]
]
PARTITIONED = dict(name="lora-fp32-3-partitioned", stage=3, adapter="lora", config=ALL_PARTITIONED)
OFFLOADED = [
    dict(
        name=f"full-bf16-{stage}-offloaded",
        stage=stage,
        precision="bf16",
        config={"zero_optimization": {"offload_optimizer": {"device": "cpu"}}},
    )
    for stage in (2, 3)
]
MANY = [dict(name=f"many-{stage}", do="many_small_gradients", stage=stage, precision="bf16") for stage in (0, 1, 2, 3)]
BAD = [dict(name=f"bad-{stage}", do="not_finite", stage=stage, factor=math.inf) for stage in (0, 2, 3)]
BAD += [dict(name="bad-2-bf16", do="not_finite", stage=2, precision="bf16", factor=math.nan)]
# One rank runs what the others are compared with; two ranks run everything.
ONE_RANK = [case for case in EQUAL if case["precision"] == "fp32"] + [EQUAL[-1]]
COMPARED = [
    pytest.param(case, world, id=f"{case['name']}-{world}")
    for world, compared in ((1, ONE_RANK), (2, [*EQUAL, PARTITIONED, *OFFLOADED]))
    for case in compared
]
LAST = str(ranks.STEPS - 1)


def cases() -> list[dict]:
    equal = [case | dict(do="equal_to_one_process", eps=EPS) for case in [*EQUAL, PARTITIONED, *OFFLOADED]]
    kinds = [
        dict(name=f"{kind}-{adapter}", do="equal_to_one_process", stage=stage, adapter=adapter, teacher=kind, eps=EPS)
        for kind, stages in (("frozen", (3, 2)), ("student", (2, 3)))
        for adapter, stage in zip(("full", "lora"), stages)
    ]
    recomputed = [
        dict(name=f"recompute-{stage}", do="norms_only", stage=stage, adapter="lora", recompute=True, eps=EPS)
        for stage in (0, 3)
    ]
    good = [case | dict(name=f"never-{case['name']}", do="never_bad") for case in BAD]
    model = str(shared("zimage"))
    zimage = [
        dict(name="zimage-full", stage=3, model=model, config=ALL_PARTITIONED, recompute=True),
        dict(name="zimage-lora", stage=3, model=model, config=ALL_PARTITIONED, adapter="lora"),
        dict(name="zimage-lora-bf16", stage=2, model=model, precision="bf16", adapter="lora"),
    ]
    zimage = [case | dict(do="norms_only", eps=EPS) for case in zimage]
    others = [
        dict(name="interrupted-2", do="interrupted", stage=2, eps=EPS),
        dict(name="unclipped-0", do="norms_only", stage=0, grad_clip=0.0, eps=EPS),
        dict(name="agreement", do="agreement", stage=0),
    ]
    return equal + kinds + recomputed + zimage + MANY + BAD + good + others


@functools.cache
def results(world: int) -> dict:
    alone = {case["name"] for case in ONE_RANK} | {"interrupted-2"}
    run = [case for case in cases() if (case["name"] in alone if world == 1 else case["do"] != "interrupted")]
    with tempfile.TemporaryDirectory() as folder:
        return ranks.run(world, run, Path(folder))


@pytest.mark.parametrize("case, world", COMPARED)
def test_equals_one_process(case: dict, world: int) -> None:
    precision = case.get("precision", "fp32")
    adapter = case.get("adapter", "full")
    expected, result = plain(adapter, precision), results(world)[case["name"]]
    relative = 2.0**-20 if precision == "fp32" else 2.0**-6
    assert result.numbers["norms"] == pytest.approx(expected.norms, rel=relative * 16)
    steps = range(ranks.STEPS) if precision == "fp32" else range(1)
    for step in steps:
        for name, student in expected.students[step].items():
            error = (result.tensors[f"{step}/student/{name}"] - student).abs().max()
            assert float(error) <= tolerance(precision, step), (step, name)
    moved = max(
        float((result.tensors[f"{LAST}/student/{name}"] - result.tensors[f"start/student/{name}"]).abs().max())
        for name in expected.students[-1]
    )
    assert moved > 100 * tolerance("fp32", ranks.STEPS - 1)


@pytest.mark.parametrize("case, world", COMPARED)
def test_teacher_is_the_float64_average_of_the_student(case: dict, world: int) -> None:
    tensors = results(world)[case["name"]].tensors
    names = [key.removeprefix("start/student/") for key in tensors if key.startswith("start/student/")]
    for name in names:
        average = tensors[f"start/student/{name}"].double()
        assert torch.equal(tensors[f"start/teacher/{name}"], tensors[f"start/student/{name}"])
        for step in range(ranks.STEPS):
            average = 0.9 * average + 0.1 * tensors[f"{step}/student/{name}"].double()
            error = (tensors[f"{step}/teacher/{name}"].double() - average).abs().max()
            # Three roundings a step at the magnitude of the average.
            assert float(error) <= 3 * (step + 1) * 2**-24 * max(1.0, float(average.abs().max())), (step, name)


@pytest.mark.parametrize("case, world", COMPARED)
def test_parameters_are_the_cast_master_and_average(case: dict, world: int) -> None:
    dtype = torch.bfloat16 if case.get("precision") == "bf16" else torch.float32
    tensors = results(world)[case["name"]].tensors
    for step in ("start", "0", LAST):
        for which in ("student", "teacher"):
            for key, tensor in tensors.items():
                if key.startswith(f"{step}/{which}/") and not key.endswith("steps_seen"):
                    weight = tensors[key.replace(f"{step}/", f"{step}/weights/", 1)]
                    assert weight.dtype == dtype and torch.equal(weight, tensor.to(dtype)), key
    assert not torch.equal(tensors[f"{LAST}/probe/teacher"], tensors[f"{LAST}/probe/student"])


@pytest.mark.parametrize("adapter", ["full", "lora"])
def test_other_teachers(adapter: str) -> None:
    for kind in ("frozen", "student"):
        result = results(2)[f"{kind}-{adapter}"]
        expected = plain(adapter, "fp32", kind)
        assert result.numbers["norms"] == pytest.approx(expected.norms, rel=2.0**-16)
        same = "start/student" if kind == "frozen" else f"{LAST}/student"
        for key, tensor in result.tensors.items():
            if key.startswith(f"{LAST}/teacher/"):
                assert torch.equal(tensor, result.tensors[same + key.removeprefix(f"{LAST}/teacher")]), key
        wanted = "start/probe/teacher" if kind == "frozen" else f"{LAST}/probe/student"
        assert torch.equal(result.tensors[f"{LAST}/probe/teacher"], result.tensors[wanted])
        assert not torch.equal(result.tensors[f"{LAST}/probe/student"], result.tensors["start/probe/student"])


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bf16_gradients_are_summed_in_fp32(stage: int) -> None:
    """1 + 63 / 512 of a gradient: in a bf16 sum every one of the 63 is lost (half a unit in the last place of 1 is
    2^-8)."""
    numbers = results(2)[f"many-{stage}"].numbers
    # Scaling by a power of two is exact in bf16, so only fp32 sums and one fp32 norm round.
    assert numbers["separate"] == pytest.approx(1 + 63 / 512, rel=1e-5)
    assert numbers["together"] == pytest.approx(1 + 63 / 512, rel=1e-5)


@pytest.mark.parametrize("case", BAD, ids=lambda case: case["name"])
def test_a_gradient_that_is_not_finite_changes_nothing(case: dict) -> None:
    result, never = results(2)[case["name"]], results(2)[f"never-{case['name']}"]
    assert not math.isfinite(float(result.numbers["bad"]))
    for key, tensor in result.tensors.items():
        if key.startswith("before/"):
            assert torch.equal(tensor, result.tensors[key.replace("before/", "after/")]), key
    assert result.numbers["next"] == never.numbers["next"]


def test_recomputation_gives_the_same_gradients() -> None:
    for stage in (0, 3):
        expected = results(2)[f"lora-fp32-{stage}"].numbers["norms"][:2]
        assert results(2)[f"recompute-{stage}"].numbers["norms"] == pytest.approx(expected, rel=2.0**-20)


@pytest.mark.parametrize("adapter, precision", [("full", "fp32"), ("lora", "fp32"), ("lora", "bf16")])
def test_tiny_zimage(adapter: str, precision: str) -> None:
    """The real class, contexts of unequal length, every parameter partitioned, with recomputation for full."""
    name = f"zimage-{adapter}" + ("-bf16" if precision == "bf16" else "")
    expected = plain(adapter, precision, model="zimage").norms[:2]
    relative = 2.0**-14 if precision == "fp32" else 2.0**-5
    assert results(2)[name].numbers["norms"] == pytest.approx(expected, rel=relative)


def test_an_exception_drops_the_gradients() -> None:
    numbers = results(1)["interrupted-2"].numbers
    assert numbers["raised"] and numbers["norms"] == results(1)["full-fp32-2"].numbers["norms"][:2]


def test_reported_norm_is_from_before_clipping() -> None:
    first = results(2)["unclipped-0"].numbers["norms"][0]
    assert first > 0.05
    for stage in (0, 2, 3):
        assert results(2)[f"full-fp32-{stage}"].numbers["norms"][0] == pytest.approx(first, rel=2.0**-20)


def test_ranks_agree() -> None:
    numbers = results(2)["agreement"].numbers
    assert (numbers["any"], numbers["ints"], numbers["mean"]) == ([False, True], [10, 11], [0.5, 1.0])


def test_summary_and_silence() -> None:
    numbers = results(2)["full-bf16-3"].numbers
    assert numbers["describe"]["parameter_dtype"] == "bfloat16" and numbers["describe"]["world"] == 2
    assert numbers["trained"] == sum(p.numel() for p in ranks.Transformer().parameters())
    said = [line for line in results(2)["output"].splitlines() if "OVERFLOW! Skipping step" not in line]
    assert [line for line in said if any(word in line for word in ("INFO", "WARN", "Warning", "deepspeed"))] == []


# ---- the pair, without an engine ---------------------------------------------------------------------------


def lora_settings(**changes) -> Settings:
    return ranks.make_settings(dict(stage=0, adapter="lora") | changes, 1)


def test_teacher_starts_equal_and_frozen() -> None:
    for adapter in ("full", "lora"):
        pair = pair_of(ranks.Family(), lora_settings(adapter=adapter), torch.float32)
        trained = pair.trained()
        assert trained and all(torch.equal(t.student, t.teacher) for t in trained)
        assert all(t.student.requires_grad and not t.teacher.requires_grad for t in trained)
        students = {id(t.student) for t in trained}
        assert all(not p.requires_grad for p in pair.parameters() if id(p) not in students)


def test_adapter_is_gaussian_and_seeded() -> None:
    settings = lora_settings()
    settings.adapter.rank = 64
    first, second = (pair_of(ranks.Family(), settings, torch.float32).trained() for _ in range(2))
    settings.train.seed = 1
    other = pair_of(ranks.Family(), settings, torch.float32).trained()
    for a, b, c in zip(first, second, other):
        assert torch.equal(a.student, b.student)
        if "lora_A" in a.name:
            assert not torch.equal(a.student, c.student)
            assert float(a.student.detach().std()) == pytest.approx(1 / 64, rel=0.3)
        else:
            assert float(a.student.detach().abs().max()) == 0


def test_teacher_forward_leaves_the_students_adapter_active() -> None:
    family, pair = ranks.make_pair(dict(adapter="lora"), lora_settings())
    with torch.no_grad():
        for t in pair.trained():
            t.teacher.add_(1.0)
    before = ranks.probe(pair, family, "student")
    flags = [p.requires_grad for p in pair.parameters()]
    teacher = ranks.probe(pair, family, "teacher")
    assert not torch.equal(before, teacher)
    assert torch.equal(ranks.probe(pair, family, "student"), before)
    with pytest.raises(ZeroDivisionError), pair.branch("teacher"):
        raise ZeroDivisionError
    assert torch.equal(ranks.probe(pair, family, "student"), before)
    assert [p.requires_grad for p in pair.parameters()] == flags


def test_targets_that_match_nothing() -> None:
    settings = lora_settings()
    settings.adapter.targets = ["to_q", "ff.net.0.proj", "q"]
    with pytest.raises(UserError, match=r"ff\.net\.0\.proj, q match no .*matched: to_q \(2\).*end in: .*w1") as error:
        pair_of(ranks.Family(), settings, torch.float32)
    assert "\n" not in str(error.value)


def test_coverage_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = ranks.Transformer()
    assert lora_coverage(model, ["to_q", "blocks.0.w1", "x"]) == {"to_q": 2, "blocks.0.w1": 1, "x": 0}
    family = SimpleNamespace(load_transformer=lambda dtype: model, lora_targets=("to_q", "w1"), pair_forward=lambda *_: None,
                             velocity=None)
    pair = pair_of(family, lora_settings(), torch.bfloat16)
    assert len(pair.trained()) == 8 and all(t.student.is_meta for t in pair.trained())


@pytest.mark.parametrize(("norm", "clip", "scale"), [(0.7, 1.0, 1.0), (4.0, 1.0, 0.25), (4.0, 0.0, 1.0), (0.2, 0.1, 0.5)])
def test_stage_0_scales_only_gradients_that_are_too_large(norm, clip, scale):
    """1e-6 is added to the norm, as DeepSpeed does."""
    from dopsd_fast.distributed.plain_engine import PlainEngine

    grads = torch.tensor([0.6, 0.0]) * norm, torch.tensor([[0.8]]) * norm
    trained = [SimpleNamespace(student=SimpleNamespace(grad=grad)) for grad in grads]
    engine = SimpleNamespace(_trained=trained, _clip=clip, optimizer=SimpleNamespace(grad_scale=1.0))
    assert PlainEngine._clip_gradients(engine) == pytest.approx(norm)
    assert engine.optimizer.grad_scale == pytest.approx(scale, rel=2e-5)


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("stage", [2, 3])
def test_the_fragments_of_all_ranks_are_every_tensor_once(stage, world):
    """Laid out as DeepSpeed does it: stages 1 and 2 cut a group's flat tensor anywhere, also within a tensor; stage 3 cuts each
    tensor, and pads it. Some ranks hold nothing of a tensor of one element."""
    from dopsd_fast.distributed.zero_engine import ZeroEngine

    sizes = [7, 1, 4, 10]
    padded = -(-sum(sizes) // world) * world
    whole = torch.arange(1.0, padded + 1)
    params = list(whole[: sum(sizes)].split(sizes))
    shares = [-(-size // world) for size in sizes]
    starts = [sum(shares[:i]) for i in range(len(sizes))]
    held = {size: torch.zeros(size) for size in sizes}
    for rank in range(world):
        engine = object.__new__(ZeroEngine)
        engine.stage, engine.world, engine.rank = stage, world, rank
        if stage == 3:
            pieces = [torch.cat([p, torch.zeros(s * world - len(p))]).chunk(world)[rank] for p, s in zip(params, shares)]
            zero = {"grad_position": {i: (0, *place) for i, place in enumerate(zip(starts, shares))},
                    "get_param_id": lambda p: sizes.index(p.ds_numel), "fp32_partitioned_groups_flat": [torch.cat(pieces)]}
            students = [SimpleNamespace(ds_numel=size) for size in sizes]
        else:
            zero = {"bit16_groups_flat": [torch.zeros(3), whole],
                    "single_partition_of_fp32_groups": [torch.zeros(3), whole.chunk(world)[rank]]}
            students = params
        engine._zero = SimpleNamespace(**zero)
        engine._trained = [SimpleNamespace(name=size, student=student) for size, student in zip(sizes, students)]
        for f in engine._find_fragments():
            held[f.trained.name][f.offset : f.offset + f.numel] += f.flat[f.start : f.start + f.numel]
    assert all(torch.equal(held[size], param) for size, param in zip(sizes, params))
