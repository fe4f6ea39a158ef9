"""The main job, run as a user runs it: what it leaves behind, and that every way to train works."""

import functools
import json
import math
import os
import re
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dopsd_fast.settings.load import load_settings
from tests import tiny
from tests.driving import TRAIN, command, data, numbers, python, rows, start, words

PROMPT = "a cat number 0 in the [V] style"
KEYS = {"step", "epoch", "loss", "state_losses", "grad_norm", "gap", "learning_rate", "samples_per_second",
        "peak_memory_bytes", "seconds"}


def transformer(folder: Path) -> dict[str, torch.Tensor]:
    files = sorted((folder / "transformer").glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def moved(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> float:
    """The part of the tensors that differ anywhere."""
    assert before.keys() == after.keys()
    return sum(not torch.equal(before[name], after[name]) for name in before) / len(before)


def as_told(job) -> Image.Image:
    """What the lines at the end of the output draw."""
    lines = job.out.partition("to sample from it:\n")[2].splitlines()
    scope: dict = {}
    exec("\n".join(line.strip() for line in [*lines[:-1], "picture = " + lines[-1]]), scope)
    return scope["picture"]


def sample(pipeline, steps: int = 2, size: int = 16, **options) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(prompt=PROMPT, sigmas=[1 - i / steps for i in range(steps)], height=size, width=size, output_type="pt",
                    generator=torch.Generator().manual_seed(0), max_sequence_length=48, **options).images


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """A full run with everything switched on that leaves traces: (run folder, its Job)."""
    run = tmp_path_factory.mktemp("full") / "run"
    settings = words(
        data__path=str(data()), output__dir=str(run), train__steps=5, train__accumulation=2, train__batch_size=1,
        train__schedule="cosine", train__warmup=2, sample__every=2, sample__count=2, sample__prompts=["a dog"],
        checkpoint__every=1, checkpoint__keep=2, conditioning__cache="disk",
    )
    return run, start(settings).succeed()


def test_metrics_hold_every_step_once(full):
    run, _ = full
    table = rows(run)
    assert [row["step"] for row in table] == [1, 2, 3, 4, 5]
    assert [row["epoch"] for row in table] == [0, 0, 1, 1, 2]  # 4 records, 2 a step
    for row in table:
        assert row.keys() == KEYS
        assert len(row["state_losses"]) == 4
        assert row["loss"] == pytest.approx(sum(row["state_losses"]) / 4, rel=1e-12)
        assert row["gap"] == pytest.approx(math.sqrt(row["loss"]), rel=1e-5)  # weight v is 1
        assert row["grad_norm"] > 0 and row["samples_per_second"] > 0 and row["peak_memory_bytes"] > 2**20
        assert {"data", "rollout", "optimizer"} <= row["seconds"].keys()
    half = [1e-3 * (1 + math.cos(math.pi * i / 3)) / 2 for i in range(3)]
    assert [row["learning_rate"] for row in table] == pytest.approx([0.5e-3, 1e-3, *half])


def test_the_run_folder_is_complete(full):
    run, job = full
    parts = {"settings.toml", "metrics.jsonl", "samples", "checkpoints", "export", "export_teacher", "tensorboard"}
    assert parts <= set(os.listdir(run))
    settings = load_settings([str(run / "settings.toml")])
    assert (settings.train.steps, settings.train.schedule, settings.output.dir) == (5, "cosine", str(run))
    assert sorted(os.listdir(run / "checkpoints")) == ["step-000004", "step-000005"]
    assert not list(run.rglob("*.tmp")) and not list(run.rglob("*.part"))
    assert not [file for file in (run / "checkpoints").rglob("*") if file.suffix in (".pt", ".pth", ".bin", ".pkl")]

    grids = sorted((run / "samples").glob("*.png"))
    assert [grid.name for grid in grids] == ["step-000002.png", "step-000004.png", "step-000005.png"]
    sheets = [Image.open(grid).convert("RGB") for grid in grids]
    assert len({sheet.size for sheet in sheets}) == 1 and sheets[0].width > sheets[0].height / 2
    assert sheets[0].tobytes() != sheets[2].tobytes()
    assert len(list((run / "samples" / "before").glob("*.png"))) == 3  # two records and the prompt

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run / "tensorboard")).Reload()
    assert [point.step for point in board.Scalars("loss")] == [1, 2, 3, 4, 5]
    assert [point.value for point in board.Scalars("grad_norm")] == pytest.approx([row["grad_norm"] for row in rows(run)])
    assert "t = 0, 0.1, 0.25, 0.5, 1" in job.out and "8 forwards a sample; pictures by 2 steps" in job.out


