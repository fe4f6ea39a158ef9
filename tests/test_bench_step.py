"""Suite `step`: its peers, what it counts, and what it says of what failed, fell back or does not fit."""

import math
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bench import harness, models
from bench.machine import Ceilings
from bench.models import Model
from bench.references import reference_eager as reference
from bench.results import Options, Row, merged
from bench.suites import room, step, workload
from bench.suites.gemm_floor import GemmFloor, Recorder
from bench.suites.workload import Cell, Workload
from dopsd_fast.errors import UserError
from dopsd_fast.settings.schema import Settings
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


def test_conditions_have_the_standard_lengths():
    work = Workload(tiny_options())
    assert [tuple(one.text.shape) for one in work.student] == [(20, 32)] * 8
    assert [tuple(one.text.shape) for one in work.teacher] == [(80, 32)] * 8
    assert work.grid == pytest.approx([0, 0.1, 0.25, 0.5, 1])


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_all_variants_start_alike(kind):
    """Adapters too, in any dtype; the teacher as the student."""
    work = Workload(tiny_options())
    ours = dict(workload.OurStep(kind, work).parameters())
    for dtype in (None, torch.float64):
        theirs = workload.peer("R2", kind, work, dtype)
        for name, parameter in theirs.trainable.items():
            assert torch.equal(parameter.float(), ours[workload.stock_name(name)]), name
            assert torch.equal(parameter, theirs.teacher_weights[name]) and (parameter != 0).any()


def test_adapters_are_drawn_on_the_models_device(monkeypatch):
    """PEFT draws on the default device: inside the calls that lead to it, that is the model's."""
    seen = []
    monkeypatch.setattr(workload, "build_pair", lambda *_: seen.append(torch.empty(1).device))
    monkeypatch.setattr(workload, "ReferenceStep", lambda *_, **__: seen.append(torch.empty(1).device))
    monkeypatch.setattr(Model, "transformer", lambda *_: None)
    work = Workload(Options("zimage-small", torch.device("meta"), threads=1))
    workload.pair_on_device(work.model, Settings())
    workload.peer("R2", "full", work)
    assert [device.type for device in seen] == ["meta", "meta"] and torch.empty(1).device == CPU


# ---- the suite -------------------------------------------------------------------------------------------------------


def test_rows_of_the_suite():
    rows = found(step.measure(tiny_options(peers=("R1", "R2"))))
    for kind in ("lora", "full"):
        case = f"{kind}@zimage"
        for variant in ("ours", "R1", "R2"):
            value = {metric: row.value for (at, of, metric), row in rows.items() if (at, of) == (case, variant)}
            assert value["states_per_second"] == pytest.approx(4 * value["samples_per_second"])
            assert value["samples_per_second"] == pytest.approx(8 / value["seconds_per_step"], rel=0.5)  # medians of two
            assert value["mfu"] > 0 and value["flops_per_second"] > 0
            # fp32 against float64 through some ten layers: far below 1e-4 where the step is the same, far above if not
            assert value["gradient_relative_error"] < 1e-4 and value["gradient_one_minus_cosine"] < 1e-8
        for peer in ("R1", "R2"):
            ratio = rows[f"{kind}/{peer}@zimage", "ours", "speedup"]
            assert ratio.unit == "x" and ratio.n == 2 and ratio.value > 0
        assert 0 < rows[case, "R1", "encoders_share"].value < 1 and rows[case, "ours", "floor_share"].value > 0
        flops = rows[case, "floor", "gemm_gflop_per_step"].value * 1e9
        rate = rows[case, "floor", "flops_per_second"]
        assert rate.value == pytest.approx(flops / rows[case, "floor", "seconds_per_step"].value, rel=0.5)
    assert all(row.status == "ok" and not row.note for row in rows.values())


def test_a_variant_that_cannot_run_leaves_rows_and_the_others_go_on(monkeypatch):
    """R1 is built and fails when timed, as for want of memory; R2 is not even built."""

    class Broken(workload.PeerStep):
        def __init__(self, name, kind, work):
            if name == "R2":
                raise torch.OutOfMemoryError("no room\nfor it")
            super().__init__(name, kind, work)
            self.begun = False
            self.whole, self.step = self.step, self.once

        def once(self):
            if self.begun:
                raise RuntimeError("not twice")
            self.begun = True
            self.whole()

    monkeypatch.setattr(step, "PeerStep", Broken)
    rows = found(step.measure(tiny_options(peers=("R1", "R2"), kinds=("full",))))
    assert rows["full@zimage", "ours", "seconds_per_step"].status == "ok"
    assert rows["full@zimage", "floor", "seconds_per_step"].status == "ok"
    for peer, said in (("R1", "RuntimeError: not twice"), ("R2", "OutOfMemoryError: no room for it")):
        for key in (("full@zimage", peer, "seconds_per_step"), (f"full/{peer}@zimage", "ours", "speedup")):
            assert (rows[key].status, rows[key].value, rows[key].note) == ("failed", None, said), key


