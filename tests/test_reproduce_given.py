"""The comparison on a user's own model, records and metrics, on tiny ones; and options that cannot be."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from PIL import Image

from bench import run as bench
from bench.reproduce import runs
from bench.reproduce.arms import OURS, START, Arm, Budget
from bench.reproduce.given import Given
from bench.results import read_results
from tests import forked_plans, tiny
from tests.driving import data, rows, words
from tests.tiny_metrics import TEXTS, make_all, make_dino


@pytest.fixture(scope="module", autouse=True)
def forks():
    with forked_plans.used():
        yield


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory):
    """Held-out records, probes and every metric."""
    folder = make_all(tmp_path_factory.mktemp("eval"))
    (folder / "target").mkdir()
    for i, text in enumerate(TEXTS):
        Image.new("RGB", (40, 40), (40 * i, 90, 200 - 40 * i)).save(folder / "target" / f"{i}.png")
        (folder / "target" / f"{i}.txt").write_text(f"{text} in the [V] style")
    return folder


def settings() -> list[str]:
    ours = ("model.path", "sample.", "checkpoint.every", "train.steps", "train.learning_rate")
    return [word for word in words() if not word.startswith(ours)]


def given(evaluation: Path, out: Path, *more: str) -> int:
    return bench.main(["reproduce", "--model", str(tiny.shared("zimage")), "--data", str(data()), "--eval", str(evaluation),
                       "--recipe", "nano_full", "--quick", "--steps", "2", "--threads", "1", "--out", str(out), *more,
                       "--set", *settings()])


@pytest.fixture(scope="module")
def whole(evaluation, tmp_path_factory):
    """The result folder of a comparison with every metric."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert given(evaluation, out) == 0
    return out


def test_a_model_of_ones_own(whole):
    facts, found = read_results(whole)
    few = next(row.case for row in found if row.metric == "fid").partition("@")[2]
    assert few == "2_steps" or few == "8_steps"
    names = {(row.variant, row.metric) for row in found if row.case == f"target@{few}" and row.status == "ok"}
    for arm in (START, "sft", OURS, "live_teacher"):
        assert {(arm, name) for name in ("dino_distance", "clip_score", "fid", "lpips")} <= names
    assert {row.metric for row in found if row.case == f"original@{few}" and row.variant == OURS} >= {"clip_score", "probes"}
    noted = {row.case: row.note for row in found if row.metric == "claim"}
    assert "dino_distance" in noted["dopsd_beats_sft"] and "fid" in noted["dopsd_beats_sft"]
    assert "probes" in noted["dopsd_keeps_original"]
    assert (whole / "plots" / "reproduce_grid_target.png").exists()
    drawn = whole / "work" / "drawn" / START / "pictures"
    assert len(list((drawn / f"target@{few.removesuffix('_steps')}").glob("*.png"))) == len(TEXTS)


@pytest.fixture(scope="module")
def dino_alone(evaluation, tmp_path_factory):
    """Held-out records, and one metric."""
    folder = tmp_path_factory.mktemp("dino")
    shutil.copytree(evaluation / "target", folder / "target")
    make_dino(folder / "dino")
    return folder


def test_metrics_without_their_model_say_what_is_missing(whole, dino_alone, tmp_path):
    shutil.copytree(whole / "work" / "runs", tmp_path / "out" / "work" / "runs")  # what is trained is not trained again
    assert given(dino_alone, tmp_path / "out") == 0
    assert not list((tmp_path / "out" / "work" / "logs").glob("*.train.log"))
    _, found = read_results(tmp_path / "out")
    missing = {row.variant: row for row in found if row.case == "metrics"}
    assert set(missing) == {"clip_score", "fid", "lpips", "probes"}
    assert all(row.status == "failed" and str(dino_alone) in row.note for row in missing.values())
    assert {row.metric for row in found if row.case.startswith("target@")} == {"dino_distance", "dino_distance_minus_start"}
    assert {row.value for row in found if row.metric == "claim"} == {0}


def test_the_processes_are_those_that_a_user_starts(dino_alone, tmp_path, monkeypatch):
    """Without forks: the trainer and what draws are programs of their own. What is marked as finished is left alone."""
    monkeypatch.setattr(runs, "start", forked_plans.REAL)
    subject = Given(str(tiny.shared("zimage")), str(data()), str(dino_alone), "cpu", "nano_full", settings())
    plan = runs.Plan(tmp_path, subject, Budget(2, 1, False, 1, 1, 1, 1), workers=2)
    (tmp_path / "drawn" / START).mkdir(parents=True)
    (tmp_path / "drawn" / START / runs.FINISHED).touch()
    sft = Arm("sft", "SFT", ("method.name=sft",))
    plan.train_all([sft])
    assert not plan.lost
    ((rate, seed),) = plan.seeds(sft)
    assert [row["step"] for row in rows(plan.run(sft, rate, seed))] == [1, 2] and rate == subject.known_rate(sft)
    found = subject.read(plan.drawn(sft, rate, seed))
    assert set(found) == {("target", subject.few), ("target", 32)} and found["target", 32].pictures == len(TEXTS)
    assert sorted(log.name for log in (tmp_path / "logs").iterdir()) == ["sft-1e-05-0.pictures.log", "sft-1e-05-0.train.log"]


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["reproduce", "--data", "x"], ("--data", "--eval")),
        (["reproduce", "--eval", "x"], ("--data", "--eval")),
        (["reproduce", "--model", "zimage-small"], ("zimage-small", "--data PATH")),
        (["step", "--ablations"], ("--ablations", "reproduce")),
        (["reproduce", "step", "--eval", "x"], ("--eval", "by itself")),
        (["reproduce", "--model", "{nowhere}", "--data", "x", "--eval", "x"], ("nowhere",)),
        (["reproduce", "--model", "{tiny}", "--data", "x", "--eval", "{nowhere}"], ("nowhere", "dino")),
        (["reproduce", "--model", "{tiny}", "--data", "x", "--eval", "x", "--recipe", "none_such"], ("none_such",)),
        (["reproduce", "--model", "{tiny}", "--data", "x", "--eval", "x", "--set", "train.stepz=3"], ("train.stepz",)),
        (["reproduce", "--model", "{flux}", "--data", "x", "--eval", "x"], ("flux2_klein", "--recipe")),
    ],
)
def test_bad_options_are_one_line(arguments, parts, tmp_path, capsys):
    places = {"nowhere": tmp_path / "nowhere", "tiny": tiny.shared("zimage"), "flux": tiny.shared("flux2_klein")}
    filled = [argument.format(**places) for argument in arguments]
    assert bench.main([*filled, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len([line for line in said if line.startswith("error:")]) == 1
    assert all(part in said[-1] for part in parts), said


def test_data_without_held_out_records_is_refused_before_training(evaluation, tmp_path, capsys):
    folder = tmp_path / "eval"
    make_dino(folder / "dino")
    assert given(folder, tmp_path / "out") == 2
    assert "target/" in capsys.readouterr().err
