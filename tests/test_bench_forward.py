"""Suites `rollout` and `forward`: what they say of speed and error, and of a variant that cannot run."""

from dataclasses import replace

import pytest
import torch

from bench.models import Model
from bench.references.reference_eager import STRONGER
from bench.results import Options, Row, merged
from bench.suites import forward, rollout
from bench.suites.rollout import OurPair, PeerPair
from bench.suites.workload import Workload
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


# ---- rollout ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_student_and_teacher_differ_alike_in_all_variants(kind):
    work = Workload(tiny_options())
    ours = OurPair(kind, work)
    for dtype in (None, torch.float64):
        theirs = PeerPair("R2", kind, work, dtype).reference
        named = theirs.trainable.items()
        by_name = {rollout.stock_name(name): (weight, theirs.teacher_weights[name]) for name, weight in named}
        for trained in ours.pair.trained():
            student, teacher = by_name[trained.name]
            assert torch.equal(trained.student.double(), student.double()), trained.name
            assert torch.equal(trained.teacher.double(), teacher.double()), trained.name
            assert not torch.equal(student, teacher) or not student.any(), trained.name


def test_rows_of_rollout():
    rows = found("rollout", rollout.measure(tiny_options(peers=("R1", "R2"), rounds=1)))
    for kind in ("lora", "full"):
        case = f"{kind}@zimage"
        for variant in ("ours", "R1", "R2"):
            value = {metric: row.value for (at, of, metric), row in rows.items() if (at, of) == (case, variant)}
            assert value["states_per_second"] == pytest.approx(4 * 8 / value["seconds_per_rollout"])
            assert 0 < value["final_state_relative_error"] < EXACT and 0 <= value["loss_relative_error"] < EXACT
        for peer in ("R1", "R2"):
            ratio = rows[f"{kind}/{peer}@zimage", "ours", "speedup"]
            assert ratio.unit == "x" and ratio.n == 1 and ratio.value > 0
    assert all(row.status == "ok" and not row.note for row in rows.values())


def test_the_published_rollout_begins_with_its_encoders(monkeypatch):
    """Once for student and teacher in each rollout of R1, never for R2."""
    work, asked = Workload(tiny_options()), []
    R1, R2 = (PeerPair(name, "lora", work) for name in ("R1", "R2"))
    for side in ("student", "teacher"):
        encode = getattr(work.encoders, side)
        monkeypatch.setattr(work.encoders, side, lambda *given, side=side, encode=encode: asked.append(side) or encode(*given))
    (loss, state), (same_loss, same_state) = (one.rollout(work.grid) for one in (R1, R2))
    assert asked == ["student", "teacher"]
    assert loss == pytest.approx(same_loss, rel=1e-5) and torch.allclose(state, same_state, atol=1e-5)


def test_a_peer_that_cannot_roll_out_leaves_rows_and_the_others_go_on(monkeypatch):
    def broken(name, *given):
        if name == "R2":
            raise torch.OutOfMemoryError("no room\nfor it")
        return peer(name, *given)

    peer = rollout.peer
    monkeypatch.setattr(rollout, "peer", broken)
    rows = found("rollout", rollout.measure(tiny_options(peers=("R1", "R2"), kinds=("full",))))
    assert rows["full@zimage", "ours", "seconds_per_rollout"].status == "ok"
    assert rows["full/R1@zimage", "ours", "speedup"].value > 0
    said = "OutOfMemoryError: no room for it"
    for key in (("full@zimage", "R2", "seconds_per_rollout"), ("full/R2@zimage", "ours", "speedup"),
                ("full@zimage", "exact", "final_state_relative_error")):
        assert (rows[key].status, rows[key].value, rows[key].note) == ("failed", None, said), key


def test_eight_states_too_but_not_in_the_tour():
    rows = found("rollout", rollout.measure(replace(tiny_options(peers=("R1", "R2"), kinds=("lora",), rounds=1), quick=False)))
    for variant in ("ours", "R1"):
        states, seconds = (rows["lora@K8@zimage", variant, of].value for of in ("states_per_second", "seconds_per_rollout"))
        assert states == pytest.approx(8 * 8 / seconds)
        assert rows["lora@K8@zimage", variant, "final_state_relative_error"].value < EXACT
    assert rows["lora/R1@K8@zimage", "ours", "speedup"].value > 0
    assert ("lora@K8@zimage", "R2", "seconds_per_rollout") not in rows
    options = replace(tiny_options(peers=("R3",), kinds=("lora",), rounds=1), quick=False, tour=True)
    rows = found("rollout", rollout.measure(options))
    assert {case for case, _, _ in rows} == {"lora@zimage", "student@zimage", "student/diffusers@zimage"}
    assert {variant for case, variant, _ in rows if case == "lora@zimage"} == {"ours"}
    assert rows["lora@zimage", "ours", "seconds_per_rollout"].note == "R3 is measured by `bench/run.py rollout`"


