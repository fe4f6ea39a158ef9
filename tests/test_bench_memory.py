"""Suite `memory`: what it counts follows the depth and the plan, and what it measures is what was allocated."""

from dataclasses import replace

import pytest
import torch

from bench.models import Model
from bench.results import Options, Row
from bench.suites import memory, room
from bench.suites.memory import Counted
from dopsd_fast.memory.ledger import CONTEXT, PROCESS, Machine
from dopsd_fast.memory.planner import make_plan
from tests import tiny

CPU, GPU = torch.device("cpu"), torch.device("cuda")
MB = 1 << 20


def tiny_options(**more) -> Options:
    return Options(str(tiny.shared("zimage")), CPU, quick=True, threads=1, **more)


def found(rows) -> dict[tuple[str, str, str], Row]:
    rows = list(rows)
    by_key = {(row.case, row.variant, row.metric): row for row in rows}
    assert len(by_key) == len(rows) and {row.suite for row in rows} == {"memory"}
    return by_key


# ---- measured --------------------------------------------------------------------------------------------------------


class Allocator:
    """PyTorch's on a GPU, of which others have 5 MB."""

    held = peak = 5 * MB

    def take(self, size: int) -> None:
        self.held += size
        self.peak = max(self.peak, self.held)


@pytest.mark.parametrize("name", ["ours", "R1", "R2_uncheckpointed", "R4"])
def test_the_peak_is_what_was_allocated(monkeypatch, name):
    """By a step that holds 24 MB, makes 8 MB of moments at first, leaves 2 MB of gradients, and takes 40 MB for a moment."""
    allocator, said = Allocator(), []

    class Known:
        reference = type("Step", (), {"model": type("Model", (), {
            "disable_gradient_checkpointing": lambda self: said.append("no checkpoints")})()})()

        def __init__(self, *given):
            said.append(next((one for one in given if one in ("R2", "R4", "recompute")), None))
            self.gradients, self.stepped = 0, False
            allocator.take(24 * MB)

        def step(self):
            allocator.take(0 if self.stepped else 8 * MB)
            self.stepped = True
            allocator.take(40 * MB)
            allocator.take(-38 * MB)
            self.gradients = 2 * MB

        def clear(self):
            allocator.take(-self.gradients)
            self.gradients = 0

        def fell_back(self):
            return "something"

        def close(self):
            said.append("closed")

    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: allocator.held)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: allocator.peak)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: setattr(allocator, "peak", allocator.held))
    monkeypatch.setattr(memory, "OurStep", Known)
    monkeypatch.setattr(memory, "PeerStep", Known)
    peak, added, fell = memory.allocated("lora", tiny_options(), name, "recompute")
    assert (peak, added) == ((24 + 8 + 40) * MB, 40 * MB)
    assert fell == ("torch.compile compiled nothing" if name == "R4" else "something")
    made = {"ours": ["recompute"], "R1": ["R2"], "R2_uncheckpointed": ["R2", "no checkpoints"], "R4": ["R4"]}
    assert said == [*made[name], "closed"]


# ---- counted ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_rows_of_the_suite(monkeypatch, kind):
    monkeypatch.setattr(memory, "counted", lambda kind, _: [Row("memory", f"{kind}@full_size", "ours", "peak_bytes", 1.0, "B")])
    rows = found(memory.measure(tiny_options(kinds=(kind,))))
    assert rows.pop((f"{kind}@full_size", "ours", "peak_bytes"))
    value = {key: row.value for key, row in rows.items()}
    names = [("", "R1"), ("", "R2_uncheckpointed"), ("", "ours"), ("@selective", "ours"), ("@recompute", "ours")]
    for end, name in names:
        peak, step = (value[f"{kind}{end}@zimage", name, metric] for metric in ("peak_bytes", "step_bytes"))
        assert peak > step > 0, name
    steps = [value[f"{kind}{end}@zimage", name, "step_bytes"] for end, name in names]
    assert steps[0] < steps[1] and steps[4] < steps[3] < steps[2] < steps[1]
    for metric in ("peak", "step"):
        ratio = rows[f"{kind}/R1@recompute@zimage", "ours", f"{metric}_ratio"]
        ours = value[f"{kind}@recompute@zimage", "ours", f"{metric}_bytes"]
        assert ratio.value == ours / value[f"{kind}@zimage", "R1", f"{metric}_bytes"] and ratio.unit == "x"
    for end in ("", "@selective", "@recompute"):
        planned = value[f"{kind}{end}@zimage", "planner", "planned_bytes"]
        counted = value[f"{kind}{end}@zimage", "ours", "peak_bytes"]
        assert planned == pytest.approx(counted, rel=0.4)
        assert value[f"{kind}{end}@zimage", "planner", "planned_ratio"] == planned / counted
    assert {row.status for row in rows.values()} == {"ok"}
    assert {row.note for row in rows.values() if row.metric in ("peak_bytes", "step_bytes")} == {"counted"}


