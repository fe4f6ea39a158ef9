"""Suites `kernels` and `optimizer`: what they count, what their rows are called, and what a variant that fails leaves."""

from collections.abc import Iterable

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from bench import harness
from bench.machine import Ceilings
from bench.models import Model
from bench.results import Options, Row, merged
from bench.suites import ops, optimizer, roofline
from dopsd_kernels import native_ops
from dopsd_kernels.divergence_step import divergence_step
from dopsd_kernels.layernorm_modulate import layernorm_modulate
from dopsd_kernels.sequences import Sequences
from tests import tiny

CPU, META = torch.device("cpu"), torch.device("meta")
QUICK = Options("nano", CPU, quick=True, threads=1)
LIMITS = Ceilings(bytes_per_second=1e9, flops_per_second=1e10)
SIZE = ops.Size(sequences=2, length=32, teacher_length=64, heads=4, head_dim=8, hidden=48, rank=4, latents=(2, 3, 4, 4))


def keys(rows: Iterable[Row]) -> dict[tuple[str, str, str], Row]:
    rows = merged(rows)
    found = {(row.case, row.variant, row.metric): row for row in rows}
    assert len(found) == len(rows)
    return found


def build(name: str, device: torch.device = CPU, dtype: torch.dtype = torch.float32, size: ops.Size = SIZE) -> ops.Op:
    return ops.OPS[name](ops.Draw(size, device, dtype))


@pytest.fixture(autouse=True)
def no_garbage(monkeypatch):
    """To search a whole test process for garbage before each variant takes longer than all that is measured here."""
    monkeypatch.setattr(harness, "free", lambda device: None)


# ---- work ------------------------------------------------------------------------------------------------------------


def test_work_of_a_memory_bound_op():
    """swiglu: gu [T, 2F] read, s [T, F] written; back ds and gu read, dgu written; silu and product, 1 an element each."""
    found = roofline.work(build("swiglu", META))
    elements = 64 * 48
    assert {phase: work.bytes for phase, work in found.items()} == {"forward": 4 * 3 * elements, "backward": 4 * 5 * elements}
    assert found["forward"].flops == 2 * elements


def test_work_of_products():
    full, lora = (roofline.work(build(f"pair_linear_{kind}", META)) for kind in ("full", "lora"))
    rows, teacher_rows, d, r = 64, 128, 32, 4
    assert full["forward"].flops == 2 * (rows + teacher_rows) * 3 * d * d
    assert full["forward"].bytes == 4 * ((rows + teacher_rows) * (d + 3 * d) + 2 * 3 * d * d)
    assert full["backward"].flops == 2 * full["forward"].flops * rows // (rows + teacher_rows)
    assert lora["forward"].flops == full["forward"].flops + 2 * (rows + teacher_rows) * 3 * r * 2 * d
    attention = roofline.work(build("attention", META))
    assert attention["forward"].flops == 2 * 2 * 2 * 4 * 8 * 32**2
    assert attention["backward"].flops * 2 == attention["forward"].flops * 5
    sums = roofline.work(build("pair_linear_accumulate_full", META))
    assert set(sums) == {"forward"} and sums["forward"].flops == 2 * rows * 3 * d * d
    assert sums["forward"].bytes == 4 * (rows * d + rows * 3 * d + 2 * 3 * d * d)  # the sums are read and written


def test_the_floor_is_the_larger_bound():
    assert roofline.Work(bytes=2_000_000_000, flops=1).floor(LIMITS) == 2
    assert roofline.Work(bytes=1, flops=30_000_000_000).floor(LIMITS) == 3


