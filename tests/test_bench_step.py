"""Suite `step`: its peers, what it counts, and what it says of what failed, fell back or does not fit."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bench import harness, models
from bench.models import Model
from bench.references import reference_eager as reference
from bench.results import Options, Row, merged
from bench.suites import room, step, workload
from bench.suites.measurement import cells
from bench.suites.products import Products
from bench.suites.workload import Cell, OurStep, PeerStep, Workload
from dopsd_kernels import native_ops
from tests import tiny

CPU = torch.device("cpu")


def tiny_options(**more) -> Options:
    return Options(str(tiny.shared("zimage")), CPU, quick=True, threads=1, **more)


def found(rows) -> dict[tuple[str, str, str], Row]:
    rows = merged(rows)
    by_key = {(row.case, row.variant, row.metric): row for row in rows}
    assert len(by_key) == len(rows) and {row.suite for row in rows} == {"step"}
    return by_key


@pytest.fixture(scope="module")
def work() -> Workload:
    return Workload(tiny_options())


# ---- peers -----------------------------------------------------------------------------------------------------------


def gradients(kind: str, **options) -> dict[str, torch.Tensor]:
    from diffusers import ZImageTransformer2DModel

    model = ZImageTransformer2DModel.from_pretrained(tiny.shared("zimage") / "transformer")
    torch.manual_seed(0)
    adapter = reference.Adapter(3, 6.0) if kind == "lora" else None
    peer = reference.ReferenceStep(model, [1.0, 0.75, 0.5, 0.0], adapter=adapter, **options)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in peer.trainable.values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
    texts = [reference.Condition(torch.randn(n, 32, generator=draw)) for n in (5, 40, 70, 33)]
    result = peer.backward(torch.randn(2, 8, 6, 10, generator=draw), texts[:2], texts[2:])
    assert result.loss > 0
    return peer.gradients()


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_stronger_peers_have_the_published_gradient(kind):
    """The same mathematics in another order: 1e-5 is 170 units of fp32 roundoff. Compiled by dynamo alone: inductor's
    code generation takes minutes."""
    published = gradients(kind)
    for name in ("R3", "R4"):
        options = {**reference.STRONGER[name], "compile_blocks": "eager"}
        torch._dynamo.reset()
        for weight, gradient in gradients(kind, **options).items():
            assert (gradient - published[weight]).norm() <= 1e-5 * published[weight].norm(), (name, weight)
    assert reference.STRONGER["R1"] == reference.STRONGER["R2"] == {}


def test_conditions_have_the_standard_lengths(work):
    """Those that R1 encodes in every step, too, whatever the prompts' lengths are; the others have them already."""
    assert work.grid == pytest.approx([0, 0.1, 0.25, 0.5, 1])
    R1, R2 = (PeerStep(name, "lora", work) for name in ("R1", "R2"))
    assert R2.conditions() == (work.student, work.teacher)
    for student, teacher in ((work.student, work.teacher), R1.conditions()):
        assert [tuple(one.text.shape) for one in student] == [(20, 32)] * 8
        assert [tuple(one.text.shape) for one in teacher] == [(80, 32)] * 8


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_all_variants_start_alike(kind, work):
    """Adapters too, in any dtype; the teacher as the student."""
    ours = dict(OurStep(kind, work).parameters())
    for dtype in (None, torch.float64):
        theirs = PeerStep("R2", kind, work, dtype).reference
        for name, parameter in theirs.trainable.items():
            assert torch.equal(parameter.float(), ours[workload.stock_name(name)]), name
            assert torch.equal(parameter, theirs.teacher_weights[name]) and (parameter != 0).any()
            assert torch.equal(parameter.float(), theirs.ema[name])


def test_adapters_are_drawn_on_the_models_device(monkeypatch):
    """PEFT draws on the default device: inside the calls that lead to it, that is the model's."""
    seen = []

    def draws(*_, **__):
        seen.append(torch.empty(1).device.type)
        raise InterruptedError

    monkeypatch.setattr(models, "build_pair", draws)
    monkeypatch.setattr(workload, "ReferenceStep", draws)
    monkeypatch.setattr(Model, "transformer", lambda *_: None)
    work = Workload(Options("zimage-small", torch.device("meta"), threads=1))
    for make in (lambda: OurStep("lora", work), lambda: PeerStep("R2", "lora", work)):
        with pytest.raises(InterruptedError):
            make()
    assert seen == ["meta", "meta"] and torch.empty(1).device == CPU