def test_what_would_begin_too_late_is_left_out():
    options = tiny_options(kinds=("lora",))
    rows = found(step.measure(options, [Cell()], ("R1",), deadline=0.0))
    lost = {variant for (_, variant, metric), row in rows.items() if metric == "seconds_per_step" and row.status == "failed"}
    assert lost == {"ours", "R1"} and all("time was up" in row.note for row in rows.values())


def test_what_fell_back_says_so(monkeypatch):
    monkeypatch.setattr(native_ops, "_native", None)
    monkeypatch.setitem(reference.STRONGER["R3"], "compile_blocks", broken_backend)
    rows = found(step.measure(tiny_options(peers=("R3",), kinds=("full",))))
    ours, R3 = (rows["full@zimage", variant, "seconds_per_step"] for variant in ("ours", "R3"))
    assert ours.status == "fallback" and "_native is not built" in ours.note and ours.value > 0
    assert R3.status == "failed" and "no compiler" in R3.note


def broken_backend(graph, inputs):
    raise RuntimeError("no compiler here")


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


def test_bf16_is_compared_with_fp32(monkeypatch):
    """As on a GPU; the CPU has no kernels for it. bf16 carries 8 bits: errors of 1e-3 to 1e-1 through ten layers and four
    states. Ours is to be no worse than twice the peer's."""
    monkeypatch.setattr(Model, "dtype", torch.bfloat16)
    rows = found(step.measure(tiny_options(peers=("R2",), kinds=("lora",))))
    ours, theirs = (rows["lora@zimage", variant, "gradient_relative_error"] for variant in ("ours", "R2"))
    assert 1e-3 < theirs.value < 0.2 and ours.value <= 2 * theirs.value
    assert theirs.note == "against fp32 without TF32" and ours.status == "fallback" and theirs.status == "ok"


def test_names_of_cells():
    assert Cell().name == "" and Cell(pixels=512, batch=4).name == "@512px@batch4"
    assert Cell(layers=12, states=8, activations="recompute").name == "@12layers@K8@recompute"
    options = Options("nano", CPU)
    assert [cell.name for cell in step.cells(options)] == [
        "", "@selective", "@recompute", "@K8", "@batch1", "@batch4", "@16px"]
    assert [cell.name for cell in step.cells(replace(options, tour=True))] == [""]


def test_a_cell_changes_what_its_name_says():
    work = Workload(Options("zimage-small", CPU, threads=1), Cell(layers=2, pixels=64, batch=3, states=8))
    assert work.noise.shape == (3, 16, 8, 8) and len(work.grid) == 9 and len(work.student) == len(work.prompts) == 3
    assert len(work.model.transformer().layers) == 2 and work.suffix == "@2layers@64px@batch3@K8@zimage-small"
    with pytest.raises(UserError, match="weights of its own"):
        Workload(tiny_options(), Cell(layers=1))


def test_the_tour_leaves_r3_to_the_suite_and_says_so(monkeypatch):
    monkeypatch.setattr(step, "ceilings", lambda *_: Ceilings(1e9, 1e9))
    options = replace(tiny_options(peers=("R3",), kinds=("lora",), rounds=1), quick=False, tour=True)
    rows = found(step.measure(options))
    assert rows["lora@zimage", "ours", "seconds_per_step"].note == "R3 is measured by `bench/run.py step`"
    assert {variant for _, variant, _ in rows} == {"ours", "floor"}


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
    fits = room.Room(kind, work, step.Options("nano", CPU).peers)
    assert (fits.layers, fits.masters) == (layers, masters)
    assert [name for name in ("R1", "R2", "R3", "R4") if fits.beside_ours(name)] == beside.split()