def test_export_is_a_pipeline_and_what_was_not_trained_is_linked(full):
    from diffusers import ZImagePipeline

    run, job = full
    source = tiny.shared("zimage")
    student, teacher = transformer(run / "export"), transformer(run / "export_teacher")
    assert moved(transformer(source), student) > 0.9 and moved(student, teacher) > 0.9
    for file in ("vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors", "vlm/model.safetensors"):
        here, there = run / "export" / file, source / file
        assert here.samefile(there) or here.read_bytes() == there.read_bytes()
    assert as_told(job).size == (16, 16)
    pictures = [sample(ZImagePipeline.from_pretrained(folder), guidance_scale=0.0)
                for folder in (source, run / "export", run / "export_teacher")]
    assert all(bool(picture.isfinite().all()) for picture in pictures)
    assert not torch.equal(pictures[0], pictures[1]) and not torch.equal(pictures[1], pictures[2])


def assert_silent(job) -> None:
    """Nothing but progress bars on stderr, nothing but the program's own words on stdout."""
    shown = [line for line in re.split(r"[\r\n]+", job.err) if line.strip()]
    assert shown and all(re.search("(step|context)/s|s/(step|context)", line) for line in shown), job.err
    assert not re.search("warning|deprecated|float32|torch_dtype=torch.f|Loading|safetensors", job.out, re.IGNORECASE), job.out


def test_libraries_are_silent(full):
    assert_silent(full[1])


def test_a_second_start_in_the_same_folder_is_refused(full):
    run, _ = full
    before = (run / "metrics.jsonl").read_bytes()
    assert "resume=auto" in start(words(data__path=str(data()), output__dir=str(run))).fail(str(run), "another run")
    assert (run / "metrics.jsonl").read_bytes() == before


LIKE_THE_FIRST = {
    "k_graphs": dict(method__backward="k_graphs"),
    "recompute, accumulation": dict(train__activations="recompute", train__accumulation=2, train__batch_size=1),
    "selective": dict(train__activations="selective"),
    "zero 0": dict(deepspeed__stage=0),
    "zero 3": dict(deepspeed__stage=3),
    "diffusers": dict(backbone="diffusers", train__activations="recompute"),
    "diffusers, zero 3": dict(backbone="diffusers", deepspeed__stage=3),
    "2 ranks, cache off": dict(train__batch_size=1, ranks=2, conditioning__cache="off"),
    "2 ranks, zero 0": dict(train__batch_size=1, ranks=2, deepspeed__stage=0),
    "2 ranks, zero 3": dict(train__batch_size=1, ranks=2, deepspeed__stage=3),
}
"""Settings that change how a step is computed, and not what."""
OTHER = {
    "sft": dict(method__name="sft"),
    "sft, teacher": dict(method__name="sft", method__targets="teacher"),
    "pso": dict(method__name="pso", teacher__kind="frozen"),
    "pso, zero 3": dict(method__name="pso", teacher__kind="frozen", deepspeed__stage=3, method__pairs="offline"),
    "off_policy": dict(method__states="off_policy"),
    "mu": dict(method__weight="mu"),
    "K = 2": dict(method__num_states=2, method__shift=1.0),
    "bf16 average": dict(teacher__ema_dtype="bf16"),
    "frozen": dict(teacher__kind="frozen"),
    "student": dict(teacher__kind="student"),
    "bf16": dict(train__precision="bf16"),
    "bf16, zero 0": dict(train__precision="bf16", deepspeed__stage=0),
    "bf16, zero 3": dict(train__precision="bf16", deepspeed__stage=3),
}
"""Settings that change what is learned."""


