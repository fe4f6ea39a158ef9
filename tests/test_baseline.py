"""Counts that no machine changes: against bench/baseline.json and the promised targets; and how they are compared."""

import json
from dataclasses import replace

import pytest

from bench import baseline
from bench.results import Row, failed
from bench.suites import cost
from dopsd_fast.errors import UserError

LAUNCHES = Row("cost", "lora", "ours", "launches_per_step", 5000.0, "")
GATHERS = Row("zero", "lora", "ours", "gathers_per_step", 0.0, "")
PEAK = Row("memory", "lora@full_size", "ours", "peak_bytes", 3e10, "B")
ROWS = [LAUNCHES, GATHERS, PEAK]


@pytest.fixture(scope="module")
def counted():
    return baseline.counts(baseline.measure())


def test_no_count_is_worse_and_the_file_is_what_is_counted_now(counted):
    """Else the next change has room to get worse."""
    assert baseline.changed(counted, baseline.read()) == []


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_targets_of_a_full_size_step(counted, kind):
    """And FLOPs at most 1.05 times the floor's."""
    values = counted["cost"][kind]
    for metric, limit in cost.TARGETS.items():
        assert 0 < values[metric] <= limit, metric
    assert 0.98 * cost.FLOOR_TFLOP[kind] <= values["gemm_tflop_per_step"] <= 1.05 * cost.FLOOR_TFLOP[kind]


def test_targets_of_gathers(counted):
    values = {case: metrics["gathers_per_step"] for case, metrics in counted["zero"].items()}
    assert values["full"] <= 2 and values["full/resident"] == 1 and values["lora"] == 0


# ---- the comparison --------------------------------------------------------------------------------------------------


def times(row: Row, factor: float) -> list[Row]:
    return [replace(other, value=other.value * factor) if other is row else other for other in ROWS]


@pytest.mark.parametrize(("rows", "said"), [
    (ROWS, []),
    (times(LAUNCHES, 1.019), []),
    (times(LAUNCHES, 0.981), []),
    (times(LAUNCHES, 1.021), ["worse: cost lora launches_per_step: 5,105, before 5,000 (+2.1 %)"]),
    (times(PEAK, 0.97), ["better: memory lora@full_size peak_bytes: 2.91e+10, before 3e+10 (-3.0 %); hold it with --update"]),
    ([LAUNCHES, replace(GATHERS, value=1.0), PEAK], ["worse: zero lora gathers_per_step: 1, before 0"]),
    ([LAUNCHES, GATHERS], ["worse: memory lora@full_size peak_bytes is not counted any more"]),
    ([*ROWS, replace(LAUNCHES, case="full")], ["worse: cost full launches_per_step is not in baseline.json: --update"]),
])
def test_what_is_worse_and_what_is_better(rows, said):
    assert baseline.changed(baseline.counts(rows), baseline.counts(ROWS)) == said


def test_only_counts_of_ours_belong_to_it():
    others = [replace(LAUNCHES, variant="R1"), replace(GATHERS, metric="seconds_per_step"), replace(PEAK, metric="step_bytes")]
    assert baseline.counts([*ROWS, *others]) == baseline.counts(ROWS)
    with pytest.raises(UserError, match="cost lora launches_per_step was not counted: no luck"):
        baseline.counts([failed(*LAUNCHES.key, "", "no luck")])


def test_the_command(monkeypatch, tmp_path, capsys):
    file = tmp_path / "baseline.json"
    monkeypatch.setattr(baseline, "FILE", file)
    monkeypatch.setattr(baseline, "measure", lambda: ROWS)
    assert baseline.main([]) == 2 and "--update" in capsys.readouterr().err
    file.write_text("[1]")
    assert baseline.main([]) == 2 and str(file) in capsys.readouterr().err
    assert baseline.main(["--update"]) == 0 and json.loads(file.read_text())["cost"]["lora"]["launches_per_step"] == 5000
    capsys.readouterr()
    assert baseline.main([]) == 0 and capsys.readouterr().out == "3 counts, 0 worse\n"
    monkeypatch.setattr(baseline, "measure", lambda: times(LAUNCHES, 1.5))
    assert baseline.main([]) == 1 and "worse: cost lora launches_per_step" in capsys.readouterr().out
    monkeypatch.setattr(baseline, "measure", lambda: times(LAUNCHES, 0.5))
    assert baseline.main([]) == 0 and "better: cost lora launches_per_step" in capsys.readouterr().out
