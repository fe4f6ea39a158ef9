"""Suite `memory`: what it measures is what was allocated, and what it counts follows the depth."""

import json
import os
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import forks
from bench.cases import cost, memory, room
from bench.cases.workload import Workload
from bench.results import Options, Row
from dopsd_fast.memory.ledger import CONTEXT, PROCESS, Machine
from dopsd_fast.memory.planner import make_plan
from tests import tiny

CPU = torch.device("cpu")
MB = 1 << 20


def tiny_options(**more) -> Options:
    return Options(str(tiny.shared("zimage")), CPU, quick=True, threads=1, **more)


def found(rows) -> dict[tuple[str, str, str], Row]:
    rows = list(rows)
    by_key = {(row.case, row.variant, row.metric): row for row in rows}
    assert len(by_key) == len(rows) and {row.suite for row in rows} == {"memory"}
    return by_key


class Known:
    """Holds 24 MB, and for a moment of each step 40 MB more."""

    def __init__(self, kind, work):
        self.held = torch.ones(24 * MB // 4)

    def step(self):
        parts = [torch.ones(20 * MB // 4) for _ in range(2)]
        del parts
        torch.ones(30 * MB // 4)

    def fell_back(self):
        return ""


def examine(out: str) -> None:
    """In a process of its own, as the suite measures: this one's heap has room that would not count."""
    torch.set_num_threads(1)
    work = Workload(tiny_options())
    found = [memory.in_turn(Known, "lora", work) for _ in range(2)]
    Path(out).write_text(json.dumps([*found, memory.in_turn(memory.PEERS["R1"], "full", work)]))


@pytest.fixture(scope="module")
def examined(tmp_path_factory):
    folder = tmp_path_factory.mktemp("examined")
    assert forks.apart(f"{__name__}:examine", [str(folder / "out")], folder / "log", {}) == ""
    return json.loads((folder / "out").read_text())


def test_the_peak_is_what_was_allocated(examined):
    """Some pages of the process itself come to it; a fork leaves nothing behind."""
    for peak, growth, note in examined[:2]:
        assert growth == pytest.approx(40 * MB, abs=2 * MB) and peak - growth == 24 * MB and note == ""


def test_what_stays_is_weights_moments_and_average(examined):
    """Full: R1 has its model, the teacher, two moments and the average, five fp32 numbers a parameter."""
    peak, growth, _ = examined[2]
    assert peak - growth == pytest.approx(5 * 4 * Workload(tiny_options()).parameters, rel=0.02)


def test_no_fork_of_a_process_that_has_a_process_group(monkeypatch):
    """It would wait for itself."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    with pytest.raises(memory.Lost, match="has a process group"):
        memory.in_turn(Known, "lora", Workload(tiny_options()))


def lead(work: str, out: str) -> None:
    """As the suite's, but nothing is compiled."""
    memory.PEERS["R4"] = lambda kind, work: memory.Peer("R2", kind, work, False)
    memory.lead(work, out)


def led_by(name: str, monkeypatch, options: Options) -> list[Row]:
    """The suite's rows, with a function of this module in place of its `lead`."""
    apart = forks.apart
    monkeypatch.setattr(forks, "apart", lambda _, *rest: apart(f"{__name__}:{name}", *rest))
    return memory.measured_apart(options)


def test_rows_of_the_suite(monkeypatch):
    rows = found(led_by("lead", monkeypatch, tiny_options(kinds=("full",))))
    value = {key: row.value for key, row in rows.items()}
    names = [("", "R1"), ("", "R2_uncheckpointed"), ("", "R4"), ("", "ours"), ("@selective", "ours"), ("@recompute", "ours")]
    for end, name in names:
        peak, step = (value[f"full{end}@zimage", name, metric] for metric in ("peak_bytes", "step_bytes"))
        assert peak > step > 0, name
    steps = [value[f"full{end}@zimage", name, "step_bytes"] for end, name in names]
    assert steps[0] < steps[1] and steps[5] < steps[4] < steps[3] < steps[1]
    ratio = rows["full/R1@recompute@zimage", "ours", "peak_ratio"]
    ours, theirs = value["full@recompute@zimage", "ours", "peak_bytes"], value["full@zimage", "R1", "peak_bytes"]
    assert ratio.value == ours / theirs and ratio.unit == "x"
    for end in ("", "@selective", "@recompute"):
        planned = value[f"full{end}@zimage", "planner", "planned_bytes"]
        measured = value[f"full{end}@zimage", "ours", "peak_bytes"]
        assert planned == pytest.approx(measured, rel=0.4)
        assert value[f"full{end}@zimage", "planner", "planned_ratio"] == planned / measured
    assert all(row.status == "ok" and not row.note for row in rows.values())


def test_the_suite_measures_in_a_process_of_its_own(monkeypatch):
    """Whatever threads and process groups this one has; and it tells what it does."""
    said: list[str] = []
    monkeypatch.setattr(forks, "step", said.append)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        for name, value in forks.rank_environment(0, 1, taken.getsockname()[1]).items():
            monkeypatch.setenv(name, value)  # as a step that was measured before leaves them
        rows = found(memory.measured_apart(tiny_options(kinds=("lora",), tour=True)))
    assert all(row.status == "ok" for row in rows.values())
    assert rows["lora@zimage", "ours", "peak_bytes"].value > rows["lora@recompute@zimage", "ours", "peak_bytes"].value > 0
    assert said == ["memory: lora@zimage, R1", "memory: lora@zimage, ours", "memory: lora@recompute@zimage, ours"]


def test_a_process_that_fails_says_why(tmp_path):
    """With the last error that it wrote."""
    assert forks.apart("bench.forks:free_port", [], tmp_path / "log", {}) == ""
    lost = forks.apart("bench.cases.memory:lead", ["{}", "nowhere"], tmp_path / "log", {})
    assert lost == "its process ended with 1: KeyError: 'peers'"


def unable(kind, work):
    raise MemoryError("no room for it")


class Killed(Known):
    def step(self):
        os.kill(os.getpid(), 9)


def lead_with_failures(work: str, out: str) -> None:
    memory.PEERS.update(R1=unable, R2_uncheckpointed=Killed, R4=Known)
    memory.lead(work, out)


def test_a_variant_that_cannot_run_leaves_rows_and_the_others_go_on(monkeypatch):
    """An error in the fork, and a fork that is killed."""
    rows = found(led_by("lead_with_failures", monkeypatch, tiny_options(kinds=("lora",))))
    lost, killed = (rows["lora@zimage", name, "peak_bytes"] for name in ("R1", "R2_uncheckpointed"))
    assert (lost.status, lost.value) == ("failed", None) and lost.note == "MemoryError: no room for it"
    assert killed.status == "failed" and killed.note == "the fork ended with -9"
    assert rows["lora@zimage", "R4", "peak_bytes"].value > 0 and rows["lora@zimage", "ours", "peak_bytes"].value > 0
    ratio = rows["lora/R1@zimage", "ours", "peak_ratio"]
    assert (ratio.status, ratio.note) == ("failed", "R1 was not measured")


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_the_published_step_grows_evenly_with_its_layers(kind):
    one, two, three = (memory.traced_bytes(kind, cost.Size(layers, 2)) for layers in (2, 3, 4))
    assert three - two == two - one
    # each of two graphs keeps the input of every block: 4096 + 256 tokens, 3840 channels, bf16
    assert two - one >= 2 * (4096 + 256) * 3840 * 2


def test_full_size_by_count():
    rows = found(memory.counted("lora", replace(tiny_options(), tour=True)))
    keep, recompute, theirs = (rows[f"lora@full_size{end}", name, "activation_bytes"].value
                               for end, name in (("", "ours"), ("@recompute", "ours"), ("", "R1")))  # fmt: skip
    assert recompute < theirs < keep and 10e9 < keep < 20e9
    assert rows["lora/R1@full_size@recompute", "ours", "activation_ratio"].value == recompute / theirs
    peaks = {(end, name): rows[f"lora@full_size{end}", name, "peak_bytes"].value
             for end, name in (("", "ours"), ("@recompute", "ours"), ("", "R1"), ("", "R2"))}  # fmt: skip
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


def test_a_plan_without_what_the_process_takes():
    """On a GPU that is the context; on a CPU the libraries, which a GPU's memory never holds."""
    settings, family, shapes = memory.full_size("lora", "recompute")
    for kind, own in (("cuda", CONTEXT), ("cpu", PROCESS)):
        whole = make_plan(settings, Machine(1, 1, None, None, kind), family, shapes).device_peak
        assert memory.planned_peak(settings, kind, family, shapes) == whole - own
