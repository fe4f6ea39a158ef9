"""bench/first_run.py: every stage with a small model on the CPU; and stages that fail, hang or do not fit."""

import json
import math
import os
import re
import subprocess
import sys
import time
import tomllib
import weakref
from importlib.metadata import requires, version
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import first_run, needed
from bench.suites import first_stages
from dopsd_kernels import pair_linear

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = {"cpu_flash"}
"""Of attention, those that a CPU has."""
USUAL = list(first_run.STAGES)


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "first.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("first") / "out"
    command = [sys.executable, str(ROOT / "bench" / "first_run.py"), str(out), "--device", "cpu"]
    environment = os.environ | {"QUICK": "1", "OMP_NUM_THREADS": "1"}
    began = time.monotonic()
    done = subprocess.run(command, env=environment, cwd=out.parent, capture_output=True, text=True, timeout=600)
    taken = time.monotonic() - began
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return out, lines(out), done.stdout, taken


def test_every_stage_has_its_rows_and_none_failed(whole):
    out, rows, printed, _ = whole
    assert [json.loads(line) for line in printed.splitlines() if line.startswith("{")] == rows
    assert [row["name"] for row in rows if row["stage"] == "done"] == USUAL
    assert not [row for row in rows if {"failed", "left_out"} & set(row)] and rows[-1]["failures"] == 0
    numbers = [value for row in rows for item in row.values() for value in (item if isinstance(item, list) else [item])]
    assert all(math.isfinite(value) for value in numbers if isinstance(value, float)) and not {"nan", "inf"} & set(
        value for value in numbers if isinstance(value, str))
    times = [row["t"] for row in rows]
    assert times == sorted(times)


def test_the_first_row_says_where_and_what(whole):
    _, rows, *_ = whole
    start = rows[0]
    assert start["stage"] == "start" and start["torch"] == torch.__version__ and start["device"] == "cpu"
    assert {"cpu", "cores", "python", "triton", "transformers", "commit", "missing", "model"} <= set(start)
    assert start["cudnn"] == torch.backends.cudnn.version() and start["gpu_bytes"] is None


def test_the_clock_begins_before_the_imports(whole):
    """What it does not count, the start of Python and its end, is less than what it counts before its first line."""
    _, rows, _, taken = whole
    assert taken - rows[-1]["t"] < rows[0]["t"]


def test_what_each_stage_measures(whole):
    _, rows, *_ = whole
    of = {name: [row for row in rows if row["stage"] == name] for name in USUAL}
    assert of["env"][0]["copy_TBs"] > 0 and of["env"][0]["gemm_TFs"] > 0 and of["env"][0]["launch_us"] > 0
    assert [row["group"] for row in of["gemm"]] == ["qkv", "out", "up", "down"]
    rates = {"base", "base_one_by_one", "folded", "dx_base", "dW_fp32_sums", "lora_triton", "lora_cublas",
             "lora_backward_triton", "lora_backward_cublas"}
    for row in of["gemm"]:
        assert all(row[name] > 0 for name in rates) and max(row["triton_against_cublas"]) < 1e-5
    dense = {row["backend"]: row for row in of["attend"] if "lengths" not in row}
    packed = {row["backend"] for row in of["attend"] if "lengths" in row}
    assert set(dense) == LIBRARIES and packed == {"auto", *LIBRARIES}
    assert all(max(row["error"]) < 1e-5 and len(row["error"]) == 4 for row in dense.values())  # fp32 against fp32
    for row in of["ops"]:
        assert row["ours_result_relative_error"] < 1e-5 and row["ours_seconds_backward"] > 0
        assert row["ours_ceiling_share_forward"] > 0 and row["ours_speedup_forward"] > 0
    assert {row["op"] for row in of["ops"]} == {*first_stages.OPS}
    (errors,) = of["velocities"]
    for name in ("ours", "eager"):  # fp32 against float64, through four blocks: an error of 0 would be no yardstick
        assert len(errors[name]) == 2 and all(1e-9 < error < 1e-5 for error in errors[name])


