"""AdamW, an exponential moving average of the weights and the rounded copies of both: one pass over memory, any number of
tensors at once.

    g = grad_scale * grad
    theta = theta * (1 - lr * weight_decay)
    m = b1 * m + (1 - b1) * g;   v = b2 * v + (1 - b2) * g^2
    theta = theta - lr / (1 - b1^n) * m / (sqrt(v / (1 - b2^n)) + eps)
    ema = decay * ema + (1 - decay) * theta
    student = round(theta);   teacher = round(ema)

theta and ema are fp32, or halves: a bf16 tensor (the nearest one; ties away from 0) and the 16 low bits of the fp32 number
as int16. The two hold its bits exactly, and the bf16 tensor is the parameter itself: no copy of it is needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dopsd_kernels import native_ops
from dopsd_kernels.backend import choose
from dopsd_kernels.costs import Cost, declares, size
from dopsd_kernels.cubins import CompileCase
from dopsd_kernels.launch import launch
from dopsd_kernels.triton_compat import tl, triton

CHUNK, BLOCK = 4096, 1024
"""Elements of one program, and of one turn of its loop."""

_PIECE = 1 << 22  # elements that the plain PyTorch path handles at once, so that its temporaries stay small


class Hyper(NamedTuple):
    """The numbers of one tensor's update; `step` counts from 1. `decay` is ignored where there is no average."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    decay: float
    step: float
    grad_scale: float = 1.0


# ---- Triton ------------------------------------------------------------------------------------------------------------


