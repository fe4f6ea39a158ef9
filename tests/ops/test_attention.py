"""Attention dispatch: each backend that runs here against the equation, and what the others would be asked."""

import logging

import pytest
import torch
from torch._subclasses import FakeTensorMode

from dopsd_kernels import attention_libraries as libraries
from dopsd_kernels.attention import (
    _runs,
    attention,
    attention_bwd,
    attention_fwd,
    attention_ref,
    choose_attention,
    chosen,
)
from dopsd_kernels.costs import COSTS, Cost
from dopsd_kernels.sequences import Sequences
from tests.ops import rule

LENGTHS = ([8, 8, 8], [5, 0, 7, 7, 33], [1], [123], [3, 9, 3, 1], [], [0, 0])
BACKENDS = [name for name in libraries.BACKENDS if libraries.usable(name, torch.device(rule.DEVICE), torch.float16, 64)]


def inputs(lengths, heads=2, head_dim=36, dtype=torch.float64, seed=0):
    """q and k on their own, v a column slice of a wider buffer as after a fused projection."""
    generator = torch.Generator().manual_seed(seed)
    sequences = Sequences(lengths, rule.DEVICE)
    shape = (sequences.tokens, heads, head_dim)
    q, k = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    wide = torch.randn(sequences.tokens, 3, heads, head_dim, generator=generator, dtype=torch.float64)
    return sequences, [x.to(rule.DEVICE, dtype) for x in (q, k)], wide.to(rule.DEVICE, dtype)


def results(function, lengths, dtype, head_dim=36):
    sequences, (q, k), wide = inputs(lengths, head_dim=head_dim, dtype=dtype)
    return rule.with_gradients(lambda q, k, wide: function(q, k, wide[:, 2], sequences), [q, k, wide])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
def test_against_float64(backend, lengths, dtype):
    device = torch.device(rule.DEVICE)
    head_dim = 36 if libraries.usable(backend if backend != "auto" else "math", device, dtype, 36) else 64
    if backend != "auto" and not libraries.usable(backend, device, dtype, head_dim):
        with pytest.raises(ValueError, match="cannot do"):
            results(lambda *args: attention(*args, backend=backend), lengths, dtype, head_dim)
        return
    ours = results(lambda *args: attention(*args, backend=backend), lengths, dtype, head_dim)
    eager = results(attention_ref, lengths, dtype, head_dim)
    oracle = results(attention_ref, lengths, torch.float64, head_dim)
    # Blocked kernels round P to a half dtype before it meets v, as eager PyTorch in that dtype does; attention_ref does not.
    same_dtype = eager if dtype == torch.float32 else results(rounding_reference, lengths, dtype, head_dim)
    for mine, theirs, same, exact in zip(ours, eager, same_dtype, oracle):
        if exact.numel() and exact.abs().max() < 1e-12:  # one token attends to itself alone: q and k do not matter
            assert mine.abs().max() < 100 * torch.finfo(dtype).eps
            continue
        worse = theirs if rule.error(theirs, exact) > rule.error(same, exact) else same
        rule.assert_twice(mine, worse, exact, backend)


def rounding_reference(q, k, v, sequences):
    """The equation with every product and the softmax in the inputs' own dtype."""
    parts = []
    for a, b, c in zip(*(x.split(sequences.lengths) for x in (q, k, v))):
        scores = torch.einsum("ihd,jhd->hij", a, b) * q.shape[-1] ** -0.5
        parts.append(torch.einsum("hij,jhd->ihd", scores.softmax(-1), c))
    return torch.cat(parts) if parts else q * k * v


@pytest.mark.parametrize("lengths", [[4, 4], [5, 0, 2, 3], [1]], ids=str)
@pytest.mark.parametrize("function", [attention_ref, lambda *args: attention(*args, backend="math")], ids=["ref", "math"])
def test_gradcheck(function, lengths):
    sequences, (q, k), wide = inputs(lengths, heads=2, head_dim=3)
    leaves = [x.requires_grad_() for x in (q, k, wide)]
    assert torch.autograd.gradcheck(lambda q, k, wide: function(q, k, wide[:, 1], sequences), leaves)


def test_float64_is_exact_enough():
    ours = results(attention, [5, 0, 7, 7, 33], torch.float64)
    for mine, exact in zip(ours, results(attention_ref, [5, 0, 7, 7, 33], torch.float64)):
        assert rule.error(mine, exact) < 1e-14


