"""The parts of the embedded pipeline, untrained: real diffusers and transformers classes at toy sizes."""

from __future__ import annotations

import json
from typing import Any

from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImageTransformer2DModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3Model, Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from dopsd_fast.nano import world

SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<think>",
    "</think>",
]
CHAT_TEMPLATE = """\
{%- for message in messages %}{{ '<|im_start|>' + message.role + '\\n' }}
{%- if message.content is string %}{{ message.content }}{% else %}
{%- for part in message.content %}
{%- if part.type == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}{% else %}{{ part.text }}{% endif %}
{%- endfor %}{% endif %}{{ '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}"""
TEXT: dict[str, Any] = dict(
    hidden_size=128,
    intermediate_size=320,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=2048,
    tie_word_embeddings=True,
    rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
)
VISION: dict[str, Any] = dict(
    depth=2,
    hidden_size=96,
    intermediate_size=256,
    num_heads=3,
    patch_size=8,
    spatial_merge_size=1,
    temporal_patch_size=2,
    out_hidden_size=TEXT["hidden_size"],
    num_position_embeddings=16,
    deepstack_visual_indexes=[0],
)


def tokenizer() -> Qwen2Tokenizer:
    """Byte-level BPE over the world's captions without their style tags, so that a tag is always `[`, letter, `]`."""
    scenes = world.sample_scenes("original", 2000, seed=0)
    byte_level = Tokenizer(models.BPE())
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()))
    byte_level.train_from_iterator((world.caption(scene, i % 3) for i, scene in enumerate(scenes)), trainer)
    state = json.loads(byte_level.to_str())["model"]
    out = Qwen2Tokenizer(
        vocab=state["vocab"],
        merges=[tuple(merge) for merge in state["merges"]],
        unk_token=None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=SPECIAL,
    )
    out.chat_template = CHAT_TEMPLATE
    out.model_max_length = TEXT["max_position_embeddings"]
    return out


def vlm(tok) -> Qwen3VLForConditionalGeneration:
    ids = {
        name: tok.convert_tokens_to_ids(token)
        for name, token in {
            "image_token_id": "<|image_pad|>",
            "video_token_id": "<|video_pad|>",
            "vision_start_token_id": "<|vision_start|>",
            "vision_end_token_id": "<|vision_end|>",
        }.items()
    }
    text = {**TEXT, "vocab_size": len(tok)}
    text["rope_parameters"] = {**TEXT["rope_parameters"], "mrope_section": [6, 5, 5], "mrope_interleaved": True}
    return Qwen3VLForConditionalGeneration(
        Qwen3VLConfig(text_config=text, vision_config=VISION, tie_word_embeddings=True, **ids)
    )


def text_encoder(tok) -> Qwen3Model:
    return Qwen3Model(Qwen3Config(vocab_size=len(tok), **TEXT))


def image_processor() -> Qwen2VLImageProcessorPil:
    pixels = world.SIDE**2
    return Qwen2VLImageProcessorPil(
        patch_size=VISION["patch_size"],
        merge_size=VISION["spatial_merge_size"],
        temporal_patch_size=VISION["temporal_patch_size"],
        size={"shortest_edge": pixels, "longest_edge": pixels},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )


def transformer() -> ZImageTransformer2DModel:
    return ZImageTransformer2DModel(
        in_channels=8,
        dim=144,
        n_layers=6,
        n_refiner_layers=1,
        n_heads=4,
        n_kv_heads=4,
        cap_feat_dim=TEXT["hidden_size"],
        axes_dims=[12, 12, 12],
        axes_lens=[1024, 512, 512],
    )


def vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[24, 48],
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=8,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
        sample_size=world.SIDE,
    )


def scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0, use_dynamic_shifting=False)
