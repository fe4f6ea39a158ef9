"""Z-Image: contexts, velocity and rollouts against diffusers' pipeline; the folder errors; the full-size shapes."""

import json
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ZImagePipeline
from peft import LoraConfig, inject_adapter_in_model
from PIL import Image
from transformers import Qwen3VLForConditionalGeneration

from dopsd_fast.errors import UserError
from dopsd_fast.families.registry import open_family
from dopsd_fast.method.trajectory import rollout
from dopsd_fast.settings.schema import ConditioningSettings
from tests.tiny import make_tokenizer, make_vlm, shared

ROOT = Path(__file__).resolve().parent.parent
PROMPTS = ["a cat", "a much longer prompt, über ein Haus, 画", ""]


def conditioning(**fields):
    return ConditioningSettings(**({"max_text_tokens": 64, "max_vlm_tokens": 128} | fields))


def picture(seed=0, width=48, height=32):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def family():
    return open_family(shared("zimage"), conditioning())


@pytest.fixture(scope="module")
def encoders(family):
    return family.load_encoders()


@pytest.fixture(scope="module")
def transformer(family):
    return family.load_transformer(torch.float32)


@pytest.fixture(scope="module")
def pipeline():
    pipeline = ZImagePipeline.from_pretrained(shared("zimage"))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def copied(tmp_path):
    return shutil.copytree(shared("zimage"), tmp_path / "model")


def one_line(error) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def test_student_context_is_the_pipelines(encoders, pipeline):
    prompts = [*PROMPTS, "cut at the limit " * 10]
    expected = pipeline.encode_prompt(list(prompts), do_classifier_free_guidance=False, max_sequence_length=64)[0]
    for context, reference in zip(encoders.student(prompts), expected, strict=True):
        assert context["text"].shape == reference.shape
        torch.testing.assert_close(context["text"], reference, rtol=0, atol=2e-6)
    assert len(encoders.student(prompts)[-1]["text"]) == 64


