"""The image-seeing teacher's encoder: Qwen3-VL whose language model carries the pipeline's own text-encoder weights.

The ViT, the connector and the VLM's config (its rope included) stay the VLM's. The chat template is that of the VLM's
tokenizer, because the pipeline's (Qwen3) template drops image content. The image placeholder is expanded here,
because transformers' AutoProcessor needs torchvision. So does its AutoImageProcessor up to 5.17, whatever backend is asked for;
the class that it would choose for a Qwen3-VL needs Pillow alone, and is named here.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from PIL import Image

from dopsd_fast.conditioning.text import ATTENTION, load_pretrained, load_tokenizer, one_line
from dopsd_fast.errors import UserError

IMAGE_TOKEN = "<|image_pad|>"


def check_vlm_folder(folder: Path) -> None:
    """One clear line if `folder` is no Qwen3-VL, before anything large is read."""
    hint = "download Qwen3-VL-4B-Instruct and set conditioning.vlm_path"
    if not folder.is_dir():
        raise UserError(f"no vision-language model at {folder}: {hint}")
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / 'config.json'} is missing or not JSON: {hint}") from error
    if config.get("model_type") != "qwen3_vl":
        raise UserError(f"{folder}: model_type is {config.get('model_type')!r}, expected 'qwen3_vl': {hint}")


def overwrite_language_model(vlm, text_encoder, where: str) -> None:
    """Replaces the VLM's language weights by `text_encoder`'s, sharing memory; all names and shapes must match."""
    target, source = vlm.language_model.state_dict(), text_encoder.state_dict()
    lost, unknown = sorted(target.keys() - source.keys()), sorted(source.keys() - target.keys())
    misshapen = sorted(n for n in target.keys() & source.keys() if target[n].shape != source[n].shape)
    if lost or unknown or misshapen:
        parts = [
            f"{len(names)} {what} (first {names[0]})"
            for names, what in ((lost, "only in the VLM"), (unknown, "only in the text encoder"))
            if names
        ]
        if misshapen:
            first = misshapen[0]
            shapes = f"{[*target[first].shape]} and {[*source[first].shape]}"
            parts.append(f"{len(misshapen)} of another shape (first {first}: {shapes})")
        raise UserError(
            f"{where}: language weights do not match the pipeline's text encoder ({len(target)} and {len(source)} "
            f"tensors): {', '.join(parts)}; use the VLM of the same size as the text encoder"
        )
    vlm.language_model.load_state_dict(source, assign=True)
    vlm.language_model.requires_grad_(False)


class VisionLanguageEncoder:
    """`encode(prompt, images)` -> hidden_states[-2], `[tokens, D]`. Holds the VLM without its language head."""

    def __init__(self, folder: Path, text_encoder, min_pixels: int, max_pixels: int, max_tokens: int):
        from transformers import Qwen2VLImageProcessorPil, Qwen3VLForConditionalGeneration

        check_vlm_folder(folder)
        self.folder, self.max_tokens = folder, max_tokens
        self.tokenizer = load_tokenizer(folder)
        if IMAGE_TOKEN not in self.tokenizer.get_vocab():
            raise UserError(f"{folder}: the tokenizer has no image token {IMAGE_TOKEN}: it is not that of a Qwen3-VL")
        if self.tokenizer.chat_template is None:
            self.tokenizer.chat_template = _legacy_template(folder)
        try:
            self.processor = Qwen2VLImageProcessorPil.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise UserError(f"{folder}: cannot load its image processor: {one_line(error)}") from error
        self.size = {
            "shortest_edge": min_pixels or self.processor.size["shortest_edge"],
            "longest_edge": max_pixels or self.processor.size["longest_edge"],
        }
        options = dict(dtype=text_encoder.dtype, attn_implementation=ATTENTION)
        model = load_pretrained(Qwen3VLForConditionalGeneration, folder, **options).model
        self.image_id = model.config.image_token_id
        token = self.tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
        if token != self.image_id:
            raise UserError(f"{folder}: {IMAGE_TOKEN} is token {token} of the tokenizer, config.json says {self.image_id}")
        vision = model.config.vision_config
        if (self.processor.patch_size, self.processor.merge_size) != (vision.patch_size, vision.spatial_merge_size):
            raise UserError(f"{folder}: patch or merge size of the image processor and of config.json differ")
        overwrite_language_model(model, text_encoder, str(folder))
        self.model = model.to(text_encoder.device)

    @torch.no_grad()
    def encode(self, prompt: str, images: list[Image.Image]) -> torch.Tensor:
        """One user turn, the images and then the text, no system prompt; cut to `max_tokens` at the end of the text."""
        if IMAGE_TOKEN in prompt:
            raise UserError(f"a prompt contains {IMAGE_TOKEN}, which stands for an image: {prompt[:80]!r}")
        content = [{"type": "image"}] * len(images) + [{"type": "text", "text": prompt}]
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        pieces = text.split(IMAGE_TOKEN)
        if len(pieces) != len(images) + 1 or prompt.strip() not in text:
            raise UserError(f"{self.folder}: its chat template does not render {len(images)} image(s) and the prompt")
        inputs, counts = {}, []
        if images:
            features = self.processor(images=images, size=self.size, return_tensors="pt")
            inputs = {name: features[name].to(self.model.device) for name in ("pixel_values", "image_grid_thw")}
            counts = (features["image_grid_thw"].prod(-1) // self.processor.merge_size**2).tolist()
        text = pieces[0] + "".join(IMAGE_TOKEN * n + rest for n, rest in zip(counts, pieces[1:], strict=True))
        ids = self.tokenizer(text, truncation=True, max_length=self.max_tokens, return_tensors="pt").input_ids
        if int((ids == self.image_id).sum()) != sum(counts):
            raise UserError(
                f"{sum(counts)} image tokens and the turn around them exceed conditioning.max_vlm_tokens = "
                f"{self.max_tokens}: lower conditioning.max_pixels or use fewer images per record"
            )
        ids = ids.to(self.model.device)
        return self.model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=(ids == self.image_id).int(),
            output_hidden_states=True,
            use_cache=False,
            **inputs,
        ).hidden_states[-2][0]


def _legacy_template(folder: Path) -> str:
    try:
        return json.loads((folder / "chat_template.json").read_text())["chat_template"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder}: neither its tokenizer nor chat_template.json has a chat template") from error
