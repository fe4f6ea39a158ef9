"""One training step of this program against the published step (bench/references/reference_eager.py), on tiny random models.

Same weights, same noise, same batch: the same loss, states and gradient for every trainable tensor.

The tolerance. Both programs do the same mathematics in another order, so a fixed number would be a guess. Instead
both fp32 results are compared with the reference in float64 (err = norm of the difference / norm, per tensor): ours
may be at most twice the reference's own fp32 error, plus a floor, because a reference may be right by luck. The floor
is FLOOR = 16 units of fp32 roundoff u = 2^-24: a gradient is a sum over K = 4 states and two elements of the batch of
products that each went through some ten GEMMs and norms, each of which adds at least one u to it; independent
roundings add up to sqrt(4 * 2 * 10) = 9 u, and 16 leaves less than a factor of 2. In float64 the two must agree to
the same bound with u = 2^-53: every rounding is 2^29 times smaller and nothing else may differ. The bound holds for the
loss, the states and the root mean square of the gradients' errors. One gradient alone is a sum with much cancellation, right
or wrong by luck (tests/test_pair_forward.py has the spread): it is held to LUCK times the reference's worst.
"""

from __future__ import annotations

import functools
import zlib

import pytest
import torch

from bench.references import reference_eager as reference
from bench.references.float64 import wide
from dopsd_fast.families.registry import open_family
from dopsd_fast.method.dopsd import DOPSD
from dopsd_fast.method.objective import StepInputs
from dopsd_fast.settings.schema import Settings
from tests import tiny
from tests.tiny import pair_of

SIGMAS = [1.0, 0.9, 0.75, 0.5, 0.0]  # K = 4, shift 3, by hand
FLOOR = 16
LUCK = 7
ROUNDOFF = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}
RANK, ALPHA = 3, 6.0
# Unequal lengths within the batch and between student and teacher; none is a multiple of 32, so that pad tokens matter.
LENGTHS = {"zimage": ((5, 40), (70, 33)), "flux2_klein": ((6, 6), (9, 9))}
SHAPES = {"zimage": (2, 8, 6, 10), "flux2_klein": (2, 16, 3, 5)}
LORA_TARGETS = {"zimage": reference.ZIMAGE_TARGETS}


def draw(key: str, shape, dtype: torch.dtype) -> torch.Tensor:
    """Standard normal numbers that belong to `key`, exact in fp32."""
    generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
    return torch.randn(shape, generator=generator).to(dtype)


@torch.no_grad()
def set_weights(student: dict, teacher: dict) -> None:
    """Moves both sides away from their start, each in its own direction: LoRA's B is 0 and the teacher equal there."""
    for name, parameter in student.items():
        if "lora_" in name:
            parameter.copy_(0.2 * draw(name, parameter.shape, parameter.dtype))
    for name, parameter in teacher.items():
        change = 0.2 if "lora_" in name else 0.05
        parameter.copy_(student[name] + change * draw("teacher " + name, parameter.shape, parameter.dtype))


def make_contexts(family: str, dtype: torch.dtype):
    """The same student and teacher contexts in this program's form and in the reference's."""
    width = {"zimage": 32, "flux2_klein": 48}[family]
    ours, theirs = [], []
    for side, lengths in zip(("student", "teacher"), LENGTHS[family], strict=True):
        texts = [draw(f"{side} text {i}", (n, width), dtype) for i, n in enumerate(lengths)]
        latents = []
        if family == "flux2_klein" and side == "teacher":
            latents = [draw(f"reference {i}", SHAPES[family][1:], dtype) for i in range(2)]
        theirs.append([reference.Condition(text, latents[i : i + 1]) for i, text in enumerate(texts)])
        contexts = [{"text": text} for text in texts]
        for context, latent in zip(contexts, latents, strict=False):
            rows, columns = latent.shape[1:]
            context["reference"] = torch.stack([latent[:, r, c] for r in range(rows) for c in range(columns)])
            context["reference_ids"] = torch.tensor([(10, r, c, 0) for r in range(rows) for c in range(columns)])
        ours.append(contexts)
    return ours, theirs


