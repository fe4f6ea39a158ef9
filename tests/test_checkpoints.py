"""Saving and resuming: same numbers, any world size and stage, and nothing lost when a save fails."""

from __future__ import annotations

import copy
import functools
import json
import os
import resource
import shutil
import signal
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from dopsd_fast.errors import UserError
from dopsd_fast.storage import atomic, checkpoints
from tests import ranks

SAVED = [
    *(dict(name=f"{adapter}-{stage}", stage=stage, adapter=adapter) for adapter in ("full", "lora") for stage in (0, 2, 3)),
    *(dict(name=f"full-bf16-{stage}", stage=stage, precision="bf16") for stage in (0, 1, 2, 3)),
    dict(
        name="lora-bf16-3-partitioned",
        stage=3,
        adapter="lora",
        precision="bf16",
        config={"zero_optimization": {"stage3_param_persistence_threshold": 0}},
    ),
    dict(name="frozen-2", stage=2, teacher="frozen", adapter="lora"),
]
# name of the saved case (at one rank) -> the case that reads it at two ranks
ELSEWHERE = {
    "full-0": dict(stage=3), "full-2": dict(stage=0), "full-3": dict(stage=2), "lora-0": dict(stage=2, adapter="lora"),
    "lora-3": dict(stage=0, adapter="lora"), "full-bf16-3": dict(stage=2, precision="bf16"),
    "full-bf16-0": dict(stage=3, precision="bf16"), "lora-2": dict(stage=3, adapter="lora"),
}
ALONE = [case for case in SAVED if case["name"] in ELSEWHERE]


@functools.cache
def scratch() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory()


def saved_folder(name: str, world: int) -> Path:
    return Path(scratch().name) / f"{name}-{world}"


@functools.cache
def results(world: int) -> dict:
    """One rank runs first, because two ranks read what it saved."""
    saved = SAVED if world == 2 else ALONE
    cases = [case | dict(do="save_and_go_on", folder=str(saved_folder(case["name"], world))) for case in saved]
    if world == 2:
        results(1)
        cases += [
            case | dict(name=f"from-{name}", do="load_only", folder=str(saved_folder(name, 1)))
            for name, case in ELSEWHERE.items()
        ]
        cases += [dict(name="failing", do="failing_rank", stage=2, folder=str(saved_folder("failing", 2)))]
    return ranks.run(world, cases, Path(scratch().name) / f"run-{world}")


@pytest.mark.parametrize(
    "case, world",
    [pytest.param(case, world, id=f"{case['name']}-{world}") for world in (1, 2) for case in (ALONE, SAVED)[world - 1]],
)
def test_resumed_equals_uninterrupted(case: dict, world: int) -> None:
    """Bit for bit: norms, masters, averages, the weights in use and what they compute; bf16 too."""
    result = results(world)[case["name"]]
    assert result.numbers["resumed_norms"] == result.numbers["norms"]
    assert result.numbers["extra"] == {"epoch": 3, "loss": 0.1}
    compared = 0
    for key, tensor in result.tensors.items():
        for mine, other in (("saved/", "loaded/"), ("uninterrupted/", "resumed/")):
            if key.startswith(mine):
                assert torch.equal(tensor, result.tensors[key.replace(mine, other, 1)]), key
                compared += 1
    assert compared > 40
    moved = [k for k, t in result.tensors.items() if k.startswith("saved/student/") and not k.endswith("steps_seen")]
    assert all(not torch.equal(result.tensors[k], result.tensors[k.replace("saved/", "resumed/")]) for k in moved)


@pytest.mark.parametrize("name", ELSEWHERE)
def test_another_world_and_stage_continue_with_the_same_state(name: str) -> None:
    written, read = results(1)[name], results(2)[f"from-{name}"]
    for key, tensor in written.tensors.items():
        exact = key.startswith(("saved/student/", "saved/teacher/", "saved/weights/"))
        if exact:
            assert torch.equal(tensor, read.tensors[key.replace("saved/", "loaded/", 1)]), key
    # Other sums from here on: a few units in the last place of the gradient's dtype.
    relative = 2.0**-6 if "bf16" in name else 2.0**-16
    assert read.numbers["resumed_norms"] == pytest.approx(written.numbers["norms"], rel=relative)