# ---- the suite -------------------------------------------------------------------------------------------------------


def test_rows_of_the_suite():
    rows = found(step.measure(tiny_options(peers=("R1", "R2"), rounds=1)))
    for kind in ("lora", "full"):
        case = f"{kind}@zimage"
        for variant in ("ours", "R1", "R2"):
            value = {metric: row.value for (at, of, metric), row in rows.items() if (at, of) == (case, variant)}
            assert value["states_per_second"] == pytest.approx(4 * 8 / value["seconds_per_step"])
            assert value["mfu"] > 0 and value["flops_per_second"] > 0
            # fp32 against float64 through some ten layers: far below 1e-4 where the step is the same, far above if not
            assert value["gradient_relative_error"] < 1e-4
        for peer in ("R1", "R2"):
            ratio = rows[f"{kind}/{peer}@zimage", "ours", "speedup"]
            assert ratio.unit == "x" and ratio.n == 1 and ratio.value > 0
    assert all(row.status == "ok" and not row.note for row in rows.values())


def test_a_variant_that_cannot_run_leaves_rows_and_the_others_go_on(monkeypatch):
    """R1 is built and fails when timed, as for want of memory; R2 is not even built; R3 has no compiler. Ours says what it fell
    back to."""

    class Broken(PeerStep):
        begun = False

        def __init__(self, name, kind, work, dtype=None):
            if name == "R2" and dtype is None:
                raise torch.OutOfMemoryError("no room\nfor it")
            super().__init__(name, kind, work, dtype)

        def step(self):
            if self.begun:
                raise RuntimeError("not twice")
            self.begun = True
            super().step()

    monkeypatch.setattr(step, "PeerStep", Broken)
    monkeypatch.setattr(native_ops, "_native", None)
    monkeypatch.setitem(reference.STRONGER["R3"], "compile_blocks", unable)
    rows = found(step.measure(tiny_options(peers=("R1", "R2", "R3"), kinds=("full",))))
    ours = rows["full@zimage", "ours", "seconds_per_step"]
    assert ours.status == "fallback" and "_native is not built" in ours.note and ours.value > 0
    said = {"R1": "RuntimeError: not twice", "R2": "OutOfMemoryError: no room for it", "R3": "no way to do it"}
    for peer, why in said.items():
        for key in (("full@zimage", peer, "seconds_per_step"), (f"full/{peer}@zimage", "ours", "speedup")):
            assert (rows[key].status, rows[key].value) == ("failed", None) and why in rows[key].note, key


def unable(*_):
    raise RuntimeError("no way to do it")


def test_what_was_not_compiled_is_known():
    def whole(x):
        return x.sin().cos()

    def broken(x):
        x = x.sin()
        torch._dynamo.graph_break()
        return x.cos()

    said = []
    for function in (whole, broken, None):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        if function is not None:
            torch.compile(function, backend="eager")(torch.ones(3))
        said.append(harness.compiled_in_part())
    assert said[0] == "" and "broke the graph" in said[1] and said[2] == "torch.compile compiled nothing"
    torch._dynamo.reset()


def test_bf16_is_compared_with_fp32_and_what_does_not_fit_beside_ours_follows(monkeypatch):
    """As on a GPU; the CPU has no kernels for bf16. It carries 8 bits: errors of 1e-3 to 1e-1 through ten layers and four
    states. Ours is to be no worse than twice the peer's. R2 has no room beside ours, so it is measured afterwards."""
    monkeypatch.setattr(Model, "dtype", torch.bfloat16)
    monkeypatch.setattr(room.Room, "beside_ours", lambda self, *names: False)
    rows = found(step.Step("lora", tiny_options(rounds=1), Cell(batch=2), ["R2"]).rows())
    case = "lora{}@batch2@zimage"
    ours, theirs = (rows[case.format(""), variant, "gradient_relative_error"] for variant in ("ours", "R2"))
    assert 1e-3 < theirs.value < 0.2 and ours.value <= 2 * theirs.value
    assert theirs.note == "against fp32 without TF32" and ours.status == "fallback" and theirs.status == "ok"
    speedup = rows[case.format("/R2"), "ours", "speedup"]
    ours, theirs = (rows[case.format(""), variant, "seconds_per_step"] for variant in ("ours", "R2"))
    assert "measured one after the other" in speedup.note and speedup.value == pytest.approx(theirs.value / ours.value)