def test_steps_their_ratio_and_where_their_time_goes(whole):
    out, rows, *_ = whole
    steps = {row["stage"]: row for row in rows if "first_seconds" in row}
    assert set(steps) == {"lora", "lora_cublas", "r1", "full", "full_recompute", "r4"}
    assert all(row["seconds"] > 0 and row["cpu_seconds"] > 0 for row in steps.values())
    ours = [row for name, row in steps.items() if name.startswith(("lora", "full"))]
    assert all(row["loss"] > 0 and row["attention"] == "cpu_flash" and row["masters"] == "fp32" for row in ours)
    assert steps["lora"]["loss"] == steps["lora_cublas"]["loss"] and steps["full"]["loss"] == steps["full_recompute"]["loss"]
    for name in ("r1", "r4"):
        (ratio,) = [row["speedup"] for row in rows if row["stage"] == name and "speedup" in row]
        assert ratio == pytest.approx(steps[name]["seconds"] / steps["lora"]["seconds"], rel=1e-3)
    for name in ("lora", "lora_cublas", "full"):
        (parts,) = [row for row in rows if row["stage"] == name and "gemm_s" in row]
        assert parts["gemm_s"] > 0 and parts["optimizer_s"] > 0
        kernels = [row for row in rows if row["stage"] == name and "kernel" in row]
        assert len(kernels) == first_stages.KERNELS and kernels[0]["ms"] == max(row["ms"] for row in kernels)
    files = [file for file in out.rglob("*") if file.is_file()]
    assert len(files) == 4 <= 8 and all(file.stat().st_size <= 16e6 and file.parent == out for file in files)


# ---- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """Runs stages in this process, each of them given as a function."""
    monkeypatch.setenv("QUICK", "1")

    def call(*options: str, **stages) -> tuple[int, list[dict]]:
        monkeypatch.setattr(first_run, "STAGES", dict.fromkeys(stages, 0.0))
        for name, stage in stages.items():
            monkeypatch.setattr(first_stages, name, stage, raising=False)
        code = first_run.main([str(tmp_path / "out"), "--device", "cpu", *options])
        return code, lines(tmp_path / "out")

    return call


class Large:
    pass


def test_a_stage_that_raises_is_a_line_keeps_nothing_and_stops_no_other(quick):
    seen = []

    def without_memory(run):
        large = Large()
        large.itself = large  # as modules and hooks refer to each other
        seen.append(weakref.ref(large))
        raise torch.OutOfMemoryError("no room\nfor it")

    def after(run):
        run.say("after", freed=seen[0]() is None)

    code, rows = quick(without_memory=without_memory, after=after)
    found = {row["stage"]: row for row in rows}
    assert code == 1 and found["without_memory"]["failed"] == "OutOfMemoryError: no room for it"
    assert found["after"]["freed"] is True and found["end"]["failures"] == 1


