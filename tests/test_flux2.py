"""FLUX.2-klein: contexts, edit references, velocity and rollouts against diffusers' pipeline."""

from functools import partial

import numpy as np
import pytest
import torch
from diffusers import Flux2KleinPipeline, Flux2Transformer2DModel
from peft import LoraConfig, inject_adapter_in_model
from PIL import Image

from dopsd_fast.families.registry import open_family
from dopsd_fast.method.trajectory import rollout
from dopsd_fast.settings.schema import ConditioningSettings
from tests.tiny import shared

PROMPTS = ["a cat", "a much longer prompt, über ein Haus"]


def picture(seed=0, width=80, height=64):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def open_tiny(**fields):
    return open_family(shared("flux2_klein"), ConditioningSettings(max_text_tokens=48, **fields))


@pytest.fixture(scope="module")
def family():
    return open_tiny(edit_instruction="")


@pytest.fixture(scope="module")
def encoders(family):
    return family.load_encoders()


@pytest.fixture(scope="module")
def transformer(family):
    return family.load_transformer(torch.float32)


@pytest.fixture(scope="module")
def pipeline():
    pipeline = Flux2KleinPipeline.from_pretrained(shared("flux2_klein"))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_student_context_is_the_pipelines(encoders, pipeline):
    prompts = [*PROMPTS, "cut at the limit " * 10]
    expected = pipeline.encode_prompt(prompts, max_sequence_length=48)[0]
    found = torch.stack([context["text"] for context in encoders.student(prompts)])
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


def test_teacher_text_carries_the_instruction(encoders):
    instructed = open_tiny(edit_instruction="Again.").load_encoders()
    teacher = instructed.teacher(["a cat"], [[picture()]])[0]
    assert torch.equal(teacher["text"], encoders.student(["a cat Again."])[0]["text"])


def test_latents_and_references_are_the_pipelines(family, encoders, pipeline):
    images = [picture(1), picture(2, 64, 64)]
    pixels = [pipeline.image_processor.preprocess(image) for image in images]
    expected, ids = pipeline.prepare_image_latents(pixels, 1, None, "cpu", torch.float32)
    context = encoders.teacher(["a cat"], [images])[0]
    torch.testing.assert_close(context["reference"], expected[0], rtol=1e-5, atol=1e-5)
    assert torch.equal(context["reference_ids"], ids[0])
    latent = encoders.latents(images[:1])[0]
    assert latent.shape == family.latent_shape(64, 80) == (16, 16, 20)
    torch.testing.assert_close(latent.flatten(1).T, expected[0, :320], rtol=1e-5, atol=1e-5)


def test_large_reference_shrinks_as_in_the_pipeline(family, pipeline):
    image = picture(3, 1301, 1100)
    reference = family._reference_image(image)
    resized = pipeline.image_processor._resize_to_target_area(image, 1024 * 1024)
    width, height = (side // 4 * 4 for side in resized.size)
    expected = pipeline.image_processor.preprocess(resized, height=height, width=width, resize_mode="crop")
    torch.testing.assert_close(pipeline.image_processor.preprocess(reference), expected, rtol=0, atol=0)


@pytest.mark.parametrize("references", [0, 1, 2])
def test_rollout_is_the_pipeline(family, encoders, transformer, pipeline, references):
    """Text to image, and image input with one and two references: the pipeline's loop and ours, 4 steps."""
    shape = family.latent_shape(64, 80)
    noise = torch.randn(1, *shape, generator=torch.Generator().manual_seed(references))
    images = [picture(5), picture(6, 64, 64)][:references]
    contexts = encoders.teacher(PROMPTS[1:], [images]) if images else encoders.student(PROMPTS[1:])
    x = rollout(partial(family.velocity, transformer, contexts=contexts), noise, family.sample_grid(0, shape))
    call = dict(
        image=images or None, prompt=PROMPTS[1], height=64, width=80, num_inference_steps=4, guidance_scale=1.0,
        latents=noise, max_sequence_length=48,
    )
    vae = family.load_vae()
    latent = pipeline(output_type="latent", **call).images
    torch.testing.assert_close(family._to_vae(vae, x), latent, rtol=0, atol=5e-5)
    difference = np.asarray(family.decode(vae, x)[0], int) - np.asarray(pipeline(**call).images[0], int)
    assert np.abs(difference).max() <= 1 and (difference != 0).mean() < 1e-3


def test_items_with_other_references_share_a_batch(family, encoders, transformer):
    contexts = [
        *encoders.teacher(PROMPTS, [[picture(1)], [picture(2, 64, 64)]]),
        *encoders.student(PROMPTS[:1]),
        *encoders.teacher(PROMPTS[:1], [[picture(3)]]),
    ]
    moved = contexts[3]["reference_ids"] + torch.tensor([0, 5, 0, 0])  # as many as the first item's, in other places
    contexts[3] = contexts[3] | {"reference_ids": moved}
    x = torch.randn(4, *family.latent_shape(64, 80), generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0.0, 0.3, 0.6, 0.9])
    together = family.velocity(transformer, x, t, contexts)
    for i in range(4):
        alone = family.velocity(transformer, x[i : i + 1], t[i : i + 1], contexts[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-5)
    assert (together[0] - together[3]).abs().max() > 1e-2
    together.sum().backward()
    assert transformer.x_embedder.weight.grad.abs().sum() > 0
    transformer.zero_grad(set_to_none=True)


def test_velocity_sign_and_time(family, encoders, transformer):
    context = encoders.student(PROMPTS[:1])
    x = torch.randn(1, 16, 2, 2, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        raw = transformer(
            hidden_states=x.flatten(2).transpose(1, 2),
            encoder_hidden_states=context[0]["text"][None],
            timestep=torch.tensor([0.75]),
            img_ids=torch.tensor([[0, 0, 0, 0], [0, 0, 1, 0], [0, 1, 0, 0], [0, 1, 1, 0]]),
            txt_ids=torch.tensor([[0, 0, 0, i] for i in range(48)]),
            return_dict=False,
        )[0]
        v = family.velocity(transformer, x, torch.tensor([0.25]), context)
    torch.testing.assert_close(v, -raw.transpose(1, 2).reshape(1, 16, 2, 2), rtol=0, atol=0)


def test_grid_is_dynamic(family, pipeline):
    from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

    shape = family.latent_shape(64, 80)
    pipeline.scheduler.set_timesteps(sigmas=[1, 0.75, 0.5, 0.25], mu=compute_empirical_mu(16 * 20, 4))
    expected = (1 - pipeline.scheduler.sigmas.double()).tolist()
    assert family.train_grid(4, 0.0, shape) == pytest.approx(expected, abs=1e-6)
    assert family.train_grid(4, 3.0, shape) == pytest.approx([0, 0.1, 0.25, 0.5, 1])


def test_lora_targets_cover_both_kinds_of_block(family):
    transformer = family.meta_transformer()
    assert isinstance(transformer, Flux2Transformer2DModel)
    config = LoraConfig(r=2, target_modules=list(family.lora_targets))
    inject_adapter_in_model(config, transformer, low_cpu_mem_usage=True)
    adapted = {name for name, module in transformer.named_modules() if hasattr(module, "lora_A")}
    assert len(adapted) == 2 * (8 + 4) + 2 * 2
    inside = {
        name.replace(".base_layer", "")
        for name, module in transformer.named_modules()
        if isinstance(module, torch.nn.Linear) and "blocks." in name and "lora_" not in name
    }
    assert adapted == inside
