"""The paper's comparison, small: its required claims on the embedded pipeline, and the eager reference."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from bench import run as bench
from bench.reproduce import claims, eager
from bench.reproduce.arms import ABLATIONS, DOMAINS, MAIN, OURS, START, Budget
from bench.reproduce.claims import Measures
from bench.reproduce.embedded import Embedded
from bench.reproduce.resampling import Draws
from bench.reproduce.runs import Plan
from bench.results import Options, read_results
from bench.suites import reproduce
from tests import forked_plans, tiny
from tests.driving import data, rows, start, words

SMALL = Budget(steps=50, seeds=1, search=False, captions=10, validation=8, curve=4, points=2)
MORE = tuple(
    arm if arm.name == "sft" else replace(arm, words=(*arm.words, "train.batch_size=4"))
    for arm in (*MAIN, *ABLATIONS) if arm.name in ("sft", "pso", OURS, "live_teacher", "frozen_teacher")
)
"""Half of the usual batch, but for SFT, whose steps cost little: it has lost the few steps only after so many pictures."""
QUICK = tuple(arm for arm in MORE if arm.name in ("sft", OURS, "live_teacher"))
REQUIRED = {"sft_loses_few_step", "dopsd_learns_target", "dopsd_keeps_original", "dopsd_beats_sft", "live_teacher_collapses"}


@pytest.fixture(scope="module", autouse=True)
def forks():
    with forked_plans.used():
        yield


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """(result folder, its rows): start, SFT, D-OPSD and the live teacher, one seed, at the rates that the full search found."""
    out = tmp_path_factory.mktemp("reproduce")
    options = Options(model="nano", device=torch.device("cpu"), threads=2, quick=True, budget=SMALL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reproduce, "QUICK", QUICK)
        return out, bench.measure(["reproduce"], options, out)


def test_the_required_claims_are_supported(small):
    found = {row.case: row for row in small[1] if row.metric == "claim"}
    assert {name for name in REQUIRED if found[name].value == 1} == REQUIRED, {name: found[name].note for name in REQUIRED}
    assert found["sft_forgets"].value == 1, found["sft_forgets"].note


@pytest.fixture(scope="module")
def more(small):
    """The claims' rows with PSO and the frozen teacher, too."""
    plan = Plan(small[0] / "work", Embedded(small[0] / "work"), SMALL, workers=2)
    return reproduce.reproduce(plan, MORE, Measures())


@pytest.mark.parametrize(
    ("claim", "one", "other"), [("dopsd_beats_pso", OURS, "pso"), ("ema_at_least_frozen", OURS, "live_teacher")]
)
def test_the_other_claims_are_supported_and_can_be_lost(small, more, claim, one, other):
    found = {row.case: row for row in more if row.metric == "claim"}
    assert found[claim].value == 1, found[claim].note
    assert all(found[name].value == 1 for name in REQUIRED)
    swapped = claims.rows(Draws(exchanged(samples_of(small[0], MORE), one, other)), Measures(), 1)
    assert {row.case: row.value for row in swapped}[claim] == -1


def samples_of(out: Path, arms=QUICK):
    found = {}
    for arm in (START, *(arm.name for arm in arms)):
        (drawn,) = [folder for folder in (out / "work" / "drawn").iterdir() if folder.name.partition("-")[0] == arm]
        for (domain, steps), one in Embedded(out / "work").read(drawn).items():
            found[arm, domain, steps] = [one]
    return found


@pytest.fixture(scope="module")
def samples(small):
    found = samples_of(small[0])
    assert REQUIRED <= supported(found)
    return found


def supported(samples) -> set[str]:
    return {row.case for row in claims.rows(Draws(samples), Measures(), 1) if row.value == 1}


def exchanged(samples, one: str, other: str):
    names = {one: other, other: one}
    return {(names.get(arm, arm), domain, steps): found for (arm, domain, steps), found in samples.items()}


@pytest.mark.parametrize(
    ("one", "other", "lost"),
    [
        (OURS, "sft", {"dopsd_beats_sft", "sft_loses_few_step"}),
        (OURS, "live_teacher", {"dopsd_beats_sft", "dopsd_learns_target", "dopsd_keeps_original", "live_teacher_collapses"}),
        (OURS, START, {"dopsd_learns_target"}),
    ],
)
def test_the_claims_are_lost_when_the_pictures_are_others(samples, one, other, lost):
    assert lost <= REQUIRED - supported(exchanged(samples, one, other))