def noise_of(family: str, dtype: torch.dtype) -> torch.Tensor:
    return draw("noise", SHAPES[family], dtype)


def lora_targets(family: str) -> tuple[str, ...]:
    return LORA_TARGETS.get(family) or open_family(tiny.shared(family), Settings().conditioning).lora_targets


def load_model(family: str, dtype: torch.dtype):
    import diffusers

    name = {"zimage": "ZImageTransformer2DModel", "flux2_klein": "Flux2Transformer2DModel"}[family]
    return getattr(diffusers, name).from_pretrained(tiny.shared(family) / "transformer", torch_dtype=dtype)


def restart_average(step: reference.ReferenceStep) -> None:
    for name, weight in step.teacher_weights.items():
        step.ema[name] = weight.detach().to(step.ema[name].dtype, copy=True)


def reference_step(family: str, kind: str, weight: str, dtype: torch.dtype, **options) -> reference.ReferenceStep:
    adapter = reference.Adapter(RANK, ALPHA, lora_targets(family)) if kind == "lora" else None
    step = reference.ReferenceStep(load_model(family, dtype), SIGMAS, weight=weight, adapter=adapter, **options)
    set_weights(step.trainable, step.teacher_weights)
    restart_average(step)
    return step


@functools.cache
def published(family: str, kind: str, weight: str, dtype: torch.dtype):
    """(result, gradients) of the reference."""
    with wide(dtype):
        step = reference_step(family, kind, weight, dtype)
        _, (student, teacher) = make_contexts(family, dtype)
        result = step.backward(noise_of(family, dtype), student, teacher)
    return result, step.gradients()


class OurStep:
    """Family, Pair and objective on the reference's weights and batch."""

    def __init__(self, family: str, kind: str, objective: DOPSD, dtype: torch.dtype, activations: str = "keep",
                 backbone: str = "auto") -> None:
        settings = Settings(train={"activations": activations}, adapter={"kind": kind, "rank": RANK, "alpha": ALPHA},
                            backbone=backbone)
        self.family = open_family(tiny.shared(family), settings.conditioning)
        self.pair = pair_of(self.family, settings, dtype)
        # The reference keeps PEFT's names; this program's stock names leave the adapter's name out.
        names = {id(parameter): name for name, parameter in self.pair.student.named_parameters()}
        self.student = {names[id(entry.student)]: entry.student for entry in self.pair.trained()}
        self.teacher = {names[id(entry.student)]: entry.teacher for entry in self.pair.trained()}
        set_weights(self.student, self.teacher)
        self.objective, self.dtype = objective, dtype
        (self.student_contexts, self.teacher_contexts), _ = make_contexts(family, dtype)

    def backward(self, noise: torch.Tensor):
        with wide(self.dtype):
            forward = self.pair.open(self.student_contexts, self.teacher_contexts, noise.shape)
            inputs = StepInputs(noise=noise, grid=self.family.train_grid(4, 3.0, tuple(noise.shape[1:])), forward=forward)
            report = self.objective.accumulate(inputs, lambda loss: loss.backward())
        assert all(parameter.grad is None for parameter in self.teacher.values())
        return report

    def gradients(self) -> dict[str, torch.Tensor]:
        return {name: parameter.grad for name, parameter in self.student.items()}


def error(value: torch.Tensor, exact: torch.Tensor) -> float:
    return ((value.double() - exact).norm() / exact.norm()).item()


def compare(family: str, kind: str, weight: str, dtype: torch.dtype, report, gradients) -> None:
    exact, exact_gradients = published(family, kind, weight, torch.float64)
    theirs, their_gradients = published(family, kind, weight, torch.float32)
    scale = ROUNDOFF[dtype] / ROUNDOFF[torch.float32]

    def bound(their_error: float) -> float:
        return scale * (2 * their_error + FLOOR * ROUNDOFF[torch.float32])

    def close(value: float, their_value: float, exact_value: float) -> None:
        assert abs(value / exact_value - 1) <= bound(abs(their_value / exact_value - 1))

    assert exact.loss > 1e-3
    close(report.loss, theirs.loss, exact.loss)
    for ours, their_loss, exact_loss in zip(report.state_losses, theirs.losses, exact.losses, strict=True):
        close(ours, their_loss, exact_loss)
    for ours, their_state, exact_state in zip(report.states, theirs.states, exact.states, strict=True):
        assert error(ours, exact_state) <= bound(error(their_state, exact_state))
    assert gradients.keys() == exact_gradients.keys()
    assert all(gradient.norm() > 0 for gradient in exact_gradients.values())
    ours = {name: error(gradients[name], gradient) for name, gradient in exact_gradients.items()}
    their_errors = {name: error(their_gradients[name], gradient) for name, gradient in exact_gradients.items()}
    assert mean_square(ours) <= bound(mean_square(their_errors))
    for name, value in ours.items():
        allowed = bound(LUCK / 2 * max(their_errors.values()))
        assert value <= allowed, f"{name}: {value:.2e} > {allowed:.2e}"


