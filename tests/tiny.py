"""Tiny random pipelines of the real classes, in the ordinary diffusers and transformers layouts, seeded.

`make_zimage` and `make_flux2_klein` write complete folders that `from_pretrained` loads. Every parameter is drawn with
a size that matters (also pad tokens, norms and batch-norm statistics): a zero would hide an error behind it.
"""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dopsd_fast.distributed.engine import Engine
from dopsd_fast.distributed.registry import make_engine
from dopsd_fast.families.build import build_pair
from dopsd_fast.pair.student_teacher import Pair
from dopsd_fast.settings.deepspeed_dict import deepspeed_config
from dopsd_fast.settings.schema import Settings

SPECIAL_TOKENS = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
    "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>", "<think>", "</think>",
)
VOCAB_SIZE = 272  # 256 bytes + the special tokens, rounded up

# As Qwen3's template: one turn after the other; `enable_thinking=False` opens the answer with an empty thought. List
# content (text and image parts) as in Qwen3-VL's template.
CHAT_TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.content is string %}
        {{- message.content }}
    {%- else %}
        {%- for part in message.content %}
            {%- if part.type == 'image' %}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' }}
            {%- else %}
                {{- part.text }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""


def pair_of(family: Any, settings: Settings, dtype: torch.dtype) -> Pair:
    """The pair that a trainer with these settings builds."""
    return build_pair(family, settings.backbone, settings.adapter, settings.teacher, settings.train, dtype)


def engine_of(pair: Pair, settings: Settings) -> Engine:
    """The engine that a trainer with these settings makes."""
    return make_engine(pair, settings.train, settings.teacher, settings.deepspeed, deepspeed_config(settings))


def make_tokenizer(image_tokens: bool = True):
    """Byte-level Qwen2 tokenizer without merges; `image_tokens=False` leaves the vision tokens out."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import Qwen2Tokenizer

    names = [t for t in SPECIAL_TOKENS if image_tokens or not any(w in t for w in ("vision", "image", "video"))]
    vocab = {character: i for i, character in enumerate(sorted(ByteLevel.alphabet()))}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[], eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.add_special_tokens({"additional_special_tokens": names})
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@torch.no_grad()
def randomise(model: nn.Module, seed: int) -> nn.Module:
    """Draws every parameter: matrices with gain 0.8, norm weights around 1, biases and pad tokens small but not 0."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        draw = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:
            draw = 0.1 * draw if name.endswith("bias") else 1 + 0.1 * draw
        elif "embed_tokens" not in name and "pad_token" not in name:
            draw = draw * (0.8 / parameter[0].numel() ** 0.5)
        parameter.copy_(draw)
    return model.eval()


def text_config(layers: int, hidden: int, heads: int = 2) -> dict:
    return dict(
        vocab_size=VOCAB_SIZE, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=1, head_dim=16, max_position_embeddings=4096,
    )


def make_vae(flux2: bool, seed: int):
    """2 blocks (8 channels wide, one halving): 8 latent channels, or 4 (16 after 2x2 patching) for FLUX.2."""
    from diffusers import AutoencoderKL, AutoencoderKLFlux2

    common = dict(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, sample_size=32, mid_block_add_attention=False,
    )
    if not flux2:
        vae = AutoencoderKL(
            latent_channels=8, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False,
            use_post_quant_conv=False, **common,
        )
        return randomise(vae, seed)
    vae = randomise(AutoencoderKLFlux2(latent_channels=4, **common), seed)
    generator = torch.Generator().manual_seed(seed + 1)
    vae.bn.running_mean.copy_(0.3 * torch.randn(16, generator=generator))
    vae.bn.running_var.copy_(0.5 + torch.rand(16, generator=generator))
    return vae


def make_vlm(folder: Path, seed: int = 0, layers: int = 3, hidden: int = 32, dtype=torch.float32, tokenizer=None):
    """Qwen3-VL (2 ViT layers, one deepstack tap), tokenizer and PIL image processor in `folder`."""
    from transformers import Qwen2VLImageProcessorPil, Qwen3VLConfig, Qwen3VLForConditionalGeneration

    tokenizer = tokenizer or make_tokenizer()
    config = Qwen3VLConfig(
        text_config=text_config(layers, hidden)
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5, "mrope_section": [4, 2, 2]}},
        vision_config=dict(
            depth=2, hidden_size=32, intermediate_size=48, num_heads=2, patch_size=8, spatial_merge_size=2,
            temporal_patch_size=2, out_hidden_size=hidden, num_position_embeddings=64, deepstack_visual_indexes=[0],
        ),
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vlm = randomise(Qwen3VLForConditionalGeneration(config), seed + 40)
    vlm.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessorPil(
        patch_size=8, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 32 * 32, "longest_edge": 64 * 64},
        image_mean=[0.5] * 3, image_std=[0.5] * 3,
    ).save_pretrained(folder)


def make_zimage(folder, seed: int = 0, dtype=torch.float32) -> Path:
    """Writes a Z-Image pipeline (transformer dim 48, 2 + 1 + 1 layers; latents 8 x h/2 x w/2) with `vlm/`."""
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
    from transformers import Qwen3Config, Qwen3Model

    folder = Path(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = ZImageTransformer2DModel(
            in_channels=8, dim=48, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=32,
            axes_dims=[8, 8, 8], axes_lens=[1024, 64, 64],
        )
        encoder = Qwen3Model(Qwen3Config(**text_config(3, 32), tie_word_embeddings=True))
        pipeline = ZImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=make_vae(False, seed + 10).to(dtype),
            text_encoder=randomise(encoder, seed + 20).to(dtype),
            tokenizer=make_tokenizer(),
            transformer=randomise(transformer, seed + 30).to(dtype),
        )
    pipeline.save_pretrained(folder)
    make_vlm(folder / "vlm", seed=seed, dtype=dtype)
    return folder


def make_flux2_klein(folder, seed: int = 0, dtype=torch.float32) -> Path:
    """Writes a FLUX.2-klein pipeline (2 double and 2 single blocks, dim 48; latents 16 x h/4 x w/4); returns it.

    The encoder has 28 layers because the pipeline reads its hidden states 9, 18 and 27.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Transformer2DModel
    from transformers import Qwen3Config, Qwen3ForCausalLM

    folder = Path(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = Flux2Transformer2DModel(
            in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=24, num_attention_heads=2,
            joint_attention_dim=48, timestep_guidance_channels=32, axes_dims_rope=(6, 6, 6, 6), guidance_embeds=False,
        )
        encoder = Qwen3ForCausalLM(Qwen3Config(**text_config(28, 16), tie_word_embeddings=True))
        pipeline = Flux2KleinPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
            vae=make_vae(True, seed + 10).to(dtype),
            text_encoder=randomise(encoder, seed + 20).to(dtype),
            tokenizer=make_tokenizer(),
            transformer=randomise(transformer, seed + 30).to(dtype),
            is_distilled=True,
        )
    pipeline.save_pretrained(folder)
    return folder


@functools.cache
def shared(kind: str) -> Path:
    """The folder of `make_<kind>` at seed 0, built once per process in a temporary folder. Do not write into it."""
    makers = {"zimage": make_zimage, "flux2_klein": make_flux2_klein}
    folder = Path(tempfile.mkdtemp(prefix="tiny-")) / kind
    atexit.register(shutil.rmtree, folder.parent, ignore_errors=True)
    return makers[kind](folder)