@pytest.mark.parametrize("case", SAVED, ids=lambda case: case["name"])
def test_whole_tensors_from_the_files_of_two_ranks(case: dict) -> None:
    """What one rank at stage 0 would read."""
    tensors = results(2)[case["name"]].tensors
    folder = checkpoints.latest(saved_folder(case["name"], 2))
    assert len(list(folder.glob("rank-*.safetensors"))) == 2
    with ExitStack() as files:
        reader = checkpoints.CheckpointReader(folder, files)
        for which, kind in (("student", "master"), ("teacher", "ema")):
            for key, tensor in tensors.items():
                if not key.startswith(f"saved/{which}/") or key.endswith("steps_seen"):
                    continue
                name = key.removeprefix(f"saved/{which}/")
                if kind == "ema" and case.get("teacher") == "frozen":
                    with pytest.raises(UserError, match=f"holds no ema of {name}"):
                        reader(name, kind, 0, tensor.numel())
                    continue
                assert torch.equal(reader(name, kind, 0, tensor.numel()), tensor.flatten())
                assert int(reader(name, "step", 0, 1)) == 2
        with pytest.raises(UserError, match="another size"):
            reader(name, "master", 0, tensor.numel() + 1)


def test_files_are_plain_safetensors() -> None:
    from safetensors.torch import load_file

    results(2)
    folder = checkpoints.latest(saved_folder("full-3", 2))
    state = json.loads((folder / "state.json").read_text())
    assert (state["world"], state["stage"], state["step"]) == (2, 3, 2)
    tensors = load_file(folder / "rank-0001.safetensors")
    kinds = {key.rsplit("|", 1)[1] for key in tensors}
    assert kinds == {"master", "exp_avg", "exp_avg_sq", "ema", "step"}
    assert sorted(path.suffix for path in folder.iterdir()) == [".json", ".safetensors", ".safetensors"]


def test_a_rank_that_cannot_write_stops_all_and_loses_nothing() -> None:
    numbers = results(2)["failing"].numbers
    assert "step-000002: another rank failed" in numbers["error"] and numbers["errors"] == 2
    assert numbers["left"] == ["step-000001"] and numbers["extra"] == {"n": 1}


# ---- the folder's life, with an engine that holds two small tensors ----------------------------------------


class Engine:
    """What checkpoints.py asks of dopsd_fast.distributed.zero_engine.Engine, in one process."""

    rank, world, stage = 0, 1, 0
    kinds = ("master", "ema")

    def __init__(self, numel: int = 300_000) -> None:
        generator = torch.Generator().manual_seed(numel)
        self.tensors = {
            name: {kind: torch.randn(numel, generator=generator) for kind in self.kinds} for name in ("a.weight", "b|odd")
        }

    @property
    def trained_parameters(self) -> int:
        return sum(kinds["master"].numel() for kinds in self.tensors.values())

    def any(self, flag: bool) -> bool:
        return flag

    def gather_int(self, value: int) -> list[int]:
        return [value]

    def fragment_sizes(self):
        return [(name, 0, kinds["master"].numel()) for name, kinds in self.tensors.items()]

    def state_fragments(self):
        for name, kinds in self.tensors.items():
            yield name, 0, kinds, 7

    def load_fragments(self, reader) -> None:
        for name, kinds in self.tensors.items():
            for kind, tensor in kinds.items():
                tensor.copy_(reader(name, kind, 0, tensor.numel()))
            assert int(reader(name, "step", 0, 1)) == 7


def equal(a: Engine, b: Engine) -> bool:
    return all(torch.equal(a.tensors[n][k], b.tensors[n][k]) for n in a.tensors for k in a.kinds)


def test_round_trip_retention_and_latest(tmp_path: Path) -> None:
    folder, engine = tmp_path / "run" / "checkpoints", Engine()
    assert checkpoints.latest(folder) is None
    for step in (1, 9, 10, 100):
        path = checkpoints.save(folder, engine, {"step": step}, step=step, keep=2)
        assert path == checkpoints.latest(folder)
    assert sorted(p.name for p in folder.iterdir()) == ["step-000010", "step-000100"]
    other = Engine()
    for kinds in other.tensors.values():
        for tensor in kinds.values():
            tensor.zero_()
    assert checkpoints.load(folder, other) == {"step": 100}
    assert equal(engine, other)
    assert checkpoints.load(folder / "step-000010", other) == {"step": 10}


def test_the_same_step_is_saved_once(tmp_path: Path) -> None:
    first = checkpoints.save(tmp_path, Engine(), {"n": 1}, step=3, keep=1)
    assert checkpoints.save(tmp_path, Engine(), {"n": 2}, step=3, keep=1) == first
    assert checkpoints.read_extra(first) == {"n": 1}


