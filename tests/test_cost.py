"""The meta trace: its rules on programs small enough to count by hand, and the full-size figures it stands for."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bench.suites import cost
from bench.suites.meta_trace import FOREACH_TENSORS, Trace, moved
from dopsd_kernels.costs import COSTS, Cost

BF16 = torch.bfloat16


def empty(*shape, dtype=torch.float32, **options):
    return torch.empty(*shape, dtype=dtype, device="meta", **options)


def traced(function) -> Trace:
    trace = Trace()
    with trace:
        function()
    return trace


def test_elementwise_rules():
    x = empty(8, 4)
    size = 8 * 4 * 4
    cases = [
        (lambda: x.view(4, 8).t()[1:], Cost()),
        (lambda: torch.empty_like(x), Cost()),
        (lambda: x + 1, Cost(1, 0, 2 * size)),
        (lambda: x * x, Cost(1, 0, 2 * size)),
        (lambda: x + empty(4), Cost(1, 0, 2 * size + 16)),
        (lambda: x + empty(1, 1).expand(8, 4), Cost(1, 0, 2 * size + 4)),
        (lambda: x.to(BF16), Cost(1, 0, size + size // 2)),
        (lambda: x.add_(1), Cost(1, 0, 2 * size)),
        (lambda: x.zero_(), Cost(1, 0, size)),
        (lambda: x.copy_(empty(8, 4)), Cost(1, 0, 2 * size)),
        (lambda: x.copy_(torch.zeros(8, 4)), Cost()),
        (lambda: torch.zeros(8, 4) + 1, Cost()),
        (lambda: torch.zeros(0, 4, device="meta") + 1, Cost()),
        (lambda: torch.cat([x, x]), Cost(1, 0, 3 * size)),
        (lambda: x.sum(), Cost(1, 0, size + 4)),
        (lambda: F.embedding(empty(3, dtype=torch.int64), empty(1000, 4)), Cost(1, 0, 2 * 48 + 24)),
    ]
    for function, expected in cases:
        assert traced(function).cost() == expected


def test_gemms_and_attention():
    assert traced(lambda: empty(5, 7) @ empty(7, 3)).cost() == Cost(1, 1, 0, 2 * 5 * 7 * 3)
    assert traced(lambda: F.linear(empty(5, 7), empty(3, 7), empty(3))).cost() == Cost(1, 1, 0, 2 * 5 * 7 * 3)
    q, k = empty(2, 3, 16, 8, requires_grad=True), empty(2, 3, 32, 8)
    trace = traced(lambda: F.scaled_dot_product_attention(q, k, k).backward(empty(2, 3, 16, 8)))
    product = 2 * 2 * 3 * 16 * 32 * 8
    assert trace.cost(op="attention") == Cost(4, 0, 0, 7 * product)


def test_foreach_is_as_many_kernels_as_its_tables_need():
    tensors = [empty(4) for _ in range(2 * FOREACH_TENSORS[0] + 1)]
    assert traced(lambda: torch._foreach_mul_(tensors, 2.0)).cost() == Cost(3, 0, 2 * 16 * len(tensors))
    large = [empty(65536 * 320), empty(4)]
    assert traced(lambda: torch._foreach_mul_(large, 2.0)).cost().launches == 2


def test_our_ops_cost_what_they_declare():
    from dopsd_kernels.swiglu import swiglu_fwd

    gu = empty(6, 8, dtype=BF16)
    assert traced(lambda: swiglu_fwd(gu)).cost() == COSTS["dopsd::swiglu_fwd"](gu, out=empty(6, 4, dtype=BF16))


def test_numbers_read_back_are_zero():
    def program():
        assert empty(2, 2).tolist() == [[0.0, 0.0], [0.0, 0.0]] and empty(()).item() == 0.0
        assert torch.ones(2).tolist() == [1.0, 1.0]

    assert traced(program).cost() == Cost()


def test_moved_counts_a_broadcast_once():
    assert moved(empty(1, 5).expand(7, 5)) == 20
    assert moved(empty(0, 5)) == 0


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


@pytest.mark.parametrize("checkpoint", [False, True])
def test_regions_and_phases(checkpoint):
    """Each module's backward belongs to it; what a checkpoint computes again is `recompute`."""
    model, trace = Two().to("meta"), Trace()
    trace.watch(model, "model")
    trace.watch(model.first, "first")
    trace.watch([model.second], "second")
    x = empty(3, 4, requires_grad=True)
    with trace:
        for _ in range(2):
            if checkpoint:
                out = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)
            else:
                out = model(x)
            (out * 2).sum().backward()
        with torch.no_grad():
            model(x)
    assert trace.cost("first", "student forward").gemms == trace.cost("second", "student forward").gemms == 2
    assert trace.cost("first", "teacher forward").gemms == 1
    assert trace.cost("first", "backward").gemms == trace.cost("second", "backward").gemms == 4
    assert trace.cost("model", "student forward", "tanh") == Cost(2, 0, 2 * 96)
    assert trace.cost("model", "backward", "tanh_backward").launches == 2
    assert trace.cost("first", "accumulate").launches == 1, "the second backward adds to the first one's gradient"
    assert trace.cost("model", "recompute", "tanh").launches == (2 if checkpoint else 0)
    assert trace.cost("", "other").launches == 6  # out * 2, the sum, the first gradient