def test_what_stays_is_weights_moments_and_average():
    """Full, in fp32: student, teacher, two moments and the average, five numbers a parameter, of R1 and of ours."""
    step = Counted("full", Model(str(tiny.shared("zimage")), CPU))
    parameters = sum(p.numel() for p in step.model.family.meta_transformer().parameters())
    for name in ("R1", "ours"):
        peak, added, _ = step.sizes(name, "keep")
        assert peak - added == 5 * 4 * parameters


def test_a_variant_that_cannot_be_counted_leaves_rows_and_the_others_go_on(monkeypatch):
    alive = memory.alive

    def unable(step, checkpoint, layers):
        if checkpoint:
            raise MemoryError("no room for it")
        return alive(step, checkpoint, layers)

    monkeypatch.setattr(memory, "alive", unable)
    monkeypatch.setattr(memory, "counted", lambda *_: iter(()))
    rows = found(memory.measure(tiny_options(kinds=("lora",))))
    lost = rows["lora@zimage", "R1", "peak_bytes"]
    assert (lost.status, lost.value, lost.note) == ("failed", None, "MemoryError: no room for it")
    assert all(rows["lora@zimage", name, "peak_bytes"].value > 0 for name in ("R2_uncheckpointed", "ours"))
    ratio = rows["lora/R1@zimage", "ours", "peak_ratio"]
    assert (ratio.status, ratio.note) == ("failed", "R1 was not measured")


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_published_step_grows_evenly_with_its_layers(kind):
    step = Counted(kind, Model("zimage-turbo", GPU))
    step.model.standard = replace(step.model.standard, states=2)
    one, two, three = (memory.alive(step, True, layers) for layers in (2, 3, 4))
    for before, between, after in zip(one, two, three):
        assert after - between == between - before
    # each of two graphs keeps the input of every block: 4096 + 256 tokens, 3840 channels, bf16
    assert two[1] - one[1] >= 2 * (4096 + 256) * 3840 * 2


def test_full_size_by_count():
    rows = found(memory.counted("lora", replace(tiny_options(), tour=True)))
    keep, recompute, theirs = (rows[f"lora@full_size{end}", name, "activation_bytes"].value
                               for end, name in (("", "ours"), ("@recompute", "ours"), ("", "R1")))
    assert recompute < theirs < keep and 10e9 < keep < 20e9
    assert rows["lora/R1@full_size@recompute", "ours", "activation_ratio"].value == recompute / theirs
    peaks = {(end, name): rows[f"lora@full_size{end}", name, "peak_bytes"].value
             for end, name in (("", "ours"), ("@recompute", "ours"), ("", "R1"), ("", "R2"))}
    weights = 2 * 6_154_908_736  # bf16; two adapters and the optimizer come to it
    assert all(weights + 3.6e9 < peak < weights + 20e9 for (_, name), peak in peaks.items() if name != "R1")
    assert peaks["", "R1"] - peaks["", "R2"] == room.ENCODERS
    for name in ("R1", "R2"):
        for end in ("", "@recompute"):
            ratio = rows[f"lora/{name}@full_size{end}", "ours", "peak_ratio"].value
            assert ratio == peaks[end, "ours"] / peaks["", name]
    # the promise: 0.87 of the published step without recomputing, 0.55 with it
    assert peaks["", "ours"] <= 0.87 * peaks["", "R1"] and peaks["@recompute", "ours"] <= 0.55 * peaks["", "R1"]
    assert all(row.status == "ok" for row in rows.values())


@pytest.mark.parametrize(("name", "device", "own"), [("zimage-turbo", GPU, CONTEXT), ("zimage-small", CPU, PROCESS)])
def test_a_plan_without_what_the_process_takes(name, device, own):
    """On a GPU that is the context; on a CPU the libraries, which a GPU's memory never holds."""
    step = Counted("lora", Model(name, device))
    machine = Machine(1, 1, None, None, device.type)
    whole = make_plan(step.settings("recompute"), machine, step.model.family, step.shapes).device_peak
    assert step.planned("recompute") == whole - own
