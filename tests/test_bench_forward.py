"""Suites `rollout` and `forward`: what they say of speed and error, and of a variant that cannot run."""

from dataclasses import replace

import pytest
import torch

from bench import harness
from bench.models import Model
from bench.references.reference_eager import STRONGER
from bench.results import Options, Row, merged
from bench.suites import forward, rollout
from bench.suites.measurement import cells
from bench.suites.rollout import SAMPLING, Peer, Rollout
from bench.suites.workload import STANDARD, Cell, Workload, stock_name
from tests import tiny

CPU = torch.device("cpu")
EXACT = 1e-4
"""fp32 against float64 through ten layers and four states: some 1e-6 where the computation is the same, far above if not."""


def tiny_options(**more) -> Options:
    return Options(str(tiny.shared("zimage")), CPU, quick=True, threads=1, **more)


def found(suite: str, rows) -> dict[tuple[str, str, str], Row]:
    rows = merged(rows)
    by_key = {(row.case, row.variant, row.metric): row for row in rows}
    assert len(by_key) == len(rows) and {row.suite for row in rows} == {suite}
    return by_key


def unable(*given):
    raise torch.OutOfMemoryError("no room\nfor it")


# ---- rollout ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_student_and_teacher_differ_alike_in_all_variants(kind):
    work = Workload(tiny_options())
    ours = rollout.Ours(kind, work)
    for dtype in (None, torch.float64):
        theirs = Peer("R2", kind, work, dtype).reference
        named = theirs.trainable.items()
        by_name = {stock_name(name): (weight, theirs.teacher_weights[name]) for name, weight in named}
        for trained in ours.pair.trained():
            student, teacher = by_name[trained.name]
            assert torch.equal(trained.student.double(), student.double()), trained.name
            assert torch.equal(trained.teacher.double(), teacher.double()), trained.name
            assert not torch.equal(student, teacher) or not student.any(), trained.name


def test_rows_of_rollout(monkeypatch):
    """With eight states for the peers that are compared with everywhere, R1 and R4, and in the tour with four alone."""
    options = tiny_options(peers=("R1", "R2"), rounds=1)
    assert cells(replace(options, quick=False), rollout.MORE, rollout.MORE) == [STANDARD, Cell(states=8)]
    assert cells(replace(options, tour=True, quick=False), rollout.MORE, rollout.MORE) == [STANDARD]
    monkeypatch.setattr(rollout, "cells", lambda options, wide, narrow: [STANDARD, *narrow])  # without further warm-ups
    rows = found("rollout", rollout.measure(options))
    for kind, peers in (("lora", ("R1", "R2")), ("full", ("R1", "R2")), (SAMPLING, ("diffusers",))):
        for end, states in (("", 4), ("@K8", 8)):
            compared = [name for name in peers if not end or name != "R2"]
            case = f"{kind}{end}@zimage"
            for variant in ("ours", *compared):
                value = {metric: row.value for (at, of, metric), row in rows.items() if (at, of) == (case, variant)}
                assert value["states_per_second"] == pytest.approx(states * 8 / value["seconds_per_rollout"])
                assert 0 < value["final_state_relative_error"] < EXACT
                assert kind == SAMPLING or 0 <= value["loss_relative_error"] < EXACT
            for peer in compared:
                ratio = rows[f"{kind}/{peer}{end}@zimage", "ours", "speedup"]
                assert ratio.unit == "x" and ratio.n == 1 and ratio.value > 0
            assert end == "" or (case, "R2", "seconds_per_rollout") not in rows
    assert all(row.status == "ok" and not row.note for row in rows.values())


def test_the_published_rollout_begins_with_its_encoders(monkeypatch):
    """Once for student and teacher in each rollout of R1, never for R2."""
    work, asked = Workload(tiny_options()), []
    R1, R2 = (Peer(name, "lora", work) for name in ("R1", "R2"))
    for side in ("student", "teacher"):
        encode = getattr(work.encoders, side)
        monkeypatch.setattr(work.encoders, side, lambda *given, side=side, encode=encode: asked.append(side) or encode(*given))
    (state, loss), (same_state, same_loss) = (one.rollout() for one in (R1, R2))
    assert asked == ["student", "teacher"]
    assert loss == pytest.approx(same_loss, rel=1e-5) and torch.allclose(state, same_state, atol=1e-5)


def test_a_peer_that_cannot_roll_out_leaves_rows_and_the_others_go_on(monkeypatch):
    """The exact trajectory is R2's in float64. The tour leaves R3 to the suite and says so."""

    class Broken(Peer):
        def __init__(self, name, *given):
            if name == "R2":
                unable()
            super().__init__(name, *given)

    monkeypatch.setattr(rollout, "Peer", Broken)
    options = replace(tiny_options(peers=("R1", "R2", "R3"), kinds=("full",), rounds=1), quick=False, tour=True)
    rows = found("rollout", Rollout("full", options).rows())
    ours = rows["full@zimage", "ours", "seconds_per_rollout"]
    assert (ours.status, ours.note) == ("ok", "R3 is measured by `bench/run.py rollout`")
    assert rows["full/R1@zimage", "ours", "speedup"].value > 0
    for key in (("full@zimage", "R2", "seconds_per_rollout"), ("full/R2@zimage", "ours", "speedup"),
                ("full@zimage", "exact", "final_state_relative_error")):
        assert (rows[key].status, rows[key].value, rows[key].note) == ("failed", None, "OutOfMemoryError: no room for it"), key
    assert not any("R3" in case or variant == "R3" for case, variant, _ in rows)


