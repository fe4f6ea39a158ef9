"""The benchmark's clock, file, peers and runner. Nothing here asserts a speed."""

import csv
import json
import math
import re
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from bench import clock, machine, results, run
from bench.results import Options, Row
from bench.suites import ops, zero
from dopsd_fast.errors import UserError
from tests import tiny

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = {"suite", "case", "variant", "metric", "value", "unit", "p20", "p80", "n", "status", "note", "low", "high"}
NUMBERS = (int, float)
CPU = torch.device("cpu")


# ---- clock and file --------------------------------------------------------------------------------------------------


def test_every_call_is_timed_once_a_round_and_each_goes_first_in_turn():
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    seconds = clock.interleaved(calls, rounds=3, warmup=1)
    assert "".join(order) == "abc" "bca" "cab" "abc"
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3, "c": 3}
    assert all(value >= 0 for values in seconds.values() for value in values)


def test_a_kernel_is_timed_behind_fills_that_hide_the_hosts_time(monkeypatch):
    """A GPU that is none: an event reads the clock of a device, which each fill advances by .1 ms and the kernel by .02 ms. The
    host takes .93 ms to launch it, which is no part of the answer and asks for 1.86 ms of fills the next time."""
    device_ms = [0.0]

    class Event:
        def __init__(self, enable_timing):
            pass

        def record(self, stream):
            self.at = device_ms[0]

        def elapsed_time(self, end):
            return end.at - self.at

    class Buffer:
        fills = 0

        def zero_(self):
            device_ms[0] += 0.1
            self.fills += 1

    def kernel():
        device_ms[0] += 0.02
        host[0] += 0.93e-3

    host, buffer = [0.0], Buffer()
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(clock.torch, "empty", lambda *_, **__: buffer)
    monkeypatch.setattr(clock.time, "perf_counter", lambda: host[0])
    seconds = clock.timer("events", torch.device("cuda"))
    counts = []
    for _ in range(2):
        before = buffer.fills
        assert seconds(kernel) == pytest.approx(2e-5)
        counts.append(buffer.fills - before)
    assert counts == [clock.FEWEST_FILLS, 19]
    assert clock.kernel_clock(CPU, "cpu") == "cpu" and clock.kernel_clock(torch.device("cuda")) == "events"


def test_median_and_percentiles():
    assert clock.summary([5.0, 1.0, 2.0, 3.0, 4.0, 0.0]) == {"value": 2.5, "p20": 1.0, "p80": 4.0, "n": 6}
    assert clock.summary([7.0]) == {"value": 7.0, "p20": 7.0, "p80": 7.0, "n": 1}
    assert clock.ratios([4.0, 9.0], [2.0, 3.0]) == [2.0, 3.0]


def test_results_come_back_as_they_were_written(tmp_path):
    counted = Row("cost", "full", "ours", "launches_per_step", 4e3, "")
    missing = results.failed("step", "full", "R3", "seconds_per_step", "s", RuntimeError("no\n compiler, no comma"))
    slower = Row("kernels", "swiglu", "ours", "seconds_forward", 0.25, "s", status="fallback", note='by "PyTorch", not native')
    rows = [Row("step", "lora/R1", "ours", "speedup", 1.5, "x", 1.4, 1.6, 20), counted, missing, slower]
    options = Options("nano", torch.device("cpu"))
    file = results.write_results(tmp_path / "out", machine.environment(options), rows)
    content = json.loads(file.read_text())
    assert file.name == "results.json" and set(content) == {"environment", "rows"}
    assert all(set(row) == COLUMNS for row in content["rows"])
    facts, found = results.read_results(tmp_path / "out")
    assert found == rows and missing.note == "RuntimeError: no compiler, no comma" and missing.value is None
    assert {"python", "torch", "cpu", "cores", "threads", "commit", "device", "model"} <= set(facts)
    with (tmp_path / "out" / "results.csv").open(newline="", encoding="utf-8") as stream:
        lines = list(csv.DictReader(stream))
    assert [list(line) for line in lines] == [[field.name for field in fields(Row)]] * len(rows)
    assert [line["note"] for line in lines] == [row.note for row in rows]
    assert [float(line["value"] or "nan") for line in lines] == pytest.approx([1.5, 4e3, math.nan, 0.25], nan_ok=True)


def test_every_column_is_explained():
    for field in fields(Row):
        assert re.search(rf"^ +(p20, |low, )?{field.name}\b", Row.__doc__ or "", re.MULTILINE), field.name


