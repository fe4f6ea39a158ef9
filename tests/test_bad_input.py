"""Whatever a user can get wrong: one clear line, an exit code that is not 0, no traceback, and nothing lost."""

import json
import shutil
import struct
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from dopsd_fast.errors import UserError
from tests import tiny
from tests.driving import authors_jsonl, data, image_folder, picture, rows, start, words

SHORT = dict(train__steps=1, sample__count=0, checkpoint__every=0)


def refuse(tmp_path: Path, *parts: str, ranks: int = 1, **settings) -> str:
    """The line that a start with these settings fails with; no run folder is left behind."""
    run = tmp_path / "run"
    line = start(words(**{"data__path": str(data()), "output__dir": str(run)} | SHORT | settings), ranks).fail(*parts)
    assert not (run / "metrics.jsonl").exists()
    return line


def test_settings(tmp_path):
    refuse(tmp_path, "train.stepz", "did you mean train.steps?", train__stepz=3)
    refuse(tmp_path, "train.stepz", "did you mean train.steps?", train__stepz=3, ranks=2)
    refuse(tmp_path, 'train.steps = "many"', "command line", train__steps="many")
    refuse(tmp_path, "train.precision", "bf16", train__precision="fp8")
    refuse(tmp_path, "impossible combination", "method.name", "method.states", method__name="sft", method__states="off_policy")
    refuse(tmp_path, "impossible combination", "deepspeed.stage", deepspeed__config__zero_optimization__stage=1)
    start(["no_such_recipe"]).fail("no_such_recipe", "nano_full")
    start([str(tmp_path / "none.toml")]).fail("none.toml", "does not exist")
    (tmp_path / "own.toml").write_text("[train]\nsteps = = 3\n")
    start([str(tmp_path / "own.toml")]).fail("own.toml", "line 2")
    (tmp_path / "own.toml").write_bytes(b"\xff\xfe\x00")
    start([str(tmp_path / "own.toml")]).fail("own.toml", "UTF-8")
    start(["--steps", "3"]).fail("--steps")
    refuse(tmp_path, "model.family=flux2_klein", model__family="flux2_klein")
    refuse(tmp_path, "conditioning.context=edit", conditioning__context="edit")


