"""Case `student` of the suite `rollout`: sampling, ours against the published pipeline."""

from dataclasses import replace

import pytest
import torch

from bench import harness
from bench.results import Options, Row, merged
from bench.suites import sampling
from tests import tiny

OPTIONS = Options(str(tiny.shared("zimage")), torch.device("cpu"), quick=True, threads=1)


def found(options: Options) -> dict[tuple[str, str, str], Row]:
    rows = merged(sampling.measure(options))
    by_key = {(row.case, row.variant, row.metric): row for row in rows}
    assert len(by_key) == len(rows) and {row.suite for row in rows} == {"rollout"}
    return by_key


def test_both_sample_the_exact_state():
    rows = found(replace(OPTIONS, rounds=1))
    assert {case for case, _, _ in rows} == {"student@zimage", "student/diffusers@zimage"}
    for variant in ("ours", "diffusers"):
        # fp32 against float64: the pipeline's grid is rounded to fp32, and t = 1 - sigma with it
        assert 0 < rows["student@zimage", variant, "final_state_relative_error"].value < 1e-4
        speed, seconds = (rows["student@zimage", variant, of] for of in ("states_per_second", "seconds_per_rollout"))
        assert speed.value == pytest.approx(4 * 8 / seconds.value) and seconds.n == 1
    assert rows["student/diffusers@zimage", "ours", "speedup"].value > 0
    assert all(row.status == "ok" for row in rows.values())


def test_the_deployed_number_of_states_is_in_the_suite_and_not_in_the_tour():
    rows = found(replace(OPTIONS, quick=False, rounds=1))
    for variant in ("ours", "diffusers"):
        speed, seconds = (rows["student@K8@zimage", variant, of].value for of in ("states_per_second", "seconds_per_rollout"))
        assert speed == pytest.approx(8 * 8 / seconds)
        assert rows["student@K8@zimage", variant, "final_state_relative_error"].value < 1e-4
    assert not any("@K8" in case for case, _, _ in found(replace(OPTIONS, quick=False, tour=True, rounds=1)))


def test_speedup_is_the_pipelines_seconds_over_ours(monkeypatch):
    seconds = {"diffusers": [3.0, 4.0], "ours": [1.5, 1.0]}
    monkeypatch.setattr(harness, "in_turns", lambda calls, *_: [{name: seconds[name] for name in calls}])
    row = found(OPTIONS)["student/diffusers@zimage", "ours", "speedup"]
    assert (row.value, row.n, row.unit) == (3.0, 2, "x")


def test_a_pipeline_that_cannot_run_leaves_rows_and_ours_goes_on(monkeypatch):
    def unable(*given):
        raise torch.OutOfMemoryError("no room\nfor it")

    monkeypatch.setitem(sampling.VARIANTS, "diffusers", unable)
    rows = found(OPTIONS)
    assert rows["student@zimage", "ours", "seconds_per_rollout"].status == "ok"
    for key in (("student@zimage", "diffusers", "seconds_per_rollout"), ("student/diffusers@zimage", "ours", "speedup")):
        assert (rows[key].status, rows[key].value, rows[key].note) == ("failed", None, "OutOfMemoryError: no room for it")
