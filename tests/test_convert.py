"""A checkpoint becomes what the finished run would have exported: same bits, other layouts; one line for what cannot work."""

from __future__ import annotations

import functools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dopsd_fast import convert
from dopsd_fast.storage import checkpoints, pipeline, safetensors_layout
from dopsd_fast.storage.pipeline import SINGLE
from tests import tiny
from tests.driving import ROOT, data, start, words
from tests.resuming import joined

FILE = "diffusion_pytorch_model-{:05}-of-{:05}.safetensors"


@functools.cache
def finished(root: Path, kind: str) -> Path:
    """A run of two steps: full on two ranks at ZeRO-3, LoRA on one."""
    more = dict(deepspeed__stage=3, train__batch_size=1) if kind == "full" else {}
    run = root / kind / "run"
    settings = words(data__path=str(data()), output__dir=str(run), adapter__kind=kind, train__steps=2, **more)
    start(settings, 2 if kind == "full" else 1).succeed()
    return run


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def full(root) -> Path:
    return finished(root, "full")


@pytest.fixture(scope="module")
def lora(root) -> Path:
    return finished(root, "lora")


@pytest.fixture
def copied(full, tmp_path) -> Path:
    """A copy of the run whose files a test may damage."""
    return shutil.copytree(full, tmp_path / "copied", ignore=shutil.ignore_patterns("export*"))


