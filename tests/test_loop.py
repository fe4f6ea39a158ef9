"""What the loop gives a step and keeps of it: learning rates, inputs, a row of metrics, the file of rows. Without a run."""

from __future__ import annotations

import contextlib
import json
import math
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dopsd_fast.data.epochs import Item, item_noise, item_seed
from dopsd_fast.method.objective import StepReport
from dopsd_fast.method.trajectory import draw_times
from dopsd_fast.run import trainer
from dopsd_fast.run.metrics import MetricsLog, read_rows
from dopsd_fast.run.pictures import Showcase, Shown
from dopsd_fast.run.trainer import Trainer
from dopsd_fast.settings.schema import Settings, TrainSettings

ITEMS = [Item(record, repeat, 3, "text", f"prompt {record}", 16, 16) for record, repeat in ((4, 0), (2, 1), (7, 0), (5, 2))]


class Family:
    def latent_shape(self, height, width):
        return (2, height // 8, width // 8)

    def train_grid(self, num_states, shift, shape):
        return [k / num_states for k in range(num_states + 1)]

    def sample_grid(self, steps, shape):
        return [0.0, 0.5, 1.0]


class Contexts:
    """Each context is its own name."""

    def get(self, *name):
        return name


def loop(world=1, rank=0, sees="image", **train):
    made = object.__new__(Trainer)
    made.settings = Settings(train=TrainSettings(**train))
    made.rank, made.world, made.device, made.batches_per_epoch = rank, world, torch.device("cpu"), 5
    made.family, made.contexts, made.phases = Family(), Contexts(), lambda name: contextlib.nullcontext()
    made.objective = SimpleNamespace(needs_latents=False, needs_times=False, draws=False, needs_teacher=True, teacher_sees=sees)
    made.pair = SimpleNamespace(open=lambda student, teacher, shape: (student, teacher, tuple(shape)))
    return made


def rates(**train):
    made = loop(**train)
    return [made.learning_rate(done) for done in range(train["steps"])]


def test_learning_rates():
    """The first step has a part of the rate already, and the last one is not 0."""
    assert rates(steps=6, warmup=4, learning_rate=0.5) == [0.125, 0.25, 0.375, 0.5, 0.5, 0.5]
    assert rates(steps=3, learning_rate=0.5) == [0.5] * 3
    cosine = [0.5 * (1 + math.cos(math.pi * k / 4)) for k in range(4)]
    assert rates(steps=6, warmup=2, learning_rate=1.0, schedule="cosine") == pytest.approx([0.5, 1.0, *cosine])


@pytest.mark.parametrize("sees", ["image", "text"])
def test_inputs_belong_to_their_items(sees):
    inputs = loop(sees=sees, accumulation=4, seed=11).inputs(ITEMS[:2])
    assert torch.equal(inputs.noise, torch.stack([item_noise(11, item, (2, 2, 2)) for item in ITEMS[:2]]))
    student = [("student", "prompt 4"), ("student", "prompt 2")]
    teacher = [("teacher", 4, "prompt 4"), ("teacher", 2, "prompt 2")] if sees == "image" else student
    assert inputs.forward == (student, teacher, (2, 2, 2, 2))
    assert inputs.scale == 0.25 and list(inputs.grid) == [0.0, 0.25, 0.5, 0.75, 1.0]


def test_times_and_second_noise_belong_to_the_appearance_of_an_item():
    """Each purpose has numbers of its own, and each epoch."""
    made = loop(seed=11)
    made.objective.needs_times = made.objective.draws = True
    later = [replace(item, epoch=4) for item in ITEMS]
    first, second = made.inputs(ITEMS), made.inputs(later)
    assert torch.equal(first.second_noise, torch.stack([item_noise(11, item, (2, 2, 2), "second noise") for item in ITEMS]))
    assert not torch.equal(first.second_noise, first.noise)
    seeds = [item_seed(11, item.epoch, item.record, item.repeat, "time") for item in ITEMS]
    assert torch.equal(first.times, draw_times(seeds, 1.0))
    for name in ("times", "noise", "second_noise"):
        assert (getattr(first, name) != getattr(second, name)).any(dim=-1).all(), name


def test_a_step_is_the_mean_of_its_micro_batches():
    """Rank 1 of 2 runs the second and the fourth item; the row holds means over micro-batches, then over ranks."""
    made, seen, events = loop(world=2, rank=1, batch_size=1, accumulation=2, learning_rate=0.5), [], []

    def accumulate(inputs, backward):
        backward(inputs.scale)
        seen.append(inputs.forward[0][0][1])
        k = len(seen)
        return StepReport(loss=float(k), state_losses=[10.0 * k, 20.0 * k], gap=3.0 if k == 1 else 4.0, states=[])

    @contextlib.contextmanager
    def accumulating():
        yield
        events.append("reduced")

    made.objective.accumulate = accumulate
    made.engine = SimpleNamespace(
        accumulating=accumulating, backward=lambda scale: events.append(scale), any=lambda flag: flag,
        step=lambda rate: events.append(("step", rate)) or 0.25, mean=lambda values: [value + 0.5 for value in values],
    )
    row = made.step(12, ITEMS)
    assert seen == ["prompt 2", "prompt 5"]
    assert events == [0.5, 0.5, "reduced", ("step", 0.5)]
    assert (row["step"], row["epoch"], row["grad_norm"], row["learning_rate"]) == (13, 2, 0.25, 0.5)
    assert (row["loss"], row["state_losses"], row["gap"]) == (2.0, [15.5, 30.5], math.sqrt(13.0))
    assert row["peak_memory_bytes"] > 2**24  # bytes: torch alone takes more


def test_metrics_are_on_the_disk_before_the_checkpoint(monkeypatch):
    made, events = loop(), []
    made.log = SimpleNamespace(sync=lambda: events.append("metrics"))
    made.consensus = SimpleNamespace(together=contextlib.nullcontext)
    made.folder, made.engine, made.global_batch = Path("run"), None, 8
    monkeypatch.setattr(trainer.checkpoints, "save", lambda folder, engine, *saved: events.append(saved))
    made.save(7)
    assert events == ["metrics", ({"step": 7, "global_batch": 8}, 7, 2)]


def test_rows_that_are_done_again_are_dropped(tmp_path, monkeypatch):
    """A run that wrote three rows and a torn one goes on after its second step."""
    first = MetricsLog(tmp_path, 0)
    for step in (1, 2, 3):
        first.append({"step": step, "loss": 0.5 * step})
    first.close()
    with open(first.path, "a", encoding="utf-8") as file:
        file.write('{"step": 4, "lo')
    assert [row["step"] for row in read_rows(first.path)] == [1, 2, 3]
    second, synced = MetricsLog(tmp_path, 2), []
    assert [row["step"] for row in read_rows(second.path)] == [1, 2]
    second.append({"step": 3, "loss": 7.0})
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.fstat(handle).st_size))
    second.sync()
    assert synced == [first.path.stat().st_size]  # nothing is left in the program's own buffer
    second.close()
    assert [json.loads(line)["loss"] for line in first.path.read_text().splitlines()] == [0.5, 1.0, 7.0]


def test_the_teachers_picture_is_of_what_the_teacher_is_shown():
    """Each row with a noise of its own, the same at every step and for both branches."""
    made, asked = object.__new__(Showcase), []

    def sampler(branch, contexts, shape):
        asked.append((branch, *contexts))
        return lambda x, t: torch.zeros_like(x)

    made.parts = SimpleNamespace(
        settings=Settings(), objective=SimpleNamespace(needs_teacher=True, teacher_sees="image"), contexts=Contexts(),
        family=Family(), device=torch.device("cpu"), pair=SimpleNamespace(sampler=sampler),
    )
    shown, plain = Shown("a cat", 3, 16, 16), Shown("a dog", None, 16, 16)
    drawn = [made.latent(branch, row, i) for i, row in enumerate((shown, plain)) for branch in ("student", "teacher")]
    assert asked == [("student", ("student", "a cat")), ("teacher", ("teacher", 3, "a cat")),
                     ("student", ("student", "a dog")), ("teacher", ("student", "a dog"))]
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[2], drawn[3]) and not torch.equal(drawn[0], drawn[2])
