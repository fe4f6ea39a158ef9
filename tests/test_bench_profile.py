"""The breakdown of a profiled step: which part a kernel is, whose time it is, and that nothing is lost."""

import gzip
import json
import re
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from bench import breakdown
from bench.breakdown import KERNELS, OPERATORS, OPTIMIZER, PARTS, STEP, part_of
from bench.results import Options
from tests import tiny

ROOT = Path(__file__).resolve().parent.parent


# ---- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "part"), [
    ("nvjet_tst_256x128_64x4_1x2_h_bz_coopA_TNT", "gemm"),
    ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "gemm"),
    ("ampere_bf16_s16816gemm_bf16_128x128_ldg8_f2f_stages_32x5_nn", "gemm"),
    ("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_256x128_32x3_nn_align8>(...)", "gemm"),
    ("void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>(...)", "gemm"),
    ("void flash_fwd_kernel<Flash_fwd_kernel_traits<128, 128, 64, 4>>(Flash_fwd_params)", "attention"),
    ("void cutlass::device_kernel<flash::enable_sm90<flash::FlashAttnFwdSm90<...>>>", "attention"),
    ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_7_64x128x128", "attention"),
    ("fmha_cutlassB_bf16_aligned_64x64_k128_sm80(PyTorchMemEffAttention::AttentionBackwardKernel)", "attention"),
    ("ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "communication"),
    ("void at::native::vectorized_elementwise_kernel<4, at::native::BinaryFunctor<...>>", "elementwise"),
    ("void at::native::reduce_kernel<512, 1, at::native::ReduceOp<...MeanOps...>>", "elementwise"),
    ("void at::native::(anonymous namespace)::CatArrayBatchedCopy<...>", "elementwise"),
    ("Memcpy DtoD (Device -> Device)", "elementwise"),
    ("Memset (Device)", "elementwise"),
    ("Memcpy HtoD (Pinned -> Device)", "other"),
    ("triton_poi_fused_mul_silu_3", "elementwise"),
    ("void at::native::multi_tensor_apply_kernel<..., FusedAdamMathFunctor<float, 4, ...>>", "optimizer"),
    ("void somebody::unheard_of<int>(float*)", "other"),
])
def test_kernels(name, part):
    assert part_of(name, KERNELS) == part


def test_our_own_kernels_are_known():
    """Every Triton kernel of dopsd_kernels, by the name that a trace shows."""
    files = (ROOT / "kernels" / "dopsd_kernels").glob("*.py")
    declared = re.compile(r"^@triton\.jit.*\ndef (\w*_kernel)\(", re.MULTILINE)
    names = {name for file in files for name in declared.findall(file.read_text("utf-8"))}
    parts = {name: part_of(name, KERNELS) for name in names}
    assert len(names) >= 15 and "other" not in parts.values(), parts
    assert {name for name, part in parts.items() if part == "gemm"} == {
        "project_kernel", "through_kernel", "input_gradient_kernel", "adapter_gradients_kernel",
    }
    assert parts["adamw_ema_kernel"] == "optimizer" and parts["_swiglu_bwd_kernel"] == "elementwise"


@pytest.mark.parametrize(("name", "part"), [
    ("aten::mm", "gemm"), ("aten::addmm_", "gemm"), ("aten::linear", "gemm"), ("aten::_scaled_mm", "gemm"),
    ("aten::convolution_backward", "gemm"), ("dopsd::pair_linear_fwd", "gemm"), ("aten::mul", "elementwise"),
    ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "attention"), ("dopsd::attention_fwd", "attention"),
    ("dopsd::swiglu_bwd", "elementwise"), ("dopsd::fp8_quantise_rows", "elementwise"), ("aten::copy_", "elementwise"),
    ("dopsd::adamw_ema", "optimizer"), ("Optimizer.step#AdamW.step", "optimizer"), ("c10d::allreduce_", "communication"),
    ("gloo:all_reduce", "communication"), ("aten::view", ""), ("aten::empty", ""), ("MulBackward0", ""),
    ("autograd::engine::evaluate_function: MmBackward0", ""), ("BlockFunction", ""), ("elsewhere::op", "other"),
])
def test_operators(name, part):
    assert part_of(name, OPERATORS) == part


# ---- intervals -------------------------------------------------------------------------------------------------------


def whole(**parts: float) -> dict[str, float]:
    return dict.fromkeys(PARTS, 0.0) | parts


