"""The trajectory's numbers, and the objectives on a toy velocity field whose gradients can be written down."""

from __future__ import annotations

import math
import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dopsd_fast.method.baselines import PSO, SFT
from dopsd_fast.method.dopsd import DOPSD
from dopsd_fast.method.objective import NonFiniteLoss, StepInputs
from dopsd_fast.method.registry import make_objective
from dopsd_fast.method.trajectory import draw_times, grid_shift, off_policy_state, shift_sigma, shifted_grid, state_weights
from dopsd_fast.pair.passes import BranchVelocity, TwoCalls

GRID = [0.0, 0.1, 0.25, 0.5, 1.0]
SHAPE = (3, 2, 5, 3)


class Field(nn.Module):
    """v = tanh(x * a + t * c), two layers deep so that autograd has something to save."""

    def __init__(self, seed: int, dtype=torch.float64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.a = nn.Parameter(torch.randn(SHAPE[1:], generator=generator, dtype=torch.float64).to(dtype))
        self.b = nn.Parameter(torch.randn(SHAPE[1:], generator=generator, dtype=torch.float64).to(dtype))

    def forward(self, x, t, contexts):
        c = torch.stack([context["c"] for context in contexts]).to(x)
        hidden = torch.tanh(x * self.a + (t[:, None] * c)[:, :, None, None])
        return torch.sin(hidden * self.b)


def make_inputs(student: BranchVelocity, teacher: BranchVelocity | None, dtype=torch.float64, **changes) -> StepInputs:
    generator = torch.Generator().manual_seed(7)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    fields = dict(noise=draw(*SHAPE), latents=draw(*SHAPE), grid=GRID)
    contexts = [[{"c": draw(2)} for _ in range(3)] for _ in range(2)]
    return StepInputs(**(fields | changes), forward=TwoCalls(student, contexts[0], teacher, contexts[1]))


def gradients(objective, inputs, student):
    student.zero_grad(set_to_none=True)
    calls = []

    def backward(loss):
        calls.append(loss.detach())
        loss.backward()

    report = objective.accumulate(inputs, backward)
    return report, [p.grad.clone() for p in student.parameters()], calls


def test_grid_of_z_image():
    assert shifted_grid(4, 3.0) == pytest.approx(GRID, abs=1e-15)
    assert shifted_grid(5, 1.0) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1], abs=1e-15)
    assert shifted_grid(1, 7.0) == [0.0, 1.0]
    for count, shift in ((0, 3.0), (4, 0.0), (4, -1.0), (4, float("nan"))):
        with pytest.raises(ValueError):
            shifted_grid(count, shift)


@pytest.mark.parametrize(("count", "shift"), [(4, 3.0), (8, 3.0), (3, 6.0), (4, 1.0), (7, 0.5)])
def test_grid_equals_diffusers_with_explicit_sigmas(count, shift):
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=[1 - k / count for k in range(count)])
    # The scheduler works in fp32: four roundings of numbers up to 1, divided by at least min(1, shift).
    expected = 1 - scheduler.sigmas.double()
    assert shifted_grid(count, shift) == pytest.approx(expected.tolist(), abs=4 * 2**-24 / min(1, shift))


def test_dynamic_shift_is_a_static_one():
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=[1 - k / 4 for k in range(4)], mu=2.02)
    assert shifted_grid(4, math.exp(2.02)) == pytest.approx((1 - scheduler.sigmas.double()).tolist(), abs=1e-6)