@pytest.mark.parametrize("name", ["zimage-small", "tiny"])
def test_sizes_are_those_of_the_model(name):
    model = Model(str(tiny.shared("zimage")) if name == "tiny" else name, CPU)
    transformer = model.family.meta_transformer()
    size, config, standard = ops.Size.of(model), dict(transformer.config), model.standard
    assert (size.width, size.heads) == (config["dim"], config["n_heads"])
    assert size.hidden == transformer.layers[0].feed_forward.w1.out_features
    assert (size.sequences, size.rank, size.latents[0]) == (standard.batch, standard.rank, standard.batch)
    picture = (size.latents[2] // 2) * (size.latents[3] // 2)
    assert size.length == -(-picture // 32) * 32 + 32 and size.teacher_length == size.length + 64  # 20 and 80 tokens of text


# ---- rows ------------------------------------------------------------------------------------------------------------


def test_the_rows_of_an_op():
    op = build("layernorm_modulate")
    found = keys(roofline.measure(op, roofline.work(build("layernorm_modulate", META)), LIMITS, QUICK, "@tiny"))
    case = "layernorm_modulate@tiny"
    for variant in ("ours", "eager", "compiled"):
        status = "fallback" if variant == "compiled" else "ok"  # quick: traced only
        for phase in ("forward", "backward"):
            seconds, share = (found[case, variant, f"{metric}_{phase}"] for metric in ("seconds", "ceiling_share"))
            work = found[case, "ours", f"bytes_{phase}"].value, found[case, "ours", f"flops_{phase}"].value
            assert seconds.status == status and seconds.value > 0 and seconds.n == 2
            assert found[case, variant, f"bytes_per_second_{phase}"].p80 == pytest.approx(work[0] / seconds.p20, rel=0.5)
            floor = max(work[0] / 1e9, work[1] / 1e10)
            assert share.p20 <= floor / seconds.value * 1.5 and share.p80 >= floor / seconds.value / 1.5
        for what in ("result", "gradient"):
            assert 0 < found[case, variant, f"{what}_relative_error"].value < 1e-6
    for peer in ("eager", "compiled"):
        assert found[f"layernorm_modulate/{peer}@tiny", "ours", "speedup_backward"].value > 0
    assert found["layernorm_modulate/compiled@tiny", "ours", "speedup_forward"].status == "fallback"


def test_an_op_that_adds_in_place_is_measured_on_copies():
    """Its errors belong to one call, whatever was measured before."""
    op = build("pair_linear_accumulate_lora")
    work = roofline.work(build("pair_linear_accumulate_lora", META))
    for _ in range(2):
        found = keys(roofline.measure(op, work, LIMITS, QUICK, compiles=False))
        for variant in ("ours", "eager"):
            assert found[op.name, variant, "result_relative_error"].value < 1e-6
    assert not any(metric.endswith("backward") or variant == "compiled" for _, variant, metric in found)


def test_a_wrong_op_shows_in_its_error():
    op = build("swiglu")
    wrong = ops.Op(op.name, lambda gu: op.eager(gu) * 1.01, op.eager, op.tensors)
    found = keys(roofline.measure(wrong, roofline.work(build("swiglu", META)), LIMITS, QUICK, compiles=False))
    assert found["swiglu", "ours", "result_relative_error"].value == pytest.approx(0.01, rel=1e-3)
    assert found["swiglu", "ours", "gradient_relative_error"].value == pytest.approx(0.01, rel=1e-3)


def test_a_variant_that_raises_is_a_failed_row(monkeypatch):
    def broken(*_, **__):
        raise RuntimeError("no\ncompiler")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: broken)
    found = keys(roofline.measure(build("swiglu"), roofline.work(build("swiglu", META)), LIMITS, QUICK))
    row = found["swiglu", "compiled", "seconds_forward"]
    assert (row.status, row.value, row.note) == ("failed", None, "RuntimeError: no compiler")
    assert found["swiglu", "eager", "seconds_backward"].status == "ok"
    assert found["swiglu/compiled", "ours", "speedup_forward"].status == "failed"


def test_an_op_without_its_native_kernel_is_a_fallback(monkeypatch):
    ours, eager = (roofline.Variant(op, function, CPU) for op in [build("swiglu")] for function in (op.ours, op.eager))
    assert ours.fell_back() == ""
    monkeypatch.setattr(native_ops, "_native", None)
    assert "not built" in ours.fell_back() and eager.fell_back() == ""
    product = build("fp8_linear")
    assert "needs a GPU" in roofline.Variant(product, product.ours, CPU).fell_back()


def test_the_suite_goes_on_after_an_op_that_cannot_be_built(monkeypatch):
    """An fp8 matrix whose sides are no multiples of 16."""
    monkeypatch.setattr(ops, "OPS", {name: ops.OPS[name] for name in ("fp8_linear", "swiglu")})
    monkeypatch.setattr(ops, "TINY", ops.Size(2, 5, 7, 2, 12, 16, 3, (2, 4, 6, 6)))
    found = keys(ops.measure(QUICK))
    assert found["fp8_linear", "ours", "seconds_forward"].status == "failed"
    assert found["swiglu", "ours", "seconds_forward"].status == "ok"
    assert found["copy", "copy", "bytes_per_second"].value > 0 < found["gemm", "gemm", "flops_per_second"].value


def test_the_tour_compiles_what_moves_memory(monkeypatch):
    compiled: dict[str, bool] = {}
    monkeypatch.setattr(roofline, "measure", lambda op, *_, compiles: compiled.update({op.name: compiles}) or [])
    list(ops.measure(Options("nano", CPU, quick=True, threads=1, tour=True)))
    assert {name for name, done in compiled.items() if not done} == ops.PRODUCTS and len(compiled) == len(ops.OPS)


# ---- the optimizer ---------------------------------------------------------------------------------------------------


def test_the_rows_of_the_optimizer():
    found = keys(optimizer.measure(QUICK))
    case = "bfloat16_gradients"
    elements = optimizer.TENSORS << 16
    tables = found[case, "ours", "bytes_per_step"].value - elements * 38  # 36 and the gradient
    assert 0 <= tables < 0.01 * elements * 38
    for variant in ("ours", "torch"):
        assert found[case, variant, "ceiling_share"].value > 0 < found[case, variant, "seconds_per_step"].value
        assert found[case, variant, "ema_relative_error"].value < 1e-5
        assert found[case, variant, "master_relative_error"].value < 1e-5
    assert {f"{case}@low_bits", "float32_gradients"} <= {name for name, _, _ in found}
    assert {name for name, _, _ in keys(optimizer.measure(Options("nano", CPU, quick=True, tour=True)))} == {
        case, f"{case}/torch"}


def test_an_optimizer_that_raises_is_a_failed_row(monkeypatch):
    def broken(*_):
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setitem(optimizer.VARIANTS, "ours", broken)
    monkeypatch.setattr(optimizer, "CASES", optimizer.CASES[:1])
    found = keys(optimizer.measure(QUICK))
    assert found["bfloat16_gradients", "ours", "seconds_per_step"].status == "failed"
    assert found["bfloat16_gradients", "torch", "seconds_per_step"].value > 0


# ---- ops without a custom op's dispatch ------------------------------------------------------------------------------


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket._qualified_op_name)
        return function(*args, **(kwargs or {}))


