"""The pair forward against diffusers' own Z-Image model: velocities of both branches, and every gradient.

The rule (STYLE.md): with diffusers' model in float64 as oracle, the error (norm of the difference / norm, per tensor) of the
pair forward in a dtype is at most twice that of diffusers' model in the same dtype, plus FLOOR units of that dtype's
roundoff, because a reference may be right by luck: a velocity passes through some ten roundings a block. A single gradient
is right by luck more often: it is a sum with much cancellation (over 16 seeds and all adapters the two programs' errors
have the ratio 1.1 in the geometric mean, and anything from 0.2 to 6.6 one by one). So the rule holds for the root mean square
of a case's gradient errors, and each gradient is only held to LUCK times the worst of the reference's. In float64 the
reference's error is that in float32, 2^29 times smaller: there a wrong term of one part in 10^13 would be seen.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from bench.references.float64 import wide
from dopsd_fast.families.zimage.pair import ZImagePair, patchify, unpatchify
from dopsd_fast.pair.gradient_sums import GradientSums
from dopsd_fast.pair.lora import add_adapters
from dopsd_fast.pair.passes import FusedForward
from dopsd_fast.pair.student_teacher import STUDENT, TEACHER, Pair
from tests import tiny

FLOOR = 16
LUCK = 7
TARGETS = ("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0", "feed_forward.w1", "feed_forward.w2",
           "feed_forward.w3")
EVERYWHERE = (*TARGETS, "layers.0.adaLN_modulation.0", "2-1.adaLN_modulation.1", "mlp.0", "mlp.2", "cap_embedder.1",
              "all_final_layer.2-1.linear", "all_x_embedder.2-1")


@dataclass(frozen=True)
class Case:
    seed: int = 0
    dim: int = 48
    heads: int = 2
    axes: tuple[int, ...] = (8, 8, 8)
    layers: int = 2
    refiners: int = 1
    norm_eps: float = 1e-5
    qk_norm: bool = True
    size: tuple[int, int] = (6, 10)
    student: tuple[int, ...] = (5, 40)
    teacher: tuple[int, ...] = (70, 33)
    targets: tuple[str, ...] = ()
    activations: str = "keep"
    dtype: torch.dtype = torch.float32

    @property
    def name(self) -> str:
        changed = [f"{f.name}={getattr(self, f.name)}" for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]
        return ",".join(changed).replace("torch.", "").replace(" ", "") or "plain"


CASES = [
    Case(),
    Case(1, size=(16, 16), student=(32, 64), teacher=(96, 96)),  # nothing to pad
    Case(2, size=(2, 2), student=(1,), teacher=(1,)),  # one image token, one word
    Case(3, size=(4, 20), student=(31, 1, 33), teacher=(2, 128, 64)),
    Case(4, size=(6, 6), student=(20,) * 4, teacher=(80,) * 4),
    Case(5, refiners=2, layers=3, dim=60, heads=3, axes=(4, 8, 8)),
    Case(6, refiners=0, layers=1),
    Case(7, qk_norm=False, norm_eps=1e-3),
    Case(8, dim=288, heads=8, axes=(12, 12, 12), layers=4, size=(16, 12), student=(20, 45), teacher=(80, 61)),
    Case(9, targets=TARGETS),
    Case(10, targets=("attention.to_v", "feed_forward.w1"), student=(7, 40, 2), teacher=(33, 64, 5)),
    Case(11, targets=EVERYWHERE, refiners=2),
    *(Case(12, activations=policy, targets=targets) for policy in ("selective", "recompute") for targets in ((), TARGETS)),
    *(Case(13 + i, dtype=torch.float64, targets=targets, activations=policy)
      for i, (targets, policy) in enumerate([((), "keep"), (TARGETS, "keep"), ((), "recompute"), (EVERYWHERE, "selective")])),
    *(Case(20 + i, dtype=torch.bfloat16, targets=targets) for i, targets in enumerate([(), TARGETS])),
]


@pytest.mark.parametrize("targets", [(), EVERYWHERE])
def test_what_the_states_share_gathers_its_gradient_in_fp32(targets):
    """In bf16 a sum of many states' gradients would lose the small ones."""
    case = Case(30, targets=targets, dtype=torch.bfloat16)
    x, t, contexts, upstream = inputs(case, case.dtype)
    both = models(case, case.dtype)
    names = {branch: branch if targets else "" for branch in both}
    pair = ZImagePair(both, names)
    forward = FusedForward(pair, lambda x, t, call: call(x, t), contexts, x.shape, case.dtype, x.device)
    for _ in range(2):
        v_s = forward(x, t)[0]
        (v_s.float() * upstream.float()).sum().backward()
    assert forward.given[0].grad.dtype == torch.float32


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def models(case: Case, dtype: torch.dtype) -> dict:
    """Each branch's model: two with weights of their own, or one with two adapters that differ."""
    from diffusers import ZImageTransformer2DModel

    def build(seed: int):
        model = ZImageTransformer2DModel(
            in_channels=8, dim=case.dim, n_layers=case.layers, n_refiner_layers=case.refiners, n_heads=case.heads,
            n_kv_heads=case.heads, cap_feat_dim=32, axes_dims=list(case.axes), axes_lens=[1024, 64, 64],
            norm_eps=case.norm_eps, qk_norm=case.qk_norm,
        )
        return tiny.randomise(model, seed)

    student = build(case.seed)
    if not case.targets:
        both = {STUDENT: student, TEACHER: build(case.seed + 100)}
    else:
        student.requires_grad_(False)
        linears = [name for name, module in student.named_modules() if isinstance(module, torch.nn.Linear)]
        targets = [target for target in case.targets if any(name.endswith(target) for name in linears)]
        add_adapters(student, targets, 3, 6.0, 0, [STUDENT, TEACHER])
        for i, (name, parameter) in enumerate(student.named_parameters()):
            if "lora_" in name:
                parameter.data = 0.3 * draw(1000 + i, *parameter.shape)
        both = {STUDENT: student, TEACHER: student}
    for model in both.values():
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
    return both