def mean_square(errors: dict[str, float]) -> float:
    return (sum(value**2 for value in errors.values()) / len(errors)) ** 0.5


CASES = [
    ("float64", "per_state", "keep", "pair"), ("float32", "per_state", "keep", "pair"),
    ("float32", "per_state", "selective", "pair"), ("float32", "per_state", "recompute", "pair"),
    ("float32", "k_graphs", "keep", "pair"), ("float64", "k_graphs", "selective", "pair"),
    ("float64", "per_state", "recompute", "pair"),
    ("float64", "per_state", "keep", "diffusers"), ("float32", "k_graphs", "recompute", "diffusers"),
]
FLUX_CASES = [
    ("float64", "per_state", "keep", "auto"), ("float32", "per_state", "keep", "auto"),
    ("float32", "k_graphs", "recompute", "auto"),
]


def check_step(family: str, kind: str, weight: str, dtype: str, backward: str, activations: str, backbone: str) -> None:
    width = getattr(torch, dtype)
    ours = OurStep(family, kind, DOPSD(weight, "on_policy", backward), width, activations, backbone)
    assert (ours.pair.fused is not None) == (backbone == "pair")
    report = ours.backward(noise_of(family, width))
    compare(family, kind, weight, width, report, ours.gradients())


@pytest.mark.parametrize(("dtype", "backward", "activations", "backbone"), CASES)
@pytest.mark.parametrize("weight", ["v", "x1", "mu"])
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_step_equals_the_published_one(kind, weight, dtype, backward, activations, backbone):
    check_step("zimage", kind, weight, dtype, backward, activations, backbone)


@pytest.mark.parametrize(("dtype", "backward", "activations", "backbone"), FLUX_CASES)
@pytest.mark.parametrize("weight", ["v", "x1"])
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_flux2_klein_step_equals_the_published_one(kind, weight, dtype, backward, activations, backbone):
    check_step("flux2_klein", kind, weight, dtype, backward, activations, backbone)


def test_published_checkpointing_does_not_change_the_step():
    _, expected = published("zimage", "lora", "x1", torch.float32)
    step = reference_step("zimage", "lora", "x1", torch.float32, gradient_checkpointing=False)
    _, (student, teacher) = make_contexts("zimage", torch.float32)
    step.backward(noise_of("zimage", torch.float32), student, teacher)
    for name, gradient in step.gradients().items():
        assert torch.equal(gradient, expected[name]), name


def test_grids_of_the_schedulers():
    from diffusers import FlowMatchEulerDiscreteScheduler

    for name, shape in (("zimage", (8, 6, 10)), ("flux2_klein", (16, 3, 5))):
        family = open_family(tiny.shared(name), Settings().conditioning)
        scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(family.path / "scheduler")
        sigmas = reference.scheduler_sigmas(scheduler, 4, image_tokens=15)
        assert [1 - t for t in family.train_grid(4, 0.0, shape)] == pytest.approx(sigmas, abs=4 * 2**-24)
        if name == "zimage":
            assert sigmas == pytest.approx(SIGMAS, abs=4 * 2**-24)