@pytest.mark.parametrize("damage", ["missing file", "short file", "no state", "torn state", "no files", "older format"])
def test_incomplete_ones_are_ignored(tmp_path: Path, damage: str) -> None:
    engine = Engine()
    good = checkpoints.save(tmp_path, engine, {"n": 1}, step=1, keep=3)
    bad = checkpoints.save(tmp_path, engine, {"n": 2}, step=2, keep=3)
    file, state = bad / "rank-0000.safetensors", bad / "state.json"
    if damage == "missing file":
        file.unlink()
    elif damage == "short file":
        os.truncate(file, file.stat().st_size - 1)
    elif damage == "no state":
        state.unlink()
    elif damage == "torn state":
        state.write_text(state.read_text()[:-20])
    elif damage == "no files":
        state.write_text(json.dumps(json.loads(state.read_text()) | {"files": None}))
    else:
        state.write_text(json.dumps(json.loads(state.read_text()) | {"format": 0}))
    assert checkpoints.latest(tmp_path) == good
    assert checkpoints.load(tmp_path, Engine()) == {"n": 1}
    named = {"missing file": "rank-0000.safetensors is missing", "short file": r"rank-0000.safetensors has \d+ of \d+ bytes",
             "no state": "state.json is missing", "older format": "state.json is of format 0"}
    for read in (checkpoints.read_extra, lambda path: checkpoints.load(path, Engine())):
        with pytest.raises(UserError, match=named.get(damage, "state.json is damaged")) as error:
            read(bad)
        assert f"{bad} is not a complete checkpoint" in str(error.value)
    again = checkpoints.save(tmp_path, engine, {"n": 3}, step=2, keep=3)
    assert checkpoints.latest(tmp_path) == again and checkpoints.read_extra(again) == {"n": 3}