def bomb(file: Path) -> None:
    """A PNG of 40000 x 40000 pixels in a few hundred bytes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 40000, 40000, 1, 0, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


BAD_IMAGES = {
    "does not exist": lambda file: file.unlink(),
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-200]),
    "empty": lambda file: file.write_bytes(b""),
    "1 x 1": lambda file: picture(0, (1, 1)).save(file),
    "decompression bomb": bomb,
    "not an image": lambda file: file.write_text("a cat"),
}


def test_images(tmp_path):
    for i, (reason, spoil) in enumerate(BAD_IMAGES.items()):
        file = authors_jsonl(tmp_path / str(i))
        spoil(file.parent / "images" / "2.png")
        refuse(tmp_path, f"{file}:3", "2.png", reason, "data.skip_bad", data__path=str(file), ranks=1 + (i == 0))


def test_lines_of_a_jsonl(tmp_path):
    file = authors_jsonl(tmp_path / "set")
    whole = file.read_text().splitlines()
    record = json.loads(whole[1])
    for line, reason in {
        whole[1][:40]: "not JSON",
        "[1, 2]": "an object was expected",
        json.dumps(record | {"local_path_list": []}): "no image",
        json.dumps({"local_path_list": record["local_path_list"], "short_en": "  "}): "no prompt",
        json.dumps(record | {"h*w": "wide"}): '"h*w"',
    }.items():
        file.write_text("\n".join([whole[0], line, *whole[2:]]) + "\n")
        refuse(tmp_path, f"{file}:2: ", reason, data__path=str(file))
    file.write_text("\n".join(whole) + "\n")
    refuse(tmp_path, f"{file}:1", "no_such_key", data__path=str(file), data__prompt_keys=["no_such_key"])
    file.write_text("\n\n")
    refuse(tmp_path, "no records", data__path=str(file))


def test_data_sets(tmp_path):
    refuse(tmp_path, "none", "does not exist", data__path=str(tmp_path / "none"))
    refuse(tmp_path, "none", "does not exist", data__path=str(tmp_path / "none"), ranks=2)
    (tmp_path / "empty").mkdir()
    refuse(tmp_path, "neither a .jsonl file nor images", data__path=str(tmp_path / "empty"))
    picture(0).save(tmp_path / "empty" / "a.png")
    refuse(tmp_path, "no captions", data__path=str(tmp_path / "empty"))
    (tmp_path / "empty" / "a.txt").write_text(" \n")
    refuse(tmp_path, "a.txt is empty", data__path=str(tmp_path / "empty"))
    file = authors_jsonl(tmp_path / "set")
    refuse(tmp_path, "data.root", "not a folder", data__path=str(file), data__root=str(tmp_path / "x"))


def test_unusual_images_work_and_bad_ones_can_be_skipped(tmp_path):
    """One run on CMYK, palette, alpha and 16-bit images; the spoilt ones beside them are listed at the end."""
    folder = image_folder(tmp_path / "set", 5)
    square = picture(9)
    square.convert("CMYK").save(folder / "0.tif")
    square.convert("P").save(folder / "1.png")
    square.convert("RGBA").save(folder / "2.png")
    Image.fromarray(np.arange(576, dtype=np.uint16).reshape(24, 24) * 100).save(folder / "3.png")
    (folder / "0.png").unlink()
    for i, spoil in enumerate(BAD_IMAGES.values(), start=5):
        picture(i).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text("a cat")
        spoil(folder / f"{i}.png")
    run = tmp_path / "run"
    settings = dict(data__path=str(folder), output__dir=str(run), **SHORT | {"train__steps": 3, "sample__count": 9})
    start(words(**settings)).fail("data.skip_bad")
    job = start(words(**settings, data__skip_bad=True)).succeed()
    listed = job.out.partition("bad record(s) were left out:\n")[2].splitlines()
    assert job.out.count("6 bad record(s)") == 1 and "5 records" in job.out and len(listed) == 6
    for i in range(5, 11):
        assert sum(f"/{i}." in line for line in listed) == 1, listed
    assert len(rows(run)) == 3 and len(list((run / "samples" / "before").iterdir())) == 5


def test_model_folders(tmp_path):
    refuse(tmp_path, "model.path", "no such folder", model__path=str(tmp_path / "none"))
    source = tiny.shared("zimage")
    parts = ("model_index.json", "scheduler", "vae", "text_encoder", "tokenizer", "transformer", "vlm")
    for part in parts:
        folder = tmp_path / f"without_{part}"
        shutil.copytree(source, folder, ignore=lambda where, names, part=part: {part} if Path(where) == source else set())
        line = refuse(tmp_path, str(folder), part.removesuffix(".json"), model__path=str(folder), ranks=1 + (part == "vlm"))
        assert "vlm_path" in line or part != "vlm"
    start(words(model__path=str(tmp_path / "without_vlm"), data__path=str(data()), output__dir=str(tmp_path / "sft"),
                method__name="sft", **SHORT)).succeed()


def test_model_files(tmp_path):
    """Weights that are missing or cut off, in each part that is loaded."""
    folder = tmp_path / "model"
    shutil.copytree(tiny.shared("zimage"), folder)
    for part in ("vae", "text_encoder", "transformer", "vlm"):
        file = next((folder / part).glob("*.safetensors"))
        content = file.read_bytes()
        for damaged in (content[: len(content) // 2], b"", None):
            file.unlink() if damaged is None else file.write_bytes(damaged)
            refuse(tmp_path, f"{folder}/{part}", model__path=str(folder), method__states="off_policy")
        file.write_bytes(content)
    (folder / "transformer" / "config.json").write_text("{")
    refuse(tmp_path, "config.json", "JSON", model__path=str(folder))


def test_vision_language_model_that_does_not_match(tmp_path):
    tiny.make_vlm(tmp_path / "deeper", layers=4)
    tiny.make_vlm(tmp_path / "wider", hidden=64)
    for name in ("deeper", "wider"):
        for ranks in (1, 2):
            refuse(tmp_path, str(tmp_path / name), "language weights do not match", conditioning__vlm_path=str(tmp_path / name),
                   conditioning__cache="disk", ranks=ranks)
    refuse(tmp_path, "qwen3_vl", conditioning__vlm_path=str(tiny.shared("zimage") / "text_encoder"))
    refuse(tmp_path, "no vision-language model at", conditioning__vlm_path=str(tmp_path / "none"))
    refuse(tmp_path, "max_vlm_tokens", conditioning__max_vlm_tokens=4)
    # Corrected, the same command runs: a start that failed leaves no run behind.
    start(words(data__path=str(data()), output__dir=str(tmp_path / "run"), **SHORT)).succeed()


def test_adapter_targets_that_match_nothing(tmp_path):
    line = refuse(tmp_path, "adapter.targets: to_z", "attention.to_q", adapter__kind="lora", adapter__targets=["to_q", "to_z"])
    assert "feed_forward.w1" in line


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_loss_that_is_not_finite(ranks, tmp_path):
    """From the second step on, and from the first (damaged weights): the last good state is saved, the batch named."""
    run = tmp_path / "run"
    job = start(words(data__path=str(data()), output__dir=str(run), train__learning_rate="1e30", checkpoint__every=0), ranks)
    line = job.fail("step 2", "state of step 1 is saved", "batch:", ".png", "train.learning_rate")
    assert line.count(".png") == 2 * ranks
    assert [row["step"] for row in rows(run)] == [1]
    assert (run / "checkpoints" / "step-000001" / "state.json").exists() and not (run / "export").exists()

    folder = tmp_path / "model"
    shutil.copytree(tiny.shared("zimage"), folder)
    file = next((folder / "transformer").glob("*.safetensors"))
    tensors = load_file(file)
    tensors["layers.0.attention.to_q.weight"][0, 0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    run = tmp_path / "damaged"
    job = start(words(model__path=str(folder), data__path=str(data()), output__dir=str(run), deepspeed__stage=3), ranks)
    job.fail("step 1", "state of step 0 is saved", "nan", ".png")
    assert (run / "checkpoints" / "step-000000" / "state.json").exists()


def test_output_folders(tmp_path):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "run", Path("/proc/run")):
        assert str(folder) in start(words(data__path=str(data()), output__dir=str(folder), **SHORT)).fail("output.dir=")
    (tmp_path / "parts" / "checkpoints").mkdir(parents=True)
    start(words(data__path=str(data()), output__dir=str(tmp_path / "parts"), resume="auto", **SHORT)).fail("no settings.toml")
    (tmp_path / "noted").mkdir()
    (tmp_path / "noted" / "log.txt").write_text("started by hand")
    start(words(data__path=str(data()), output__dir=str(tmp_path / "noted"), **SHORT)).succeed()


def test_no_space_for_a_checkpoint(tmp_path):
    """A limit on the size of files, between those of a checkpoint with two moments and of everything smaller."""
    run = tmp_path / "run"
    settings = dict(data__path=str(data()), output__dir=str(run), checkpoint__every=2, resume="auto")
    start(words(**settings, train__steps=2)).succeed()
    kept = {file.relative_to(run): file.read_bytes() for file in run.rglob("*.safetensors")}
    size = (run / "checkpoints" / "step-000002" / "rank-0000.safetensors").stat().st_size
    job = start(words(**settings, train__steps=4), file_bytes=size - 1)
    job.fail("could not save", "step-000004", "earlier checkpoints are intact", "resume=auto")
    assert {file.relative_to(run): file.read_bytes() for file in run.rglob("*.safetensors")} == kept
    assert not list(run.rglob("*.tmp"))
    start(words(**settings, train__steps=4)).succeed()
    assert [row["step"] for row in rows(run)] == [1, 2, 3, 4]


def test_no_space_for_anything_else(tmp_path):
    """The settings, metrics or pictures, the context cache, the checkpoint: each in turn is what does not fit."""
    run = tmp_path / "run"
    settings = dict(data__path=str(data()), output__dir=str(run), resume="auto", sample__every=1)
    for size, cache, what in (
        (900, "memory", "output.dir"),
        (1500, "memory", str(run)),
        (4000, "disk", "context_cache"),
        (300_000, "disk", "step-000001"),
    ):
        start(words(**settings, conditioning__cache=cache), file_bytes=size).fail("File too large", what)
    start(words(**settings)).succeed()
    assert [row["step"] for row in rows(run)] == [1, 2, 3, 4]


def test_no_space_for_the_export(tmp_path):
    """The old export stays, and the next start writes the new one."""
    run = tmp_path / "run"
    settings = dict(data__path=str(data()), output__dir=str(run), resume="auto", deepspeed__stage=0, teacher__kind="student")
    start(words(**settings, train__steps=2)).succeed()
    old = (run / "export" / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes()
    (run / "export.tmp").write_text("in the way")  # what a full disk does, at the same place
    start(words(**settings, train__steps=3)).fail("cannot write", str(run / "export"))
    assert (run / "export" / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes() == old
    (run / "export.tmp").unlink()
    start(words(**settings, train__steps=3)).succeed()
    assert (run / "export" / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes() != old


def test_a_run_that_cannot_fit_is_refused(monkeypatch, capsys):
    """Before anything is loaded, with the plan and what would help."""
    from dopsd_fast.families.registry import open_family
    from dopsd_fast.run import trainer
    from dopsd_fast.settings.load import load_settings

    asked = SimpleNamespace(settings=load_settings(["train.batch_size=64", "deepspeed.stage=0"]), world=1, local_world=1,
                            device=torch.device("cpu"), say=print)
    asked.family = open_family(asked.settings.model.folder, asked.settings.conditioning, "auto")
    monkeypatch.setattr(trainer.Machine, "here", lambda *_: trainer.Machine(1, 1, None, 2_000_000_000, "cpu"))
    with pytest.raises(UserError, match="does not fit the memory of this machine: it would with train.activations=") as caught:
        trainer.Trainer._planned(asked)
    assert "does not fit (2.0 GB a node" in capsys.readouterr().out and "\n" not in str(caught.value)