def test_fake_agrees_with_real():
    sequences, (q, k), wide = inputs([4, 4, 6], dtype=torch.float32)
    arguments = (q, k, wide[:, 2], sequences.starts, sequences.lengths, "auto")
    torch.library.opcheck(attention_fwd, tuple(x.requires_grad_() if x is q else x for x in arguments))
    q = q.detach()
    out, lse = attention_fwd(q, k, wide[:, 2], *arguments[3:])
    assert lse.shape == (14 * 2,) and out.is_contiguous()
    torch.library.opcheck(attention_bwd, (torch.randn_like(out), q, k, wide[:, 2], out, lse, *arguments[3:]))


def test_meta_needs_no_data():
    q = torch.empty(4352, 30, 128, device="meta", dtype=torch.bfloat16)
    starts = torch.empty(2, device="meta", dtype=torch.int32)
    out, lse = attention_fwd(q, q, q, starts, [4352], "auto")
    grads = attention_bwd(out, q, q, q, out, lse, starts, [4352], "auto")
    assert out.shape == q.shape and lse.shape == (4352 * 30,) and [g.shape for g in grads] == [q.shape] * 3


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["flash", "varlen", "cudnn"])
def test_torch_gpu_calls_fit_their_schemas(name, packed):
    """No GPU runs here: fake CUDA tensors check the arguments and the shapes that torch's kernels take and give."""
    library = libraries.BACKENDS[name]
    if packed and name == "cudnn":
        return
    with FakeTensorMode():
        shape, longest = ((100, 4, 128), 70) if packed else ((2, 64, 4, 128), 64)
        q = torch.empty(shape, device="cuda", dtype=torch.bfloat16)
        starts = torch.empty(3, device="cuda", dtype=torch.int32) if packed else None
        out, lse = library.forward(q, q, q, starts, longest)
        grads = library.backward(torch.empty_like(out), q, q, q, out, lse.reshape(-1), starts, longest)
        assert out.shape == q.shape and lse.numel() == q.numel() // 128
        assert [grad.shape for grad in grads] == [q.shape] * 3
        assert out.is_contiguous() and all(grad.is_contiguous() for grad in grads)