def test_a_newer_format_is_neither_read_nor_passed_over_nor_replaced(tmp_path: Path) -> None:
    checkpoints.save(tmp_path, Engine(), {"n": 1}, step=1, keep=1)
    newer = checkpoints.save(tmp_path, Engine(), {"n": 2}, step=2, keep=2)
    state = newer / "state.json"
    state.write_text(json.dumps({"format": 99, "files": {}, "step": 2, "world": 1, "extra": {}}))
    content = state.read_bytes()
    for read in (checkpoints.latest, lambda path: checkpoints.load(path, Engine()), lambda _: checkpoints.read_extra(newer)):
        with pytest.raises(UserError, match="step-000002 was written by a newer version .* 99, this one knows 1"):
            read(tmp_path)
    with pytest.raises(UserError, match="a newer version of this program has written it"):
        checkpoints.save(tmp_path, Engine(), {"n": 3}, step=2, keep=2)
    checkpoints.save(tmp_path, Engine(), {"n": 4}, step=3, keep=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000002", "step-000003"] and state.read_bytes() == content


@pytest.mark.parametrize("damage", ["start", "length", "offsets", "tail"])
def test_damaged_contents_are_one_line(tmp_path: Path, damage: str) -> None:
    path = checkpoints.save(tmp_path, Engine(), {}, step=1, keep=1)
    file = path / "rank-0000.safetensors"
    content = file.read_bytes()
    if damage == "start":
        file.write_bytes(b"\xff" * 64 + content[64:])
    elif damage == "length":
        file.write_bytes((2**40).to_bytes(8, "little") + content[8:])
    elif damage == "offsets":
        file.write_bytes(content.replace(b'"data_offsets":[0,1200000]', b'"data_offsets":[8,1200008]', 1))
    else:
        file.write_bytes(content.replace(b'"I64"', b'"I16"'))
    assert file.stat().st_size == len(content) and file.read_bytes() != content
    engine = Engine(200)
    with pytest.raises(UserError, match="rank-0000.safetensors is damaged") as error:
        checkpoints.load(path, engine)
    assert "\n" not in str(error.value) and equal(engine, Engine(200))


class Half(Engine):
    """One of two ranks; each holds one half of every tensor."""

    world = 2

    def __init__(self, rank: int, step: int = 7) -> None:
        super().__init__(600)
        self.rank, self.step = rank, step

    def fragment_sizes(self):
        return [(name, 300 * self.rank, 300) for name in self.tensors]

    def state_fragments(self):
        for name, kinds in self.tensors.items():
            half = {kind: tensor[300 * self.rank : 300 * self.rank + 300] for kind, tensor in kinds.items()}
            yield name, 300 * self.rank, half, self.step


def two_halves(folder: Path, step: int, did: int = 7) -> Path:
    path = folder / f"step-{step:06}"
    path.mkdir(parents=True)
    files = [path / f"rank-000{rank}.safetensors" for rank in (0, 1)]
    for rank, file in enumerate(files):
        checkpoints._write_fragments(file, Half(rank, did))
    sizes = {file.name: file.stat().st_size for file in files}
    state = dict(format=1, step=step, world=2, stage=2, files=sizes, extra={"step": step})
    (path / "state.json").write_text(json.dumps(state))
    return path


def test_files_of_other_checkpoints_are_refused_by_name(tmp_path: Path) -> None:
    """A whole file but of another step, of another rank, of another world size."""
    path, later = two_halves(tmp_path, 1), two_halves(tmp_path, 2)
    whole = Engine(600)
    assert checkpoints.load(path, whole) == {"step": 1} and equal(whole, Engine(600))
    first, second = path / "rank-0000.safetensors", path / "rank-0001.safetensors"
    content = second.read_bytes()
    lone = (later / second.name).read_bytes().replace(b'"step":"2"', b'"step":"1"').replace(b'"world":"2"', b'"world":"4"')
    for other, why in (((later / second.name).read_bytes(), "it is of step 2, not 1"),
                       (first.read_bytes(), "it is of rank 0, not 1"), (lone, "it is of world 4, not 2")):
        second.write_bytes(other)
        state = json.loads((path / "state.json").read_text())
        state["files"][second.name] = len(other)
        (path / "state.json").write_text(json.dumps(state))
        with pytest.raises(UserError, match=f"{second} is damaged .{why}"):
            checkpoints.load(path, Engine(600))
    second.write_bytes(content.replace(b"a.weight|300|", b"a.weight|299|"))
    state["files"][second.name] = len(content)
    (path / "state.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match=f"{second} is damaged .a.weight .* goes on at 299, not at 300"):
        checkpoints.load(path, Engine(600))


def test_files_without_their_step_are_told_apart_by_the_optimizer_s(tmp_path: Path) -> None:
    """Checkpoints of earlier versions have no metadata."""
    path, other = two_halves(tmp_path / "one", 1), two_halves(tmp_path / "other", 1, did=8)
    for file in (path / "rank-0000.safetensors", other / "rank-0001.safetensors"):
        content = file.read_bytes()
        start, end = content.index(b'"__metadata__"'), content.index(b'},"a.weight') + 2
        file.write_bytes(content[:start] + b" " * (end - start) + content[end:])
    shutil.copyfile(other / "rank-0001.safetensors", path / "rank-0001.safetensors")
    with pytest.raises(UserError, match="rank-0001.safetensors is damaged .* has done 8 steps, in rank-0000.safetensors 7"):
        checkpoints.load(path, Engine(600))


def test_everything_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch) -> None:
    """The power may go at any moment: whole files first, then their folder, the name, and the folder around it."""
    order: list[Any] = []

    def synced(handle: int) -> None:
        order.append((Path(os.readlink(f"/proc/self/fd/{handle}")).name, os.fstat(handle).st_size))

    def named(move: Any) -> Any:
        return lambda old, new: order.append(Path(old).name) or move(old, new)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "rename", named(os.rename))
    monkeypatch.setattr(os, "replace", named(os.replace))
    path = checkpoints.save(tmp_path, Engine(300), {}, step=1, keep=1)
    work = next(entry for entry in order if isinstance(entry, str))
    sizes = {file.name: file.stat().st_size for file in path.iterdir()}
    assert [entry if isinstance(entry, str) else entry[0] for entry in order] == [
        "rank-0000.safetensors", "state.json", work, work, tmp_path.name]
    assert dict(order[:2]) == sizes
    order.clear()
    atomic.write_text(tmp_path / "settings.toml", "steps = 1\n")
    assert order[:2] == [("settings.toml.part", 10), "settings.toml.part"] and order[2][0] == tmp_path.name and len(order) == 3


def test_two_runs_save_the_same_step(tmp_path: Path, monkeypatch) -> None:
    """The second begins and ends while the first is writing: the first says that it could not, the second's is whole."""
    first, second = Engine(300), Engine(301)
    monkeypatch.setattr(first, "state_fragments", lambda: iter(
        [checkpoints.save(tmp_path, second, {"n": 2}, step=1, keep=1) and x for x in Engine.state_fragments(first)]))
    with pytest.raises(UserError, match="could not save .*step-000001"):
        checkpoints.save(tmp_path, first, {"n": 1}, step=1, keep=1)
    other = Engine(301)
    for kinds in other.tensors.values():
        kinds["master"].zero_()
    assert checkpoints.load(tmp_path, other) == {"n": 2} and equal(other, second)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]