def test_every_measure_is_a_row_with_its_interval(small):
    out, found = small
    keys = {(row.case, row.variant, row.metric) for row in found}
    for domain in DOMAINS:
        for steps in (4, 32):
            for arm in (START, *(arm.name for arm in QUICK)):
                for metric in ("patch_fd", "style_distance", "accuracy"):
                    assert (f"{domain}@{steps}_steps", arm, metric) in keys
                    assert arm == START or (f"{domain}@{steps}_steps", arm, f"{metric}_minus_start") in keys
    measured = [row for row in found if "_steps" in row.case]
    assert all(row.status == "ok" and row.low <= row.value <= row.high for row in measured)
    assert any(row.low < row.high for row in measured)
    steps = {row.case for row in found if row.metric == "curve_patch_fd" and row.variant == OURS}
    assert {f"{domain}@step_{step}" for domain in DOMAINS for step in (0, 25, 50)} == steps
    assert {row.variant for row in found if row.metric == "seconds_per_step"} == {arm.name for arm in QUICK}
    assert read_results(out)[1] == found
    with (out / "results.csv").open(newline="") as stream:
        lines = [line for line in csv.DictReader(stream) if line["metric"] == "claim"]
    assert {line["case"] for line in lines if line["value"] == "1"} >= REQUIRED


def test_figures_and_report_are_there(small):
    out, _ = small
    for domain in DOMAINS:
        with Image.open(out / "plots" / f"reproduce_grid_{domain}.png") as grid:
            assert grid.width > 600 and len(grid.convert("RGB").getcolors(1 << 20)) > 100
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64") >= 4 and "dopsd_keeps_original" in page
    assert all((out / "plots" / f"{name}.png").exists() for name in ("reproduce_curves", "reproduce_teachers"))


def test_what_is_finished_is_not_done_again(small, monkeypatch):
    out, found = small

    def process(*arguments):
        raise AssertionError(f"started {arguments}")

    monkeypatch.setattr(Plan, "_process", process)
    plan = Plan(out / "work", Embedded(out / "work"), SMALL, workers=1)
    again = reproduce.reproduce(plan, QUICK, Measures())
    assert [row for row in again if row.metric == "claim"] == [row for row in found if row.metric == "claim"]
    left = [len(list(run.glob("checkpoints/step-*"))) for run in (out / "work" / "runs").iterdir()]
    assert len(left) >= len(QUICK) and set(left) == {1}  # the curve's are gone


# ---- the eager reference -----------------------------------------------------------------------------------------------------


def test_the_eager_reference_trains_as_ours(tmp_path):
    """The same records, noise, rates and steps: losses and weights differ by what the order of fp32 sums does through Adam."""
    settings = words(
        data__path=str(data()), train__steps=4, train__schedule="cosine", checkpoint__every=2, conditioning__max_text_tokens=512
    )
    ours = tmp_path / "ours"
    start([*settings, f"output.dir={ours}"]).succeed()
    eager.train(tmp_path / "eager", settings)
    theirs = [json.loads(line) for line in (tmp_path / "eager" / "metrics.jsonl").read_text().splitlines()]
    assert [row["loss"] for row in rows(ours)] == pytest.approx([row["loss"] for row in theirs], rel=1e-3)
    assert all(row["seconds"] > 0 for row in theirs)
    start_of = load_weights(tiny.shared("zimage") / "transformer")
    a, b = load_weights(ours / "export" / "transformer"), load_weights(tmp_path / "eager" / "checkpoints" / "step-000004")
    moved = sum((a[name] - start_of[name]).square().sum() for name in a).sqrt()
    apart = sum((a[name] - b[name]).square().sum() for name in a).sqrt()
    assert moved > 0 and apart < 0.02 * moved
    assert [folder.name for folder in sorted((tmp_path / "eager" / "checkpoints").iterdir())] == ["step-000002", "step-000004"]


def load_weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(folder.glob("*.safetensors")) for name, t in load_file(file).items()}