def test_overlapping_streams_are_counted_once():
    """
    0        10   20   30   40   50   60   70   80       100   120
             [ gemm       ]                    [ attention      ]
                       [ elementwise ]
                  [ communication         ]
    """
    spans = [(10, 40, "gemm"), (30, 60, "elementwise"), (20, 70, "communication"), (80, 120, "attention")]
    expected = whole(gemm=30, elementwise=20, communication=10, attention=20, idle=20)
    assert breakdown.occupied(spans, 0, 100) == expected
    assert breakdown.occupied(reversed(spans), 0, 100) == expected
    assert breakdown.occupied([(0, 5, "gemm"), (0, 5, "gemm"), (5, 9, "gemm")], 2, 8) == whole(gemm=6)
    assert breakdown.occupied([(0, 5, "gemm")], 5, 8) == whole(idle=3)


# ---- traces ----------------------------------------------------------------------------------------------------------


def event(cat: str, name: str, ts: float, dur: float, tid: int = 1, **args) -> dict:
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "pid": 0, "tid": tid, "args": args}


def test_a_gpu_trace_of_two_steps():
    """Two streams; a kernel that runs after its optimizer range has ended on the CPU is still the optimizer's."""
    events = [
        {"ph": "M", "name": "process_name"},
        event("user_annotation", STEP, 1000, 100), event("user_annotation", STEP, 2000, 60),
        event("cuda_runtime", "cudaLaunchKernel", 990, 4, correlation=1),  # before the step
        event("kernel", "gemm", 991, 8, tid=7, correlation=1),
        event("cuda_runtime", "cudaLaunchKernel", 1001, 5, correlation=2),
        event("kernel", "sm90_xmma_gemm", 1010, 30, tid=7, correlation=2),
        event("cuda_runtime", "cudaLaunchKernelExC", 1006, 5, correlation=3),
        event("kernel", "ncclDevKernel_AllGather", 1030, 20, tid=8, correlation=3),
        event("user_annotation", OPTIMIZER, 1011, 9),
        event("cuda_driver", "cuLaunchKernelEx", 1012, 3, correlation=4),
        event("kernel", "vectorized_elementwise_kernel", 1060, 20, tid=7, correlation=4),
        event("cuda_runtime", "cudaLaunchKernel", 1016, 1, correlation=5),
        event("kernel", "ncclDevKernel_AllReduce", 1085, 5, tid=7, correlation=5),
        event("cuda_runtime", "cudaDeviceSynchronize", 1021, 75),
        event("cpu_op", "aten::mm", 1000, 10),
        event("cuda_runtime", "cudaMemcpyAsync", 2001, 2, correlation=6),
        event("gpu_memcpy", "Memcpy DtoD (Device -> Device)", 2010, 10, tid=7, correlation=6),
    ]
    found = breakdown.break_down(events)
    parts = whole(gemm=30, communication=10 + 5, optimizer=20, elementwise=10, idle=100 - 65 + 60 - 10)
    for part, time in parts.items():
        assert found[f"seconds_{part}"] == pytest.approx(time / 2e6)
    assert found["seconds_per_step"] == pytest.approx(80e-6)
    assert found["seconds_launch"] == pytest.approx((5 + 5 + 3 + 1 + 2) / 2e6) and found["launches_per_step"] == 5 / 2
    assert sum(found[f"share_{part}"] for part in PARTS) == pytest.approx(1, abs=1e-12)


def test_a_cpu_trace():
    events = [
        event("user_annotation", STEP, 0, 100),
        event("cpu_op", "aten::linear", 10, 20), event("cpu_op", "aten::t", 11, 2), event("cpu_op", "aten::addmm", 14, 15),
        event("user_annotation", "dopsd::swiglu_fwd", 35, 5), event("cpu_op", "aten::empty", 36, 1),
        event("user_annotation", OPTIMIZER, 60, 20), event("cpu_op", "aten::mul_", 62, 4),
        event("cpu_op", "c10d::allreduce_", 70, 5),
        event("cpu_op", "aten::mul", 25, 10, tid=2),  # another thread's is not the step's time
        event("cpu_op", "aten::mul", 150, 10),
    ]
    found = breakdown.break_down(events)
    expected = whole(gemm=20, elementwise=5, optimizer=15, communication=5, idle=100 - 45)
    assert {part: found[f"seconds_{part}"] for part in PARTS} == {part: pytest.approx(t / 1e6) for part, t in expected.items()}
    assert not {"seconds_launch", "launches_per_step"} & set(found)


