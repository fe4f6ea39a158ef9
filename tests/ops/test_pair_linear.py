"""Linear layers of two branches with their adapters folded in: kernels and GEMM calls against float64."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dopsd_kernels import backend, launch, pair_linear, pair_linear_triton
from dopsd_kernels.costs import COSTS
from tests.ops.rule import DEVICE, DTYPES, assert_twice


@dataclass
class Case:
    """Shapes of one call. `ranks`: of the student's adapters, of the teacher's; () for no LoRA, 0 for a bare member."""

    name: str
    tokens: tuple[int, int | None]
    width: int
    members: tuple[int, ...]
    ranks: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    bias: bool = False
    shared: bool = True
    padding: int = 0
    scales: tuple[float, ...] = field(default=(2.0, 0.5, 1.25, 0.75))


CASES = [
    Case("qkv lora", (5, 7), 36, (36, 36, 36), ((4, 4, 4), (4, 4, 4))),
    Case("bare members, unequal ranks, bias", (123, 40), 36, (5, 29, 144), ((2, 0, 23), (0, 7, 0)), bias=True),
    Case("two weight sets with adapters", (33, 70), 144, (48, 60), ((16, 0), (3, 16)), shared=False, padding=5),
    Case("two weight sets", (33, 70), 144, (48, 60), shared=False, bias=True),
    Case("student only", (1, None), 123, (123,), ((8,), ())),
    Case("lora on the student only", (9, 4), 50, (17, 40), ((5, 5), ())),
    Case("no student rows", (0, 9), 36, (36, 20), ((4, 2), (4, 2))),
    Case("no teacher rows", (9, 0), 36, (36, 20), ((4, 2), (4, 2))),
    Case("no rows", (0, 0), 36, (36, 20), ((4, 2), (4, 2)), bias=True),
    Case("rank over one block", (40, 3), 72, (40,), ((70,), (70,))),
    Case("full width", (3, 2), 3840, (24,), ((4,), (4,))),
    Case("four members", (8, 8), 36, (8, 12, 20, 4), ((2, 2, 2, 2), (2, 2, 2, 2))),
]


def cases(*skipped: str) -> Any:
    chosen = [case for case in CASES if case.name not in skipped]
    return pytest.mark.parametrize("case", chosen, ids=[case.name for case in chosen])


def make(case: Case, dtype: torch.dtype, seed: int = 0) -> list[Any]:
    """The arguments of `pair_linear_fwd`; the same numbers, rounded, for every dtype."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(torch.float16).to(DEVICE, dtype)

    def rows(count: int | None) -> Tensor | None:
        return None if count is None else normal(count, case.width + case.padding)[:, : case.width]

    def weights() -> list[Tensor]:
        return [normal(n, case.width, scale=case.width**-0.5) for n in case.members]

    def adapters(ranks: tuple[int, ...]) -> tuple[list[Tensor], list[Tensor]]:
        a = [normal(r, case.width, scale=case.width**-0.5) if r else normal(0) for r in ranks]
        return a, [normal(n, r) if r else normal(0) for n, r in zip(case.members, ranks)]

    x_s, x_t = rows(case.tokens[0]), rows(case.tokens[1])
    w_s = weights()
    w_t = [] if x_t is None else w_s if case.shared else weights()
    bias = [normal(n) for n in case.members] if case.bias else []
    a_s, b_s = adapters(case.ranks[0])
    a_t, b_t = adapters(case.ranks[1])
    scales = list(case.scales[: len(case.members)])
    return [x_s, x_t, w_s, w_t, bias, bias if x_t is not None else [], a_s, b_s, a_t, b_t, scales, scales]


