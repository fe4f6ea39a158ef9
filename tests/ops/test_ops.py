"""All ops that work row by row (`tests/ops/table.py`), tested alike: the error rule in every implementation, the gradient of
float64, the registration, declared launches, rows far apart. What is special to an op is in the file of its name."""

import pytest
import torch
from torch import Tensor

from dopsd_kernels import backend, launch, native_ops
from dopsd_kernels.costs import COSTS
from tests.ops.rule import DEVICE, DTYPES, assert_twice, with_gradients
from tests.ops.table import OPS, Leaves, Op, Shape

ALL = pytest.mark.parametrize("op", OPS.values(), ids=lambda op: op.name)
GIVEN = pytest.mark.parametrize(("op", "given"), [
    pytest.param(op, given, id=f"{op.name}-{given}") for op in OPS.values() for given in op.given
])
WIDE = 1 << 13
"""Elements of rows that the interpreter takes seconds for: in one dtype, since their point is that they are several blocks."""


def rule_cases() -> list:
    found = []
    for op in OPS.values():
        for shape, given in op.cases:
            long = op.make(shape, torch.float32, "meta")[0].numel() > WIDE
            ways = [("triton", dtype) for dtype in DTYPES if dtype == torch.float32 or not long or DEVICE == "cuda"]
            ways += [*(("torch", dtype) for dtype in DTYPES), ("native", torch.float32)]
            name = f"{op.name}-{'x'.join(map(str, shape))}-{given}".replace(" ", "")
            found += [pytest.param(op, shape, given, *way, id=f"{name}-{way[0]}-{way[1]}") for way in ways]
    return found


@pytest.mark.parametrize(("op", "shape", "given", "chosen", "dtype"), rule_cases())
def test_error_rule(op: Op, shape: Shape, given: str, chosen: str, dtype: torch.dtype) -> None:
    """Outputs and gradients."""
    device = "cpu" if chosen == "native" else DEVICE
    inputs = op.inputs(shape, given, dtype, device)
    if chosen == "native":
        assert native_ops.has(op.name) and native_ops.usable(*inputs)
    function, reference = op.bind(shape, dtype, device)
    with backend.forced(chosen):
        ours = with_gradients(function, inputs)
    oracle = with_gradients(reference, [None if t is None else t.double() for t in inputs])
    assert_twice(ours, with_gradients(reference, inputs), oracle, f"{op.name} {chosen}")


@GIVEN
def test_gradcheck(op: Op, given: str) -> None:
    leaves = [None if t is None else t.clone().requires_grad_() for t in op.inputs(op.narrow, given, torch.float64, "cpu")]
    function, reference = op.bind(op.narrow, torch.float64, "cpu")
    assert torch.autograd.gradcheck(lambda *t: outputs(reference(*t)), leaves)
    with backend.forced("torch"):
        assert torch.autograd.gradcheck(lambda *t: outputs(function(*t)), leaves)


def outputs(results: Tensor | list[Tensor]) -> tuple[Tensor, ...]:
    return (results,) if isinstance(results, Tensor) else tuple(results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@ALL
def test_registration(op: Op, dtype: torch.dtype) -> None:
    """One set of arguments a dtype, all the sets in turn."""
    turn = [torch.float32, torch.bfloat16, torch.float64].index(dtype)
    for given in list(op.given)[turn::3] or list(op.given)[:1]:
        inputs = op.inputs(op.narrow, given, dtype, "cpu")
        with backend.forced("torch"):
            for asked in (True, False):
                (forward, arguments), (backward, others) = op.primitives(op.narrow, inputs, asked)
                torch.library.opcheck(backward, others)
            leaves = [None if t is None else t.clone().requires_grad_() for t in inputs]
            torch.library.opcheck(forward, (*leaves, *arguments[len(leaves) :]))


@GIVEN
@pytest.mark.parametrize("asked", [False, True])
def test_launches_are_declared(op: Op, given: str, asked: bool) -> None:
    for shape in (op.cases[0][0], op.narrow):  # the first has no rows
        inputs = op.inputs(shape, given)
        assert bool(inputs[0].numel()) == (shape == op.narrow)
        with backend.forced("torch"):  # the forward's statistics
            calls = list(op.primitives(shape, inputs, asked))
        for primitive, arguments in calls:
            before = launch.count
            with backend.forced("triton"):
                out = primitive(*arguments)
            assert COSTS[primitive._qualname](*arguments, out=out).launches == launch.count - before


@ALL
def test_rows_beyond_two_to_the_31_elements(op: Op) -> None:
    """The same bits as of rows that are near each other."""
    shape = ((1, 1), 16) if isinstance(op.narrow[0], tuple) else (2, *op.narrow[1:])
    near = op.inputs(shape, next(iter(op.given)), torch.float16)
    columns = near[0].shape[1]
    whole = torch.empty(2**31 + 4 * columns, dtype=torch.float16, device=DEVICE)
    far = [whole.as_strided((2, columns), (2**31 + columns, 1), i * columns).copy_(t) for i, t in enumerate(near[: op.rows])]
    there, here = results(op, shape, [*far, *near[op.rows :]]), results(op, shape, near)
    assert len(there) == len(here) and all(map(torch.equal, there, here))


def results(op: Op, shape: Shape, leaves: Leaves) -> list[Tensor]:
    with backend.forced("triton"):
        return [t for primitive, arguments in op.primitives(shape, leaves, True) for t in outputs(primitive(*arguments))]