def test_errors_come_from_less_depth_where_the_exact_gradient_does_not_fit(monkeypatch):
    monkeypatch.setattr(room.Room, "exact_fits", property(lambda self: self.work.cell.layers == 2))
    thin = {"dim": 64, "n_heads": 1, "n_kv_heads": 1, "n_layers": 3}
    monkeypatch.setitem(models.RANDOM, "zimage-small", models.SMALL | thin)
    options = Options("zimage-small", CPU, quick=True, threads=1, kinds=("lora",))
    rows = found(step.measure(options, [Cell(pixels=32, batch=1)], ("R2",)))
    case = "lora@{}32px@batch1@zimage-small"
    for variant in ("ours", "R2"):
        assert 0 < rows[case.format("2layers@"), variant, "gradient_relative_error"].value < 1e-4
        assert rows[case.format(""), variant, "seconds_per_step"].value > 0
    lost = rows[case.format(""), "ours", "gradient_relative_error"]
    assert lost.status == "failed" and "lora@2layers" in lost.note
    assert (case.format("2layers@"), "ours", "seconds_per_step") not in rows


# ---- the floor -------------------------------------------------------------------------------------------------------


def test_the_floor_counts_every_product_once():
    torch.manual_seed(0)
    x = torch.randn(6, 10, requires_grad=True)
    layers = [nn.Linear(10, 4, bias=False) for _ in range(3)] + [nn.Linear(4, 7)]
    layers[3].requires_grad_(False)

    def forward():
        q, k, v = (layer(x) for layer in layers[:3])
        attended = F.scaled_dot_product_attention(*(y.view(1, 6, 2, 2).transpose(1, 2) for y in (q, k, v)))
        layers[3](attended.transpose(1, 2).reshape(6, 4))
        with torch.no_grad():
            for _ in range(3):
                layers[3](torch.zeros(5, 4))  # gone at once: the next may have its id

    with Recorder() as recorder:
        forward()
    assert +recorder.products == Counter({
        (1, 6, 10, 12): 1, (1, 6, 12, 10): 1, (1, 12, 6, 10): 1,  # q, k, v as one: forward, dx, dW
        (2, 6, 2, 6): 3, (2, 6, 6, 2): 3,  # attention: 2 forward, 4 backward
        (1, 6, 4, 7): 1, (1, 6, 7, 4): 1,  # frozen: no dW
        (1, 5, 4, 7): 3,  # without gradient
    })
    floor = GemmFloor(forward, 3, CPU)
    assert floor.flops == 3 * 2 * (3 * 720 + 6 * 144 + 2 * 168 + 3 * 140)
    floor.run()


def test_on_a_gpu_the_floor_is_freed_before_ours_is_built(monkeypatch):
    """Its operands would lie beside what is measured; its rows are the same as when it takes turns with ours."""
    held = []

    class Watched(workload.OurStep):
        def __init__(self, *given):
            held.append([len(floor._work) for floor in floors])
            super().__init__(*given)

    class Known(GemmFloor):
        def __init__(self, *given):
            super().__init__(*given)
            floors.append(self)

        def run(self):
            super().run()
            ran.append(len(self._work))

    floors, ran = [], []
    monkeypatch.setattr(step, "OurStep", Watched)
    monkeypatch.setattr(step, "GemmFloor", Known)
    monkeypatch.setattr(step.Measurement, "floor_is_alone", True)
    rows = found(step.measure(tiny_options(peers=("R2",), kinds=("lora",))))
    assert held == [[0]] and ran and min(ran) > 0
    assert rows["lora@zimage", "floor", "seconds_per_step"].value > 0 and rows["lora@zimage", "ours", "mfu"].value > 0
    share = rows["lora@zimage", "ours", "floor_share"]
    assert share.value > 0 and share.note == "measured one after the other"
    assert rows["lora/R2@zimage", "ours", "speedup"].note == ""


def test_without_the_exact_gradient_there_are_times_and_ratios():
    rows = found(step.measure(tiny_options(kinds=("lora",)), [Cell()], ("R2",), exact=False))
    assert rows["lora/R2@zimage", "ours", "speedup"].value > 0
    assert {metric for _, variant, metric in rows if variant == "ours"} == {
        "seconds_per_step", "states_per_second", "samples_per_second", "speedup"}
    assert {variant for _, variant, _ in rows} == {"ours", "R2"}


def test_numbers_that_are_none_are_failures():
    row = harness.Contest("step", "lora{}", tiny_options()).row("ours", "gradient_relative_error", "", math.nan)
    assert (row.status, row.value, row.note) == ("failed", None, "not finite")