def test_an_exact_gradient_that_cannot_be_computed_is_a_failed_row(monkeypatch):
    """The times and ratios are there all the same; the tour leaves R3 to the suite and says so."""
    monkeypatch.setattr(step.Step, "find_exact", unable)
    options = replace(tiny_options(peers=("R2", "R3"), kinds=("lora",), rounds=1), quick=False, tour=True)
    rows = found(step.measure(options))
    exact = rows["lora@zimage", "exact", "gradient_relative_error"]
    assert (exact.status, exact.note) == ("failed", "RuntimeError: no way to do it")
    assert rows["lora/R2@zimage", "ours", "speedup"].value > 0
    assert {metric for _, variant, metric in rows if variant == "ours"} == {"seconds_per_step", "states_per_second", "speedup"}
    assert rows["lora@zimage", "ours", "seconds_per_step"].note == "R3 is measured by `bench/run.py step`"
    assert {variant for _, variant, _ in rows} == {"ours", "R2", "exact"}


def test_names_of_cells():
    assert Cell().name == "" and Cell(pixels=512, batch=4).name == "@512px@batch4"
    assert Cell(layers=12, states=8, activations="recompute").name == "@12layers@K8@recompute"
    options = Options("nano", CPU)
    names = [cell.name for cell in cells(options, step.WIDE, step.NARROW)]
    assert names == ["", "@selective", "@recompute", "@K8", "@batch1", "@batch4"]
    assert [cell.name for cell in cells(replace(options, tour=True), step.WIDE, step.NARROW)] == [""]


def test_a_cell_changes_what_its_name_says():
    work = Workload(Options("zimage-small", CPU, threads=1), Cell(layers=2, pixels=64, batch=3, states=8))
    assert work.noise.shape == (3, 16, 8, 8) and len(work.grid) == 9 and len(work.student) == len(work.prompts) == 3
    assert len(work.model.transformer().layers) == 2 and work.suffix == "@2layers@64px@batch3@K8@zimage-small"


# ---- what fits a GPU -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("gigabytes", "kind", "cell", "layers", "masters", "beside"), [
    (85.0, "lora", Cell(), None, "fp32", "R1 R2 R3 R4"),
    (85.0, "lora", Cell(batch=4), None, "fp32", ""),
    (85.0, "full", Cell(), 12, "fp32", ""),
    (85.0, "full", Cell(activations="recompute"), 12, "fp32", ""),
    (150.7, "full", Cell(), None, "low_bits", ""),
    (400.0, "full", Cell(), None, "fp32", "R1 R2 R3 R4"),
])
def test_room_for_z_image(monkeypatch, gigabytes, kind, cell, layers, masters, beside):
    """The published model has 6,154,908,736 parameters, LoRA of rank 64 158.8 M (LOG.md)."""
    monkeypatch.setattr(Model, "noise", lambda *_: torch.empty(0))
    monkeypatch.setattr(Model, "features", lambda self, batch, *_: [torch.empty(0)] * batch)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=int(gigabytes * 1e9)))
    work = Workload(Options("zimage-turbo", torch.device("cuda")), cell)
    assert work.parameters == 6_154_908_736 and work.trained("lora") == pytest.approx(158.8e6, rel=1e-3)
    fits = room.Room(kind, work)
    assert (fits.layers, fits.masters) == (layers, masters)
    assert [name for name in ("R1", "R2", "R3", "R4") if fits.beside_ours(name)] == beside.split()


# ---- what is counted -------------------------------------------------------------------------------------------------


def test_every_product_is_counted_once():
    torch.manual_seed(0)
    x = torch.randn(6, 10, requires_grad=True)
    layers = [nn.Linear(10, 4, bias=False) for _ in range(3)] + [nn.Linear(4, 7)]
    layers[3].requires_grad_(False)
    with Products() as products:
        q, k, v = (layer(x) for layer in layers[:3])
        attended = F.scaled_dot_product_attention(*(y.view(1, 6, 2, 2).transpose(1, 2) for y in (q, k, v)))
        layers[3](attended.transpose(1, 2).reshape(6, 4))
        with torch.no_grad():
            for _ in range(3):
                layers[3](torch.zeros(5, 4))
    # q, k, v: forward, dx, dW; attention: 2 forward, 4 backward; frozen: no dW; without gradient
    assert products.flops == 2 * (3 * 720 + 6 * 144 + 2 * 168 + 3 * 140)


def test_numbers_that_are_none_are_failures():
    row = harness.Contest("step", "lora{}", tiny_options()).row("ours", "gradient_relative_error", "", math.nan)
    assert (row.status, row.value, row.note) == ("failed", None, "not finite")