@triton.jit
def _at(address, offset, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointers to elements `offset` of the array at `address`, an integer. ALIGNED: which 16 divides."""
    pointer = address.to(tl.pointer_type(TYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer + offset


@triton.jit
def _read(address, offset, mask, KIND: tl.constexpr, ALIGNED: tl.constexpr):
    """fp32 values. bf16 in integer arithmetic, which the interpreter gets right."""
    if KIND == "bf16":
        half = tl.load(_at(address, offset, tl.int16, ALIGNED), mask=mask)
        return (half.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    elif KIND == "fp16":
        return tl.load(_at(address, offset, tl.float16, ALIGNED), mask=mask).to(tl.float32)
    else:
        return tl.load(_at(address, offset, tl.float32, ALIGNED), mask=mask)


@triton.jit
def _write(address, offset, mask, x, KIND: tl.constexpr, ALIGNED: tl.constexpr):
    """Rounds to nearest, ties to even."""
    if KIND == "bf16":
        bits = x.to(tl.int32, bitcast=True)
        rounded = tl.where(x == x, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16, 0x7FC0)
        tl.store(_at(address, offset, tl.int16, ALIGNED), rounded.to(tl.int16), mask=mask)
    elif KIND == "fp16":
        tl.store(_at(address, offset, tl.float16, ALIGNED), x.to(tl.float16), mask=mask)
    else:
        tl.store(_at(address, offset, tl.float32, ALIGNED), x, mask=mask)


@triton.jit
def _read_master(high, low, offset, mask, HALVES: tl.constexpr, ALIGNED: tl.constexpr):
    if HALVES:
        bits = _read(high, offset, mask, "bf16", ALIGNED).to(tl.int32, bitcast=True)
        rest = tl.load(_at(low, offset, tl.int16, ALIGNED), mask=mask)
        return (bits + rest.to(tl.int32)).to(tl.float32, bitcast=True)
    else:
        return _read(high, offset, mask, "fp32", ALIGNED)


@triton.jit
def _write_master(high, low, offset, mask, x, HALVES: tl.constexpr, ALIGNED: tl.constexpr):
    if HALVES:
        bits = tl.where(x == x, x.to(tl.int32, bitcast=True), 0x7FC00000)
        tl.store(_at(high, offset, tl.int16, ALIGNED), ((bits + 0x8000) >> 16).to(tl.int16), mask=mask)
        tl.store(_at(low, offset, tl.int16, ALIGNED), bits.to(tl.int16), mask=mask)
    else:
        _write(high, offset, mask, x, "fp32", ALIGNED)


@triton.jit
def _lerp(start, end, weight):
    """start + weight * (end - start), from the nearer side, as torch.lerp."""
    return tl.where(weight < 0.5, tl.fma(weight, end - start, start), tl.fma(weight - 1.0, end - start, end))


@triton.jit
def _update_chunk(
    at,
    number,
    first,
    FULL: tl.constexpr,
    GRAD: tl.constexpr,
    THETA_HALVES: tl.constexpr,
    EMA: tl.constexpr,
    EMA_HALVES: tl.constexpr,
    STUDENT: tl.constexpr,
    TEACHER: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Elements [first, first + CHUNK) of one tensor; FULL: it has them all, which spares the masks."""
    theta_at, theta_low_at, grad_at = tl.load(at), tl.load(at + 1), tl.load(at + 2)
    m_at, v_at, ema_at, ema_low_at = tl.load(at + 3), tl.load(at + 4), tl.load(at + 5), tl.load(at + 6)
    student_at, teacher_at, elements = tl.load(at + 7), tl.load(at + 8), tl.load(at + 9)
    shrink, take_grad, keep_square = tl.load(number), tl.load(number + 1), tl.load(number + 2)
    take_square, root, eps = tl.load(number + 3), tl.load(number + 4), tl.load(number + 5)
    minus_step, take_theta, grad_scale = tl.load(number + 6), tl.load(number + 7), tl.load(number + 8)
    blocks = CHUNK // BLOCK if FULL else tl.cdiv(tl.minimum(elements - first, CHUNK), BLOCK)
    for block in range(blocks):
        offset = first + block * BLOCK + tl.arange(0, BLOCK)
        mask = None if FULL else offset < elements
        theta = _read_master(theta_at, theta_low_at, offset, mask, THETA_HALVES, ALIGNED)
        g = _read(grad_at, offset, mask, GRAD, ALIGNED) * grad_scale
        m = _lerp(_read(m_at, offset, mask, "fp32", ALIGNED), g, take_grad)
        v = tl.fma(take_square * g, g, keep_square * _read(v_at, offset, mask, "fp32", ALIGNED))
        theta = theta * shrink + tl.div_rn(minus_step * m, tl.sqrt_rn(v) * root + eps)
        _write(m_at, offset, mask, m, "fp32", ALIGNED)
        _write(v_at, offset, mask, v, "fp32", ALIGNED)
        _write_master(theta_at, theta_low_at, offset, mask, theta, THETA_HALVES, ALIGNED)
        if STUDENT != "none":
            _write(student_at, offset, mask, theta, STUDENT, ALIGNED)
        if EMA:
            ema = _lerp(_read_master(ema_at, ema_low_at, offset, mask, EMA_HALVES, ALIGNED), theta, take_theta)
            _write_master(ema_at, ema_low_at, offset, mask, ema, EMA_HALVES, ALIGNED)
            if TEACHER != "none":
                _write(teacher_at, offset, mask, ema, TEACHER, ALIGNED)


@triton.jit
def adamw_ema_kernel(
    addresses,  # int64 [N, 10]: theta, theta_low, grad, exp_avg, exp_avg_sq, ema, ema_low, student, teacher, elements
    numbers,  # fp32 [N, 9]: see _numbers
    chunks,  # int32 [programs, 2]: tensor, chunk of it
    GRAD: tl.constexpr,
    THETA_HALVES: tl.constexpr,
    EMA: tl.constexpr,
    EMA_HALVES: tl.constexpr,
    STUDENT: tl.constexpr,
    TEACHER: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    tensor = tl.load(chunks + 2 * program).to(tl.int64)
    first = tl.load(chunks + 2 * program + 1).to(tl.int64) * CHUNK
    at, number = addresses + tensor * 10, numbers + tensor * 9
    if first + CHUNK <= tl.load(at + 9):
        _update_chunk(at, number, first, True, GRAD, THETA_HALVES, EMA, EMA_HALVES, STUDENT, TEACHER, ALIGNED, CHUNK, BLOCK)
    else:
        _update_chunk(at, number, first, False, GRAD, THETA_HALVES, EMA, EMA_HALVES, STUDENT, TEACHER, ALIGNED, CHUNK, BLOCK)


_KINDS = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def _kind(tensors: Sequence[Tensor]) -> str:
    return _KINDS[tensors[0].dtype] if tensors else "none"


@lru_cache(maxsize=8)
def _chunks(elements: tuple[int, ...], device: torch.device) -> Tensor:
    counts = torch.tensor([-(-n // CHUNK) for n in elements])
    tensor = torch.arange(len(elements)).repeat_interleave(counts)
    chunk = torch.arange(len(tensor)) - (counts.cumsum(0) - counts)[tensor]
    return torch.stack([tensor, chunk], 1).to(torch.int32).to(device)


def _numbers(h: Hyper) -> tuple[float, ...]:
    first, second = 1 - h.beta1**h.step, 1 - h.beta2**h.step
    shrink = 1 - h.lr * h.weight_decay
    return shrink, 1 - h.beta1, h.beta2, 1 - h.beta2, second**-0.5, h.eps, -h.lr / first, 1 - h.decay, h.grad_scale


def _sent(rows: Sequence[Sequence[float]], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A table on `device`. From pageable memory the copy to a GPU would make the host wait until the GPU has finished all that
    was launched before; from pinned memory it does not, and PyTorch reuses that memory only after the copy has ended."""
    return torch.tensor(rows, dtype=dtype, pin_memory=device.type == "cuda").to(device, non_blocking=True)


@lru_cache(maxsize=8)
def _addresses(rows: tuple[tuple[int, ...], ...], device: torch.device, stream: int) -> Tensor:
    """The kernel's table of addresses and element counts, built once for tensors that stay where they are: its own content is
    the key. `stream`: the one that it is copied on, since another stream might read the table before it has arrived."""
    return _sent(rows, torch.int64, device)


def _triton(lists: Sequence[Sequence[Tensor]], hyper: Sequence[Hyper]) -> None:
    theta, theta_low, grads, _, _, ema, ema_low, students, teachers = lists
    device, elements = theta[0].device, tuple(t.numel() for t in theta)
    columns = [[t.data_ptr() for t in tensors] or [0] * len(theta) for tensors in lists]
    aligned = all(address % 16 == 0 for column in columns for address in column)
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    addresses = _addresses(tuple(zip(*columns, elements)), device, stream)
    numbers = _sent([_numbers(h) for h in hyper], torch.float32, device)
    chunks = _chunks(elements, device)
    launch(adamw_ema_kernel, (len(chunks),), addresses, numbers, chunks, GRAD=_kind(grads),
           THETA_HALVES=bool(theta_low), EMA=bool(ema), EMA_HALVES=bool(ema_low), STUDENT=_kind(students),
           TEACHER=_kind(teachers), ALIGNED=aligned, CHUNK=CHUNK, BLOCK=BLOCK, num_warps=8)


# ---- plain PyTorch -----------------------------------------------------------------------------------------------------


def join(high: Tensor, low: Tensor) -> Tensor:
    """The fp32 tensor whose halves these are: bf16 and int16, any shape."""
    return ((high.view(torch.int16).int() << 16) + low.int()).view(torch.float32)


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of `join`: (nearest bf16, ties away from 0; int16 low bits). A NaN becomes the NaN 0x7fc00000."""
    bits = torch.where(x.isnan(), 0x7FC00000, x.view(torch.int32))
    low = (bits + 0x8000) % 0x10000 - 0x8000
    return ((bits - low) >> 16).to(torch.int16).view(torch.bfloat16), low.to(torch.int16)


def untie_(x: Tensor) -> Tensor:
    """Changes fp32 `x` in place so that rounding to nearest, ties to even, as every cast does it, gives the upper half that
    `split` gives: of numbers halfway between two bf16 numbers, those that a cast would round towards 0 become the next fp32
    number away from 0 (2^-16 of a bf16 step). What is exported of masters that are kept as low bits then is the live weight
    once it is read as bf16, if it is stored in bf16, fp32 or float64. fp16 has only three bits more than bf16: it rounds such a
    number back to the middle."""
    for piece in x.view(-1).view(torch.int32).split(_PIECE):
        piece += (piece & 0x1FFFF) == 0x8000
    return x


def adamw_ema_ref(theta: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, ema: Tensor | None, h: Hyper) -> None:
    """The update in place, fp32 or float64, operation for operation as `torch.optim.AdamW`; `ema` by `lerp_`."""
    if h.grad_scale != 1:
        grad = grad * h.grad_scale
    theta.mul_(1 - h.lr * h.weight_decay)
    exp_avg.lerp_(grad, 1 - h.beta1)
    exp_avg_sq.mul_(h.beta2).addcmul_(grad, grad, value=1 - h.beta2)
    denominator = (exp_avg_sq.sqrt() / (1 - h.beta2**h.step) ** 0.5).add_(h.eps)
    theta.addcdiv_(exp_avg, denominator, value=-h.lr / (1 - h.beta1**h.step))
    if ema is not None:
        ema.lerp_(theta, 1 - h.decay)


def _pieces(tensors: Sequence[Tensor | None]) -> Iterator[tuple[Tensor | None, ...]]:
    found = [t for t in tensors if t is not None]
    if not all(t.is_contiguous() for t in found):
        yield tuple(tensors)
        return
    for start in range(0, found[0].numel(), _PIECE):
        yield tuple(None if t is None else t.view(-1)[start : start + _PIECE] for t in tensors)


def _torch_one(tensors: Sequence[Tensor | None], h: Hyper) -> None:
    for piece in _pieces(tensors):
        theta, theta_low, grad, m, v, ema, ema_low, student, teacher = piece
        assert theta is not None and grad is not None and m is not None and v is not None
        whole = theta if theta_low is None else join(theta, theta_low)
        average = ema if ema is None or ema_low is None else join(ema, ema_low)
        adamw_ema_ref(whole, grad.to(whole.dtype), m, v, average, h)
        for value, high, low, copy in ((whole, theta, theta_low, student), (average, ema, ema_low, teacher)):
            if high is not None and low is not None and value is not None:
                for half, new in zip((high, low), split(value)):
                    half.copy_(new)
            if copy is not None and value is not None:
                copy.copy_(value)


def update_torch(lists: Sequence[Sequence[Tensor]], hyper: Sequence[Hyper]) -> None:
    """`adamw_ema` in plain PyTorch, for any strides. `lists`: the op's, in its order."""
    for i, h in enumerate(hyper):
        _torch_one([tensors[i] if tensors else None for tensors in lists], h)


# ---- C++ ---------------------------------------------------------------------------------------------------------------


def _native_all(lists: Sequence[Sequence[Tensor]], hyper: Sequence[Hyper]) -> None:
    update = native_ops._native.adamw_ema
    for i, h in enumerate(hyper):
        theta, theta_low, grad, m, v, ema, ema_low, student, teacher = (t[i] if t else None for t in lists)
        update(theta, grad, m, v, ema, student, teacher, *h[:6], int(h.step), 0, theta_low, ema_low, h.grad_scale)


def _half_or_single(tensors: Sequence[Tensor]) -> bool:
    return not tensors or tensors[0].dtype in (torch.float32, torch.bfloat16)


def backend_for(
    theta: Sequence[Tensor], grads: Sequence[Tensor], students: Sequence[Tensor] = (), teachers: Sequence[Tensor] = ()
) -> str:
    """"triton", "native" or "torch": what `adamw_ema` runs for these arguments."""
    native = (
        theta[0].device.type == "cpu"
        and theta[0].dtype != torch.float64
        and all(_half_or_single(tensors) for tensors in (grads, students, teachers))
        and native_ops.has("adamw_ema")
    )
    return choose(theta[0], native=native)


# ---- the op ------------------------------------------------------------------------------------------------------------


@torch.library.custom_op(
    "dopsd::adamw_ema",
    mutates_args=("theta", "theta_low", "exp_avg", "exp_avg_sq", "ema", "ema_low", "students", "teachers"),
)
def _adamw_ema(
    theta: Sequence[Tensor],
    theta_low: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    exp_avg_sq: Sequence[Tensor],
    ema: Sequence[Tensor],
    ema_low: Sequence[Tensor],
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    hyper: Sequence[float],
) -> None:
    size = len(Hyper._fields)
    numbers = [Hyper(*hyper[i : i + size]) for i in range(0, len(hyper), size)]
    lists = (theta, theta_low, grads, exp_avg, exp_avg_sq, ema, ema_low, students, teachers)
    backend = backend_for(theta, grads, students, teachers)
    if backend == "triton":
        _triton(lists, numbers)
    elif backend == "native":
        _native_all(lists, numbers)
    else:
        update_torch(lists, numbers)


@_adamw_ema.register_fake
def _(theta, theta_low, grads, exp_avg, exp_avg_sq, ema, ema_low, students, teachers, hyper) -> None:
    return None


@declares("dopsd::adamw_ema")
def _cost(theta, theta_low, grads, exp_avg, exp_avg_sq, ema, ema_low, students, teachers, hyper, out=None) -> Cost:
    updated = (*theta, *theta_low, *exp_avg, *exp_avg_sq, *ema, *ema_low)
    tables = sum(10 * 8 + 9 * 4 + 8 * -(-t.numel() // CHUNK) for t in theta)
    return Cost(launches=1, elementwise_bytes=2 * size(*updated) + size(*grads, *students, *teachers) + tables)


_DTYPES = {
    "grads": _KINDS, "students": _KINDS, "teachers": _KINDS, "exp_avg": (torch.float32,), "exp_avg_sq": (torch.float32,),
    "theta_low": (torch.int16,), "ema_low": (torch.int16,),
}


def _check(name: str, tensors: Sequence[Tensor], theta: Sequence[Tensor], dtypes: Any) -> None:
    if not tensors:
        return
    if len(tensors) != len(theta):
        raise ValueError(f"adamw_ema: {len(tensors)} {name}, but {len(theta)} theta: give one for each, or none")
    dtype, device = tensors[0].dtype, theta[0].device
    if dtype not in dtypes:
        raise ValueError(f"adamw_ema: {name} is {dtype}, must be {' or '.join(map(str, dtypes))}")
    for i, (tensor, like) in enumerate(zip(tensors, theta)):
        if tensor.dtype != dtype:
            raise ValueError(f"adamw_ema: {name}[{i}] is {tensor.dtype}, {name}[0] {dtype}: one call takes one dtype")
        if tensor.device != device:
            raise ValueError(f"adamw_ema: {name}[{i}] is on {tensor.device}, theta[0] on {device}")
        if tensor.numel() != like.numel():
            raise ValueError(f"adamw_ema: {name}[{i}] has {tensor.numel()} elements, theta[{i}] has {like.numel()}")
        if not tensor.is_contiguous():
            raise ValueError(f"adamw_ema: {name}[{i}] must be contiguous, has strides {tensor.stride()}")


@torch.no_grad()
def adamw_ema(
    theta: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avg: Sequence[Tensor],
    exp_avg_sq: Sequence[Tensor],
    hyper: Sequence[Hyper],
    *,
    ema: Sequence[Tensor] = (),
    theta_low: Sequence[Tensor] = (),
    ema_low: Sequence[Tensor] = (),
    students: Sequence[Tensor] = (),
    teachers: Sequence[Tensor] = (),
) -> None:
    """Updates N tensors in place, as the module's docstring says: one kernel launch on CUDA.

    Lists of N contiguous tensors on one device, one dtype a list; entry i of every list has as many elements as theta[i].
    `theta`, `ema`: fp32, or bf16 with `theta_low`, `ema_low` (int16). `exp_avg`, `exp_avg_sq` (m, v): fp32. `grads`,
    `students` (copies of theta), `teachers` (copies of ema): fp32, bf16 or fp16. A list may be empty where it has a default.
    fp32 arithmetic; deterministic. ValueError on wrong dtypes, devices, sizes or strides. AdamW: arXiv 1711.05101.
    """
    if not theta:
        return
    if not len(theta) == len(grads) == len(exp_avg) == len(exp_avg_sq) == len(hyper):
        raise ValueError("adamw_ema: theta, grads, exp_avg, exp_avg_sq and hyper must have one entry a tensor")
    if (ema_low or teachers) and not ema:
        raise ValueError("adamw_ema: ema_low and teachers need ema")
    lists = dict(theta=theta, theta_low=theta_low, grads=grads, exp_avg=exp_avg, exp_avg_sq=exp_avg_sq, ema=ema,
                 ema_low=ema_low, students=students, teachers=teachers)
    for name, tensors in lists.items():
        halves = theta_low if name == "theta" else ema_low
        _check(name, tensors, theta, _DTYPES.get(name) or ((torch.bfloat16,) if halves else (torch.float32,)))
    _adamw_ema(*(list(tensors) for tensors in lists.values()), [float(x) for h in hyper for x in h])


def _case(name: str, **constexprs: Any) -> CompileCase:
    default = dict(GRAD="bf16", THETA_HALVES=False, EMA=True, EMA_HALVES=False, STUDENT="bf16", TEACHER="bf16",
                   ALIGNED=True, CHUNK=CHUNK, BLOCK=BLOCK)
    signature = {"addresses": "*i64", "numbers": "*fp32", "chunks": "*i32"}
    return CompileCase(f"adamw_ema {name}", adamw_ema_kernel, signature, {**default, **constexprs}, num_warps=8)


COMPILE_CASES = [
    _case("fp32 masters"),
    _case("fp32 masters, fp32 gradients", GRAD="fp32"),
    _case("low bits", THETA_HALVES=True, EMA_HALVES=True, STUDENT="none", TEACHER="none"),
    _case("low bits, fp32 gradients", GRAD="fp32", THETA_HALVES=True, EMA_HALVES=True, STUDENT="none", TEACHER="none"),
    _case("fp32 parameters", GRAD="fp32", STUDENT="none", TEACHER="fp32"),
    _case("no average", EMA=False, TEACHER="none"),
    _case("unaligned", ALIGNED=False),
]