@pytest.mark.parametrize("rows", [
    [Row("step", "lora", "ours", "speedup", math.nan, "x")],
    [Row("step", "lora", "ours", "speedup", math.inf, "x")],
    [Row("step", "lora", "ours", "speedup", None, "x")],
    [Row("step", "lora", "ours", "speedup", 1.0, "x", status="failed")],
    [Row("step", "lora", "ours", "speedup", 1.0, "x"), Row("step", "lora", "ours", "speedup", 2.0, "x")],
])
def test_what_is_no_number_is_not_written(rows, tmp_path):
    with pytest.raises(ValueError):
        results.write_results(tmp_path, {}, rows)
    assert not (tmp_path / "results.json").exists() and not (tmp_path / "results.csv").exists()


@pytest.mark.parametrize(("content", "said"), [
    ('{"rows": [{"suite": "step"}], "environment": {}}', "is no benchmark result"),
    ('{"rows": [', "is no benchmark result"),
    ("[]", "is no benchmark result"),
    (None, "cannot be read: No such file"),
])
def test_what_is_no_result_is_refused(content, said, tmp_path):
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    with pytest.raises(UserError, match=said):
        results.read_results(tmp_path)


def test_how_often_a_suite_measures():
    usual = Options("nano", torch.device("cpu"))
    changes: list[dict] = [{}, {"tour": True}, {"quick": True}, {"rounds": 7}]
    assert [replace(usual, **more).repeats(20, 5) for more in changes] == [20, 5, 2, 7]


# ---- the runner ------------------------------------------------------------------------------------------------------


