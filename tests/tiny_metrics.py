"""An evaluation folder with tiny random networks of the real classes. No number from it says anything about pictures."""

import json

import torch
from torch import Tensor, nn

from tests import tiny

TEXTS = ["a red ball", "two cats", "fog over a lake", "a cup"]
QUESTIONS = tuple(f"Is there {thing}?" for thing in ("a ball", "fog", "a cat in a hat", "snow", "it", "a big old tree"))
UNPOOLED = {"vit": {"add_pooling_layer": False}}


class TinyInception(nn.Module):
    """12 features: means of the quadrants; without `return_features` something else."""

    def forward(self, img: Tensor, return_features: bool = False) -> Tensor:
        assert img.dtype == torch.uint8 and img.shape[1] == 3
        features = nn.functional.adaptive_avg_pool2d(img.float(), [2, 2]).flatten(1)
        return features if return_features else features[:, :5] + 1


class TinyVgg(nn.Module):
    """Every pixel, scaled; with `resize_images` or without `return_lpips` something else."""

    def forward(self, img: Tensor, resize_images: bool = True, return_lpips: bool = False) -> Tensor:
        assert img.dtype == torch.float32
        if resize_images:
            img = nn.functional.interpolate(img, [7, 7])
        return img.flatten(1) / 64 if return_lpips else img.mean([2, 3])


def make_dino(folder, kind="dinov2"):
    import transformers as t

    size = dict(hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8,
                num_register_tokens=1, hidden_sizes=[8, 8, 16, 24], depths=[1, 1, 1, 1])
    model = t.AutoModel.from_config(t.AutoConfig.for_model(kind, **size), **UNPOOLED.get(kind, {}))
    tiny.randomise(model, 1).save_pretrained(folder)
    if kind.startswith("dinov3"):
        facts = dict(image_processor_type="DINOv3ViTImageProcessorFast", size={"height": 32, "width": 32}, resample=2,
                     image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225], rescale_factor=1 / 255)
        (folder / "preprocessor_config.json").write_text(json.dumps(facts))
    else:
        t.BitImageProcessorPil(size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)


def make_clip(folder):
    import transformers as t
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = t.CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[])
    size = dict(hidden_size=24, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    text = dict(vocab_size=len(words), max_position_embeddings=24, eos_token_id=len(words) - 1, bos_token_id=len(words) - 2)
    config = t.CLIPConfig(text_config=size | text, vision_config=size | dict(image_size=32, patch_size=8), projection_dim=16)
    model = t.CLIPModel(config)
    scale = model._parameters.pop("logit_scale")  # a scalar, which cannot be drawn
    tiny.randomise(model, 20).logit_scale = scale
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    t.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)


def yes_no_tokenizer():
    """tiny's tokenizer, with single tokens for yes, no, and both after a space."""
    tokenizer = tiny.make_tokenizer()
    tokenizer.add_tokens(["yes", "no", " yes", " no"])
    return tokenizer


def make_all(folder):
    """Everything that the metrics can use."""
    make_dino(folder / "dino")
    make_clip(folder / "clip")
    torch.jit.script(TinyInception()).save(str(folder / "inception.pt"))
    torch.jit.script(TinyVgg()).save(str(folder / "lpips.pt"))
    tiny.make_vlm(folder / "vqa", seed=0, tokenizer=yes_no_tokenizer())
    lines = [json.dumps({"prompt": text, "questions": QUESTIONS}) for text in TEXTS]
    (folder / "probes.jsonl").write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    return folder