def test_own_time_is_the_innermost_operators():
    """What has no part is its caller's; attention keeps what it calls, but for communication; of two steps, the mean."""
    events = [
        event("user_annotation", STEP, 0, 100), event("cpu_op", "MulBackward0", 0, 99),
        event("cpu_op", "aten::mul", 10, 50), event("cpu_op", "aten::mm", 20, 10), event("cpu_op", "aten::view", 30, 10),
        event("cpu_op", "c10d::allreduce_", 32, 4),
        event("cpu_op", "dopsd::attention_fwd", 70, 20), event("cpu_op", "aten::mm", 75, 10),
        event("cpu_op", "c10d::broadcast_", 86, 2),
        event("user_annotation", STEP, 200, 50), event("cpu_op", "aten::mm", 240, 11),  # clocks are read a little apart
    ]
    assert breakdown.host_times(events) == whole(elementwise=36, gemm=10 + 10, communication=4 + 2, attention=18, idle=30 + 40)
    assert breakdown.break_down(events)["seconds_per_step"] == pytest.approx(75e-6)


def test_a_trace_without_a_step_is_refused():
    with pytest.raises(ValueError, match="no range 'bench::step'"):
        breakdown.break_down([event("cpu_op", "aten::mm", 0, 1)])


# ---- real steps ------------------------------------------------------------------------------------------------------


def test_a_real_trace_agrees_with_the_profilers_own_sums(tmp_path):
    x, w = torch.randn(256, 256, requires_grad=True), torch.randn(256, 256)
    with profile(activities=[ProfilerActivity.CPU]) as recorded, record_function(STEP):
        for _ in range(5):
            (torch.nn.functional.linear(x, w).exp() * 1e-9).sum().backward()
    recorded.export_chrome_trace(str(tmp_path / "trace.json"))
    found = breakdown.break_down(json.loads((tmp_path / "trace.json").read_text())["traceEvents"])
    own = dict.fromkeys(PARTS, 0.0)
    for average in recorded.key_averages():
        if average.key != STEP:
            own[part_of(average.key, OPERATORS) or "idle"] += average.self_cpu_time_total / 1e6
    # operators without a part count as their callers' there, as idle here: views, allocations
    assert own["gemm"] > 0 and own["elementwise"] > 0
    for part in ("gemm", "elementwise"):
        assert own[part] - 1e-6 <= found[f"seconds_{part}"] <= own[part] + own["idle"] + 1e-6


def test_a_profiled_step(tmp_path):
    """Ours and the published step on a tiny pipeline: the rows and the traces that they come from."""
    options = Options(str(tiny.shared("zimage")), torch.device("cpu"), quick=True, threads=1, kinds=("lora",))
    rows = {(row.case, row.variant, row.metric): row for row in breakdown.profile_step(options, tmp_path)}
    assert {row.status for row in rows.values()} == {"ok"}, [row for row in rows.values() if row.status != "ok"]
    assert {row.suite for row in rows.values()} == {"profile"} and {key[:2] for key in rows} == {
        ("lora@zimage", "ours"), ("lora@zimage", "R1"),
    }
    for variant in ("ours", "R1"):
        values = {metric: row.value for (_, of, metric), row in rows.items() if of == variant}
        assert {f"{what}_{part}" for what in ("seconds", "share") for part in PARTS} < set(values)
        assert sum(values[f"share_{part}"] for part in PARTS) == pytest.approx(1, abs=1e-9)
        assert sum(values[f"seconds_{part}"] for part in PARTS) == pytest.approx(values["seconds_per_step"], rel=1e-9)
        for part in ("gemm", "attention", "elementwise", "optimizer", "idle"):
            assert values[f"seconds_{part}"] > 0, (variant, part)
        assert values["share_other"] < 0.05, "operators that no rule knows"
        with gzip.open(tmp_path / "profile" / f"lora-{variant}.json.gz", "rt") as text:
            again = breakdown.break_down(json.load(text)["traceEvents"])
        assert again["seconds_per_step"] == values["seconds_per_step"] and values["profiler_overhead"] > 0


def test_a_variant_that_fails_says_so_and_the_others_go_on(tmp_path, monkeypatch):
    from bench.suites import workload

    def broken(*_):
        raise RuntimeError("no room\nfor it")

    monkeypatch.setattr(workload, "PeerStep", broken)
    options = Options(str(tiny.shared("zimage")), torch.device("cpu"), quick=True, threads=1, kinds=("full",))
    rows = list(breakdown.profile_step(options, tmp_path))
    lost = [row for row in rows if row.status == "failed"]
    assert [(row.variant, row.note) for row in lost] == [("R1", "RuntimeError: no room for it")]
    assert any(row.variant == "ours" and row.metric == "share_gemm" for row in rows)
