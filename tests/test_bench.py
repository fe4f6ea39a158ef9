"""The benchmark's clock, file, peers and runner. Nothing here asserts a speed."""

import json
import math
import subprocess
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bench import results
from bench.cases import ops, step, zero
from bench.cases.gemm_floor import GemmFloor, Recorder
from bench.peers import reference_eager as reference
from bench.results import Options, Row
from tests import tiny

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = {"suite", "case", "variant", "metric", "value", "unit", "p20", "p80", "n"}
NUMBERS = (int, float)


# ---- clock and file --------------------------------------------------------------------------------------------------


def test_every_call_is_timed_once_a_round_and_each_goes_first_in_turn():
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    seconds = results.interleaved(calls, rounds=3, warmup=1)
    assert "".join(order) == "abc" "bca" "cab" "abc"
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3, "c": 3}
    assert all(value >= 0 for values in seconds.values() for value in values)


def test_median_and_percentiles():
    assert results.summary([5.0, 1.0, 2.0, 3.0, 4.0, 0.0]) == {"value": 2.5, "p20": 1.0, "p80": 4.0, "n": 6}
    assert results.summary([7.0]) == {"value": 7.0, "p20": 7.0, "p80": 7.0, "n": 1}
    assert results.ratios([4.0, 9.0], [2.0, 3.0]) == [2.0, 3.0]


def test_results_come_back_as_they_were_written(tmp_path):
    counted = Row("cost", "full", "ours", "launches_per_step", 4e3, "")
    rows = [Row("step", "lora/R1", "ours", "speedup", 1.5, "x", 1.4, 1.6, 20), counted]
    options = Options(tmp_path, torch.device("cpu"))
    file = results.write_results(tmp_path / "out", results.environment(options), rows)
    content = json.loads(file.read_text())
    assert file.name == "results.json" and set(content) == {"environment", "rows"}
    assert all(set(row) == COLUMNS for row in content["rows"])
    facts, found = results.read_results(tmp_path / "out")
    assert found == rows
    assert {"python", "torch", "cpu", "threads", "commit", "device"} <= set(facts)


def test_a_result_that_is_no_number_or_no_result_is_refused(tmp_path):
    with pytest.raises(ValueError):
        results.write_results(tmp_path, {}, [Row("step", "lora", "ours", "speedup", math.nan, "x")])
    assert not (tmp_path / "results.json").exists()
    (tmp_path / "results.json").write_text('{"rows": [{"suite": "step"}], "environment": {}}')
    with pytest.raises(ValueError, match="results.json is no benchmark result"):
        results.read_results(tmp_path)


# ---- the runner ------------------------------------------------------------------------------------------------------