@torch.no_grad()
def expected_teacher(family, prompt, images, overwrite=True):
    """By hand: explicit text, explicit copy of every language weight, the whole VLM with its head."""
    from transformers import AutoTokenizer, Qwen2VLImageProcessorPil, Qwen3Model

    folder = family.path / "vlm"
    vlm = Qwen3VLForConditionalGeneration.from_pretrained(folder).eval()
    if overwrite:
        encoder = Qwen3Model.from_pretrained(family.path / "text_encoder").state_dict()
        for name, parameter in vlm.model.language_model.named_parameters():
            parameter.copy_(encoder.pop(name))
        assert not encoder
    processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
    features = processor(images=images, return_tensors="pt")
    counts = [int(grid.prod() // 4) for grid in features["image_grid_thw"]]
    slots = "".join(f"<|vision_start|>{'<|image_pad|>' * n}<|vision_end|>" for n in counts)
    text = f"<|im_start|>user\n{slots}{prompt}<|im_end|>\n<|im_start|>assistant\n"
    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt").input_ids[:, :128]
    out = vlm(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        mm_token_type_ids=(ids == vlm.config.image_token_id).int(),
        output_hidden_states=True,
        **features,
    )
    return out.hidden_states[-2][0]


@pytest.mark.parametrize("images", [[picture(1)], [picture(1), picture(2, 32, 64)]])
@pytest.mark.parametrize("prompt", [PROMPTS[1], "far more text than the limit leaves room for " * 6])
def test_teacher_context_by_hand(family, encoders, prompt, images):
    context = encoders.teacher([prompt], [images])[0]["text"]
    torch.testing.assert_close(context, expected_teacher(family, prompt, images), rtol=0, atol=2e-6)


def test_teacher_uses_the_pipelines_language_weights_and_the_image(family, encoders):
    prompt, image = PROMPTS[0], picture(1)
    context = encoders.teacher([prompt], [[image]])[0]["text"]
    assert (context - expected_teacher(family, prompt, [image], overwrite=False)).abs().max() > 1e-2
    assert (context - encoders.teacher([prompt], [[picture(3)]])[0]["text"]).abs().max() > 1e-2


def test_pixel_limits_decide_the_image_tokens(encoders):
    small = open_family(shared("zimage"), conditioning(max_pixels=32 * 32)).load_encoders()
    counts = [len(e.teacher(["a cat"], [[picture(1, 64, 64)]])[0]["text"]) for e in (encoders, small)]
    assert counts[0] - counts[1] == 16 - 4  # 64x64 and 32x32 pixels in tokens of 16x16


def test_contexts_do_not_depend_on_the_batch(encoders):
    images = [[picture(i)] for i in range(3)]
    together = encoders.teacher(PROMPTS, images)
    for i, prompt in enumerate(PROMPTS):
        assert torch.equal(together[i]["text"], encoders.teacher([prompt], [images[i]])[0]["text"])
        assert torch.equal(encoders.student(PROMPTS)[i]["text"], encoders.student([prompt])[0]["text"])


def test_latents_are_the_normalised_mode(family, encoders, pipeline):
    vae, image = pipeline.vae, picture(5)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        expected = (vae.encode(pixels).latent_dist.mode() - 0.1159) * 0.3611
    latent = encoders.latents([image])[0]
    assert latent.shape == family.latent_shape(32, 48) == (8, 16, 24)
    torch.testing.assert_close(latent, expected[0], rtol=1e-5, atol=1e-5)


def test_velocity_with_unequal_texts(family, encoders, transformer):
    contexts = encoders.student(["a cat", "a prompt that needs more than thirty-two tokens", "dog"])
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(3, 8, 12, 20, generator=generator), torch.tensor([0.0, 0.25, 0.9])
    with torch.no_grad():
        together = family.velocity(transformer, x, t, contexts)
        for i in range(3):
            alone = family.velocity(transformer, x[i : i + 1], t[i : i + 1], contexts[i : i + 1])
            torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-5)
            raw = transformer([x[i, :, None]], t[i : i + 1], [contexts[i]["text"]], return_dict=False)[0][0]
            torch.testing.assert_close(alone[0], raw[:, 0], rtol=0, atol=0)
        assert together.dtype == torch.float32
        assert family.velocity(transformer.to(torch.bfloat16), x, t, contexts).dtype == torch.float32
    transformer.to(torch.float32).load_state_dict(family.load_transformer(torch.float32).state_dict())


@pytest.mark.parametrize("steps", [4, 8])
def test_rollout_is_the_pipeline(family, encoders, transformer, pipeline, steps):
    prompts = PROMPTS[:2]
    shape = family.latent_shape(32, 48)
    noise = torch.randn(2, *shape, generator=torch.Generator().manual_seed(steps))
    grid = family.sample_grid(steps, shape)
    x = rollout(partial(family.velocity, transformer, contexts=encoders.student(prompts)), noise, grid)
    call = dict(
        height=32, width=48, num_inference_steps=steps, sigmas=[1 - k / steps for k in range(steps)],
        guidance_scale=0.0, latents=noise, max_sequence_length=64,
    )
    # K Euler steps, each with a handful of fp32 roundings of values up to about 5
    torch.testing.assert_close(x, pipeline(list(prompts), output_type="latent", **call).images, rtol=0, atol=2e-5)
    for ours, theirs in zip(family.decode(family.load_vae(), x), pipeline(list(prompts), **call).images, strict=True):
        assert np.abs(np.asarray(ours, int) - np.asarray(theirs, int)).max() <= 1
    alone = rollout(partial(family.velocity, transformer, contexts=encoders.student(prompts[:1])), noise[:1], grid)
    theirs = pipeline(prompts[0], **(call | {"latents": noise[:1]})).images[0]
    assert np.array_equal(family.decode(family.load_vae(), alone)[0], theirs)


def test_grids(family):
    shape = family.latent_shape(32, 32)
    assert family.train_grid(4, 0.0, shape) == pytest.approx([0, 0.1, 0.25, 0.5, 1])
    assert family.train_grid(2, 1.0, shape) == pytest.approx([0, 0.5, 1])
    assert len(family.sample_grid(0, shape)) == 9


def test_caption_limit(family, transformer):
    x, t = torch.zeros(1, 8, 4, 4), torch.zeros(1)
    with torch.no_grad():
        family.velocity(transformer, x, t, [{"text": torch.ones(992, 32)}])
        with pytest.raises(IndexError):  # what diffusers says: if this changes, our limit is out of date
            transformer([x[0, :, None]], t, [torch.ones(993, 32)])
    with pytest.raises(UserError) as error:
        family.velocity(transformer, x, t, [{"text": torch.ones(993, 32)}])
    assert "993" in one_line(error) and "992" in one_line(error)
    long = open_family(shared("zimage"), conditioning(max_text_tokens=2000, max_vlm_tokens=2000)).load_encoders()
    for call in (lambda: long.student(["x" * 1100]), lambda: long.teacher(["x" * 1100], [[picture()]])):
        with pytest.raises(UserError, match="caption tokens of prompt 'xxx"):
            call()


def test_image_tokens_never_cut(family, encoders):
    with pytest.raises(UserError, match="max_vlm_tokens"):
        encoders.teacher(["a cat"], [[picture(i, 64, 64) for i in range(9)]])
    with pytest.raises(UserError, match="stands for an image"):
        encoders.teacher(["a <|image_pad|> cat"], [[picture()]])


def test_image_sizes(family):
    for size in ((30, 32), (0, 32), (4 * 65, 32)):
        with pytest.raises(UserError, match="image size"):
            family.latent_shape(*size)


def break_missing(vlm):
    shutil.rmtree(vlm)


def break_architecture(vlm):
    config = json.loads((vlm / "config.json").read_text())
    (vlm / "config.json").write_text(json.dumps(config | {"model_type": "qwen2_5_vl"}))


def break_tokenizer(vlm):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (vlm / name).unlink()
    make_tokenizer(image_tokens=False).save_pretrained(vlm)


def break_layers(vlm):
    shutil.rmtree(vlm)
    make_vlm(vlm, layers=4)


def break_width(vlm):
    shutil.rmtree(vlm)
    make_vlm(vlm, hidden=48)


@pytest.mark.parametrize(
    "damage, text",
    [
        (break_missing, "no vision-language model"),
        (break_architecture, "'qwen2_5_vl', expected 'qwen3_vl'"),
        (break_tokenizer, "no image token"),
        (break_layers, r"46 and 35 tensors.*11 only in the VLM \(first layers\.3\.input_layernorm"),
        (break_width, "of another shape"),
    ],
)
def test_wrong_vlm_is_one_line(copied, damage, text):
    damage(copied / "vlm")
    with pytest.raises(UserError, match=text) as error:
        family = open_family(copied, conditioning())
        family.fingerprint("teacher")
        family.load_encoders().teacher(["a cat"], [[picture()]])
    one_line(error)
    open_family(copied, conditioning()).load_encoders().student(["a cat"])  # what needs no VLM still works


def test_lost_encoder_weight_is_one_line(copied):
    from safetensors.torch import load_file, save_file

    file = copied / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    tensors.pop("layers.1.mlp.up_proj.weight")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match="1 weights of Qwen3Model are missing.*up_proj") as error:
        open_family(copied, conditioning()).load_encoders().student(["a cat"])
    one_line(error)


