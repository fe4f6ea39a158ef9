"""Two result folders of one machine: what counts as a change, and what cannot be compared."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from bench import run
from bench.report.compare import matched, same_machine
from bench.results import Row, failed, read_results, write_results
from dopsd_fast.errors import UserError

FACTS = {
    "platform": "Linux x86_64", "cpu": "A CPU", "cpu_capability": "AVX2", "cores": 2, "threads": 2, "clock": "wall",
    "model": "nano", "device": "cpu", "quick": False, "load": [0.5, 0.5, 0.5], "commit": "a" * 40, "torch": "2.13.0",
}
TIME = Row("step", "lora", "ours", "seconds_per_step", 1.0, "s", 0.98, 1.02, 20)
SPEED = Row("rollout", "lora", "ours", "states_per_second", 100.0, "1/s", 98.0, 102.0, 20)
RATIO = Row("step", "lora/R1", "ours", "speedup", 2.0, "x", 1.95, 2.05, 20)
SHARE = Row("kernels", "swiglu", "ours", "ceiling_share_forward", 0.8, "", 0.79, 0.81, 20)
COUNT = Row("cost", "lora", "ours", "launches_per_step", 5000.0, "")
BYTES = Row("zero", "full", "ours", "gathered_bytes_per_step", 1e6, "B")
NOTHING = Row("zero", "lora", "ours", "gathers_per_step", 0.0, "")
ERROR = Row("step", "lora", "ours", "gradient_relative_error", 3e-7, "")
PEAK = Row("memory", "lora", "ours", "peak_bytes", 1e9, "B")
ROWS = [TIME, SPEED, RATIO, SHARE, COUNT, BYTES, NOTHING, ERROR, PEAK]


def times(row: Row, factor: float) -> Row:
    """The row with value and spread `factor` as large."""
    return replace(row, value=row.value * factor, p20=row.p20 and row.p20 * factor, p80=row.p80 and row.p80 * factor)


def folder(path: Path, rows: list[Row], **facts: object) -> Path:
    write_results(path, FACTS | facts, rows)
    return path


def verdict(a: Row, b: Row, threshold: float = 5.0) -> str:
    (change,) = matched([a], [b], threshold)
    return change.verdict


@pytest.mark.parametrize(("row", "factor", "said"), [
    (TIME, 1.2, "slower"), (TIME, 0.8, "faster"), (TIME, 1.045, "same"),
    (SPEED, 1.2, "faster"), (SPEED, 0.8, "slower"), (RATIO, 1.2, "faster"), (RATIO, 0.8, "slower"),
    (SHARE, 1.2, "faster"), (SHARE, 0.8, "slower"),
    (COUNT, 1.0009, "same"), (COUNT, 1.0012, "worse"), (COUNT, 0.9, "better"), (BYTES, 1.01, "worse"), (BYTES, 0.99, "better"),
    (ERROR, 1.9, "same"), (ERROR, 2.1, "worse"), (ERROR, 0.4, "better"), (ERROR, 0.6, "same"),
    (PEAK, 1.04, "same"), (PEAK, 1.06, "worse"), (PEAK, 0.9, "better"),
    (replace(TIME, p20=None, p80=None), 1.2, "slower"),
    (replace(TIME, metric="suite_seconds", p20=None, p80=None), 3.0, "same"),
    (replace(PEAK, case="lora/R1", metric="peak_ratio", value=0.5, unit="x"), 1.2, "worse"),
    (replace(RATIO, metric="speedup_forward"), 0.8, "slower"),
    (replace(SHARE, suite="profile", metric="share_gemm"), 0.5, "same"),
    (replace(ERROR, metric="gradient_one_minus_cosine"), 3, "worse"),
])
def test_what_counts_as_a_change(row, factor, said):
    assert verdict(row, times(row, factor)) == said


def test_overlapping_spreads_are_no_change():
    wide = replace(TIME, p20=0.9, p80=1.3)
    assert verdict(wide, times(TIME, 1.2)) == "same"
    assert verdict(wide, times(TIME, 1.4)) == "slower"
    assert verdict(TIME, times(TIME, 1.2), threshold=25) == "same"


def test_measures_of_pictures_change_when_their_intervals_part():
    distance = Row("reproduce", "target@4_steps", "dopsd", "patch_fd", 0.4, "", n=3, low=0.36, high=0.44)
    worse, near = replace(distance, value=0.5, low=0.45, high=0.55), replace(distance, value=0.43, low=0.39, high=0.47)
    assert verdict(distance, worse) == "worse" and verdict(worse, distance) == "better" and verdict(distance, near) == "same"
    accuracy = replace(distance, metric="accuracy", value=0.9, low=0.88, high=0.92)
    assert verdict(accuracy, replace(accuracy, value=0.8, low=0.78, high=0.82)) == "worse"
    claim = Row("reproduce", "dopsd_beats_sft", "ours", "claim", 1, "", n=3, low=1.4, high=1.5)
    assert verdict(claim, replace(claim, value=0, low=0.9)) == "worse" and verdict(replace(claim, value=-1), claim) == "better"
    decides = [change.decides for change in matched([distance], [distance, replace(distance, variant="sft"), claim], 5.0)]
    assert decides == [True, False, True]
    assert verdict(replace(distance, metric="learning_rate"), replace(worse, metric="learning_rate")) == "same"


def test_a_count_of_nothing():
    assert verdict(NOTHING, NOTHING) == "same"
    assert verdict(NOTHING, replace(NOTHING, value=1.0)) == "worse"
    assert verdict(replace(NOTHING, value=1.0), NOTHING) == "better"


def test_rows_that_failed_or_fell_back():
    broken = failed(*TIME.key, "s", "out of memory")
    other = replace(TIME, status="fallback", note="plain PyTorch")
    assert [verdict(TIME, broken), verdict(broken, TIME), verdict(broken, broken)] == ["failed", "measured now", "same"]
    assert [verdict(TIME, other), verdict(other, TIME), verdict(other, other)] == ["fell back", "same", "same"]


def test_nothing_changed(tmp_path, capsys):
    a = folder(tmp_path / "a", ROWS)
    b = folder(tmp_path / "b", ROWS[::-1], commit="b" * 40, torch="2.14.0", driver="600")
    assert run.main(["compare", str(a), str(b)]) == 0
    out = capsys.readouterr().out
    assert "torch: 2.13.0, now 2.14.0" in out and "b" * 40 in out and "platform" not in out
    assert out.splitlines()[-1] == f"ours, beyond 5 % and the spread: {len(ROWS)} same"


def test_the_table_and_the_exit_code(tmp_path, capsys):
    peer = replace(TIME, variant="R1")
    a = folder(tmp_path / "a", [*ROWS, peer, replace(TIME, case="full")])
    b = folder(tmp_path / "b", [times(TIME, 0.5), times(SPEED, 0.5), *ROWS[2:], times(peer, 2), replace(TIME, case="lora@K8")])
    assert run.main(["compare", str(a), str(b)]) == 1
    out = capsys.readouterr().out
    assert "faster: step lora ours seconds_per_step: 1.00 s 0.980..1.02, now 500 ms 490..510 (-50.0 %)\n" in out
    assert "slower: rollout lora ours states_per_second" in out and "(+100.0 %)" in out
    last = out.splitlines()[-1]
    assert last == ("ours, beyond 5 % and the spread: 1 slower, 1 faster, 7 same, 1 only in A, 1 only in B; of peers and "
                    "ceilings 1 changed")
    assert "launches" not in out and "lora@K8" not in out


@pytest.mark.parametrize(("rows", "code"), [
    ([times(TIME, 0.5)], 0),
    ([times(TIME, 2.0)], 1),
    ([failed(*TIME.key, "s", "no memory")], 1),
    ([TIME, replace(TIME, variant="R1", value=9.0, p20=9.0, p80=9.0)], 0),
    ([], 0),
])
def test_exit_code(rows, code, tmp_path, capsys):
    a = folder(tmp_path / "a", [TIME, replace(TIME, variant="R1")])
    assert run.main(["compare", str(a), str(folder(tmp_path / "b", rows))]) == code
    assert "no memory" not in "".join(row.note for row in rows) or "no memory" in capsys.readouterr().out


@pytest.mark.parametrize(("fact", "value"), [
    ("cpu", "Another CPU"), ("cores", 4), ("threads", 1), ("clock", "cpu"), ("model", "zimage-small"), ("device", "cuda"),
    ("gpu", "NVIDIA H100"), ("compute_capability", [9, 0]), ("cpu_capability", "AVX512"), ("platform", "Linux aarch64"),
])
def test_another_machine_is_refused(fact, value, tmp_path):
    with pytest.raises(UserError, match=f"not of one machine and set-up: {fact} ") as caught:
        same_machine(tmp_path / "a", FACTS, tmp_path / "b", FACTS | {fact: value})
    assert "\n" not in str(caught.value)


def test_one_gpu_can_be_compared(tmp_path):
    facts = FACTS | {"gpu": "NVIDIA H100", "compute_capability": [9, 0]}
    same_machine(tmp_path / "a", facts, tmp_path / "b", facts | {"driver": "601", "cuda": "13.1"})


def test_a_quick_run_is_refused(tmp_path, capsys):
    a, b = folder(tmp_path / "a", ROWS), folder(tmp_path / "b", ROWS, quick=True)
    for pair in ((a, b), (b, a), (b, b)):
        assert run.main(["compare", *map(str, pair)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {b} is from --quick")


def content(**changes: object) -> str:
    row = {"suite": "step", "case": "lora", "variant": "ours", "metric": "seconds_per_step", "value": 1.0, "unit": "s"}
    return json.dumps({"environment": FACTS, "rows": [row | changes]})


@pytest.mark.parametrize(("text", "said"), [
    (None, "cannot be read: No such file or directory"),
    ('{"rows": [', "is no benchmark result"),
    ("[]", "is no benchmark result"),
    (content(colour="red"), "is no benchmark result"),
    (json.dumps({"environment": FACTS, "rows": [{"suite": "step"}]}), "is no benchmark result"),
    (json.dumps({"environment": {"cpu": "A CPU"}, "rows": []}), "not of one machine and set-up: platform "),
    (content(value="1.0"), "is no benchmark result"),
    (content(value=float("nan")), "step lora ours seconds_per_step: a number is missing or not finite"),
    (content(value=None), "a number is missing"),
])
def test_what_is_no_result_is_one_line(text, said, tmp_path, capsys):
    good = folder(tmp_path / "good", ROWS)
    bad = tmp_path / "bad"
    if text is not None:
        bad.mkdir()
        (bad / "results.json").write_text(text)
    for pair in ((good, bad), (bad, good)):
        assert run.main(["compare", *map(str, pair)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and str(bad) in line and said in line


def test_two_rows_of_one_key_are_refused(tmp_path):
    row = json.loads(content())["rows"][0]
    (tmp_path / "results.json").write_text(json.dumps({"environment": FACTS, "rows": [row, row]}))
    with pytest.raises(UserError, match="step lora ours seconds_per_step: 2 rows of this key"):
        read_results(tmp_path)


@pytest.mark.parametrize("value", ["-1", "nan", "inf"])
def test_a_threshold_is_a_percentage(value, tmp_path, capsys):
    assert run.main(["compare", str(tmp_path), str(tmp_path), "--threshold", value]) == 2
    assert "--threshold" in capsys.readouterr().err