def test_another_model_is_one_line(tmp_path: Path) -> None:
    checkpoints.save(tmp_path, Engine(300), {}, step=1, keep=1)
    with pytest.raises(UserError, match="another size"):
        checkpoints.load(tmp_path, Engine(301))
    with pytest.raises(UserError, match="holds 600 trained numbers, the model has 598"):
        checkpoints.load(tmp_path, Engine(299))
    other = Engine(300)
    other.tensors["c"] = copy.deepcopy(other.tensors["a.weight"])
    with pytest.raises(UserError, match="holds no master of c"):
        checkpoints.load(tmp_path, other)
    with pytest.raises(UserError, match="nothing"):
        checkpoints.load(tmp_path / "nothing", Engine())


@pytest.mark.parametrize("when", ["write", "fsync", "state", "rename", "mkdir"])
def test_no_space(tmp_path: Path, monkeypatch, when: str) -> None:
    engine = Engine()
    checkpoints.save(tmp_path, engine, {"n": 1}, step=1, keep=1)

    def full(*arguments, **keywords):
        raise OSError(28, "No space left on device")

    if when == "write":
        monkeypatch.setattr(engine, "state_fragments", lambda: full())
    elif when == "fsync":
        monkeypatch.setattr(os, "fsync", full)
    elif when == "state":
        monkeypatch.setattr(json, "dump", full)
    elif when == "rename":
        monkeypatch.setattr(os, "rename", full)
    else:
        monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(UserError, match="could not save .*step-000002: no space left on the device") as error:
        checkpoints.save(tmp_path, engine, {"n": 2}, step=2, keep=1)
    assert "\n" not in str(error.value)
    monkeypatch.undo()
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]
    other = Engine()
    assert checkpoints.load(tmp_path, other) == {"n": 1} and equal(engine, other)
    checkpoints.save(tmp_path, Engine(), {"n": 2}, step=2, keep=1)
    assert checkpoints.read_extra(checkpoints.latest(tmp_path)) == {"n": 2}


def test_a_write_that_the_kernel_refuses(tmp_path: Path) -> None:
    """A file size limit stands for the full disk: the write fails in the middle of a file."""
    engine = Engine()
    checkpoints.save(tmp_path, engine, {"n": 1}, step=1, keep=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        with pytest.raises(UserError, match="could not save .*step-000002: File too large"):
            checkpoints.save(tmp_path, engine, {"n": 2}, step=2, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]
    assert checkpoints.load(tmp_path, Engine()) == {"n": 1}


def test_killed_at_any_moment(tmp_path: Path) -> None:
    """The process dies (SIGKILL) before its n-th call to the operating system, for every n: the older or the newer
    checkpoint is there and whole, and the next save works."""
    base = tmp_path / "base"
    checkpoints.save(base, Engine(2000), {"n": 1}, step=1, keep=1)
    outcomes = set()
    for n in range(40):
        folder = tmp_path / f"killed-{n}"
        shutil.copytree(base, folder)
        child = os.fork()
        if child == 0:
            try:
                _die_before_call(n)
                checkpoints.save(folder, Engine(2000), {"n": 2}, step=2, keep=1)
            finally:
                os._exit(0)
        killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
        other = Engine(2000)
        found = checkpoints.load(folder, other)["n"]
        assert equal(other, Engine(2000))
        outcomes.add((killed, found))
        checkpoints.save(folder, Engine(2000), {"n": 3}, step=3, keep=1)
        assert [p.name for p in folder.iterdir()] == ["step-000003"]
        if not killed:
            break
    assert outcomes == {(True, 1), (True, 2), (False, 2)}


def _die_before_call(n: int) -> None:
    left = [n]

    def counted(function):
        def wrapper(*arguments, **keywords):
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            return function(*arguments, **keywords)

        return wrapper

    for name in ("mkdir", "rename", "fsync", "unlink", "rmdir", "open"):
        setattr(os, name, counted(getattr(os, name)))
    Engine.state_fragments = counted(Engine.state_fragments)


def test_interrupted_in_python(tmp_path: Path, monkeypatch) -> None:
    """Ctrl-C that was not caught: the leftover is ignored, and the next save removes it."""
    engine = Engine()
    checkpoints.save(tmp_path, engine, {"n": 1}, step=1, keep=2)

    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr(engine, "state_fragments", interrupt)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.save(tmp_path, engine, {"n": 2}, step=2, keep=2)
    monkeypatch.undo()
    assert checkpoints.load(tmp_path, Engine()) == {"n": 1}
    checkpoints.save(tmp_path, engine, {"n": 3}, step=3, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000001", "step-000003"]