def variant(folder: Path, name: str, ranks: int = 1, **settings) -> list[dict]:
    run = folder / name
    job = start(words(data__path=str(data()), output__dir=str(run), train__steps=3, checkpoint__every=0, **settings), ranks)
    job.succeed()
    assert [row["step"] for row in rows(run)] == [1, 2, 3], name
    return numbers(run)


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """The numbers of the run that the variants are compared with, by the kind of its adapter."""
    return functools.cache(lambda kind: variant(tmp_path_factory.mktemp("first"), kind, adapter__kind=kind))


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_ways_to_compute_the_same_step_agree(kind, first, tmp_path):
    assert all(row["loss"] > 0 and row["grad_norm"] > 0 for row in first(kind))
    for name, settings in LIKE_THE_FIRST.items():
        found = variant(tmp_path, name, adapter__kind=kind, **settings)
        for key in ("loss", "grad_norm", "gap", "learning_rate"):
            # fp32 sums in another order, through three steps of Adam, which divides small gradients by small gradients
            assert [row[key] for row in found] == pytest.approx([row[key] for row in first(kind)], rel=2e-3), (name, key)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_every_method_teacher_and_precision_trains(kind, first, tmp_path):
    seen = {tuple(row["loss"] for row in first(kind))}
    for name, settings in OTHER.items():
        found = variant(tmp_path, name, adapter__kind=kind, **settings)
        assert all(math.isfinite(row["loss"]) and row["loss"] > 0 and row["grad_norm"] > 0 for row in found), name
        states = {"sft": 1, "sft, teacher": 1, "pso": 1, "pso, zero 3": 1, "K = 2": 2}
        assert len(found[0]["state_losses"]) == states.get(name, 4)
        if name.startswith("bf16") and name != "bf16 average":
            assert [row["loss"] for row in found] == pytest.approx([row["loss"] for row in first(kind)], rel=0.1)
        else:
            assert tuple(row["loss"] for row in found) not in seen or name in ("frozen", "student")
        seen.add(tuple(row["loss"] for row in found))
        assert (tmp_path / name / "export_teacher").exists() == (not name.startswith(("frozen", "student", "pso")))


DRAWING = {
    "pso": dict(method__name="pso", teacher__kind="frozen", method__beta=5.0),
    "sft": dict(method__name="sft", method__targets="teacher"),
}


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("method", list(DRAWING))
def test_objectives_that_draw_are_the_same_however_they_are_computed(kind, method, tmp_path):
    """The pair forward sums its gradients over the states of a step: those that were only drawn must not be among them."""
    first = variant(tmp_path, "first", adapter__kind=kind, **DRAWING[method])
    for name in ("diffusers", "2 ranks, zero 3"):
        found = variant(tmp_path, name, adapter__kind=kind, **DRAWING[method], **LIKE_THE_FIRST[name])
        for key in ("loss", "grad_norm", "gap", "learning_rate"):
            assert [row[key] for row in found] == pytest.approx([row[key] for row in first], rel=2e-3), (name, key)


def test_lora_export_in_both_formats(tmp_path):
    from diffusers import ZImagePipeline
    from peft import PeftModel

    run = tmp_path / "run"
    settings = words(data__path=str(data()), output__dir=str(run), adapter__kind="lora", train__learning_rate=1e-2)
    assert as_told(start(settings).succeed()).size == (16, 16)
    base = sample(ZImagePipeline.from_pretrained(tiny.shared("zimage")), guidance_scale=0.0)
    seen = []
    for name in ("export", "export_teacher"):
        folder = run / name
        config = json.loads((folder / "adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"]) == (2, 2)  # trained with alpha 4: the scale lies inside B
        by_diffusers = ZImagePipeline.from_pretrained(tiny.shared("zimage"))
        by_diffusers.load_lora_weights(folder)
        by_peft = ZImagePipeline.from_pretrained(tiny.shared("zimage"))
        by_peft.transformer = PeftModel.from_pretrained(by_peft.transformer, str(folder)).base_model.model
        pictures = [sample(pipeline, guidance_scale=0.0) for pipeline in (by_diffusers, by_peft)]
        assert torch.equal(*pictures)
        assert (pictures[0] - base).abs().max() > 0.01
        seen.append(pictures[0])
    assert not torch.equal(*seen)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_flux2_klein_trains_through_the_same_loop(kind, tmp_path):
    from diffusers import Flux2KleinPipeline

    run, source = tmp_path / "run", tiny.shared("flux2_klein")
    settings = words(
        model__path=str(source), data__path=str(data()), output__dir=str(run), adapter__kind=kind, train__steps=12,
        data__resolution=32, conditioning__context="edit", teacher__kind="frozen", train__learning_rate=3e-3,
        checkpoint__every=0,
    )
    job = start(settings).succeed()
    table = rows(run)
    assert len(table) == 12 and all(row["grad_norm"] > 0 for row in table)
    assert sum(row["loss"] for row in table[-3:]) < 0.9 * sum(row["loss"] for row in table[:3])
    pipeline = Flux2KleinPipeline.from_pretrained(run / "export" if kind == "full" else source)
    before = sample(Flux2KleinPipeline.from_pretrained(source), size=32, guidance_scale=1.0)
    if kind == "lora":
        assert torch.equal(sample(pipeline, size=32, guidance_scale=1.0), before)
        pipeline.load_lora_weights(run / "export")
    else:
        assert moved(transformer(source), transformer(run / "export")) > 0.9
    assert not torch.equal(sample(pipeline, size=32, guidance_scale=1.0), before)
    assert as_told(job).size == (32, 32)