def test_saved_bytes_are_counted_once_and_without_parameters():
    model, trace = Two().to("meta"), Trace()
    trace.watch(model, "model")
    x = empty(3, 4)
    with trace:
        out = model(x)
        (out * out).sum()
    assert trace.saved == {"model": 2 * 48, "": 48}  # x and tanh's result; out, twice the same


SMALL = cost.Size(layers=2, states=2)


@pytest.fixture(scope="module")
def ours():
    return {kind: cost.trace_ours(kind, SMALL) for kind in ("lora", "full")}


ONE_STATE = cost.Size(layers=2, states=1)


@pytest.fixture(scope="module")
def published():
    """Without checkpointing."""
    return cost.trace_reference("lora", ONE_STATE, checkpointing=False)


def test_published_block_is_what_was_measured_before(published):
    """PERFORMANCE's figures for diffusers' block with LoRA: 80 + 22 GEMMs forward, 124 + 35 backward, 1,546 and 2,768 KB a
    token, 268 KB kept. Attention is one kernel more forward and three backward."""
    forward, backward = published.cost("block", "student forward"), published.cost("block", "backward")
    assert (forward.launches, forward.gemms) == (2 * (80 + 22 + 1), 2 * 22)
    assert (backward.launches, backward.gemms) == (2 * (124 + 35 + 3), 2 * 35)
    values = {name: value for name, value, _ in cost.metrics(published, ONE_STATE)}
    assert values["elementwise_bytes_per_token_block_forward"] == pytest.approx(1546e3, rel=1e-3)
    assert values["elementwise_bytes_per_token_block_backward"] == pytest.approx(2768e3, rel=1e-3)
    assert values["saved_bytes_per_token_block"] == pytest.approx(268e3, rel=2e-3)


def test_published_step_recomputes(published):
    checked = cost.trace_reference("lora", ONE_STATE, checkpointing=True)
    assert published.cost("block", "recompute") == Cost()
    again, first = checked.cost("block", "recompute"), checked.cost("block", "student forward")
    assert again.gemms == first.gemms and again.flops == first.flops
    assert checked.cost().flops > 1.2 * published.cost().flops


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_targets_per_token(ours, kind):
    values = {name: value for name, value, _ in cost.metrics(ours[kind], SMALL)}
    for metric, limit in [*cost.TARGETS.items()][1:]:
        assert 0 < values[metric] <= limit, metric


def test_rows_have_the_promised_names(ours):
    names = {name for name, _, _ in cost.metrics(ours["lora"], SMALL)}
    assert {*cost.TARGETS, "gemm_tflop_per_step"} <= names
