"""The published step's encoders for a model whose weights are drawn at random: their full size and cost, nothing to download.

    Qwen3-4B      the student's text encoder: 4.022 B parameters
    Qwen3-VL-4B   the teacher's: a language part of the same shape and a vision tower of 0.415 B, 4.438 B parameters

The published step holds both whole, the language weights twice. Left out, since there are no texts and pictures: the
tokenizer and the image processor, which run on the CPU.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bench.models import WIDE, Model, building, draw_weights
from bench.references.reference_eager import Condition, vision_features

LANGUAGE = dict(
    vocab_size=151936, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32,
    num_key_value_heads=8, head_dim=128, max_position_embeddings=262144, tie_word_embeddings=True,
)
VISION = dict(
    depth=24, hidden_size=1024, intermediate_size=4096, num_heads=16, out_hidden_size=2560, patch_size=16,
    spatial_merge_size=2, temporal_patch_size=2, num_position_embeddings=2304, deepstack_visual_indexes=[5, 11, 17],
)
SMALL_LANGUAGE = LANGUAGE | dict(
    vocab_size=512, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16
)
SMALL_VISION = VISION | dict(
    depth=2, hidden_size=64, intermediate_size=128, num_heads=4, num_position_embeddings=64, deepstack_visual_indexes=[0]
)
IMAGE_SHARE = 0.75
"""Of the teacher's tokens: 576 of 768 are a picture of 768x768 pixels, the most that recipes/zimage_turbo_lora.toml shows."""
OPENING = 4
"""Tokens of the turn before its picture."""


class RandomEncoders:
    """`student` and `teacher` as those of `ReferenceEncoders`, from random weights in `model.dtype` on `model.device`.

    A prompt decides its token ids, of which the student has `standard.text_tokens` (padded to `max_tokens`, as the pipeline
    pads) and the teacher `standard.teacher_tokens`, its picture's included. It decides the picture's pixels, too: `images` is
    not looked at."""

    def __init__(self, model: Model) -> None:
        self.device, self.dtype, self.standard = model.device, model.dtype, model.standard
        width, published = model.config["cap_feat_dim"], model.config["dim"] >= WIDE
        self.text_encoder = text_encoder(width, published, self.device, self.dtype)
        self.vlm = vision_language_model(width, published, self.device, self.dtype)
        draw = torch.Generator(self.device).manual_seed(0)
        for part in self.modules():
            draw_weights(part, draw)
        side = math.isqrt(int(IMAGE_SHARE * self.standard.teacher_tokens))
        merge = self.vlm.config.vision_config.spatial_merge_size
        self.image_tokens = side**2
        self.image_grid = torch.tensor([[1, merge * side, merge * side]])

    def modules(self) -> list[nn.Module]:
        return [self.text_encoder, self.vlm]

    @torch.no_grad()
    def student(self, prompts: Sequence[str], max_tokens: int = 512) -> list[Condition]:
        """Features `[standard.text_tokens, D]` of each prompt, all prompts in one call."""
        tokens = min(self.standard.text_tokens, max_tokens)
        ids = torch.zeros(len(prompts), max_tokens, dtype=torch.int64)
        for row, prompt in zip(ids, prompts, strict=True):
            row[:tokens] = self._ids(prompt, tokens)
        mask = (torch.arange(max_tokens) < tokens).expand(len(prompts), -1).to(self.device)
        out = self.text_encoder(input_ids=ids.to(self.device), attention_mask=mask, output_hidden_states=True)
        return [Condition(states[kept]) for states, kept in zip(out.hidden_states[-2], mask, strict=True)]

    @torch.no_grad()
    def teacher(self, prompts: Sequence[str], images: Sequence) -> list[Condition]:
        """Features `[standard.teacher_tokens, D]` of each picture and its prompt, one call each."""
        conditions = []
        for prompt, _ in zip(prompts, images, strict=True):
            ids = self._ids(prompt, self.standard.teacher_tokens)
            ids[OPENING : OPENING + self.image_tokens] = self.vlm.config.image_token_id
            pixels, grid = self._pixels(prompt).to(self.device), self.image_grid.to(self.device)
            conditions.append(vision_features(self.vlm, ids[None].to(self.device), pixels, grid))
        return conditions

    def _ids(self, prompt: str, tokens: int) -> Tensor:
        return torch.randint(0, self.vlm.config.image_token_id - 8, (tokens,), generator=seeded(prompt))

    def _pixels(self, prompt: str) -> Tensor:
        """Patches `[patches, channels * frames * height * width]` as the image processor hands them out, in -1 ... 1."""
        vision = self.vlm.config.vision_config
        size = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        patches = int(self.image_grid.prod())
        return torch.rand(patches, size, generator=seeded(prompt)) * 2 - 1


def seeded(prompt: str) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(prompt.encode()))


def text_encoder(width: int, published: bool, device: torch.device | str, dtype: torch.dtype) -> Any:
    """Qwen3 without its language head, features `width` wide; nothing of it is ever on another device."""
    from transformers import Qwen3Config, Qwen3Model

    shape = (LANGUAGE if published else SMALL_LANGUAGE) | {"hidden_size": width}
    with building(device, dtype):
        model = Qwen3Model(Qwen3Config(**shape, rope_parameters={"rope_type": "default", "rope_theta": 1e6}))
    return model.eval().requires_grad_(False)


def vision_language_model(width: int, published: bool, device: torch.device | str, dtype: torch.dtype) -> Any:
    """Qwen3-VL with its language head, which is tied to the embedding."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    text, vision, sections, first = LANGUAGE, VISION, [24, 20, 20], 151652
    if not published:
        text, vision, sections, first = SMALL_LANGUAGE, SMALL_VISION, [4, 2, 2], SMALL_LANGUAGE["vocab_size"] - 4
    rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_interleaved": True, "mrope_section": sections}
    config = Qwen3VLConfig(
        text_config=text | {"hidden_size": width, "rope_parameters": rope}, vision_config=vision | {"out_hidden_size": width},
        vision_start_token_id=first, vision_end_token_id=first + 1, video_token_id=first + 2, image_token_id=first + 3,
        tie_word_embeddings=True,
    )
    with building(device, dtype):
        model = Qwen3VLForConditionalGeneration(config)
    return model.eval().requires_grad_(False)