class Package:
    """Stands for an installed flash-attn: its own calls, answered with the mathematics of one dense batch."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        def call(*tensors, **options):
            self.calls.append((name, options))
            dense = [x for x in tensors if isinstance(x, torch.Tensor)]
            if "forward" in name or name.endswith("_fwd"):
                out, lse = libraries.math_forward(*dense[:3], None, 0)
                return out.contiguous(), lse.squeeze(-1)
            if name.endswith("_bwd"):
                q, k, v, out, dout, lse = dense[:6]
                return libraries.math_backward(dout, q, k, v, out, lse, None, 0)
            targets = [options[n] for n in ("dq", "dk", "dv")] if "dq" in options else dense[6:9]
            for target, grad in zip(targets, libraries.math_backward(*dense[:6], None, 0)):
                target.copy_(grad)

        return call


@pytest.mark.parametrize("name", ["flash_attn_2", "flash_attn_3", "flash_attn_4"])
def test_flash_attn_packages(name, monkeypatch):
    package = Package()
    monkeypatch.setattr(libraries, "_module", lambda module: package)
    monkeypatch.setattr(libraries, "usable", lambda *args: True)
    monkeypatch.setattr("dopsd_kernels.attention.usable", lambda *args: True)
    ours = results(lambda *args: attention(*args, backend=name), [6, 6], torch.float64)
    for mine, exact in zip(ours, results(attention_ref, [6, 6], torch.float64)):
        assert rule.error(mine, exact) < 1e-14
    assert len(package.calls) == 2


GPU_CHOICES = [
    # (capability, installed, head dim, one length) -> name
    ((9, 0), (), 128, True, "cudnn"),
    ((9, 0), (), 128, False, "varlen"),
    ((9, 0), (libraries.FLASH_ATTN_3,), 128, True, "flash_attn_3"),
    ((9, 0), (libraries.FLASH_ATTN_2,), 128, True, "cudnn"),
    ((9, 0), (libraries.FLASH_ATTN_2,), 128, False, "flash_attn_2"),
    ((10, 0), (libraries.FLASH_ATTN_3, libraries.FLASH_ATTN_4), 128, True, "flash_attn_4"),
    ((12, 0), (libraries.FLASH_ATTN_4,), 128, False, "varlen"),
    ((8, 0), (), 128, True, "flash"),
    ((8, 0), (), 128, False, "varlen"),
    ((8, 0), (libraries.FLASH_ATTN_2,), 128, True, "flash_attn_2"),
    ((9, 0), (), 36, True, "math"),
    ((7, 5), (), 128, True, "math"),
]


@pytest.mark.parametrize(("capability", "installed", "head_dim", "one", "expected"), GPU_CHOICES)
def test_choice_on_gpus(capability, installed, head_dim, one, expected, monkeypatch, caplog):
    monkeypatch.setattr("dopsd_kernels.attention._chosen", {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(libraries, "_module", lambda name: object() if name in installed else None)
    with caplog.at_level(logging.INFO, "dopsd_kernels.attention"):
        for _ in range(2):
            assert choose_attention(torch.device("cuda:0"), torch.bfloat16, head_dim, one) == expected
    assert len(caplog.records) == 1 and expected in caplog.text
    assert chosen() == (expected,)
    assert choose_attention(torch.device("cuda:0"), torch.float32, head_dim, one) == "math"


def test_choice_on_the_cpu():
    assert choose_attention(torch.device("cpu"), torch.float32, 36, False) == "cpu_flash"
    assert choose_attention(torch.device("cpu"), torch.float64, 36, True) == "math"


def test_broken_package_is_said_once(monkeypatch, tmp_path, caplog):
    (tmp_path / "flash_attn_broken.py").write_text("raise OSError('undefined symbol')")
    monkeypatch.syspath_prepend(tmp_path)
    for _ in range(2):
        assert libraries._module("flash_attn_broken") is None
    assert caplog.text.count("undefined symbol") == 1
    assert libraries._module("flash_attn_that_is_not.there") is None


def test_runs():
    assert _runs((8, 8, 0, 8, 3)) == ((0, 3, 8), (24, 1, 3))
    assert _runs((0,)) == ()


def test_declared_cost():
    def cost(lengths):
        q = torch.empty(sum(lengths), 30, 128, device="meta", dtype=torch.bfloat16)
        starts = torch.empty(len(lengths) + 1, device="meta", dtype=torch.int32)
        out = attention_fwd(q, q, q, starts, lengths, "auto")
        forward = COSTS["dopsd::attention_fwd"](q, q, q, starts, lengths, "auto", out=out)
        rest = (out[0], q, q, q, *out, starts, lengths, "auto")
        return forward, COSTS["dopsd::attention_bwd"](*rest, out=attention_bwd(*rest))

    product = 2 * 30 * 128 * 4352**2
    assert cost([4352]) == (Cost(1, 0, 0, 2 * product), Cost(3, 0, 0, 5 * product))
    several = 2 * 30 * 128 * (4 + 9 + 16)
    assert cost([2, 3, 4]) == (Cost(1, 0, 0, 2 * several), Cost(3, 0, 0, 5 * several))
    assert cost([])[0] == Cost()
    assert cost([2, 3])[0].launches == 4  # two calls, and a copy each of out and lse to join them


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(k=torch.zeros(6, 2, 5)), "k is"),
        (dict(v=torch.zeros(6, 2, 4, dtype=torch.float16)), "v is"),
        (dict(k=torch.zeros(6, 2, 4, device="meta")), "k is"),
        (dict(q=torch.zeros(6, 4, 2).mT, k=torch.zeros(6, 2, 4)), "must be contiguous"),
        (dict(sequences=Sequences([5])), "must be \\[5 tokens"),
        (dict(sequences=Sequences([6], "meta")), "the sequences are on meta"),
        (dict(backend="flash"), "cannot do"),
        (dict(backend="fast"), "is none of auto"),
    ],
)
def test_wrong_calls(change, message):
    arguments = dict(q=torch.zeros(6, 2, 4), k=torch.zeros(6, 2, 4), v=torch.zeros(6, 2, 4), sequences=Sequences([6]))
    with pytest.raises(ValueError, match=message):
        attention(**arguments | change)


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [[4352], [4352, 4352], [4352, 4096, 4864]], ids=str)
def test_full_size_on_a_gpu(lengths):
    if not torch.cuda.is_available():
        pytest.skip("needs GPU")
    ours = results(attention, lengths, torch.bfloat16, 128)
    eager = results(attention_ref, lengths, torch.bfloat16, 128)
    same = results(rounding_reference, lengths, torch.bfloat16, 128)
    exact = results(attention_ref, lengths, torch.float64, 128)
    for mine, a, b, oracle in zip(ours, eager, same, exact):
        rule.assert_twice(mine, a if rule.error(a, oracle) > rule.error(b, oracle) else b, oracle)
