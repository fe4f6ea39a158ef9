"""The comparison on a user's own model, records and metrics, on tiny ones; and options that cannot be."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from PIL import Image

from bench import run as bench
from bench.reproduce.arms import OURS, START
from bench.results import read_results
from tests import tiny
from tests.driving import data, words
from tests.tiny_metrics import TEXTS, make_all, make_dino


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory):
    """Held-out records, probes and every metric."""
    folder = make_all(tmp_path_factory.mktemp("eval"))
    (folder / "target").mkdir()
    for i, text in enumerate(TEXTS):
        Image.new("RGB", (40, 40), (40 * i, 90, 200 - 40 * i)).save(folder / "target" / f"{i}.png")
        (folder / "target" / f"{i}.txt").write_text(f"{text} in the [V] style")
    return folder


def given(evaluation: Path, out: Path, *more: str) -> int:
    ours = ("model.path", "sample.", "checkpoint.every", "train.steps", "train.learning_rate")
    settings = [word for word in words() if not word.startswith(ours)]
    return bench.main(["reproduce", "--model", str(tiny.shared("zimage")), "--data", str(data()), "--eval", str(evaluation),
                       "--recipe", "nano_full", "--quick", "--steps", "2", "--threads", "1", "--out", str(out), *more,
                       "--set", *settings])


def test_a_model_of_ones_own(evaluation, tmp_path):
    assert given(evaluation, tmp_path / "out") == 0
    facts, found = read_results(tmp_path / "out")
    few = next(row.case for row in found if row.metric == "fid").partition("@")[2]
    assert few == "2_steps" or few == "8_steps"
    names = {(row.variant, row.metric) for row in found if row.case == f"target@{few}" and row.status == "ok"}
    for arm in (START, "sft", OURS, "live_teacher"):
        assert {(arm, name) for name in ("dino_distance", "clip_score", "fid", "lpips")} <= names
    assert {row.metric for row in found if row.case == f"original@{few}" and row.variant == OURS} >= {"clip_score", "probes"}
    noted = {row.case: row.note for row in found if row.metric == "claim"}
    assert "dino_distance" in noted["dopsd_beats_sft"] and "fid" in noted["dopsd_beats_sft"]
    assert "probes" in noted["dopsd_keeps_original"]
    assert (tmp_path / "out" / "plots" / "reproduce_grid_target.png").exists()
    drawn = tmp_path / "out" / "work" / "drawn" / START / "pictures"
    assert len(list((drawn / f"target@{few.removesuffix('_steps')}").glob("*.png"))) == len(TEXTS)


def test_metrics_without_their_model_say_what_is_missing(evaluation, tmp_path):
    folder = tmp_path / "eval"
    shutil.copytree(evaluation / "target", folder / "target")
    make_dino(folder / "dino")
    assert given(folder, tmp_path / "out") == 0
    _, found = read_results(tmp_path / "out")
    missing = {row.variant: row for row in found if row.case == "metrics"}
    assert set(missing) == {"clip_score", "fid", "lpips", "probes"}
    assert all(row.status == "failed" and str(folder) in row.note for row in missing.values())
    assert {row.metric for row in found if row.case.startswith("target@")} == {"dino_distance", "dino_distance_minus_start"}
    assert {row.value for row in found if row.metric == "claim"} == {0}


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