def test_folder_errors(copied, tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        open_family(tmp_path / "none", conditioning())
    with pytest.raises(UserError, match="model_index.json is missing"):
        open_family(tmp_path, conditioning())
    with pytest.raises(UserError, match="holds a ZImagePipeline"):
        open_family(copied, conditioning(), "flux2_klein")
    with pytest.raises(UserError, match="conditioning.context=edit"):
        open_family(copied, conditioning(context="edit"))
    shutil.rmtree(copied / "vae")
    with pytest.raises(UserError, match="part vae/ is missing"):
        open_family(copied, conditioning())
    index = copied / "model_index.json"
    index.write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    with pytest.raises(UserError, match="StableDiffusionPipeline is not supported"):
        open_family(copied, conditioning())


def test_release_frees_and_reloads(family):
    import weakref

    encoders = family.load_encoders()
    before = encoders.teacher(["a cat"], [[picture()]])[0]["text"]
    dead = [weakref.ref(encoders.text_encoder), weakref.ref(encoders.vlm.model)]
    encoders.release()
    assert [reference() for reference in dead] == [None, None]
    assert torch.equal(before, encoders.teacher(["a cat"], [[picture()]])[0]["text"])


def test_sharded_folder_loads_the_same(copied, family):
    from diffusers import ZImageTransformer2DModel

    shutil.rmtree(copied / "transformer")
    ZImageTransformer2DModel.from_pretrained(shared("zimage") / "transformer").save_pretrained(
        copied / "transformer", max_shard_size="300KB"
    )
    assert len(list((copied / "transformer").glob("*.safetensors"))) > 3
    loaded = open_family(copied, conditioning()).load_transformer(torch.float32).state_dict()
    for name, tensor in family.load_transformer(torch.float32).state_dict().items():
        assert torch.equal(loaded[name], tensor)


def test_training_does_not_write_into_the_source(copied):
    """Same-dtype weights are memory-mapped from the file: changing them in place must stay private."""
    file = copied / "transformer" / "diffusion_pytorch_model.safetensors"
    before = file.read_bytes()
    transformer = open_family(copied, conditioning()).load_transformer(torch.float32)
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.add_(1)
    assert file.read_bytes() == before
    assert all(p.requires_grad for p in transformer.parameters()) and not transformer.training


LOADED = """
import sys
from functools import partial
sys.path.insert(0, sys.argv[1])
import torch
from diffusers import ZImageTransformer2DModel
from dopsd_fast.families.registry import open_family
from dopsd_fast.settings.schema import ConditioningSettings

def memory(field):
    return int(next(line for line in open("/proc/self/status") if line.startswith(field)).split()[1]) * 1024

family = open_family(sys.argv[2], ConditioningSettings())
open("/proc/self/clear_refs", "w").write("5")  # the peak starts here
before = memory("VmRSS")
transformer = family.load_transformer(torch.bfloat16)
print(memory("VmHWM") - before, sum(p.nbytes for p in transformer.parameters()))
"""


def test_loading_holds_one_copy(copied):
    """fp32 shards cast to bf16: the peak is the bf16 model and one 12 MB shard, not two models."""
    from diffusers import ZImageTransformer2DModel

    shutil.rmtree(copied / "transformer")
    ZImageTransformer2DModel(
        in_channels=8, dim=640, n_layers=4, n_refiner_layers=1, n_heads=5, n_kv_heads=5, cap_feat_dim=32
    ).save_pretrained(copied / "transformer", max_shard_size="12MB")
    out = subprocess.run(
        [sys.executable, "-c", LOADED, ROOT, copied], capture_output=True, text=True, check=True, timeout=120
    ).stdout
    peak, size = map(int, out.split()[-2:])
    assert size > 50e6 and peak < 1.5 * size, (peak, size)


def test_full_size_on_the_meta_device(copied):
    (copied / "transformer" / "config.json").write_text(json.dumps({"_class_name": "ZImageTransformer2DModel"}))
    family = open_family(copied, conditioning())
    transformer = family.meta_transformer()
    parameters = sum(p.numel() for p in transformer.parameters())
    assert all(p.is_meta for p in transformer.parameters())
    config = LoraConfig(r=64, lora_alpha=128, target_modules=list(family.lora_targets))
    inject_adapter_in_model(config, transformer, low_cpu_mem_usage=True)
    adapted = [name for name, module in transformer.named_modules() if hasattr(module, "lora_A")]
    added = sum(p.numel() for name, p in transformer.named_parameters() if "lora_" in name)
    print(f"Z-Image: {parameters / 1e9:.3f} B parameters; LoRA rank 64: {len(adapted)} matrices, {added / 1e6:.1f} M")
    assert round(parameters / 1e9, 2) == 6.15
    blocks = 30 + 2 + 2
    assert len(adapted) == blocks * 7
    # per block 4 attention matrices 3840 x 3840 and 3 feed-forward matrices between 3840 and 10240
    assert added == blocks * 64 * (4 * (3840 + 3840) + 3 * (3840 + 10240))