def bench(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "bench" / "run.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT / "tests")


def test_the_runner_end_to_end(tmp_path):
    """From another folder, on a pipeline that is not the standard one: its cases carry a suffix."""
    done = bench("rollout", "optimizer", "--quick", "--threads", "1", "--peers", "R1", "R2", "--model",
                 str(tiny.shared("zimage")), "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    facts, rows = results.read_results(tmp_path)
    assert facts["command"].startswith("python bench/run.py rollout optimizer --quick") and facts["tour"] is False
    assert str(tmp_path) not in facts["command"]
    assert facts["quick"] is True and facts["threads"] == 1 and facts["model"].endswith("zimage") and facts["seconds"] > 0
    for row in rows:
        assert row.status == "ok" and isinstance(row.value, NUMBERS) and math.isfinite(row.value), row
        assert (row.p20 is None) == (row.p80 is None) and (row.p20 is None or row.p20 <= row.value <= row.p80)
    found = {row.key: row.value for row in rows}
    for kind in ("lora", "full"):
        for variant in ("ours", "R1", "R2"):
            assert found["rollout", f"{kind}@zimage", variant, "states_per_second"] > 0
        for peer in ("R1", "R2"):
            assert found["rollout", f"{kind}/{peer}@zimage", "ours", "speedup"] > 0
    assert {suite for suite, _, _, metric in found if metric == "suite_seconds"} == {"rollout", "optimizer"}
    said = " ".join(done.stdout.split())
    assert "written:" in said and "rollout" in said and "[1/2] rollout" in done.stderr
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "rollout" in page and "optimizer" in page


@pytest.mark.parametrize(("arguments", "said"), [
    (["stp"], "'stp' is none of cost, "),
    (["step", "--model", "/no/such/folder"], "error: model.path=/no/such/folder: no such folder"),
    (["step", "--model", "zimage-turbo", "--device", "cpu"], "computes for hours on a CPU"),
    (["step", "--device", "abacus"], "error: --device abacus: "),
    (["compare", "/no/such/folder", "."], "error: /no/such/folder"),
    (["cost", "--out", __file__], f"error: --out {__file__}: File exists"),
    (["cost", "--out", "/proc/nowhere"], "error: --out /proc/nowhere: "),
    (["cost", "--threads", "0"], "'0' is no number from 1 on"),
    (["cost", "--rounds", "-3"], "'-3' is no number from 1 on"),
    (["zero", "--ranks", "two"], "'two' is no number from 1 on"),
    (["step", "--kinds", "full", "lara"], "invalid choice: 'lara'"),
    (["step", "--clock", "cpu", "--threads", "2"], "--clock cpu adds up the time of all threads"),
])
def test_bad_arguments_are_one_clear_line(arguments, said, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    try:
        code = run.main(arguments)
    except SystemExit as ended:
        code = ended.code
    assert code == 2 and said in capsys.readouterr().err.splitlines()[-1] and not list(tmp_path.iterdir())


def test_the_runner_names_the_family_that_it_cannot_measure(capsys):
    assert run.main(["step", "--model", str(tiny.shared("flux2_klein"))]) == 2
    assert "it is flux2_klein" in capsys.readouterr().err.splitlines()[-1]


def test_a_suite_that_fails_is_a_row_and_the_others_go_on(monkeypatch, tmp_path, capsys):
    def broken(suite, options, out):
        if suite == "cost":
            raise RuntimeError("no such\nluck")
        return [Row(suite, "case", "ours", "seconds", 1.0, "s")]

    monkeypatch.setattr(run, "rows_of", broken)
    options = Options("nano", torch.device("cpu"), threads=torch.get_num_threads())
    found = {row.key: row for row in run.measure(["cost", "step"], options, tmp_path)}
    assert found["step", "case", "ours", "seconds"].value == 1.0
    whole = found["cost", "cost", "ours", run.WHOLE]
    assert whole.status == "failed" and whole.note == "RuntimeError: no such luck"
    assert results.read_results(tmp_path)[1] == list(found.values())
    assert "no such luck" in capsys.readouterr().out


def test_what_is_not_installed_is_named(monkeypatch, capsys):
    monkeypatch.setattr(run, "NEEDED", ("rich", "no_such_package", "nor_this_one"))
    assert run.main(["cost"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: bench: no_such_package, nor_this_one not installed: pip install -c constraints.txt -e '.[bench]'"
    ]


@pytest.fixture
def made_up_ranks(monkeypatch):
    """zero.launch gives results that are made up; the jobs it was asked for. `losses`: case -> first loss, 2 if not named."""
    asked: list[zero.Job] = []
    losses: dict[str, float] = {}
    broken: set[str] = set()

    def launch(device, jobs):
        asked.extend(jobs)
        for job in jobs:
            (one,) = job.arrangements
            if one.case in broken:
                yield zero.RankFailed("rank 1 ended with 1: MemoryError: no more")
                continue
            counts = {"gathers_per_step": 16.0 if one.plain else 1.0, "collectives_per_step": 5}
            yield [{"first_loss": losses.get(one.case, 2.0), "precision": "fp32", "seconds_per_step": [0.5] * job.timed,
                    "peak_bytes": [7.0], "steps": [counts] * job.counted}]

    monkeypatch.setattr(zero, "launch", launch)
    return asked, losses, broken


def rows_of_zero(**changes):
    options = replace(Options(str(tiny.shared("zimage")), torch.device("cpu"), rounds=2, ranks=(2, 4)), **changes)
    return {(row.case, row.variant, row.metric): row for row in results.merged(zero.measure(options))}


def test_the_rows_of_zero(made_up_ranks):
    """Its cases, and plain's beside them. test_gathers runs it."""
    found = rows_of_zero()
    assert {job.world for job in made_up_ranks[0]} == {2, 4}
    for suffix in ("@zimage", "@zimage@4_ranks"):
        for case in ("full", "full/resident", "lora"):
            assert found[case + suffix, "ours", "gathers_per_step"].value == 1
            assert found[case + suffix, "ours", "first_loss_relative_error"].value == 0
        for case in ("full", "lora"):
            assert found[case + suffix, "plain", "gathers_per_step"].value == 16
        assert found["full" + suffix, "ours", "seconds_per_step"].n == 2
    assert not any(row.status != "ok" for row in found.values())


def test_the_tour_of_zero_measures_the_standard_arrangements(made_up_ranks):
    rows_of_zero(tour=True, rounds=0, ranks=())
    asked = {(one.case, one.variant) for job in made_up_ranks[0] for one in job.arrangements}
    assert asked == {("full", "ours"), ("full", "plain"), ("full/resident", "ours"), ("lora", "ours")}
    assert {job.world for job in made_up_ranks[0]} == {2}


def test_an_arrangement_that_does_other_work_or_fails_is_a_failed_row(made_up_ranks):
    _, losses, broken = made_up_ranks
    losses["full/resident"] = 3.0
    broken.add("full/stage2")
    found = rows_of_zero(ranks=(2,), kinds=("full",))
    for metric in ("gathers_per_step", "seconds_per_step"):
        assert "a first loss of 3, plain 2" in found["full/resident@zimage", "ours", metric].note
        assert "MemoryError: no more" in found["full/stage2@zimage", "ours", metric].note
        assert found["full@zimage", "ours", metric].status == "ok"


# ---- what is measured ------------------------------------------------------------------------------------------------


def test_every_op_is_measured():
    """A module of dopsd_kernels with a reference of its own has a case of its name."""
    files = (ROOT / "kernels" / "dopsd_kernels").glob("*.py")
    modules = {path.stem for path in files if f"def {path.stem}_ref(" in path.read_text(encoding="utf-8")}
    cases = {name.removesuffix("_lora").removesuffix("_full") for name in ops.OPS}
    assert modules == cases