def test_published_grid_of_eight_states_is_another_one():
    """1000, 976.9, 947.8, ... 473.2 = shift 6 of nine even steps down to its sigma_min, without the last."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=6.0)
    scheduler.set_timesteps(9)
    published = (scheduler.timesteps[:8].double() / 1000).tolist()
    assert [round(1000 * s, 1) for s in (*published[:3], published[-1])] == [1000.0, 976.9, 947.8, 473.2]
    lowest = shift_sigma(1 / 1000, 6.0)
    ours = [shift_sigma(1 - k / 8 * (1 - lowest), 6.0) for k in range(8)]
    assert ours == pytest.approx(published, abs=2e-6)
    for shift in (3.0, 6.0):  # neither inference's shift nor its own gives it from sigmas that end at 0
        assert max(abs(1 - t - s) for t, s in zip(shifted_grid(8, shift), published, strict=False)) > 0.01


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0, 6.0, 7.5])
@pytest.mark.parametrize("count", [2, 4, 9])
def test_grid_shift_inverts(count, shift):
    assert grid_shift(shifted_grid(count, shift)) == pytest.approx(shift, rel=1e-12)


def test_weights():
    assert state_weights("v", GRID) == [1.0, 1.0, 1.0, 1.0]
    assert state_weights("x1", GRID) == pytest.approx([1.0, 0.81, 0.5625, 0.25])
    assert state_weights("mu", GRID) == pytest.approx([0.01, 0.0225, 0.0625, 0.25])
    with pytest.raises(ValueError, match="method.weight"):
        state_weights("x0", GRID)


@pytest.mark.parametrize("backward", ["per_state", "k_graphs"])
@pytest.mark.parametrize("weight", ["v", "x1", "mu"])
@pytest.mark.parametrize("states", ["on_policy", "off_policy"])
def test_loss_gradient_and_states_are_the_formula(weight, states, backward):
    student, teacher = Field(0), Field(1)
    inputs = make_inputs(student, teacher)
    report, grads, calls = gradients(DOPSD(weight, states, backward), inputs, student)

    # The same in the open: gradient of the velocities written down, pulled back by vector-Jacobian products.
    expected_grads = [torch.zeros_like(p) for p in student.parameters()]
    w = {"v": [1, 1, 1, 1], "x1": [1, 0.81, 0.5625, 0.25], "mu": [0.01, 0.0225, 0.0625, 0.25]}[weight]
    x, losses, gaps = inputs.noise, [], []
    for k, t in enumerate(GRID[:-1]):
        if states == "off_policy":
            x = (1 - t) * inputs.noise + t * inputs.latents
        torch.testing.assert_close(report.states[k], x, rtol=0, atol=1e-14)
        times = torch.full((3,), t, dtype=x.dtype)
        v_s = student(x, times, inputs.forward.student_contexts)
        difference = (v_s - teacher(x, times, inputs.forward.teacher_contexts)).detach()
        cotangent = 2 * w[k] / (4 * difference.numel()) * difference
        for total, grad in zip(expected_grads, torch.autograd.grad(v_s, list(student.parameters()), cotangent)):
            total += grad
        gaps.append(difference.square().mean().item())
        losses.append(w[k] * gaps[-1])
        x = x + (GRID[k + 1] - t) * v_s.detach()
    assert report.state_losses == pytest.approx(losses, rel=1e-12)
    assert report.loss == pytest.approx(sum(losses) / 4, rel=1e-12)
    assert report.gap == pytest.approx(math.sqrt(sum(gaps) / 4), rel=1e-12)
    assert len(report.states) == 5
    torch.testing.assert_close(report.states[4], x if states == "on_policy" else inputs.latents, rtol=0, atol=1e-14)
    for ours, expected in zip(grads, expected_grads, strict=True):
        assert expected.abs().max() > 1e-4
        torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-15)
    assert len(calls) == (4 if backward == "per_state" else 1)
    assert sum(calls).item() == pytest.approx(report.loss)
    assert all(p.grad is None for p in teacher.parameters())
    assert not any(state.requires_grad for state in report.states)


@pytest.mark.parametrize(("backward", "graphs"), [("per_state", 1), ("k_graphs", 4)])
def test_number_of_graphs_alive(backward, graphs):
    """Counts the tensors that autograd holds: per_state never holds more than one forward's."""
    student, teacher = Field(0), Field(1)
    inputs = make_inputs(student, teacher)
    alive, peak = 0, 0

    class Saved:
        def __init__(self, tensor):
            self.tensor = tensor

    def release():
        nonlocal alive
        alive -= 1

    def pack(tensor):
        nonlocal alive, peak
        saved = Saved(tensor)
        weakref.finalize(saved, release)
        alive += 1
        peak = max(peak, alive)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        DOPSD("x1", "on_policy", "per_state").accumulate(
            make_inputs(student, teacher, grid=[0.0, 1.0]), lambda loss: loss.backward()
        )
        one_graph, peak = peak, 0
        assert one_graph > 4 and alive == 0
        DOPSD("x1", "on_policy", backward).accumulate(inputs, lambda loss: loss.backward())
    assert peak == graphs * one_graph
    assert alive == 0