def test_step_from_prompts_and_images():
    """Encoders included: texts of unequal length, images of unequal size, the VLM with the text encoder's weights."""
    from PIL import Image

    prompts = ["a red ball", "a blue kite over a very long beach with many small shells, seen from above"]
    images = [
        Image.frombytes("RGB", size, bytes((draw(f"image {i}", (size[1], size[0], 3), torch.float32) * 60 + 128)
        .clamp(0, 255).byte().flatten().tolist())) for i, size in enumerate([(48, 40), (56, 32)])
    ]
    encoders = reference.ReferenceEncoders(tiny.shared("zimage"))
    theirs = reference_step("zimage", "lora", "x1", torch.float32, encoders=encoders)
    noise = noise_of("zimage", torch.float32)
    expected = theirs.step_from_inputs(noise, prompts, images)

    ours = OurStep("zimage", "lora", DOPSD("x1"), torch.float32)
    own_encoders = ours.family.load_encoders()
    ours.student_contexts = own_encoders.student(prompts)
    ours.teacher_contexts = own_encoders.teacher(prompts, [[image] for image in images])
    for contexts, conditions in (
        (ours.student_contexts, encoders.student(prompts)), (ours.teacher_contexts, encoders.teacher(prompts, images))
    ):
        for context, condition in zip(contexts, conditions, strict=True):
            torch.testing.assert_close(context["text"], condition.text, rtol=0, atol=2e-6)
    report = ours.backward(noise)
    assert report.loss == pytest.approx(expected.loss, rel=1e-5)
    norm = torch.stack([gradient.norm() for gradient in ours.gradients().values()]).norm().item()
    assert norm == pytest.approx(expected.grad_norm, rel=1e-5)


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_three_whole_steps(kind):
    """Gradient, clipping, AdamW, EMA, teacher: the weights' change and the teacher's after n steps, by the rule above.

    eps = 1e-2 instead of 1e-8: at the published value AdamW's first steps are nearly the sign of the gradient, and
    where a gradient is zero but for rounding its sign is noise, here and in the reference. decay = 0.5 moves the
    teacher.
    """
    from dopsd_kernels.adamw_ema import AdamWEMA

    options = dict(learning_rate=1e-2, eps=1e-2, weight_decay=0.1, grad_clip=0.05)
    noises = [draw(f"noise {i}", SHAPES["zimage"], torch.float32) for i in range(3)]

    def run_reference(dtype):
        with wide(dtype):
            ema_dtype = None if dtype == torch.float64 else torch.float32
            step = reference_step("zimage", kind, "x1", dtype, ema_decay=0.5, ema_dtype=ema_dtype, **options)
            start = {name: weight.detach().clone() for name, weight in step.trainable.items()}
            _, (student, teacher) = make_contexts("zimage", dtype)
            norms = [step.step(noise.to(dtype), student, teacher).grad_norm for noise in noises]
        return norms, start, step.trainable, step.teacher_weights

    ours = OurStep("zimage", kind, DOPSD("x1"), torch.float32)
    optimizer = AdamWEMA(ours.student.values(), lr=1e-2, eps=1e-2, weight_decay=0.1, ema_decay=0.5)
    for name, parameter in ours.student.items():
        optimizer.init_state(parameter, ema=True)["ema"].copy_(ours.teacher[name])
    norms = []
    for noise in noises:
        optimizer.zero_grad(set_to_none=True)
        ours.backward(noise)
        norms.append(torch.nn.utils.clip_grad_norm_(list(ours.student.values()), 0.05).item())
        optimizer.step()
        with torch.no_grad():
            for name, parameter in ours.student.items():
                ours.teacher[name].copy_(optimizer.state[parameter]["ema"])

    exact_norms, start, exact, exact_teacher = run_reference(torch.float64)
    their_norms, _, theirs, their_teacher = run_reference(torch.float32)
    assert min(exact_norms) > 0.1  # clipping is at work
    assert norms == pytest.approx(exact_norms, rel=1e-5) and their_norms == pytest.approx(exact_norms, rel=1e-5)
    unit = ROUNDOFF[torch.float32]
    for name, begin in start.items():
        teachers = ours.teacher[name], their_teacher[name], exact_teacher[name]
        for mine, their, true in ((ours.student[name], theirs[name], exact[name]), teachers):
            moved = (true - begin).norm()
            # A weight is rounded once per step and once by the EMA, however little it moved.
            floor = FLOOR * unit * moved + 6 * unit * true.norm()
            allowed = 2 * (their.double() - true).norm() + floor
            assert (mine.double() - true).norm() <= allowed, name
            assert moved > 100 * floor, name