def contents(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def succeed(capsys, *argv: object) -> str:
    capsys.readouterr()
    code = convert.main([str(word) for word in argv])
    said = capsys.readouterr()
    assert code == 0 and not said.err, said.err
    return said.out


def fail(capsys, *argv: object) -> str:
    capsys.readouterr()
    code = convert.main([str(word) for word in argv])
    said = capsys.readouterr()
    assert code == 2 and not said.out
    assert said.err.startswith("error: ") and said.err.count("\n") == 1, said.err
    return said.err


def weights(pipeline: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in (pipeline / "transformer").glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


# ---- the same as a finished run's export ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_same_files_as_the_finished_run(root, kind, tmp_path, capsys):
    run = finished(root, kind)
    checkpoint = run / "checkpoints" / "step-000002"
    out = succeed(capsys, checkpoint, tmp_path / "student")
    assert f"{tmp_path / 'student'}: student of {checkpoint}" in out
    assert contents(tmp_path / "student") == contents(run / "export")
    succeed(capsys, run, tmp_path / "teacher", "--which", "teacher")
    assert contents(tmp_path / "teacher") == contents(run / "export_teacher") != contents(run / "export")
    (tmp_path / "both").mkdir()
    succeed(capsys, run / "checkpoints", tmp_path / "both", "--which", "both")
    assert contents(tmp_path / "both" / "export") == contents(run / "export")
    assert contents(tmp_path / "both" / "export_teacher") == contents(run / "export_teacher")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["both", "student", "teacher"]


def test_an_earlier_checkpoint(full, tmp_path, capsys):
    succeed(capsys, full / "checkpoints" / "step-000001", tmp_path / "out")
    found, saved = weights(tmp_path / "out"), joined(full / "checkpoints" / "step-000001")
    assert found.keys() == {name for name, _ in saved}
    assert all(torch.equal(tensor.view(-1), saved[name, "master"]) for name, tensor in found.items())
    assert any(not torch.equal(tensor, weights(full / "export")[name]) for name, tensor in found.items())


def test_the_command(lora, tmp_path):
    command = [sys.executable, "-m", "dopsd_fast.convert"]
    done = subprocess.run([*command, str(lora), str(tmp_path / "out")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and contents(tmp_path / "out") == contents(lora / "export"), done.stderr


def test_help(capsys):
    with pytest.raises(SystemExit) as ended:
        convert.main(["--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0
    assert all(f"--{name}" in text for name in ("which", "model", "max-shard-size", "dtype", "overwrite"))


# ---- other layouts -------------------------------------------------------------------------------------------------------


def test_sharded_as_diffusers_does_it(full, tmp_path, capsys):
    from diffusers import ZImagePipeline, ZImageTransformer2DModel

    whole = weights(full / "export")
    total = sum(4 * tensor.numel() for tensor in whole.values())
    largest = max(4 * tensor.numel() for tensor in whole.values())
    assert largest > 300_000 and total - largest > 600_000
    succeed(capsys, full, tmp_path / "out", "--max-shard-size", "300KB")
    folder = tmp_path / "out" / "transformer"
    files = sorted(folder.glob("*.safetensors"))
    count = len(files)
    assert count >= 4 and [file.name for file in files] == [FILE.format(i, count) for i in range(1, count + 1)]
    index = json.loads((folder / f"{SINGLE}.index.json").read_text())
    assert index["metadata"] == {"total_size": total}
    for file in files:
        tensors = load_file(file)
        assert {name for name, where in index["weight_map"].items() if where == file.name} == tensors.keys()
        assert sum(4 * tensor.numel() for tensor in tensors.values()) <= (300_000 if len(tensors) > 1 else largest)
        assert file.read_bytes()[8:].startswith(b'{"__metadata__":{"format":"pt"}')
    model = ZImageTransformer2DModel.from_pretrained(folder)
    assert model.state_dict().keys() == whole.keys()
    assert all(torch.equal(tensor, whole[name]) for name, tensor in model.state_dict().items())
    pipeline = ZImagePipeline.from_pretrained(tmp_path / "out")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("a cat", height=16, width=16, num_inference_steps=1, guidance_scale=0.0).images[0].size == (16, 16)
    # what diffusers itself writes has the same index but for where each tensor is
    model.save_pretrained(tmp_path / "theirs", max_shard_size="300KB")
    theirs = json.loads((tmp_path / "theirs" / f"{SINGLE}.index.json").read_text())
    assert theirs["metadata"] == index["metadata"] and theirs["weight_map"].keys() == index["weight_map"].keys()
    assert (folder / f"{SINGLE}.index.json").read_text() == json.dumps(index, indent=2, sort_keys=True) + "\n"

    succeed(capsys, full, tmp_path / "one", "--max-shard-size", "1GB")
    one = tmp_path / "one" / "transformer"
    assert [file.name for file in one.glob("*model*")] == [SINGLE]
    assert (one / SINGLE).read_bytes() == (full / "export" / "transformer" / SINGLE).read_bytes()


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_a_sharded_source_in_another_type(full, tmp_path, capsys, dtype):
    """The source's files stay, its index tells the new size; the source itself is untouched."""
    from diffusers import ZImageTransformer2DModel

    wanted = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    source = shutil.copytree(tiny.shared("zimage"), tmp_path / "source")
    model = ZImageTransformer2DModel.from_pretrained(source / "transformer", torch_dtype=torch.bfloat16)
    shutil.rmtree(source / "transformer")
    model.save_pretrained(source / "transformer", max_shard_size="100KB")
    before = contents(source)
    succeed(capsys, full, tmp_path / "as-source", "--model", source)
    succeed(capsys, full, tmp_path / "out", "--model", source, "--dtype", dtype)
    assert contents(source) == before
    as_source, out, whole = weights(tmp_path / "as-source"), weights(tmp_path / "out"), weights(full / "export")
    assert contents(tmp_path / "as-source").keys() == contents(tmp_path / "out").keys() == before.keys()
    for name, tensor in whole.items():
        assert torch.equal(as_source[name], tensor.bfloat16())
        assert out[name].dtype == wanted and torch.equal(out[name], tensor.to(wanted))
    folder = tmp_path / "out" / "transformer"
    total = sum(tensor.numel() * tensor.itemsize for tensor in out.values())
    assert json.loads((folder / f"{SINGLE}.index.json").read_text())["metadata"] == {"total_size": total}
    loaded = ZImageTransformer2DModel.from_pretrained(folder, torch_dtype=wanted).state_dict()
    assert loaded.keys() == out.keys() and all(torch.equal(tensor, out[name]) for name, tensor in loaded.items())


def test_lora_in_another_type(lora, tmp_path, capsys):
    succeed(capsys, lora, tmp_path / "out", "--dtype", "bf16")
    for name in ("adapter_model.safetensors", "pytorch_lora_weights.safetensors"):
        ours, exported = load_file(tmp_path / "out" / name), load_file(lora / "export" / name)
        assert ours.keys() == exported.keys()
        assert all(torch.equal(tensor, exported[key].bfloat16()) for key, tensor in ours.items())


@pytest.mark.parametrize("text, size", [("5GB", 5e9), ("200kb", 200_000), ("1.5 MB", 1_500_000), ("7", 7), ("2T", 2e12)])
def test_sizes(text, size):
    assert convert._size(text) == size


# ---- what was there stays, or is replaced whole --------------------------------------------------------------------------


def test_a_folder_that_is_not_empty(full, tmp_path, capsys):
    out = tmp_path / "out"
    succeed(capsys, full, out)
    before = contents(out)
    assert "--overwrite" in fail(capsys, full, out, "--which", "teacher")
    assert contents(out) == before
    succeed(capsys, full, out, "--which", "teacher", "--overwrite")
    assert contents(out) == contents(full / "export_teacher")

    other = tmp_path / "precious"
    other.mkdir()
    (other / "thesis.tex").write_text("years")
    assert "something else than an export" in fail(capsys, full, other, "--overwrite")
    assert "is a file" in fail(capsys, full, other / "thesis.tex", "--overwrite")
    for inside in (full, full / "checkpoints", full / "checkpoints" / "step-000002" / "x", full.parent,
                   tiny.shared("zimage"), tiny.shared("zimage") / "x", tiny.shared("zimage").parent):
        assert "lie inside each other" in fail(capsys, full, inside, "--overwrite")
    assert contents(other) == {"thesis.tex": b"years"}
    for beside in (tmp_path / "precious.tmp", tmp_path / "precious.old"):
        beside.mkdir()
    (other / "thesis.tex").unlink()
    succeed(capsys, full, other)
    assert (tmp_path / "precious.tmp").is_dir() and (tmp_path / "precious.old").is_dir()


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_full_disk_leaves_the_old_export(root, kind, tmp_path, capsys):
    """A limit on the size of files stands for the full disk."""
    run, out = finished(root, kind), tmp_path / "out"
    succeed(capsys, run, out)
    before = contents(out)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        line = fail(capsys, run, out, "--overwrite", "--which", "teacher")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert f"cannot write {out}" in line and "File too large" in line
    assert contents(out) == before and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_disk_without_space(full, tmp_path, capsys, monkeypatch):
    def exhausted(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pipeline, "_write_weights", exhausted)
    line = fail(capsys, full, tmp_path / "out")
    assert "No space left on device; free some space and run again" in line
    assert not list(tmp_path.iterdir())


def test_killed_and_run_again(full, tmp_path, capsys):
    out = tmp_path / "out"
    succeed(capsys, full, out)
    before = contents(out)
    child = os.fork()
    if child == 0:
        pipeline._write_weights = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        convert.main([str(full), str(out), "--overwrite"])
        os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    assert contents(out) == before and len(list(tmp_path.iterdir())) == 2
    succeed(capsys, full, out, "--overwrite", "--which", "teacher")
    assert contents(out) == contents(full / "export_teacher") and [path.name for path in tmp_path.iterdir()] == ["out"]


# ---- one line for what cannot work ---------------------------------------------------------------------------------------


def test_damaged_and_incomplete_checkpoints(copied, tmp_path, capsys):
    last, out = copied / "checkpoints" / "step-000002", tmp_path / "out"
    file = last / "rank-0001.safetensors"
    content = file.read_bytes()
    file.write_bytes(b"\xff" * 8 + content[8:])
    assert f"{file} is damaged" in fail(capsys, copied, out)
    file.write_bytes(content[:-1])
    assert f"{file.name} has {len(content) - 1} of {len(content)} bytes" in fail(capsys, last, out)
    succeed(capsys, copied, tmp_path / "earlier")  # a run is named: its latest complete one
    file.unlink()
    assert f"{file.name} is missing" in fail(capsys, last, out)
    shutil.rmtree(copied / "checkpoints" / "step-000001")
    assert "has no complete checkpoint" in fail(capsys, copied, out)
    assert not out.exists()


def test_wrong_places(full, copied, tmp_path, capsys):
    out = tmp_path / "out"
    assert "does not exist" in fail(capsys, tmp_path / "nothing", out)
    assert "state.json is missing" in fail(capsys, tmp_path, out)
    alone = shutil.copytree(full / "checkpoints" / "step-000002", tmp_path / "alone" / "step-000002")
    assert "settings.toml is missing" in fail(capsys, alone, out)
    settings = copied / "settings.toml"
    settings.write_text(settings.read_text().replace(str(tiny.shared("zimage")), str(tmp_path / "moved")))
    assert "no such folder" in (line := fail(capsys, copied, out)) and "--model" in line
    moved = shutil.copytree(tiny.shared("zimage"), tmp_path / "moved-here")
    succeed(capsys, copied, out, "--model", moved)
    assert contents(out) == contents(full / "export")
    assert "no such folder" in fail(capsys, copied, tmp_path / "x", "--model", tmp_path / "moved")
    assert "model_index.json is missing" in fail(capsys, copied, tmp_path / "x", "--model", tmp_path / "alone")


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("change", ["shape", "more", "fewer"])
def test_another_model(root, kind, change, tmp_path, capsys):
    run = finished(root, kind)
    source = shutil.copytree(tiny.shared("zimage"), tmp_path / "source")
    file, config = source / "transformer" / SINGLE, source / "transformer" / "config.json"
    tensors, shape = load_file(file), json.loads(config.read_text())
    name = "cap_embedder.1.weight"
    if change == "shape":
        tensors[name] = torch.zeros(3, 3)
        shape |= {name: 2 * shape[name] for name in ("dim", "n_heads", "n_kv_heads")}
    elif change == "more":
        tensors["another.weight"] = torch.zeros(2)
        shape["n_layers"] += 1
    else:
        del tensors[name]
        shape["n_layers"] -= 1
    save_file(tensors, file)
    config.write_text(json.dumps(shape))
    line = fail(capsys, run, tmp_path / "out", "--model", source)
    assert {"shape": " its shape is [", "more": ", which ", "fewer": "does not have"}[change] in line and str(source) in line
    if kind == "full":
        assert ("another.weight" if change == "more" else name) in line
    assert not (tmp_path / "out").exists()


def test_a_teacher_that_is_no_average(copied, tmp_path, capsys):
    settings = copied / "settings.toml"
    text = settings.read_text()
    for kind, why in (("frozen", "its weights are the source's"), ("student", "it is the student itself")):
        settings.write_text(text.replace('kind = "ema"', f'kind = "{kind}"'))
        for which in ("teacher", "both"):
            line = fail(capsys, copied, tmp_path / "out", "--which", which)
            assert f"teacher.kind={kind} has no average" in line and why in line
        succeed(capsys, copied, tmp_path / kind)


def test_options(full, lora, tmp_path, capsys):
    out = tmp_path / "out"
    assert "--max-shard-size" in fail(capsys, lora, out, "--max-shard-size", "5GB")
    assert "'lots' is not a size" in fail(capsys, full, out, "--max-shard-size", "lots")
    assert "is not a size" in fail(capsys, full, out, "--max-shard-size", "0")
    assert "the following arguments are required: OUT" in fail(capsys, full)
    assert "invalid choice" in fail(capsys, full, out, "--which", "ema")
    assert "unrecognized arguments" in fail(capsys, full, out, "--whic", "both")


def test_more_files_than_can_be_open():
    shard = safetensors_layout.Shard.of("x", [(str(i), "BF16", [10]) for i in range(600)], {})
    with pytest.raises(convert.UserError, match="make 600 files, more than 500"):
        pipeline.arrange([shard], max_bytes=20)
    assert [len(part.entries) for part in pipeline.arrange([shard], max_bytes=40)] == [2] * 300


# ---- memory --------------------------------------------------------------------------------------------------------------

TENSORS, ROWS, COLUMNS = 20, 2048, 1024  # 8 MiB each in fp32

PEAK = """
import sys
from dopsd_fast.convert import main
def status(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) // 1024
small, large, out = sys.argv[1:]
resharded = ["--dtype", "fp32", "--max-shard-size", "40MB", "--which", "teacher"]
for i, options in enumerate(([], resharded)):
    assert main([small, out + f"/small-{i}", *options]) == 0
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
    before = status("VmRSS")
    assert main([large, out + f"/large-{i}", *options]) == 0
    print("grown", status("VmHWM") - before)
"""


def fabricate(folder: Path, tensors: int) -> Path:
    """A run whose checkpoint two ranks at stage 3 might have written, of a model without a forward."""
    model = folder / "model"
    shutil.copytree(tiny.shared("zimage"), model)
    names = [f"layers.{i}.weight" for i in range(tensors)]
    generator = torch.Generator().manual_seed(tensors)
    drawn = {name: torch.randn(ROWS, COLUMNS, generator=generator) for name in names}
    save_file({name: tensor.bfloat16() for name, tensor in drawn.items()}, model / "transformer" / SINGLE, {"format": "pt"})
    run, half = folder / "run", ROWS * COLUMNS // 2
    path = run / "checkpoints" / "step-000001"
    path.mkdir(parents=True)
    (run / "settings.toml").write_text(f'[model]\npath = "{model}"\n')

    class Engine:
        world, kinds = 2, ("master", "ema")

        def fragment_sizes(self):
            return [(name, half * self.rank, half) for name in names]

        def state_fragments(self):
            for name, offset, numel in self.fragment_sizes():
                part = drawn[name].view(-1)[offset : offset + numel]
                yield name, offset, {"master": part, "ema": -part}, 1

    files = {}
    for rank in (0, 1):
        Engine.rank = rank
        file = path / f"rank-000{rank}.safetensors"
        checkpoints._write_fragments(file, Engine())
        files[file.name] = file.stat().st_size
    state = {"format": 1, "step": 1, "world": 2, "stage": 3, "files": files, "extra": {}}
    (path / "state.json").write_text(json.dumps(state))
    return run


def test_one_tensor_in_memory_at_a_time(tmp_path):
    small, large = fabricate(tmp_path / "small", 1), fabricate(tmp_path / "large", TENSORS)
    argv = [sys.executable, "-c", PEAK, str(small), str(large), str(tmp_path)]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    grown = [int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("grown")]
    # One branch is 160 MiB, the two kinds in the checkpoint 320 MiB. A tensor is 8 MiB; its cast, piece by piece, 4 MiB; the
    # interpreter and the libraries move by some 10 MiB from run to run.
    assert len(grown) == 2 and all(0 <= one <= 32 for one in grown), grown
    saved = joined(large / "checkpoints" / "step-000001")
    for i, kind, count in ((0, "master", 1), (1, "ema", 5)):
        found = weights(tmp_path / f"large-{i}")
        assert len(found) == TENSORS and len(list((tmp_path / f"large-{i}" / "transformer").glob("*.safetensors"))) == count
        assert all(torch.equal(tensor.view(-1), saved[name, kind].to(tensor.dtype)) for name, tensor in found.items())
