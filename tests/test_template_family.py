"""The template of docs/extending.md holds: the project's own functions train it and sample with it, and give what plain PyTorch
gives that knows nothing of the project."""

import copy

import pytest
import torch
from PIL import Image
from torch import nn

from dopsd_fast.distributed.plain_engine import PlainEngine
from dopsd_fast.distributed.process_group import Ranks
from dopsd_fast.errors import UserError
from dopsd_fast.families.base import Family
from dopsd_fast.families.registry import open_family
from dopsd_fast.memory.ledger import Machine
from dopsd_fast.memory.planner import make_plan
from dopsd_fast.method.objective import StepInputs
from dopsd_fast.method.registry import make_objective
from dopsd_fast.method.trajectory import rollout
from dopsd_fast.pair.lora import coverage_by_kind
from dopsd_fast.settings.load import load_settings
from dopsd_fast.settings.names import FAMILIES, FamilyNames
from tests.template_family import CHANNELS, SHIFT, WIDTH, TemplateFamily, make_template
from tests.tiny import pair_of

SIDE, LR, EPS, DECAY, CLIP = 8, 1e-2, 1e-3, 0.9, 0.5
PROMPTS = ("a red ball", "a longer caption")
SIGMAS = [SHIFT * s / (1 + (SHIFT - 1) * s) for s in (1, 0.75, 0.5, 0.25, 0)]


def settings_of(folder, *words):
    return load_settings([
        "nano_full", f"model.path={folder}", "deepspeed.stage=0", f"train.grad_clip={CLIP}", f"train.eps={EPS}",
        f"teacher.ema_decay={DECAY}", *words,
    ])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_template(tmp_path_factory.mktemp("template") / "pipeline")


@pytest.fixture(scope="module")
def family(folder):
    """Entered for a moment where a real family stays."""
    with pytest.MonkeyPatch.context() as patch:
        names = FamilyNames(TemplateFamily.__module__, "TemplateFamily", (TemplateFamily.pipeline_class,), "edit")
        patch.setitem(FAMILIES, TemplateFamily.name, names)
        return open_family(folder, settings_of(folder).conditioning)


@pytest.fixture(scope="module")
def contexts(family):
    """Of the student and of the teacher."""
    encoders = family.load_encoders()
    picture = Image.linear_gradient("L").convert("RGB").resize((SIDE, SIDE))
    return encoders.student(list(PROMPTS)), encoders.teacher(list(PROMPTS), [[picture], [picture.rotate(90)]])