def test_as_on_a_gpu_each_peer_runs_beside_ours(monkeypatch):
    """No row twice; the errors in bf16 are against fp32, and some 2^-8 a rounding."""
    groups = []
    group = rollout.group
    monkeypatch.setattr(rollout, "group", lambda names, *more: groups.append(list(names)) or group(names, *more))
    monkeypatch.setattr(Model, "dtype", torch.bfloat16)
    rows = found("rollout", rollout.of_kind("full", tiny_options(peers=("R1", "R2")), one_by_one=True))
    assert groups == [["R1"], ["R2"]] and {"full/R1@zimage", "full/R2@zimage"} <= {case for case, _, _ in rows}
    ours, theirs = (rows["full@zimage", variant, "final_state_relative_error"] for variant in ("ours", "R2"))
    assert 1e-3 < theirs.value < 0.2 and ours.value < 2 * theirs.value
    assert theirs.note == "against fp32 without TF32" and ours.status == "fallback" and theirs.status == "ok"


# ---- forward ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def eager_backend(monkeypatch):
    """Inductor's code generation takes minutes."""
    monkeypatch.setitem(STRONGER["R4"], "compile_blocks", "eager")


def test_rows_of_forward(eager_backend):
    rows = found("forward", forward.measure(tiny_options(rounds=1)))
    for kind in ("lora", "full"):
        case = f"{kind}@zimage"
        value = {(of, metric): row.value for (at, of, metric), row in rows.items() if at == case}
        for variant in ("ours", "two_calls", "diffusers", "compiled"):
            # 8 pictures, each 8 x 8 image tokens in both branches, 20 and 80 text tokens
            assert value[variant, "tokens_per_second"] * value[variant, "seconds_forward"] == pytest.approx(
                8 * (2 * 64 + 20 + 80))
            assert 0 < value[variant, "velocity_relative_error"] < EXACT
            assert 0 < value[variant, "gradient_relative_error"] < EXACT
            for end in ("", "_backward"):
                assert value[variant, f"flops_per_second{end}"] > 0 and value[variant, f"ceiling_share{end}"] > 0
            if variant != "ours":
                ratios = (rows[f"{kind}/{variant}@zimage", "ours", f"speedup_{what}"] for what in forward.METRICS)
                assert all(row.unit == "x" and row.n == 1 and row.value > 0 for row in ratios)
    assert all(row.status == "ok" for row in rows.values() if row.variant != "compiled")


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_products_of_forward_and_backward(kind, eager_backend):
    """Backward adds dx to every product of the student, and dW where the weight trains: full, twice the student's."""
    measurement = forward.Measurement(kind, tiny_options())
    assert not list(measurement.find_exact())
    share = measurement.flops["backward"] / measurement.flops["forward"]
    assert 1.2 < share < 2.5 and set(measurement.gradients) == set(OurPair(kind, measurement.work).parameters())


def test_what_cannot_run_forward_or_backward_leaves_rows_and_the_others_go_on(monkeypatch):
    class Broken(forward.TwoCalls):
        def backward(self):
            raise RuntimeError("no way\nback")

    def unable(kind, work):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setitem(forward.VARIANTS, "two_calls", Broken)
    monkeypatch.setitem(forward.VARIANTS, "compiled", unable)
    rows = found("forward", forward.measure(tiny_options(kinds=("lora",))))
    assert rows["lora/two_calls@zimage", "ours", "speedup_forward"].value > 0
    assert rows["lora/diffusers@zimage", "ours", "speedup_backward"].value > 0
    back, room = "RuntimeError: no way back", "OutOfMemoryError: no room"
    for key, said in {("lora@zimage", "two_calls", "seconds_backward"): back,
                      ("lora@zimage", "two_calls", "gradient_relative_error"): back,
                      ("lora/two_calls@zimage", "ours", "speedup_backward"): back,
                      ("lora@zimage", "compiled", "seconds_forward"): room,
                      ("lora@zimage", "compiled", "seconds_backward"): room,
                      ("lora/compiled@zimage", "ours", "speedup_forward"): room}.items():
        assert (rows[key].status, rows[key].value, rows[key].note) == ("failed", None, said), key


def test_another_batch_is_measured_too_but_not_in_the_tour(monkeypatch):
    for name in ("two_calls", "compiled"):
        monkeypatch.delitem(forward.VARIANTS, name)
    monkeypatch.setattr(forward, "OTHERS", ("diffusers",))
    options = replace(tiny_options(kinds=("full",), rounds=1), quick=False)
    rows = found("forward", forward.measure(options))
    assert {case for case, _, _ in rows} == {f"full{of}{cell}@zimage" for of in ("", "/diffusers") for cell in ("", "@batch1")}
    for variant in ("ours", "diffusers"):
        speed, seconds = (rows["full@batch1@zimage", variant, of].value for of in ("tokens_per_second", "seconds_forward"))
        assert speed * seconds == pytest.approx(2 * 64 + 20 + 80)
        assert rows["full@batch1@zimage", variant, "gradient_relative_error"].value < EXACT
    assert forward.cells(replace(options, tour=True)) == [forward.Cell()]
    wide = type("Wide", (), {"standard": forward.Model("zimage-small", CPU).standard.__class__(1024, 1, 256, 768, 64, 128.0)})
    monkeypatch.setattr(forward, "Model", lambda *given: wide)
    assert [cell.name for cell in forward.cells(options)] == ["", "@512px@batch4"]