def activate(model, adapter: str) -> None:
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module._active_adapter = [adapter]


def inputs(case: Case, dtype: torch.dtype):
    batch = len(case.student)
    x = draw(case.seed + 1, batch, 8, *case.size).to(dtype)
    t = torch.rand(batch, generator=torch.Generator().manual_seed(case.seed))
    contexts = {
        branch: [{"text": draw(seed + i, n, 32).to(dtype)} for i, n in enumerate(lengths)]
        for branch, seed, lengths in ((STUDENT, 50, case.student), (TEACHER, 70, case.teacher))
    }
    return x, t, contexts, draw(case.seed + 2, batch, 8, *case.size).to(dtype)


def theirs(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    """Velocities and gradients by diffusers' own forward, one item at a time where the batch is not uniform."""
    both = models(case, dtype)
    x, t, contexts, cotangent = inputs(case, dtype)
    out: dict[str, Tensor] = {}
    with wide(dtype):
        for branch in (TEACHER, STUDENT):
            activate(both[branch], branch)
            with torch.set_grad_enabled(branch == STUDENT):
                rows = [
                    both[branch]([x[i][:, None]], t[i : i + 1], [contexts[branch][i]["text"]], return_dict=False)[0][0][:, 0]
                    for i in range(len(x))
                ]
            out[branch] = torch.stack(rows)
        out |= gradients(both[STUDENT], out[STUDENT], cotangent)
    return {name: value.detach() for name, value in out.items()}


def ours(case: Case, dtype: torch.dtype) -> dict[str, Tensor]:
    both = models(case, dtype)
    x, t, contexts, cotangent = inputs(case, dtype)
    adapters = {branch: branch if case.targets else "" for branch in both}
    pair = ZImagePair(both, adapters, case.activations)
    names = (STUDENT, TEACHER)
    with wide(dtype):
        layouts = [pair.layout(contexts[name], *case.size, x.device) for name in names]
        captions = pair.prepare(names, [contexts[name] for name in names], layouts, dtype)
        v_s, v_t = pair(x, t, names, captions, layouts)
        assert not v_t.requires_grad and not captions[1].requires_grad
        out = {STUDENT: v_s, TEACHER: v_t} | gradients(both[STUDENT], v_s, cotangent)
    return {name: value.detach() for name, value in out.items()}


def gradients(model, v: Tensor, cotangent: Tensor) -> dict[str, Tensor]:
    # unused: the pad token where nothing is padded, the teacher's adapter
    wanted = {name: p for name, p in model.named_parameters() if p.requires_grad and f".{TEACHER}." not in name}
    grads = torch.autograd.grad((v * cotangent).sum(), list(wanted.values()), allow_unused=True)
    return {name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(wanted.items(), grads)}


def error(value: Tensor, exact: Tensor) -> float:
    return float((value.double() - exact).norm() / exact.norm().clamp(min=1e-30))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_velocities_and_gradients_equal_diffusers(case: Case):
    narrow = torch.float32 if case.dtype == torch.float64 else case.dtype
    mine, eager = ours(case, case.dtype), theirs(case, narrow)
    exact = theirs(case, torch.float64)
    assert mine.keys() == eager.keys() == exact.keys()
    roundoff = torch.finfo(case.dtype).eps / 2
    scale = 2.0**-29 if case.dtype == torch.float64 else 1.0
    found = {name: error(mine[name], oracle) for name, oracle in exact.items()}
    own = {name: scale * error(eager[name], oracle) for name, oracle in exact.items()}
    worst = max(own[name] for name in own if name not in (STUDENT, TEACHER))
    for name, value in found.items():
        limit = (2 * own[name] if name in (STUDENT, TEACHER) else LUCK * worst) + FLOOR * roundoff
        assert value <= limit, f"{name}: error {value:.2e}, limit {limit:.2e}"
    assert mean_square(found) <= 2 * mean_square(own) + FLOOR * roundoff


def mean_square(errors: dict[str, float]) -> float:
    values = [value for name, value in errors.items() if name not in (STUDENT, TEACHER)]
    return (sum(value**2 for value in values) / len(values)) ** 0.5


def test_a_batch_equals_its_items():
    """Items of unequal lengths share nothing: each alone gives the same velocity, to the order of sums in a GEMM."""
    case = Case(30, student=(5, 40, 64), teacher=(70, 3, 32))
    both = models(case, torch.float32)
    x, t, contexts, _ = inputs(case, torch.float32)
    pair = ZImagePair(both, {STUDENT: "", TEACHER: ""})

    def run(items: slice) -> tuple[Tensor, ...]:
        names = (STUDENT, TEACHER)
        layouts = [pair.layout(contexts[name][items], *case.size, x.device) for name in names]
        with torch.no_grad():
            captions = pair.prepare(names, [contexts[name][items] for name in names], layouts, torch.float32)
            return pair(x[items], t[items], names, captions, layouts)

    whole = run(slice(None))
    for i in range(len(x)):
        for all_items, alone in zip(whole, run(slice(i, i + 1))):
            assert error(all_items[i : i + 1], alone.double()) <= FLOOR * 2.0**-24


def test_one_branch_alone_equals_the_pair():
    case = Case(31, targets=TARGETS)
    both = models(case, torch.float32)
    x, t, contexts, _ = inputs(case, torch.float32)
    pair = ZImagePair(both, {STUDENT: STUDENT, TEACHER: TEACHER})

    def run(*names: str) -> tuple[Tensor, ...]:
        layouts = [pair.layout(contexts[name], *case.size, x.device) for name in names]
        with torch.no_grad():
            captions = pair.prepare(names, [contexts[name] for name in names], layouts, torch.float32)
            return pair(x, t, names, captions, layouts)

    together = run(STUDENT, TEACHER)
    for name, v in zip((STUDENT, TEACHER), together):
        assert error(run(name)[0], v.double()) <= FLOOR * 2.0**-24


@pytest.mark.parametrize("targets", [(), TARGETS], ids=len)
def test_a_branch_is_sampled_with_its_own_weights(targets):
    case = Case(32, targets=targets)
    both = models(case, torch.float32)
    x, t, contexts, _ = inputs(case, torch.float32)
    names = (STUDENT, TEACHER)
    fused = ZImagePair(both, {branch: branch if targets else "" for branch in names})
    pair = Pair(both[STUDENT], None if targets else both[TEACHER], lambda *_: x, fused=fused)
    layouts = [fused.layout(contexts[STUDENT], *case.size, x.device)] * 2
    with torch.no_grad():
        captions = fused.prepare(names, [contexts[STUDENT]] * 2, layouts, torch.float32)
        expected = fused(x, t, names, captions, layouts)
        drawn = [pair.sampler(name, contexts[STUDENT], x.shape)(x, t) for name in names]
    assert error(drawn[0], drawn[1].double()) > 0.01
    for v, wanted in zip(drawn, expected):
        assert error(v, wanted.double()) <= FLOOR * 2.0**-24


@pytest.mark.parametrize("targets", [(), TARGETS, EVERYWHERE, ("layers.0.adaLN_modulation.0", "mlp.2")], ids=len)
def test_sums_over_the_states_equal_autograds(targets):
    """The trainer's way, gradients added up beside autograd and delivered once, against a backward for each state."""
    case = Case(36, targets=targets, dtype=torch.float64)
    x, t, contexts, cotangent = inputs(case, torch.float64)
    names, found = (STUDENT, TEACHER), []
    for summed in (False, True):
        both = models(case, torch.float64)
        pair = ZImagePair(both, {branch: branch if targets else "" for branch in names})
        sums = GradientSums(pair.summed_parameters(STUDENT)) if summed else None
        layouts = [pair.layout(contexts[name], *case.size, x.device) for name in names]
        captions = [c.detach() for c in pair.prepare(names, [contexts[n] for n in names], layouts, torch.float64)]
        for k in range(3):
            v_s, _ = pair(x + k, (t + 0.1 * k).clamp(max=1), names, captions, layouts, sums)
            (v_s * cotangent).sum().backward()
        if sums is not None:
            sum(sums.finish()).backward()
        wanted = {name: p.grad for name, p in both[STUDENT].named_parameters() if p.grad is not None}
        found.append({name: grad for name, grad in wanted.items() if grad.norm() > 0})
    plain, ours = found
    assert plain and plain.keys() == ours.keys()
    for name, grad in plain.items():
        assert error(ours[name], grad) < 1e-12, name


@pytest.mark.parametrize(("gather", "targets"), [
    (None, ()), (None, EVERYWHERE), ("unit", ()), ("unit", EVERYWHERE), ("sweep", ()),
])
def test_every_way_of_holding_the_weights_delivers_the_same_gradients(gather, targets):
    """Two micro-batches of three states, the captions' refiners included, against one backward through all of it."""
    case = Case(37, targets=targets, dtype=torch.float64)
    x, t, contexts, cotangent = inputs(case, torch.float64)
    names, found = (STUDENT, TEACHER), []
    for plain in (True, False):
        both = models(case, torch.float64)
        pair = ZImagePair(both, {branch: branch if targets else "" for branch in names})
        for weight in (1.0, 3.0):
            states = [(x + weight * k, (t + 0.1 * k).clamp(max=1)) for k in range(3)]
            if plain:
                layouts = [pair.layout(contexts[name], *case.size, x.device) for name in names]
                captions = pair.prepare(names, [contexts[name] for name in names], layouts, torch.float64)
                velocities = [pair(*state, names, captions, layouts)[0] for state in states]
                (weight * sum((v * cotangent).sum() for v in velocities)).backward()
            else:
                forward = FusedForward(pair, lambda x, t, call: call(x, t), contexts, x.shape, torch.float64, x.device, gather,
                                       lambda turns: [action() for _, action in turns])
                for state in states:
                    (weight * (forward(*state)[0] * cotangent).sum()).backward()
                forward.finish(Tensor.backward)
        found.append({name: p.grad for name, p in both[STUDENT].named_parameters() if p.grad is not None and p.grad.norm() > 0})
    expected, ours = found
    assert any("context_refiner" in name for name in expected) and expected.keys() == ours.keys()
    for name, grad in expected.items():
        assert error(ours[name], grad) < 1e-12, name


class Kept:
    """Bytes that autograd saves, each storage once, without parameters."""

    def __init__(self, model) -> None:
        self.parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.storages: dict[int, int] = {}

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.parameters:
            self.storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    def __enter__(self) -> Kept:
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda tensor: tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self.hooks.__exit__(*error)

    @property
    def bytes(self) -> int:
        return sum(self.storages.values())


def test_only_the_students_activations_stay():
    """A hundred times longer teacher context changes nothing of what is kept; the policies keep less and less."""
    kept = {}
    for policy in ("keep", "selective", "recompute"):
        for length in (3, 300):
            case = Case(32, student=(32,), teacher=(length,), size=(8, 8), layers=6)
            both = models(case, torch.float32)
            x, t, contexts, _ = inputs(case, torch.float32)
            pair = ZImagePair(both, {STUDENT: "", TEACHER: ""}, policy)
            names = (STUDENT, TEACHER)
            layouts = [pair.layout(contexts[name], *case.size, x.device) for name in names]
            captions = [c.detach() for c in pair.prepare(names, [contexts[n] for n in names], layouts, torch.float32)]
            with Kept(torch.nn.ModuleList(both.values())) as found:
                velocities = pair(x, t, names, captions, layouts)
            kept[policy, length] = found.bytes
            del velocities
    for policy in ("keep", "selective", "recompute"):
        assert kept[policy, 3] == kept[policy, 300]
    values = kept["keep", 3] / (6 * 48 * 4 * 48)  # per layer, token (16 + 32) and channel
    assert 13.3 < values < 20, values  # with the parts around the layers
    assert kept["selective", 3] < 0.72 * kept["keep", 3]
    assert kept["recompute", 3] < 0.35 * kept["keep", 3]


@pytest.mark.parametrize("which", ["teacher", "frozen"])
def test_fp8_is_a_small_change_of_the_frozen_products(which):
    """e4m3 has 3 mantissa bits: a product's terms are off by up to 2^-4 each, at random, so a velocity by a few percent;
    what is not in 8 bits stays as it was. The gradient stays the gradient of nearly the same function."""
    case = Case(33, targets=TARGETS)
    x, t, contexts, cotangent = inputs(case, torch.float32)
    names = (STUDENT, TEACHER)
    found = {}
    for fp8 in ("off", which):
        both = models(case, torch.float32)
        pair = ZImagePair(both, {STUDENT: STUDENT, TEACHER: TEACHER}, fp8=fp8)
        layouts = [pair.layout(contexts[name], *case.size, x.device) for name in names]
        captions = pair.prepare(names, [contexts[name] for name in names], layouts, torch.float32)
        v_s, v_t = pair(x, t, names, captions, layouts)
        found[fp8] = {STUDENT: v_s.detach(), TEACHER: v_t} | gradients(both[STUDENT], v_s, cotangent)
    changed = {name: error(value, found["off"][name].double()) for name, value in found[which].items()}
    assert 1e-3 < changed[TEACHER] < 0.1
    if which == "teacher":
        # the captions of the teacher go through the same blocks alone, as a first branch, and keep their precision
        assert all(value == 0 for name, value in changed.items() if name != TEACHER)
    else:
        assert 1e-3 < changed[STUDENT] < 0.1
        cosine = sum((found[which][n] * found["off"][n]).sum() for n in changed if n not in names) / (
            sum(found[which][n].square().sum() for n in changed if n not in names).sqrt()
            * sum(found["off"][n].square().sum() for n in changed if n not in names).sqrt())
        assert cosine > 0.98


def test_fp8_refuses_what_trains():
    from dopsd_fast.errors import UserError

    both = models(Case(34), torch.float32)
    with pytest.raises(UserError, match="train.fp8=frozen: the matrices train"):
        ZImagePair(both, {STUDENT: "", TEACHER: ""}, fp8="frozen")
    odd = models(Case(35, dim=60, heads=3, axes=(4, 8, 8), targets=TARGETS), torch.float32)
    with pytest.raises(UserError, match="multiples of 16"):
        ZImagePair(odd, {STUDENT: STUDENT, TEACHER: TEACHER}, fp8="frozen")


def test_patches():
    x = draw(0, 2, 3, 4, 6)
    assert torch.equal(unpatchify(patchify(x).flatten(0, 1), x.shape), x)


def test_too_many_tokens_are_refused():
    from dopsd_fast.errors import UserError
    from dopsd_fast.families.registry import open_family
    from dopsd_fast.settings.schema import Settings

    family = open_family(tiny.shared("zimage"), Settings().conditioning)
    model = family.load_transformer(torch.float32)
    pair = family.pair_forward({STUDENT: model}, {STUDENT: ""}, "keep", "auto", "off")
    pair.layout([{"text": torch.zeros(992, 32)}], 4, 4, torch.device("cpu"))
    with pytest.raises(UserError, match="993 caption tokens.*992"):
        pair.layout([{"text": torch.zeros(993, 32)}], 4, 4, torch.device("cpu"))