class Mute(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


@pytest.mark.parametrize(("error", "said"), [(SystemExit(3), "SystemExit: 3"), (Mute(), "Mute")], ids=["exit", "mute"])
def test_nothing_that_a_stage_raises_ends_the_run(quick, error, said):
    def stage(run):
        raise error

    code, rows = quick(stage=stage, after=lambda run: run.say("after"))
    found = {row["stage"]: row for row in rows}
    assert code == 1 and found["stage"]["failed"] == said and "after" in found and rows[-1]["failures"] == 1


def test_an_interrupt_is_a_line_and_the_end(quick):
    def stage(run):
        raise KeyboardInterrupt

    code, rows = quick(stage=stage, after=lambda run: run.say("after"))
    assert code == 1 and rows[-1]["stage"] == "stopped" and rows[-1]["name"] == "stage"
    assert rows[-1]["why"] == "interrupted" and "after" not in {row["stage"] for row in rows}


def test_a_library_that_fails_hides_no_other(quick, monkeypatch):
    def broken(name, *tensors):
        raise RuntimeError("no plan")

    monkeypatch.setattr(first_stages, "attended", broken)
    code, rows = quick(attend=first_stages.attend)
    found = [row for row in rows if row["stage"] == "attend"]
    assert code == 1 and [row["backend"] for row in found if "failed" in row] == ["cpu_flash"]
    assert {row["backend"] for row in found if "forward" in row} == {"auto", "cpu_flash"}


def test_a_backend_of_the_products_takes_no_other_and_no_other_group(quick, monkeypatch):
    forward, dx = pair_linear.run_forward, []

    def broken(*arguments):
        if pair_linear._selected == "triton":
            raise RuntimeError("ptxas failed")
        return forward(*arguments)

    def rate(run, operations, call):
        dx.append(operations)
        if len(dx) == 4:  # the fourth of the first group: dx_base
            raise torch.OutOfMemoryError("no room")
        call()
        return 1.0

    monkeypatch.setattr(pair_linear, "run_forward", broken)
    monkeypatch.setattr(first_stages.Run, "rate", rate)
    code, rows = quick(gemm=first_stages.gemm)
    found = [row for row in rows if row["stage"] == "gemm"]
    lost = [(row["group"], row.get("backend")) for row in found if "failed" in row]
    assert code == 1 and lost == [("qkv", None), ("out", "triton"), ("up", "triton"), ("down", "triton")]
    first, *others = [row for row in found if "n" in row]
    assert {"base", "folded"} <= set(first) and not {"dx_base", "lora_cublas"} & set(first)
    for row in others:
        assert {"base", "dx_base", "lora_cublas", "lora_backward_cublas", "dW_fp32_sums"} <= set(row)
        assert not {"lora_triton", "triton_against_cublas"} & set(row)


def test_kernels_after_one_that_fails_are_measured(quick, monkeypatch):
    def broken(draw):
        raise RuntimeError("no plan")

    monkeypatch.setattr(first_stages, "OPS", ("swiglu", "divergence_step"))
    monkeypatch.setitem(first_stages.kernels.OPS, "swiglu", broken)
    code, rows = quick(ops=first_stages.ops)
    failed, measured = [row for row in rows if row["stage"] == "ops"]
    assert code == 1 and failed["op"] == "swiglu" and "no plan" in failed["failed"]
    assert measured["op"] == "divergence_step" and measured["ours_seconds_forward"] > 0


def test_every_line_is_on_the_disk_before_the_next_thing_is_done(quick):
    """So that a signal, at which nothing is written any more, takes nothing that was found."""
    seen = []

    def stage(run):
        for number in range(3):
            run.say("stage", number=number)
            seen.append([row["number"] for row in lines(run.out) if "number" in row])

    quick(stage=stage)
    assert seen == [[0], [0, 1], [0, 1, 2]]


def test_kernels_are_listed_though_the_parts_of_the_step_are_not_found(quick, monkeypatch):
    """As of a trace that lacks the step's range."""
    events = [{"cat": "cpu_op", "name": name, "dur": 1000} for name in ("mm", "mm", "add")]
    monkeypatch.setattr(first_stages, "traced", lambda *given: events)
    code, rows = quick(lora=lambda run: first_stages.where_time_goes(run, "lora", SimpleNamespace(step=None, engine=None)))
    failed, *kernels = [row for row in rows if row["stage"] == "lora"]
    assert code == 1 and failed["part"] == "breakdown" and "no range" in failed["failed"]
    assert [(row["kernel"], row["count"], row["ms"]) for row in kernels] == [("mm", 2, 2.0), ("add", 1, 1.0)]


def test_when_the_device_is_dead_it_says_so_and_ends(quick, monkeypatch):
    zeros = torch.zeros

    def illegal(*shape, **options):
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    def kills(run):
        monkeypatch.setattr(torch, "zeros", illegal)

    code, rows = quick(kills=kills, after=lambda run: run.say("after"), last=lambda run: run.say("last"))
    monkeypatch.setattr(torch, "zeros", zeros)
    assert code == 1 and rows[-1]["stage"] == "dead" and rows[-1]["after"] == "kills"
    assert "illegal memory access" in rows[-1]["why"] and rows[-1]["left_out"] == ["after", "last"]


def test_a_device_without_memory_is_not_dead(quick, monkeypatch):
    def full(*shape, **options):
        raise torch.OutOfMemoryError("no room")

    def fills(run):
        with monkeypatch.context() as patch:
            patch.setattr(torch, "zeros", full)
            run.say("fills", dead=run.dead())

    _, rows = quick(fills=fills)
    assert rows[1]["dead"] == ""


def test_what_no_longer_fits_is_left_out(quick):
    def names(name):
        return lambda run: run.say(name)

    code, rows = quick("--minutes", "-1", one=names("one"), two=names("two"))
    assert code == 0 and [(row["stage"], row.get("left_out", "")) for row in rows[1:]] == [
        ("one", "it needs 0 s, 0 are left"), ("two", "it needs 0 s, 0 are left"), ("end", "")]


def test_a_stage_that_hangs_is_ended_with_the_process(quick, monkeypatch):
    ended = []
    monkeypatch.setattr(first_run.os, "_exit", ended.append)

    def hangs(run):
        for _ in range(100):
            time.sleep(0.1)
            if ended:
                return

    _, rows = quick("--minutes", "0.02", hangs=hangs)
    (stopped,) = [row for row in rows if row["stage"] == "stopped"]
    assert ended == [1] and stopped["name"] == "hangs" and stopped["why"] == "1 s are over"


def test_the_stages_fit_the_minutes():
    """So that all of them begin if each takes what it is said to need, and the command ends within ten minutes."""
    minutes = first_run.parser().parse_args(["out"]).minutes
    assert sum(first_run.STAGES[name] for name in USUAL) <= 60 * minutes < 600


def test_the_command_line_names_the_stages(tmp_path, monkeypatch):
    peers = []
    monkeypatch.setenv("QUICK", "1")
    monkeypatch.setattr(first_stages, "peer_step", lambda run, name: peers.append(name))
    assert first_run.main([str(tmp_path), "r4", "r1", "--device", "cpu"]) == 0 and peers == ["R4", "R1"]


@pytest.mark.parametrize(("options", "said"), [
    (("gem", "lora"), "no stage gem; stages: env, gemm, attend, ops, lora"),
    (("--device", "cuda:7"), "--device cuda:7: "),
])
def test_what_cannot_be_run_is_one_line(tmp_path, monkeypatch, capsys, options, said):
    monkeypatch.setenv("QUICK", "1")
    assert first_run.main([str(tmp_path / "out"), *options]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_full_size_needs_a_gpu_and_what_is_needed(tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("QUICK", raising=False)
    assert first_run.main([str(tmp_path / "out"), "--device", "cpu"]) == 2
    assert "needs a GPU" in capsys.readouterr().err
    find = needed.installed
    monkeypatch.setattr(needed, "installed", lambda name: name != "diffusers" and find(name))
    assert first_run.main([str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith("bench/first_run.py: diffusers not installed")


def test_a_folder_that_cannot_be_written_to(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("QUICK", "1")
    (tmp_path / "file").write_text("")
    assert first_run.main([str(tmp_path / "file" / "out"), "--device", "cpu"]) == 2
    assert "name a folder" in capsys.readouterr().err


# ---- what is needed --------------------------------------------------------------------------------------------------


def test_what_is_needed_is_named_and_brought():
    """Whoever adds a dependency to pyproject.toml says in bench/needed.py whether the GPU machine has it."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    names = {re.match(r"[\w-]+", entry)[0].lower().replace("_", "-") for entry in declared}
    assert names - {*needed.NEEDED, *needed.WELCOME} == set(), "name it in bench/needed.py"
    commands = re.split(r"pip (?=download|wheel)", needed.__doc__)[1:]
    words = {word for command in commands for word in command.partition("\n\n")[0].split()}
    assert words >= {*needed.BROUGHT, "hjson", "deepspeed"}


def test_nothing_begins_without_what_is_needed(tmp_path, monkeypatch, capsys):
    find = needed.installed
    monkeypatch.setattr(needed, "installed", lambda name: name not in ("pydantic_core", "hjson") and find(name))
    assert first_run.main([str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "pydantic_core, hjson not installed" in said and "pydantic-core hjson`" in said
    assert "as bench/needed.py says at its top" in said and not (tmp_path / "out").exists()


@pytest.mark.parametrize("here", ["4.15.0", "4.9.0", "3.20"])
def test_nothing_begins_with_a_package_that_is_too_old(tmp_path, monkeypatch, capsys, here):
    monkeypatch.setattr(needed, "version", lambda name: here if name == "typing-extensions" else version(name))
    assert first_run.main([str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"typing_extensions is {here}, needs 4.16.0 or newer" in said
    assert "constraints.txt typing-extensions`" in said and not (tmp_path / "out").exists()


@pytest.mark.parametrize("here", ["4.16.0", "4.16.1rc1", "5.0"])
def test_a_package_that_is_new_enough_is_taken(monkeypatch, here):
    monkeypatch.setattr(needed, "version", lambda name: here if name == "typing-extensions" else version(name))
    assert needed.outdated() == {}


def test_the_oldest_versions_are_those_of_whoever_needs_them():
    least = dict(needed.LEAST)
    declared = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f"typing-extensions>={least.pop('typing-extensions')}" in requires("pydantic")
    assert f'"transformers>={least.pop("transformers")}"' in declared and not least
