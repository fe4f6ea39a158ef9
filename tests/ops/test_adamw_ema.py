"""The op dopsd::adamw_ema: Triton (interpreter or GPU), C++ and plain PyTorch against float64."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from dopsd_kernels import _native, adamw_ema_triton, backend, launch
from dopsd_kernels.adamw_ema_triton import Hyper, adamw_ema, adamw_ema_ref, backend_for, join, split
from dopsd_kernels.costs import COSTS
from tests.ops.rule import DEVICE, assert_twice

SHAPES = [(0,), (1,), (5,), (123,), (3840,), (144, 36), (4096,), (4097,)]
GRADS = [torch.float32, torch.float16, torch.bfloat16]  # bf16 in the interpreter, too: the kernel rounds with integers
BACKENDS = ["triton", "native", "torch"]


def numbers(step: int, n: int = len(SHAPES), beta1: float = 0.9, decay: float = 0.99) -> list[Hyper]:
    return [Hyper(1e-2 * (i + 1), beta1, 0.95, 1e-8, 0.1, decay, step + i) for i in range(n)]


def run(
    name: str, dtype: torch.dtype, low: bool = False, steps: int = 2, offset: int = 0, device: str = DEVICE, **options: float
) -> dict[str, list[Tensor]]:
    """The tensors after some steps; of `low`, theta and ema joined. `name` "exact": float64. `offset`: elements by which
    every tensor is out of alignment."""
    generator = torch.Generator().manual_seed(0)

    def draw(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    def place(x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(x.numel() + offset, dtype=dtype, device=device)[offset:].view(x.shape).copy_(x)

    # bf16 numbers, so that the nearest half of each is itself
    lists = {key: [place(draw(shape).bfloat16().float()) for shape in SHAPES] for key in ("theta", "ema")}
    for key in ("exp_avg", "exp_avg_sq"):
        lists[key] = [torch.zeros_like(t) for t in lists["theta"]]
    gradients = [[place(draw(shape).to(dtype), dtype) for shape in SHAPES] for _ in range(steps)]
    if name == "exact":
        lists = {key: [t.double() for t in tensors] for key, tensors in lists.items()}
        for step, grads in enumerate(gradients):
            for i, h in enumerate(numbers(step + 1, **options)):
                theta, ema, m, v = (tensors[i] for tensors in lists.values())
                adamw_ema_ref(theta, grads[i].double(), m, v, ema, h)
        return {**lists, "students": lists["theta"], "teachers": lists["ema"]}
    if low:
        for key in ("theta", "ema"):
            halves = [split(t) for t in lists[key]]
            lists[key] = [place(high, torch.bfloat16) for high, _ in halves]
            lists[f"{key}_low"] = [place(rest, torch.int16) for _, rest in halves]
    else:
        for key in ("students", "teachers"):
            lists[key] = [place(t, dtype) for t in lists["theta"]]
    with backend.forced(name):
        for step, grads in enumerate(gradients):
            adamw_ema(grads=grads, hyper=numbers(step + 1, **options), **lists)
    if low:
        for key in ("theta", "ema"):
            lists[key] = [join(high, rest) for high, rest in zip(lists[key], lists.pop(f"{key}_low"))]
    return lists


@pytest.mark.parametrize("dtype", GRADS)
@pytest.mark.parametrize("name", ["triton", "native"])
@pytest.mark.parametrize("options", [{}, {"beta1": 0.3, "decay": 0.2}], ids=["usual", "low_beta"])
def test_at_most_twice_as_wrong_as_pytorch(name: str, dtype: torch.dtype, options: dict[str, float]) -> None:
    device = "cpu" if name == "native" else DEVICE
    ours, eager, exact = (run(which, dtype, device=device, **options) for which in (name, "torch", "exact"))
    for key in ours:
        assert_twice(ours[key], eager[key], exact[key], key)


@pytest.mark.parametrize("name", BACKENDS)
def test_low_bits_give_the_masters_of_fp32(name: str) -> None:
    device = "cpu" if name == "native" else DEVICE
    whole, halves = (run(name, torch.bfloat16, low, device=device) for low in (False, True))
    for key in ("theta", "ema", "exp_avg", "exp_avg_sq"):
        for a, b in zip(whole[key], halves[key]):
            assert torch.equal(a, b), key


@pytest.mark.parametrize("name", BACKENDS)
def test_alignment_changes_nothing(name: str) -> None:
    device = "cpu" if name == "native" else DEVICE
    aligned, not_aligned = (run(name, torch.float32, offset=offset, device=device) for offset in (0, 1))
    for key in aligned:
        for a, b in zip(aligned[key], not_aligned[key]):
            if name == "torch":  # vector and scalar square root of torch differ
                torch.testing.assert_close(a, b, rtol=2**-20, atol=2**-20)
            else:
                assert torch.equal(a, b), key


def test_without_average_and_copies() -> None:
    results = []
    for name in BACKENDS:
        device = DEVICE if name == "triton" else "cpu"
        theta = [torch.linspace(-1, 1, 5000, device=device)]
        grads, m, v = [theta[0].cos()], [torch.zeros_like(theta[0])], [torch.zeros_like(theta[0])]
        with backend.forced(name):
            assert backend_for(theta, grads) == name
            adamw_ema(theta, grads, m, v, numbers(1, 1))
        results.append([t.cpu() for t in (*theta, *m, *v)])
    for other in results[:2]:
        torch.testing.assert_close(other, results[2], rtol=2**-20, atol=2**-20)


@pytest.mark.parametrize("dtype", GRADS)
@pytest.mark.parametrize("name", BACKENDS)
def test_gradients_are_scaled_as_they_are_read(name: str, dtype: torch.dtype) -> None:
    """By a power of two, which is exact before and after rounding to any dtype; another factor, of fp32 gradients, rounds the
    product once."""
    device = DEVICE if name == "triton" else "cpu"
    factors = [0.25, 1.0] + ([0.3] if dtype == torch.float32 and name != "triton" else [])  # Triton may fuse the product
    for factor in factors:
        results = []
        for folded in (True, False):
            theta, m, v = (torch.linspace(-1, 1, 5001, device=device).cos().mul(scale) for scale in (1.0, 0.5, 0.1))
            grad = torch.linspace(-2, 3, 5001, device=device).sin().to(dtype)
            grad, scale = (grad, factor) if folded else (grad * torch.tensor(factor, dtype=dtype), 1.0)
            hyper = [numbers(3, 1)[0]._replace(grad_scale=float(torch.tensor(scale)))]
            with backend.forced(name):
                adamw_ema([theta], [grad], [m], [v], hyper)
            results.append((theta, m, v))
        assert all(torch.equal(a, b) for a, b in zip(*results)), factor


@pytest.mark.parametrize("name", BACKENDS)
def test_fp32_copies_are_the_masters(name: str) -> None:
    device = DEVICE if name == "triton" else "cpu"
    theta, grad, m, v, ema = (torch.rand(5001, device=device) for _ in range(5))
    student, teacher = torch.empty_like(theta), torch.empty_like(theta)
    with backend.forced(name):
        assert backend_for([theta], [grad], [student], [teacher]) == name
        adamw_ema([theta], [grad], [m], [v], numbers(1, 1), ema=[ema], students=[student], teachers=[teacher])
    assert torch.equal(student, theta) and torch.equal(teacher, ema)


# ---- halves ------------------------------------------------------------------------------------------------------------


def test_halves_hold_every_bit() -> None:
    bits = torch.arange(-(2**31), 2**31, 9973, dtype=torch.int64).int()
    x = torch.cat([bits.view(torch.float32), torch.tensor([0.0, -0.0, float("inf"), float("-inf"), 3.4028235e38])])
    high, low = split(x)
    number = ~x.isnan()
    assert torch.equal(join(high, low)[number].view(torch.int32), x[number].view(torch.int32))
    assert bool(high[~number].isnan().all()) and bool(join(high, low)[~number].isnan().all())
    tie = (x.view(torch.int32) & 0xFFFF) == 0x8000
    assert torch.equal(high[number & ~tie], x[number & ~tie].bfloat16())


@pytest.mark.parametrize("name", BACKENDS)
def test_extreme_numbers_round_as_in_pytorch(name: str) -> None:
    """With lr = 0 and decay = 0 the outputs are the rounded inputs: ties, denormals, infinities, NaN."""
    device = DEVICE if name == "triton" else "cpu"
    bits = [0x3F808000, 0x3F818000, 0x3F808001, 0x00000001, 0x00008000, 0x7F7FFFFF, 0x7F800000, 0x7FFFFFFF, 0x7FC00000]
    x = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    x = torch.cat([x, -x]).to(device)
    student, theta, zero = torch.empty_like(x, dtype=torch.bfloat16), x.clone(), torch.zeros_like(x)
    high, low = split(x)
    hyper = [Hyper(0.0, 0.9, 0.99, 1e-8, 0.0, 0.0, 1)]
    with backend.forced(name):
        adamw_ema([theta], [zero], [zero.clone()], [zero.clone()], hyper, students=[student])
        adamw_ema([high], [zero], [zero.clone()], [zero.clone()], hyper, theta_low=[low])
    assert torch.equal(student.nan_to_num(7.0), x.bfloat16().nan_to_num(7.0))
    assert torch.equal(student.isnan(), x.isnan())
    assert torch.equal(join(high, low).nan_to_num(7.0), x.nan_to_num(7.0)) and torch.equal(high.isnan(), x.isnan())


# ---- the custom op -----------------------------------------------------------------------------------------------------


def lists_for_op(device: str = "cpu") -> list[Any]:
    def make(dtype: torch.dtype) -> list[Tensor]:
        return [torch.rand(n, device=device).to(dtype) for n in (0, 5, 5000)]

    full, half = torch.float32, torch.bfloat16
    hyper = [x for h in numbers(1, 3) for x in h]
    return [make(full), [], make(half), make(full), make(full), make(full), [], make(half), make(half), hyper]


def test_registration() -> None:
    torch.library.opcheck(torch.ops.dopsd.adamw_ema.default, lists_for_op())
    torch.ops.dopsd.adamw_ema(*lists_for_op("meta"))


def test_declared_cost() -> None:
    arguments = lists_for_op(DEVICE)
    before = launch.count
    with backend.forced("triton"):
        torch.ops.dopsd.adamw_ema(*arguments)
    cost = COSTS["dopsd::adamw_ema"](*arguments, out=None)
    assert cost.launches == launch.count - before == 1 and cost.gemms == cost.flops == 0
    tables = 3 * (80 + 36) + 8 * (0 + 1 + 2)  # addresses and numbers of a tensor; chunks
    assert cost.elementwise_bytes == 5005 * (4 * 8 + 3 * 2) + tables


def test_the_table_of_addresses_is_built_again_only_for_tensors_that_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    tables: list[tuple[Tensor, Tensor]] = []
    monkeypatch.setattr(adamw_ema_triton, "launch", lambda kernel, grid, *given, **options: tables.append(given[:2]))
    lists = {key: [torch.zeros(n, device=DEVICE) for n in (5, 5000)] for key in ("theta", "grads", "exp_avg", "exp_avg_sq")}
    with backend.forced("triton"):
        for step in (1, 2, 3):
            if step == 3:
                lists["grads"][1] = torch.zeros(5000, device=DEVICE)
            adamw_ema(hyper=numbers(step, 2), **lists)
    (first, early), (second, late), (third, _) = tables
    assert second is first and not torch.equal(late, early)  # the numbers are those of the step
    expected = [[0] * 10 for _ in range(2)]
    for column, key in ((0, "theta"), (2, "grads"), (3, "exp_avg"), (4, "exp_avg_sq")):
        for row, tensor in zip(expected, lists[key]):
            row[column], row[9] = tensor.data_ptr(), tensor.numel()
    assert third.tolist() == expected and first.tolist()[0] == expected[0] and first.tolist()[1] != expected[1]


@pytest.mark.gpu
def test_a_step_does_not_wait_for_the_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs GPU")
    lists = {key: [torch.zeros(n, device="cuda") for n in (5, 5000)] for key in ("theta", "grads", "exp_avg", "exp_avg_sq")}
    adamw_ema(hyper=numbers(1, 2), **lists)  # compiles the kernel
    torch.cuda.set_sync_debug_mode("error")
    try:
        adamw_ema(hyper=numbers(2, 2), **lists)
        lists["grads"] = [torch.zeros_like(grad) for grad in lists["grads"]]  # elsewhere
        adamw_ema(hyper=numbers(3, 2), **lists)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_no_tensors() -> None:
    adamw_ema([], [], [], [], [])


def bad(**changes: Any) -> dict[str, Any]:
    good = {key: [torch.zeros(6)] for key in ("theta", "grads", "exp_avg", "exp_avg_sq", "ema")}
    return {**good, "hyper": numbers(1, 1), **changes}


@pytest.mark.parametrize(
    "arguments, words",
    [
        (bad(grads=[]), "one entry a tensor"),
        (bad(ema=[torch.zeros(6)] * 2), "2 ema, but 1 theta"),
        (bad(theta=[torch.zeros(6, dtype=torch.float64)]), "theta is torch.float64, must be torch.float32"),
        (bad(theta_low=[torch.zeros(6, dtype=torch.int16)]), "theta is torch.float32, must be torch.bfloat16"),
        (bad(grads=[torch.zeros(6, dtype=torch.int32)]), "grads is torch.int32"),
        (bad(exp_avg=[torch.zeros(6, dtype=torch.bfloat16)]), "exp_avg is torch.bfloat16"),
        (bad(exp_avg_sq=[torch.zeros(7)]), r"exp_avg_sq\[0\] has 7 elements, theta\[0\] has 6"),
        (bad(grads=[torch.zeros(12)[::2]]), r"grads\[0\] must be contiguous"),
        (bad(grads=[torch.zeros(6, device="meta")]), r"grads\[0\] is on meta, theta\[0\] on cpu"),
        (bad(ema=[], teachers=[torch.zeros(6)]), "need ema"),
    ],
)
def test_rejects(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        adamw_ema(**arguments)


# ---- C++ ---------------------------------------------------------------------------------------------------------------


def native_arguments(n: int) -> tuple[list[Tensor], dict[str, Any]]:
    generator = torch.Generator().manual_seed(n)
    theta, grad, m, v, ema = (torch.rand(n, generator=generator) for _ in range(5))
    copies = [torch.zeros(n, dtype=torch.bfloat16) for _ in range(2)]
    options = dict(lr=1e-2, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1, decay=0.999, step=3)
    return [theta, grad, m, v, ema, *copies], options


def instruction_sets() -> list[str]:
    return ["baseline", "avx2", "avx512"][: ["baseline", "avx2", "avx512"].index(_native.isa()) + 1]


@pytest.mark.parametrize("isa", instruction_sets())
def test_native_same_bits_for_any_thread_count(isa: str) -> None:
    widest = _native.isa()
    _native.use_isa(isa)
    try:
        results = []
        for threads in (1, 2, 3, 7):
            tensors, options = native_arguments(300_007)
            _native.adamw_ema(*tensors, **options, threads=threads)
            results.append(tensors)
        pieces, options = native_arguments(300_007)  # nor does an element's place matter
        for part in zip(*(t.split(1003) for t in pieces)):
            _native.adamw_ema(*part, **options)
    finally:
        _native.use_isa(widest)
    for other in (*results[1:], pieces):
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@pytest.mark.parametrize("offset", [0, 1])
def test_native_writes_past_the_caches_what_it_writes_into_them(offset: int) -> None:
    n = 1 << 22
    streamed, options = native_arguments(n + offset)
    streamed = [t[offset:] for t in streamed]
    pieces = [t.clone() for t in streamed]
    _native.adamw_ema(*streamed, **options)
    for part in zip(*(t.split(n // 4) for t in pieces)):
        _native.adamw_ema(*part, **options)
    assert all(torch.equal(a, b) for a, b in zip(streamed, pieces))


@pytest.mark.parametrize("isa", instruction_sets())
def test_native_instruction_sets_are_equally_right(isa: str) -> None:
    widest = _native.isa()
    eager, exact = run("torch", torch.bfloat16, device="cpu"), run("exact", torch.bfloat16, device="cpu")
    _native.use_isa(isa)
    try:
        ours = run("native", torch.bfloat16, device="cpu")
    finally:
        _native.use_isa(widest)
    for key in ours:  # all tensors as one: of a few elements alone, one rounding more shows
        flat = (torch.cat([t.view(-1) for t in side[key]]) for side in (ours, eager, exact))
        assert_twice(*flat, key)


@pytest.mark.parametrize(
    "index, value, words",
    [
        (0, torch.zeros(9, dtype=torch.float64), "theta must be float32"),
        (1, torch.zeros(9, dtype=torch.float16), "grad must be float32 or bfloat16"),
        (2, torch.zeros(8), "exp_avg has 8 elements, the others have 9"),
        (3, torch.zeros(18)[::2], "exp_avg_sq must be contiguous"),
        (4, None, "teacher needs ema"),
        (5, torch.zeros(9, dtype=torch.float16), "student must be bfloat16 or float32"),
        (6, torch.zeros(9, dtype=torch.float16), "teacher must be bfloat16 or float32"),
        ("step", 0, "step must be 1 or more"),
        ("beta1", 1.0, "must lie in 0..1"),
        ("decay", float("nan"), "decay must lie in 0..1"),
        ("theta_low", torch.zeros(9, dtype=torch.int16), "theta must be bfloat16 beside theta_low"),
        ("threads", -1, "threads must not be negative"),
    ],
)
def test_native_rejects(index: Any, value: Any, words: str) -> None:
    tensors, options = native_arguments(9)
    if isinstance(index, str):
        options[index] = value
    else:
        tensors[index] = value
    before = [None if t is None else t.clone() for t in tensors]
    with pytest.raises(ValueError, match=words):
        _native.adamw_ema(*tensors, **options)
    assert all(a is None or torch.equal(a, b) for a, b in zip(before, tensors))


def test_native_releases_the_gil() -> None:
    """Another Python thread sees an update half done: the first element changed, the last one not yet."""
    for _ in range(20):
        tensors, options = native_arguments(5_000_000)
        theta, first, last = tensors[0], float(tensors[0][0]), float(tensors[0][-1])
        worker = threading.Thread(target=_native.adamw_ema, args=tensors, kwargs={**options, "threads": 1})
        worker.start()
        half_done = False
        while worker.is_alive():
            now_last, now_first = float(theta[-1]), float(theta[0])
            half_done |= now_first != first and now_last == last
        if half_done:
            return
    pytest.fail("no update was ever seen half done: adamw_ema holds the GIL")


def test_the_op_uses_it() -> None:
    assert backend_for([torch.zeros(3)], [torch.zeros(3, dtype=torch.bfloat16)]) == "native"
    assert backend_for([torch.zeros(3)], [torch.zeros(3, dtype=torch.float16)]) == "torch"
    assert adamw_ema_triton.native_ops.has("adamw_ema")