def test_a_pipeline_that_cannot_run_leaves_rows_and_ours_goes_on(monkeypatch):
    monkeypatch.setattr(rollout, "Pipeline", unable)
    rows = found("rollout", Rollout(SAMPLING, tiny_options(), peers=["diffusers"]).rows())
    assert rows["student@zimage", "ours", "seconds_per_rollout"].status == "ok"
    for key in (("student@zimage", "diffusers", "seconds_per_rollout"), ("student/diffusers@zimage", "ours", "speedup")):
        assert (rows[key].status, rows[key].value, rows[key].note) == ("failed", None, "OutOfMemoryError: no room for it")


def test_as_on_a_gpu_each_peer_runs_beside_ours(monkeypatch):
    """No row twice, and ours is built once; the errors in bf16 are against fp32, and some 2^-8 a rounding. A speedup is the
    peer's seconds over ours, round by round."""
    seconds, timed = {"R1": [3.0, 4.0], "R2": [6.0, 5.0], "ours": [1.5, 1.0]}, []
    monkeypatch.setattr(harness, "in_turns", lambda calls, *_: timed.append(set(calls)) or [{n: seconds[n] for n in calls}])
    monkeypatch.setattr(Model, "dtype", torch.bfloat16)
    measured = Rollout("full", tiny_options(peers=("R1", "R2")))
    measured.one_by_one = True
    rows = found("rollout", measured.rows())
    assert timed == [{"ours", "R1"}, {"ours", "R2"}]
    speedups = [rows[f"full/{peer}@zimage", "ours", "speedup"] for peer in ("R1", "R2")]
    assert [(row.value, row.n) for row in speedups] == [(3.0, 2), (4.5, 2)]
    ours, theirs = (rows["full@zimage", variant, "final_state_relative_error"] for variant in ("ours", "R2"))
    assert 1e-3 < theirs.value < 0.2 and ours.value < 2 * theirs.value
    assert theirs.note == "against fp32 without TF32" and ours.status == "fallback" and theirs.status == "ok"


# ---- forward ---------------------------------------------------------------------------------------------------------


def test_rows_of_forward(monkeypatch):
    monkeypatch.setitem(STRONGER["R4"], "compile_blocks", "eager")  # inductor's code generation takes minutes
    rows = found("forward", forward.measure(tiny_options(rounds=1)))
    for kind in ("lora", "full"):
        value = {(of, metric): row.value for (at, of, metric), row in rows.items() if at == f"{kind}@zimage"}
        for variant in ("ours", "two_calls", "diffusers", "compiled"):
            assert value[variant, "states_per_second"] * value[variant, "seconds_forward"] == pytest.approx(8)
            assert 0 < value[variant, "final_state_relative_error"] < EXACT and value[variant, "loss_relative_error"] < EXACT
            if variant != "ours":
                ratio = rows[f"{kind}/{variant}@zimage", "ours", "speedup_forward"]
                assert ratio.unit == "x" and ratio.n == 1 and ratio.value > 0
    assert all(row.status == "ok" for row in rows.values() if row.variant != "compiled")


def test_what_cannot_run_forward_leaves_rows_and_another_batch_is_measured(monkeypatch):
    monkeypatch.setitem(forward.VARIANTS, "compiled", unable)
    monkeypatch.delitem(forward.VARIANTS, "two_calls")
    monkeypatch.setattr(forward, "cells", lambda options, wide, narrow: [STANDARD, *narrow])
    rows = found("forward", forward.measure(tiny_options(kinds=("lora",), rounds=1)))
    for cell in ("", "@batch1"):
        for key in ((f"lora{cell}@zimage", "compiled", "seconds_forward"),
                    (f"lora/compiled{cell}@zimage", "ours", "speedup_forward")):
            assert (rows[key].status, rows[key].note) == ("failed", "OutOfMemoryError: no room for it"), key
        assert rows[f"lora/diffusers{cell}@zimage", "ours", "speedup_forward"].value > 0
    for variant in ("ours", "diffusers"):
        speed, seconds = (rows["lora@batch1@zimage", variant, of].value for of in ("states_per_second", "seconds_forward"))
        assert speed * seconds == pytest.approx(1)
        assert rows["lora@batch1@zimage", variant, "final_state_relative_error"].value < EXACT


def test_cells_by_the_models_width(monkeypatch):
    wide, narrow, options = [Cell(batch=4)], [Cell(batch=1)], Options("zimage-small", CPU)
    assert cells(options, wide, narrow) == [STANDARD, *narrow]
    monkeypatch.setattr(Model, "config", {"dim": 3840})
    assert cells(options, wide, narrow) == [STANDARD, *wide]