def test_teacher_runs_without_graph_and_alone():
    """The teacher comes before the student of its state, and no earlier student output is alive beside it."""
    student, teacher = Field(0), Field(1)
    order, outputs = [], []

    def spy(name, field):
        def velocity(x, t, contexts):
            order.append((name, torch.is_grad_enabled(), round(t[0].item(), 6), x.requires_grad))
            assert t.shape == (3,) and t.dtype == x.dtype
            assert not any(output() is not None for output in outputs)
            out = field(x, t, contexts)
            if name == "student":
                outputs.append(weakref.ref(out))
            return out

        return velocity

    inputs = make_inputs(spy("student", student), spy("teacher", teacher))
    DOPSD().accumulate(inputs, lambda loss: loss.backward())
    assert order == [
        (name, grad, t, False) for t in GRID[:-1] for name, grad in (("teacher", False), ("student", True))
    ]


def split(inputs: StepInputs, part: slice, scale: float) -> StepInputs:
    return StepInputs(
        noise=inputs.noise[part], latents=inputs.latents[part], grid=inputs.grid, scale=scale,
        times=None if inputs.times is None else inputs.times[part],
        forward=replace(
            inputs.forward, student_contexts=inputs.forward.student_contexts[part],
            teacher_contexts=inputs.forward.teacher_contexts[part],
        ),
    )


@pytest.mark.parametrize(
    "objective", [DOPSD("mu"), DOPSD("x1", "on_policy", "k_graphs"), SFT()], ids=["mu", "k", "sft"]
)
def test_accumulation_equals_the_whole_batch(objective):
    student, teacher = Field(0), Field(1)
    inputs = make_inputs(student, teacher, times=torch.tensor([0.1, 0.7, 0.4]))
    whole, expected, _ = gradients(objective, inputs, student)
    student.zero_grad(set_to_none=True)
    reports = [
        objective.accumulate(split(inputs, slice(i, i + 1), 1 / 3), lambda loss: loss.backward()) for i in range(3)
    ]
    for parameter, grad in zip(student.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-11, atol=1e-15)
    assert sum(r.loss for r in reports) / 3 == pytest.approx(whole.loss, rel=1e-12)  # reported unscaled


@pytest.mark.parametrize("backward", ["per_state", "k_graphs"])
def test_non_finite_loss_names_the_state_after_all_backwards(backward):
    student, teacher = Field(0), Field(1)

    def broken(x, t, contexts):
        out = teacher(x, t, contexts)
        return out * float("inf") if t[0] > 0.2 else out

    calls = []
    with pytest.raises(NonFiniteLoss, match="state 2 is (inf|nan)") as caught:
        DOPSD("v", "on_policy", backward).accumulate(
            make_inputs(student, broken), lambda loss: calls.append(loss.backward())
        )
    assert caught.value.state == 2 and not math.isfinite(caught.value.value)
    assert len(calls) == (4 if backward == "per_state" else 1)  # every rank makes the same collective calls


def test_low_precision_velocities_give_an_fp32_loss():
    """bf16 has 8 bits: squares and means taken in it would be off by 1e-3; in fp32 they agree to 1e-6."""
    student, teacher = Field(0, torch.bfloat16), Field(1, torch.bfloat16)
    pairs = []

    def low(field, keep):
        def velocity(x, t, contexts):
            out = field(x.bfloat16(), t.bfloat16(), contexts)
            keep.append(out.detach().double())
            return out

        return velocity

    kept_s, kept_t = [], []
    inputs = make_inputs(low(student, kept_s), low(teacher, kept_t), torch.float32)
    report = DOPSD("v").accumulate(inputs, lambda loss: pairs.append(loss.dtype))
    exact = [(s - t).square().mean().item() for s, t in zip(kept_s, kept_t, strict=True)]
    assert report.state_losses == pytest.approx(exact, rel=1e-6)
    assert set(pairs) == {torch.float32} and {s.dtype for s in report.states} == {torch.float32}