STEPS = 40


def ema_bound(history: list[torch.Tensor]) -> float:
    """One fp32 step rounds the product, the sum and the constant decay: 3 u |w| at most, n steps 3 n u max |w|."""
    return 3 * STEPS * 2.0**-24 * max(weight.abs().max().item() for weight in history)


def float64_ema(history: list[torch.Tensor], decay: float) -> torch.Tensor:
    average = history[0].double()
    for weight in history[1:]:
        average = decay * average + (1 - decay) * weight.double()
    return average


@pytest.mark.parametrize("decay", [0.9999, 0.9])
def test_ema_equals_a_float64_recomputation(decay):
    """Of the reference and of this program's optimizer, each along its own weights."""
    from dopsd_kernels.adamw_ema import AdamWEMA

    step = reference_step("zimage", "lora", "x1", torch.float32, ema_decay=decay, learning_rate=1e-2)
    step.copy_student_to_teacher()
    restart_average(step)
    weights = [parameter.detach().clone().requires_grad_() for parameter in step.trainable.values()]
    optimizer = AdamWEMA(weights, lr=1e-2, ema_decay=decay)
    sides = {"reference": list(step.trainable.values()), "ours": weights}
    history = {side: [[w.detach().clone()] for w in tensors] for side, tensors in sides.items()}
    for n in range(STEPS):
        for tensors in sides.values():
            for i, tensor in enumerate(tensors):
                tensor.grad = draw(f"gradient {n % 3} {i}", tensor.shape, tensor.dtype)
        step.optimizer.step()
        step.update_teacher()
        optimizer.step()
        for side, tensors in sides.items():
            for past, tensor in zip(history[side], tensors, strict=True):
                past.append(tensor.detach().clone())
    averages = {"reference": list(step.ema.values()), "ours": [optimizer.state[w]["ema"] for w in weights]}
    for side, values in averages.items():
        for average, past in zip(values, history[side], strict=True):
            assert average.dtype == torch.float32
            exact, bound = float64_ema(past, decay), ema_bound(past)
            assert (average.double() - exact).abs().max() <= bound
            assert (exact - past[0].double()).abs().max() > 10 * bound  # it moved by far more than the bound
    for teacher, average in zip(step.teacher_weights.values(), step.ema.values(), strict=True):
        assert torch.equal(teacher, average)


def test_bf16_ema_at_published_decay_stands_still():
    """bf16 has 8 bits: (1 - 0.9999) * (theta - ema) is below half a unit of ema until |theta - ema| > 19 |ema|."""
    kept = {}
    for dtype in (torch.bfloat16, torch.float32):
        step = reference_step("zimage", "full", "x1", torch.float32, ema_dtype=dtype)
        step.copy_student_to_teacher()
        restart_average(step)
        start = {name: average.clone() for name, average in step.ema.items()}
        with torch.no_grad():
            for parameter in step.trainable.values():
                parameter.mul_(1.5)  # a student that has moved far, and by as much in every element
        for _ in range(20):
            step.update_teacher()
        kept[dtype] = [torch.equal(average, start[name]) for name, average in step.ema.items()]
    assert all(kept[torch.bfloat16]) and not any(kept[torch.float32])


def test_bf16_ema_of_a_lora_that_starts_at_zero_stalls():
    """LoRA's B starts at 0, where bf16 does move at first; it stalls at 2.6..5.1 % = 2^8..2^9 * (1 - decay)."""
    theta = torch.linspace(0.5, 2, 64)
    low, exact = torch.zeros(64, dtype=torch.bfloat16), torch.zeros(64)
    for n in range(20000):
        if n == 10000:
            halfway = low.clone()
        low.mul_(0.9999).add_(theta.bfloat16(), alpha=1 - 0.9999)
        exact.mul_(0.9999).add_(theta, alpha=1 - 0.9999)
    assert torch.equal(low, halfway)
    assert (low.float() / theta).max() < 0.055
    assert (exact / theta).min() > 0.85  # 1 - exp(-2)