def test_whoever_watches_sees_the_custom_ops():
    """The public functions go past the dispatcher on plain tensors, not where a mode, the meta device or dynamo looks."""
    sequences = Sequences([3, 2])
    x, scale = torch.randn(5, 8, requires_grad=True), torch.randn(2, 8)
    plain = layernorm_modulate(x, scale, None, sequences)
    with Seen() as seen:
        y = layernorm_modulate(x, scale, None, sequences)
        y.sum().backward()
    assert torch.equal(y, plain)
    assert {"dopsd::layernorm_modulate_fwd", "dopsd::layernorm_modulate_bwd"} <= set(seen.names)
    graphs = []

    def look(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(lambda x: layernorm_modulate(x, scale, None, sequences), backend=look, fullgraph=True)
    assert torch.equal(compiled(x.detach()), plain)
    assert any("layernorm_modulate_fwd" in target for target in graphs[0])


def test_no_second_derivative_is_made_up():
    """A kernel's backward has none: an error, not a zero."""
    x = torch.randn(5, 8, requires_grad=True)
    y = layernorm_modulate(x, None, None, Sequences([5]))
    (gradient,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        gradient.sum().backward()


def test_loss_takes_part_in_a_larger_graph():
    layer = nn.Linear(4, 4)
    v_t, x = torch.randn(3, 4), torch.randn(3, 4)
    result = divergence_step(layer(x), v_t, x, 0.5, 0.1, 0.2)
    (2 * result.loss).backward()
    exact = torch.autograd.grad(((layer(x) - v_t).square().mean()), layer.weight)[0]
    torch.testing.assert_close(layer.weight.grad, exact)
    assert not result.x_next.requires_grad and not result.mean_square.requires_grad