def bench(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "bench" / "run.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT / "tests")


def test_the_runner_end_to_end(tmp_path):
    """From another folder, on a pipeline that is not the standard one: its cases carry a suffix."""
    done = bench("step", "kernels", "--quick", "--threads", "1", "--peers", "R1", "R2", "--model", str(tiny.shared("zimage")),
                 "--out", str(tmp_path))  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    facts, rows = results.read_results(tmp_path)
    assert facts["quick"] is True and facts["threads"] == 1
    for row in rows:
        assert all(isinstance(value, NUMBERS) and math.isfinite(value) for value in (row.value, row.n))
        assert (row.p20 is None) == (row.p80 is None) and (row.p20 is None or row.p20 <= row.value <= row.p80)
    found = {(row.suite, row.case, row.variant, row.metric): row.value for row in rows}
    assert len(found) == len(rows)
    for kind in ("lora", "full"):
        case = f"{kind}@zimage"
        for variant in ("ours", "R1", "R2", "floor", "encoders"):
            assert found["step", case, variant, "seconds_per_step"] > 0
        for variant in ("ours", "R1", "R2"):
            # fp32 against float64 through some ten layers: far below 1e-4 where the step is the same, far above if not
            assert found["step", case, variant, "gradient_relative_error"] < 1e-4
            assert found["step", case, variant, "gradient_one_minus_cosine"] < 1e-8
        for peer in ("R1", "R2"):
            assert found["step", f"{kind}/{peer}@zimage", "ours", "speedup"] > 0
        assert 0 < found["step", case, "R1", "encoders_share"] < 1
    named = {case for suite, case, _, _ in found if suite == "kernels"}
    assert {"rmsnorm_modulate", "gated_residual_norm", "qk_norm_rope", "swiglu", "pair_linear_lora", "attention/eager"} <= named
    for (suite, case, variant, metric), value in found.items():
        if suite == "kernels" and metric.endswith("relative_error"):
            assert value < 1e-5, (case, variant, metric)


def test_the_standard_configuration_has_plain_names():
    seconds = {"ours": [1.0, 2.0], "R1": [2.0, 3.0], "R4": [1.5, 2.0], "encoders": [0.2, 0.3], "floor": [0.5, 1.0]}
    rows = step.tabulate("full{peer}", seconds, {name: (0.0, 1e-7) for name in ("ours", "R1", "R4")})
    speedups = {row.case: asdict(row) for row in rows if row.metric == "speedup"}
    assert set(speedups) == {"full/R1", "full/R4"}
    assert speedups["full/R1"] == dict(suite="step", case="full/R1", variant="ours", metric="speedup", value=1.75, unit="x",
                                       p20=pytest.approx(1.6), p80=pytest.approx(1.9), n=2)  # fmt: skip
    assert {row.case for row in rows} == {"full", "full/R1", "full/R4"}


@pytest.mark.parametrize(("arguments", "said"), [
    (["stp"], "'stp' is none of cost, cubins, kernels, optimizer, step, zero"),
    (["step", "--model", "/no/such/folder"], "error: model.path=/no/such/folder: no such folder"),
])  # fmt: skip
def test_bad_arguments_are_one_clear_line(arguments, said):
    done = bench(*arguments)
    assert done.returncode == 2 and said in done.stderr.splitlines()[-1]


def test_step_names_the_family_that_it_cannot_measure():
    done = bench("step", "--model", str(tiny.shared("flux2_klein")))
    assert done.returncode == 2 and "flux2_klein" in done.stderr.splitlines()[-1]


def test_the_rows_of_zero(monkeypatch):
    """On results that are made up: its cases, and plain's gathers beside each that they are compared with. test_gathers runs
    it."""
    asked: list[zero.Job] = []

    def launch(model, device, jobs):
        asked.extend(jobs)
        for job in jobs:
            one = job.arrangements[0]
            counts = {"gathers_per_step": 16.0 if one.plain else 1.0, "collectives_per_step": 5}
            yield [{"first_loss": 2.0, "precision": "float32", "seconds_per_step": [0.5] * job.timed, "peak_bytes": [7.0],
                    "steps": [counts] * job.counted}]  # fmt: skip

    monkeypatch.setattr(zero, "launch", launch)
    options = Options(tiny.shared("zimage"), torch.device("cpu"), rounds=2)
    rows = zero.run(options, (2, 4))
    found = {(row.case, row.variant, row.metric): row for row in rows}
    assert len(found) == len(rows) and {job.world for job in asked} == {2, 4}
    for suffix in ("@zimage", "@zimage@4_ranks"):
        for case in ("full", "full/resident", "lora"):
            assert found[case + suffix, "ours", "gathers_per_step"].value == 1
            assert found[case + suffix, "plain", "gathers_per_step"].value == 16
        assert found["full" + suffix, "ours", "seconds_per_step"].n == 2 * 3
    monkeypatch.setattr(zero, "launch", lambda *_: [[one | {"first_loss": 1 + i}] for i, (one,) in enumerate(launch(*_))])
    with pytest.raises(RuntimeError, match="first loss"):
        zero.run(options)


# ---- peers -----------------------------------------------------------------------------------------------------------


def gradients(kind: str, **options) -> dict[str, torch.Tensor]:
    from diffusers import ZImageTransformer2DModel

    model = ZImageTransformer2DModel.from_pretrained(tiny.shared("zimage") / "transformer")
    torch.manual_seed(0)
    adapter = reference.Adapter(3, 6.0) if kind == "lora" else None
    peer = reference.ReferenceStep(model, [1.0, 0.75, 0.5, 0.0], adapter=adapter, **options)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in peer.trainable.values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
    texts = [reference.Condition(torch.randn(n, 32, generator=draw)) for n in (5, 40, 70, 33)]
    result = peer.backward(torch.randn(2, 8, 6, 10, generator=draw), texts[:2], texts[2:])
    assert result.loss > 0
    return peer.gradients()


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_stronger_peers_have_the_published_gradient(kind):
    """The same mathematics in another order: 1e-5 is 170 units of fp32 roundoff. Compiled by dynamo alone: inductor's
    code generation takes minutes."""
    published = gradients(kind)
    for name in ("R3", "R4"):
        options = {**reference.STRONGER[name], "compile_blocks": "eager"}
        torch._dynamo.reset()
        for weight, gradient in gradients(kind, **options).items():
            assert (gradient - published[weight]).norm() <= 1e-5 * published[weight].norm(), (name, weight)
    assert reference.STRONGER["R1"] == reference.STRONGER["R2"] == {}


def test_conditions_have_the_standard_lengths():
    work = step.Workload(Options(tiny.shared("zimage"), torch.device("cpu"), threads=torch.get_num_threads()))
    assert [tuple(one.text.shape) for one in work.student] == [(20, 32)] * 8
    assert [tuple(one.text.shape) for one in work.teacher] == [(80, 32)] * 8
    assert work.grid == pytest.approx([0, 0.1, 0.25, 0.5, 1])


# ---- the floor -------------------------------------------------------------------------------------------------------


def test_the_floor_counts_every_product_once():
    torch.manual_seed(0)
    x = torch.randn(6, 10, requires_grad=True)
    layers = [nn.Linear(10, 4, bias=False) for _ in range(3)] + [nn.Linear(4, 7)]
    layers[3].requires_grad_(False)

    def forward():
        q, k, v = (layer(x) for layer in layers[:3])
        attended = F.scaled_dot_product_attention(*(y.view(1, 6, 2, 2).transpose(1, 2) for y in (q, k, v)))
        layers[3](attended.transpose(1, 2).reshape(6, 4))
        with torch.no_grad():
            layers[3](torch.zeros(5, 4))

    with Recorder() as recorder:
        forward()
    assert +recorder.products == Counter({
        (1, 6, 10, 12): 1, (1, 6, 12, 10): 1, (1, 12, 6, 10): 1,  # q, k, v as one: forward, dx, dW
        (2, 6, 2, 6): 3, (2, 6, 6, 2): 3,  # attention: 2 forward, 4 backward
        (1, 6, 4, 7): 1, (1, 6, 7, 4): 1,  # frozen: no dW
        (1, 5, 4, 7): 1,  # without gradient
    })  # fmt: skip
    floor = GemmFloor(forward, 3, torch.device("cpu"))
    assert floor.flops == 3 * 2 * (3 * 720 + 6 * 144 + 2 * 168 + 140)
    floor.run()


def test_every_op_is_measured():
    """A module of dopsd_kernels with a reference of its own has a case of its name."""
    files = (ROOT / "kernels" / "dopsd_kernels").glob("*.py")
    modules = {path.stem for path in files if f"def {path.stem}_ref(" in path.read_text(encoding="utf-8")}
    names = [op.name for op in ops.ops(ops.TINY, torch.device("cpu"), torch.float32)]
    cases = {name.removesuffix("_lora").removesuffix("_full") for name in names}
    # float8 has a case on GPUs that have it; the other adds to sums in place, inside the step
    assert modules - cases <= {"fp8_linear", "pair_linear_accumulate"} and cases <= modules