def gradients(case: Case, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    dy = torch.randn(case.tokens[0], sum(case.members) + case.padding, generator=generator, dtype=torch.float64)
    return list(dy.to(torch.float16).to(DEVICE, dtype)[:, : sum(case.members)].split(list(case.members), 1))


def eager(arguments: Sequence[Any], dy: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """(y_s, y_t) as nn.Linear and PEFT compute them in the arguments' dtype, and the student's gradients, flat as in
    `pair_linear_bwd`."""
    x_s, x_t, w_s, w_t, bias_s, bias_t, a_s, b_s, a_t, b_t, scales_s, scales_t = arguments

    def branch(x: Tensor, w: Any, bias: Any, a: Any, b: Any, scales: Any) -> Tensor:
        columns = []
        for g, weight in enumerate(w):
            y = torch.nn.functional.linear(x, weight, bias[g] if bias else None)
            if a and a[g].numel():
                y = y + scales[g] * torch.nn.functional.linear(torch.nn.functional.linear(x, a[g]), b[g])
            columns.append(y)
        return torch.cat(columns, 1)

    leaves = [[m.detach().clone().requires_grad_() for m in group] for group in ([x_s], w_s, bias_s, a_s, b_s)]
    (x,), w, bias, a, b = leaves
    y_s = branch(x, w, bias, a, b, scales_s)
    flat = [m for group in leaves for m in group]
    grads = torch.autograd.grad((y_s * torch.cat(list(dy), 1)).sum(), flat, allow_unused=True)
    outs = [y_s.detach()]
    if x_t is not None:
        outs.append(branch(x_t, w_t, bias_t, a_t, b_t, scales_t))
    return outs, [torch.zeros_like(m) if g is None else g for m, g in zip(flat, grads)]


def ours(arguments: Sequence[Any], dy: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The same by the two primitives, the backward in one call and again with q handed over: bit for bit the same."""
    x_s, x_t, w_s, _, bias_s, _, a_s, b_s, _, _, scales, _ = arguments
    y_s, y_t, xa = pair_linear.pair_linear_fwd(*arguments)
    flags = True, True, bool(bias_s), bool(a_s)
    flat = pair_linear.pair_linear_bwd(dy, x_s, w_s, a_s, b_s, scales, xa, *flags)
    q = pair_linear.pair_linear_through(dy, b_s, scales)
    for one, other in zip(flat, pair_linear.pair_linear_bwd(dy, x_s, w_s, a_s, b_s, scales, xa, *flags, q)):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    return [y_s] if x_t is None else [y_s, y_t], flat


def check(case: Case, dtype: torch.dtype) -> None:
    arguments, dy = make(case, dtype), gradients(case, dtype)
    oracle = eager(make(case, torch.float64), gradients(case, torch.float64))
    for ours_, eager_, oracle_, what in zip(ours(arguments, dy), eager(arguments, dy), oracle, ("y", "gradient")):
        if dtype == torch.float64:
            torch.testing.assert_close(ours_, oracle_)
            continue
        assert_twice(ours_, eager_, oracle_, f"{case.name} {what}")


@pytest.fixture(autouse=True)
def _auto() -> Iterator[None]:
    yield
    pair_linear.set_backend("auto")


@cases()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_triton_kernels(case: Case, dtype: torch.dtype) -> None:
    pair_linear.set_backend("triton")
    before = launch.count
    with backend.forced("triton"):
        check(case, dtype)
    assert launch.count > before or len(case.members) > pair_linear_triton.MEMBERS_MAX or case.name == "no rows"


@cases()
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_gemm_calls(case: Case, dtype: torch.dtype) -> None:
    with backend.forced("torch"):
        check(case, dtype)


def test_many_rows_add_the_adapter_to_the_matrix() -> None:
    case = Case("tall", (600, 300), 24, (16, 24), ((3, 0), (3, 5)))
    arguments = make(case, torch.float32)
    assert pair_linear._worth_adding(arguments[0], arguments[2][0], keeps_product=True)
    check(case, torch.float32)
    check(case, torch.float64)


def _differentiable(arguments: Sequence[Any]) -> tuple[list[Tensor], Any]:
    """Leaves of the student's tensors, and the public function of them."""
    x_s, x_t, w_s, w_t, bias_s, bias_t, a_s, b_s, a_t, b_t, scales_s, scales_t = arguments
    groups = [[x_s], w_s, bias_s, a_s, b_s]
    leaves = [m.detach().clone().requires_grad_() for group in groups for m in group if m.numel()]

    def function(*values: Tensor) -> Tensor:
        rest = iter(values)
        (x,), w, bias, a, b = [[next(rest) if m.numel() else m for m in group] for group in groups]
        return pair_linear.pair_linear(
            x, x_t, w, w_t, bias_s=bias, bias_t=bias_t, a_s=a, b_s=b, a_t=a_t, b_t=b_t, scales_s=scales_s, scales_t=scales_t
        )[0]

    return leaves, function


@cases("full width", "no student rows", "no rows", "bare members, unequal ranks, bias", "rank over one block")
def test_gradcheck(case: Case) -> None:
    members = tuple(n % 5 + 1 for n in case.members)
    small = replace(case, tokens=(min(case.tokens[0], 4), case.tokens[1]), width=7, members=members)
    small.ranks = tuple(tuple(min(r, 2) for r in ranks) for ranks in case.ranks)  # type: ignore[assignment]
    arguments = make(small, torch.float64)
    leaves, function = _differentiable(arguments)
    assert torch.autograd.gradcheck(function, leaves)


def test_reference_gradcheck() -> None:
    arguments = make(replace(CASES[1], tokens=(3, None), width=6, members=(3, 2, 4)), torch.float64)
    x, _, w, _, bias, _, a, b, *_, scales = arguments[:11]
    leaves = [m.requires_grad_() for m in (x, *w, *bias, a[0], b[0], a[2], b[2])]

    def function(x: Tensor, *rest: Tensor) -> Tensor:
        w, bias, (a0, b0, a2, b2) = rest[:3], rest[3:6], rest[6:]
        return pair_linear.pair_linear_ref(x, w, bias, [a0, a[1], a2], [b0, b[1], b2], scales)

    assert torch.autograd.gradcheck(function, leaves)
    with torch.no_grad():
        torch.testing.assert_close(pair_linear.pair_linear_fwd(*arguments)[0], function(*leaves))


def test_only_the_student_has_gradients() -> None:
    arguments = make(CASES[2], torch.float32)
    lists = [[m.requires_grad_() for m in group] for group in arguments[2:10]]
    y_s, y_t = pair_linear.pair_linear(
        arguments[0], arguments[1], lists[0], lists[1], a_s=lists[4], b_s=lists[5], a_t=lists[6], b_t=lists[7],
        scales_s=arguments[10], scales_t=arguments[11],
    )
    assert y_s.requires_grad and y_t is not None and not y_t.requires_grad
    y_s.sum().backward()
    assert all(m.grad is not None for m in lists[0])
    assert all(m.grad is None for group in (lists[1], lists[6], lists[7]) for m in group)


def test_the_graph_holds_parameters_themselves() -> None:
    """ZeRO-3 empties a parameter after the forward and fills it again before the backward: only an alias sees that."""
    arguments = make(CASES[0], torch.float32)
    leaves, function = _differentiable(arguments)
    expected = torch.autograd.grad(function(*leaves).square().sum(), leaves)
    y = function(*leaves)
    kept = [m.data for m in leaves[1:]]
    for m in leaves[1:]:
        m.data = torch.empty(0)
    for m, data in zip(leaves[1:], kept):
        m.data = data.clone()
        data.fill_(float("nan"))
    for one, other in zip(torch.autograd.grad(y.square().sum(), leaves), expected):
        torch.testing.assert_close(one, other)


@cases("full width", "four members")
def test_fake_equals_real(case: Case) -> None:
    arguments, dy = make(case, torch.float32), gradients(case, torch.float32)
    y_s, y_t, xa = pair_linear.pair_linear_fwd(*arguments)
    x, w, a, b, scales = arguments[0], arguments[2], arguments[6], arguments[7], arguments[10]
    rest = dy, x, w, a, b, scales, xa, True, True, True, bool(a)
    mode = FakeTensorMode()

    def faked(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [faked(v) for v in value]
        return mode.from_tensor(value) if isinstance(value, Tensor) else value

    with mode:
        fakes = [*pair_linear.pair_linear_fwd(*faked(arguments)), *pair_linear.pair_linear_bwd(*faked(rest))]
        fakes.append(pair_linear.pair_linear_through(*faked((dy, b, scales))))
    real = [y_s, y_t, xa, *pair_linear.pair_linear_bwd(*rest), pair_linear.pair_linear_through(dy, b, scales)]
    assert len(fakes) == len(real)
    for one, other in zip(fakes, real):
        assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())


def test_opcheck() -> None:
    arguments, dy = make(CASES[1], torch.float32), gradients(CASES[1], torch.float32)
    arguments[0].requires_grad_()
    arguments[2][0].requires_grad_()
    torch.library.opcheck(torch.ops.dopsd.pair_linear_fwd.default, tuple(arguments))
    x, w, a, b, scales = arguments[0].detach(), arguments[3], arguments[6], arguments[7], arguments[10]
    xa = torch.randn(x.shape[0], sum(pair_linear.ranks(a)))
    backward = dy, x, [m.detach() for m in w], a, b, scales, xa, True, True, True, True
    torch.library.opcheck(torch.ops.dopsd.pair_linear_bwd.default, backward)
    torch.library.opcheck(torch.ops.dopsd.pair_linear_through.default, (dy, b, scales))


def test_flux2_parallel_block() -> None:
    """One fused projection to [qkv | gate | up], and one of [attention | mlp], which lie in one buffer."""
    width, inner, tokens = 24, 40, 9
    torch.manual_seed(0)
    into, out = torch.nn.Linear(width, 3 * width + 2 * inner), torch.nn.Linear(width + inner, width, bias=False)
    x = torch.randn(tokens, width)
    with torch.no_grad():
        fused, _, _ = pair_linear.pair_linear_fwd(x, None, [into.weight], [], [into.bias], [], [], [], [], [], [], [])
        torch.testing.assert_close(fused, into(x))
        parts = list(into.weight.split([width] * 3 + [inner] * 2)), list(into.bias.split([width] * 3 + [inner] * 2))
        members, _, _ = pair_linear.pair_linear_fwd(x, None, parts[0], [], parts[1], [], [], [], [], [], [], [])
        torch.testing.assert_close(members, into(x))
        buffer = torch.empty(tokens, width + inner)
        attention, mlp = buffer[:, :width], buffer[:, width:]
        attention.copy_(fused[:, :width])
        mlp.copy_(torch.nn.functional.silu(fused[:, 3 * width : 3 * width + inner]) * fused[:, 3 * width + inner :])
        y, _, _ = pair_linear.pair_linear_fwd(buffer, None, [out.weight], [], [], [], [], [], [], [], [], [])
        torch.testing.assert_close(y, out(torch.cat([attention, mlp], 1)))


def _broken() -> list[tuple[str, str, Any]]:
    def change(place: int, value: Any) -> Any:
        def apply(arguments: list[Any]) -> None:
            old = arguments[place]
            arguments[place] = [value(old[0]), *old[1:]] if isinstance(old, list) else value(old)

        return apply

    return [
        ("x has stride", "student", change(0, lambda x: x.t().contiguous().t())),
        ("weight 0 has strides", "student", change(2, lambda w: w.t().contiguous().t())),
        ("weight 0 is .* torch.float64", "student", change(2, lambda w: w.double())),
        ("weight 0 is .* meta", "student", change(2, lambda w: w.to("meta"))),
        ("x is .* torch.int64", "student", change(0, lambda x: x.long())),
        ("A 0 is", "student", change(6, lambda a: a[:, 1:].contiguous())),
        ("B 0 is", "student", change(7, lambda b: b[1:].contiguous())),
        ("B 0 is", "teacher", change(9, lambda b: b.double())),
        ("biases", "student", lambda arguments: arguments[4].append(arguments[4][0])),
        ("no weight", "teacher", lambda arguments: arguments.__setitem__(3, [])),
        ("differ", "", lambda arguments: arguments.__setitem__(3, [m[:2].contiguous() for m in arguments[3]])),
    ]


@pytest.mark.parametrize("message,branch,spoil", _broken())
def test_refuses(message: str, branch: str, spoil: Any) -> None:
    arguments = make(replace(CASES[0], bias=message == "biases"), torch.float32)
    if message == "differ":
        arguments[8:10] = [[], []]
    arguments = [list(value) if isinstance(value, list) else value for value in arguments]
    spoil(arguments)
    with pytest.raises(ValueError, match=f"pair_linear.*{branch}.*{message}") as caught:
        pair_linear.pair_linear_fwd(*arguments)
    assert "\n" not in str(caught.value)


def test_refuses_wrong_gradients() -> None:
    arguments, dy = make(CASES[0], torch.float32), gradients(CASES[0], torch.float32)
    rest = arguments[0], arguments[2], [], [], [], torch.empty(0), True, False, False, False
    for bad in (dy[0].t().contiguous().t(), dy[0].double(), dy[0][1:]):
        with pytest.raises(ValueError, match="dy 0"):
            pair_linear.pair_linear_bwd([bad, *dy[1:]], *rest)
    with pytest.raises(ValueError, match="fastest"):
        pair_linear.set_backend("fastest")


@cases("four members", "full width")
def test_declared_launches_are_the_counted(case: Case) -> None:
    dtype = torch.float32
    arguments, dy = make(case, dtype), gradients(case, dtype)
    pair_linear.set_backend("triton")
    with backend.forced("triton"):
        before = launch.count
        out = pair_linear.pair_linear_fwd(*arguments)
        cost = COSTS["dopsd::pair_linear_fwd"](*arguments, out=out)
        assert launch.count - before == cost.launches == cost.gemms
        x, w, a, b, scales = arguments[0], arguments[2], arguments[6], arguments[7], arguments[10]
        q = pair_linear.pair_linear_through(dy, b, scales) if a else None
        for given in (None, q):
            rest = dy, x, w, a, b, scales, out[2], True, False, False, bool(a), given
            before = launch.count
            flat = pair_linear.pair_linear_bwd(*rest)
            assert launch.count - before == COSTS["dopsd::pair_linear_bwd"](*rest, out=flat).launches


def test_declared_flops() -> None:
    case = Case("flops", (6, 10), 8, (4, 12), ((2, 0), (2, 3)))
    arguments, dy = make(case, torch.float32), gradients(case, torch.float32)
    out = pair_linear.pair_linear_fwd(*arguments)
    forward = 2 * 16 * 8 * 16 + 2 * 6 * 2 * (8 + 4) + 2 * 10 * (2 * (8 + 4) + 3 * (8 + 12))
    assert COSTS["dopsd::pair_linear_fwd"](*arguments, out=out).flops == forward
    rest = dy, arguments[0], arguments[2], arguments[6], arguments[7], arguments[10], out[2], True, True, False, True
    backward = 2 * (2 * 6 * 8 * 16) + 2 * (2 * 6 * 2 * (8 + 4))
    assert COSTS["dopsd::pair_linear_bwd"](*rest, out=[]).flops == backward