def test_missing_inputs_are_one_line():
    student, teacher = Field(0), Field(1)
    for objective, guide, changes in (
        (DOPSD(), None, {}),
        (DOPSD("v", "off_policy"), teacher, {"latents": None}),
        (SFT(), None, {"latents": None, "times": torch.ones(3)}),
        (SFT(), None, {"times": None}),
    ):
        with pytest.raises(ValueError, match="^objective (dopsd|sft): [^\n]+$"):
            objective.accumulate(make_inputs(student, guide, **changes), lambda loss: loss.backward())


def test_sft_is_flow_matching():
    student = Field(0)
    times = torch.tensor([0.05, 0.5, 0.9], dtype=torch.float64)
    inputs = make_inputs(student, None, times=times)
    report, grads, calls = gradients(SFT(), inputs, student)
    x = torch.stack([(1 - t) * n + t * i for t, n, i in zip(times, inputs.noise, inputs.latents, strict=True)])
    torch.testing.assert_close(report.states[0], x)
    loss = (student(x, times, inputs.forward.student_contexts) - (inputs.latents - inputs.noise)).square().mean()
    assert report.loss == pytest.approx(loss.item(), rel=1e-12)
    assert report.state_losses == [report.loss] and report.gap == pytest.approx(math.sqrt(report.loss))
    for ours, expected in zip(grads, torch.autograd.grad(loss, list(student.parameters())), strict=True):
        torch.testing.assert_close(ours, expected)
    assert len(calls) == 1


def drawing(seed=5):
    """A student, a teacher and inputs for the objectives that draw pictures; times on both sides of the grid's."""
    student, teacher = Field(1), Field(2)
    generator = torch.Generator().manual_seed(seed)
    second = torch.randn(SHAPE, generator=generator, dtype=torch.float64)
    times = torch.tensor([0.1, 0.2499, 0.97], dtype=torch.float64)
    return student, teacher, make_inputs(student, teacher, second_noise=second, times=times)


def euler(field, x, contexts):
    with torch.no_grad():
        for now, then in zip(GRID, GRID[1:]):
            x = x + (then - now) * field(x, torch.full((len(x),), now, dtype=x.dtype), contexts)
    return x


@pytest.mark.parametrize("pairs", ["online", "offline"])
def test_pso_is_the_logistic_loss_of_its_pairs(pairs):
    """Against the formula written out, one item after the other, with log(1 + exp) and autograd."""
    student, teacher, inputs = drawing()
    report, grads, calls = gradients(PSO(beta=3.0, pairs=pairs), inputs, student)
    forward = inputs.forward
    drawer, contexts = (student, forward.student_contexts) if pairs == "online" else (teacher, forward.teacher_contexts)
    loser = euler(drawer, inputs.noise, contexts).float().double()  # pictures are drawn in fp32
    total = 0
    for i, t in enumerate((0.1, 0.1, 0.5)):
        error = {}
        for name, image in (("w", inputs.latents[i]), ("l", loser[i])):
            x = (1 - t) * inputs.second_noise[i] + t * image
            for who, field, context in (("s", student, forward.student_contexts), ("r", teacher, forward.teacher_contexts)):
                v = field(x[None], torch.tensor([t], dtype=torch.float64), context[i : i + 1])[0]
                error[who + name] = (v - (image - inputs.second_noise[i])).square().mean()
        margin = (error["sw"] - error["rw"].detach()) - (error["sl"] - error["rl"].detach())
        total = total + torch.log1p(torch.exp(3.0 * margin)) / 3
    student.zero_grad()
    expected = torch.autograd.grad(total, list(student.parameters()))
    # The loser's rounding to fp32 (2^-24) passes through functions with slopes of order 1: 1e-6 of the gradients' size.
    for ours, theirs in zip(grads, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert report.loss == pytest.approx(total.item(), rel=1e-6) and len(calls) == 1 and report.gap > 0


def test_pso_starts_at_log_two_and_moves_towards_the_winner():
    student, _, inputs = drawing()
    same = Field(1)
    inputs.forward = replace(inputs.forward, teacher=same, teacher_contexts=inputs.forward.student_contexts)
    objective, losses = PSO(beta=1.0), []
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05)
    for _ in range(30):
        optimizer.zero_grad()
        losses.append(objective.accumulate(inputs, lambda loss: loss.backward()).loss)
        optimizer.step()
    assert losses[0] == pytest.approx(math.log(2), rel=1e-6)  # student and reference agree: margin 0
    assert losses[-1] < losses[0] - 1e-3


