"""The pipeline's text encoder (Qwen3) and tokenizer, called exactly as the diffusers pipelines call them."""

from __future__ import annotations

from pathlib import Path

import torch

from ..errors import UserError

TEXT_ENCODERS = ("Qwen3Model", "Qwen3ForCausalLM")


def load_pretrained(loader, folder: Path, **options):
    """`loader.from_pretrained(folder)` from safetensors only, no hub; a missing or misfitting weight is a `UserError`.

    Language heads may be missing: nothing here uses them.
    """
    from safetensors import SafetensorError

    try:
        model, info = loader.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True, **options
        )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise UserError(f"cannot load {loader.__name__} from {folder}: {one_line(error)}") from error
    wrong = sorted(str(n) for n in [*info["missing_keys"], *info["mismatched_keys"]] if "lm_head" not in str(n))
    if wrong:
        found = f"{len(wrong)} weights of {loader.__name__} are missing or misshapen, first {wrong[0]}"
        raise UserError(f"{folder}: {found}; the folder is incomplete, fetch it again")
    return model.eval().requires_grad_(False)


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def load_text_encoder(folder: Path, class_name: str, device, dtype: torch.dtype):
    """The encoder without its language head: a `Qwen3Model` in `dtype` on `device`."""
    import transformers

    if class_name not in TEXT_ENCODERS:
        raise UserError(f"{folder}: text encoder {class_name} is not supported, expected {' or '.join(TEXT_ENCODERS)}")
    return load_pretrained(getattr(transformers, class_name), folder, dtype=dtype).base_model.to(device)


def load_tokenizer(folder: Path):
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot load the tokenizer from {folder}: {one_line(error)}") from error


@torch.no_grad()
def encode_prompt(
    encoder, tokenizer, prompt: str, layers: tuple[int, ...], thinking: bool, max_tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states of one prompt as one user turn, padded to `max_tokens` as both pipelines do.

    Returns (states `[max_tokens, len(layers), D]` in the encoder's dtype, mask `[max_tokens]` bool), on its device. One
    prompt a call: the result does not depend on what else is encoded.
    """
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=thinking
    )
    inputs = tokenizer(text, padding="max_length", max_length=max_tokens, truncation=True, return_tensors="pt")
    mask = inputs.attention_mask.to(encoder.device).bool()
    states = encoder(
        input_ids=inputs.input_ids.to(encoder.device), attention_mask=mask, output_hidden_states=True, use_cache=False
    ).hidden_states
    return torch.stack([states[layer][0] for layer in layers], dim=1), mask[0]