def test_the_forward_is_recorded(full):
    run, job = full
    recorded = json.loads((run / "environment.json").read_text())
    assert {key: recorded[key] for key in ("backbone", "activations", "fp8", "ops")} == {
        "backbone": "pair", "activations": "keep", "fp8": "off", "ops": "native",
    }
    assert "cpu_flash" in recorded["attention"] and "forward  pair, attention cpu_flash" in job.out


@pytest.mark.parametrize("wrong", [{"backbone": "pair"}, {"train__activations": "selective"}])
def test_what_only_the_pair_forward_has_is_refused_elsewhere(wrong, tmp_path):
    source = str(tiny.shared("flux2_klein"))
    job = start(words(model__path=source, data__path=str(data()), output__dir=str(tmp_path / "run"), **wrong))
    job.fail("flux2_klein", next(iter(wrong)).replace("__", "."))


def test_fp8_trains(first, tmp_path):
    """Emulated on the CPU: near the same losses, and not the same."""
    plain = first("lora")
    fp8 = variant(tmp_path, "fp8", adapter__kind="lora", train__fp8="frozen")
    assert [row["loss"] for row in fp8] == pytest.approx([row["loss"] for row in plain], rel=0.2)
    assert fp8 != plain


@pytest.mark.filterwarnings("ignore:.*torch_dtype")
def test_a_pipeline_in_bfloat16(tmp_path):
    """Exported as it was stored, whatever the run computes in: with fp32 masters the export is their rounding."""
    source = tiny.make_zimage(tmp_path / "source", dtype=torch.bfloat16)
    for precision in ("fp32", "bf16"):
        run = tmp_path / precision
        settings = words(model__path=str(source), data__path=str(data()), output__dir=str(run), train__precision=precision)
        job = start(settings).succeed()
        assert {tensor.dtype for tensor in transformer(run / "export").values()} == {torch.bfloat16}
        assert moved(transformer(source), transformer(run / "export")) > 0.9
        assert ("torch_dtype=torch.bfloat16" in job.out) == (precision == "bf16")
        assert as_told(job).size == (16, 16)


def test_the_command_by_itself(tmp_path):
    """--help; and a run with the launcher's argument, from another folder, with paths relative to it, twice."""
    shown = command([sys.executable, str(TRAIN), "--local_rank=0", "--help"]).succeed().out
    assert "model.path" in shown and "sample.prompts" in shown and "usage: deepspeed dopsd_fast/train.py" in shown

    (tmp_path / "pictures").symlink_to(data())
    settings = ["--local_rank=0", *words(data__path="pictures", train__steps=1, sample__prompts="a dog", sample__count=0)]
    for count in (1, 2):
        job = (python if count == 1 else start)(settings, cwd=tmp_path).succeed()
        runs = sorted((tmp_path / "runs").glob("nano_full-*"))
        assert len(runs) == count and [row["step"] for row in rows(runs[-1])] == [1]
        assert (runs[-1] / "samples" / "step-000001.png").exists()
        assert_silent(job)