def test_sft_on_teacher_samples_learns_what_the_teacher_draws():
    student, teacher, inputs = drawing()
    report, grads, _ = gradients(SFT("teacher"), replace(inputs, latents=None), student)
    image = euler(teacher, inputs.noise, inputs.forward.teacher_contexts).float().double()
    t = inputs.times.view(-1, 1, 1, 1)
    x = (1 - t) * inputs.second_noise + t * image
    v = student(x, inputs.times, inputs.forward.student_contexts)
    loss = F.mse_loss(v, image - inputs.second_noise)
    for ours, theirs in zip(grads, torch.autograd.grad(loss, list(student.parameters())), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert report.loss == pytest.approx(loss.item(), rel=1e-6)


@pytest.mark.parametrize("objective", [PSO(), PSO(pairs="offline"), SFT("teacher")])
def test_objectives_that_draw_say_what_is_missing(objective):
    student, _, inputs = drawing()
    for missing in ("second_noise", "times"):
        with pytest.raises(ValueError, match="objective (pso|sft)"):
            objective.accumulate(replace(inputs, **{missing: None}), lambda loss: loss.backward())
    inputs.forward = replace(inputs.forward, teacher=None)
    with pytest.raises((ValueError, AssertionError)):
        objective.accumulate(inputs, lambda loss: loss.backward())


def test_off_policy_state_ends():
    noise, image = torch.randn(2, 1, 3, 3), torch.randn(2, 1, 3, 3)
    assert torch.equal(off_policy_state(noise, image, 0.0), noise)
    assert torch.equal(off_policy_state(noise, image, torch.ones(2)), image)


def test_training_times_belong_to_the_item():
    seeds = list(range(4000)) + [2**63 - 1]
    times = draw_times(seeds, 3.0)
    assert times.dtype == torch.float32 and times.shape == (4001,)
    assert torch.equal(draw_times(seeds[1000:1004], 3.0), times[1000:1004])  # whatever the batch
    assert times.min() >= 0 and times.max() <= 1
    # sigma' is monotone, so its quantiles are the shifted quantiles of a uniform sigma: +-4 deviations of 4000 draws.
    for quantile in (0.25, 0.5, 0.75):
        share = (1 - times <= shift_sigma(quantile, 3.0)).float().mean().item()
        assert share == pytest.approx(quantile, abs=4 * math.sqrt(quantile * (1 - quantile) / 4000))


def test_make_objective_reads_the_method():
    off = make_objective(SimpleNamespace(name="dopsd", weight="mu", states="off_policy", backward="k_graphs"))
    assert (off.weight, off.on_policy, off.per_state, off.needs_latents, off.needs_teacher) == (
        "mu",
        False,
        False,
        True,
        True,
    )
    on = make_objective(SimpleNamespace(name="dopsd", weight="v", states="on_policy", backward="per_state"))
    assert not on.needs_latents and not on.needs_times
    sft = make_objective(SimpleNamespace(name="sft", targets="data"))
    assert sft.needs_latents and sft.needs_times and not sft.needs_teacher and not sft.draws
    shown = make_objective(SimpleNamespace(name="sft", targets="teacher"))
    assert not shown.needs_latents and shown.needs_teacher and shown.draws and shown.teacher_sees == "image"
    pso = make_objective(SimpleNamespace(name="pso", beta=7.0, pairs="offline"))
    assert (pso.beta, pso.drawn_by, pso.teacher_sees) == (7.0, "teacher", "text") and pso.needs_latents and pso.draws
    assert [one.states(4) for one in (on, sft, shown, pso)] == [4, 1, 5, 6]
    assert [one.trained_states(4) for one in (on, off, sft, shown, pso)] == [4, 4, 1, 1, 1]
    assert [one.per_state for one in (on, off, sft, shown, pso)] == [True, False, True, True, True]
    with pytest.raises(ValueError, match="method.name"):
        make_objective(SimpleNamespace(name="dpo"))