def noise() -> torch.Tensor:
    return torch.randn(2, CHANNELS, SIDE // 2, SIDE // 2, generator=torch.Generator().manual_seed(1))


def plain_velocity(model: nn.Module, x: torch.Tensor, sigma: float, contexts) -> torch.Tensor:
    """noise - image, in the schedulers' convention."""
    outs = []
    for one, context in zip(x, contexts):
        tokens = one.permute(1, 2, 0).reshape(-1, CHANNELS)
        reference = context.get("reference", torch.zeros(0, CHANNELS))
        outs.append(model(tokens, reference, context["text"], torch.tensor([sigma])))
    return torch.stack(outs).reshape(2, SIDE // 2, SIDE // 2, CHANNELS).permute(0, 3, 1, 2)


def plain_step(model: nn.Module, contexts) -> tuple[float, nn.Module, nn.Module]:
    """Loss, student and teacher after one published step of Eq. 7, in sigma, with torch's own AdamW."""
    student, teacher, x, losses = model, copy.deepcopy(model), noise(), []
    for now, then in zip(SIGMAS[:-1], SIGMAS[1:]):
        v_s = plain_velocity(student, x, now, contexts[0])
        with torch.no_grad():
            v_t = plain_velocity(teacher, x, now, contexts[1])
        losses.append((v_s - v_t).square().mean())
        x = (x + (then - now) * v_s).detach()
    loss = torch.stack(losses).mean()
    loss.backward()
    nn.utils.clip_grad_norm_(student.parameters(), CLIP)
    torch.optim.AdamW(student.parameters(), lr=LR, eps=EPS, weight_decay=0.0).step()
    with torch.no_grad():
        for average, weight in zip(teacher.parameters(), student.parameters()):
            average.lerp_(weight, 1 - DECAY)
    return float(loss.detach()), student, teacher


def our_step(family: Family, settings, contexts):
    """Loss and pair after one step of the trainer's own parts."""
    pair = pair_of(family, settings, torch.float32)
    engine = PlainEngine(pair, settings.train, settings.teacher, Ranks(0, 1, 0, torch.device("cpu")))
    x = noise()
    grid = family.train_grid(settings.method.num_states, settings.method.shift, tuple(x.shape[1:]))
    with engine.accumulating():
        inputs = StepInputs(noise=x, grid=grid, forward=pair.open(*contexts, x.shape))
        report = make_objective(settings.method).accumulate(inputs, engine.backward)
    engine.step(LR)
    return report.loss, pair


def test_a_step_is_the_published_one(family, folder, contexts):
    loss, pair = our_step(family, settings_of(folder), contexts)
    expected, student, teacher = plain_step(family.load_transformer(torch.float32), contexts)
    assert loss == pytest.approx(expected, rel=1e-6)
    # A weight moves by at most LR; an error of 2^-20 of a clipped gradient moves it by LR / EPS times that.
    bound = LR / EPS * CLIP * 2.0**-20
    start = family.load_transformer(torch.float32)
    for ours, other in ((pair.student, student), (pair.teacher, teacher)):
        weights = dict(other.named_parameters())
        assert {name for name, _ in ours.named_parameters()} == set(weights)
        for name, weight in ours.named_parameters():
            torch.testing.assert_close(weight, weights[name], rtol=0, atol=bound)
            assert (weight - start.get_parameter(name)).abs().max() > 10 * bound, name


def test_the_planner_counts_it(family, folder):
    settings = settings_of(folder, "train.batch_size=2")
    plan = make_plan(settings, Machine(1, 1, None, None, "cpu"), family)
    assert plan.parameters == sum(p.numel() for p in family.load_transformer(torch.float32).parameters())
    # A state keeps q, k and v (fp32) of each item's text and image tokens, at the least.
    text, image = settings.conditioning.max_text_tokens, (settings.data.resolution // 2) ** 2
    assert plan.items["activations for backward"][0] > 2 * 3 * 4 * WIDTH * (text + image)


def test_a_lora_finds_what_the_family_names(family):
    assert coverage_by_kind(family.meta_transformer(), family.lora_targets, family.lora_kinds) == {"attention": (4, 4)}


@torch.no_grad()
def test_a_trajectory_is_the_schedulers_own(family, folder, contexts):
    pair, x = pair_of(family, settings_of(folder), torch.float32), noise()
    sampler = pair.sampler("student", contexts[0], x.shape)
    latents = rollout(sampler, x, family.sample_grid(0, tuple(x.shape[1:])))
    model = family.load_transformer(torch.float32)
    for now, then in zip(SIGMAS[:-1], SIGMAS[1:]):
        x = x + (then - now) * plain_velocity(model, x, now, contexts[0])
    torch.testing.assert_close(latents, x, rtol=1e-5, atol=1e-5)
    pictures = family.decode(family.load_vae(), latents)
    assert [picture.size for picture in pictures] == [(SIDE, SIDE)] * 2
    back = torch.stack([family.encode_image(family.load_vae(), picture) for picture in pictures])
    shown = (latents[:, :3] / 0.5).clamp(-1, 1) * 0.5  # a picture has no more than -1 to 1, in steps of 2 / 255
    torch.testing.assert_close(back[:, :3], shown, rtol=0, atol=0.51 / 255)


def test_the_folder_is_checked_and_contexts_are_known_by_what_decides_them(family, folder, tmp_path):
    assert family.check_variant([]) == []
    for bad, what in (((7, 8), "multiples of 2"), ((0, 8), "multiples of 2")):
        with pytest.raises(UserError, match=what):
            family.latent_shape(*bad)
    other = make_template(tmp_path / "other")
    (other / "scheduler" / "scheduler_config.json").write_text('{"shift": 6.0}')
    conditioning = settings_of(folder).conditioning
    with pytest.raises(UserError, match=r"shift is 6.0.*model.allow=shift"):
        TemplateFamily(other, conditioning).check_variant([])
    changed = conditioning.model_copy(update={"edit_instruction": "Another one."})
    same, instructed = TemplateFamily(other, conditioning), TemplateFamily(other, changed)
    for kind, equal in (("student", True), ("teacher", False)):
        assert family.fingerprint(kind) == same.fingerprint(kind)
        assert (family.fingerprint(kind) == instructed.fingerprint(kind)) == equal
