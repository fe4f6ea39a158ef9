"""The pipeline's text encoder (Qwen3) and tokenizer, called exactly as the diffusers pipelines call them."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from dopsd_fast.errors import UserError

TEXT_ENCODERS = ("Qwen3Model", "Qwen3ForCausalLM")
ATTENTION = "sdpa"
"""What transformers chooses by itself for the encoders. It is named because config.json could otherwise name code on a hub,
which transformers would fetch and run."""


def load_pretrained(loader, folder: Path, **options):
    """`loader.from_pretrained(folder)` from safetensors only, no hub; a missing or misfitting weight is a `UserError`.

    Language heads may be missing: nothing here uses them.
    """
    from safetensors import SafetensorError

    _refuse_other_formats(folder)
    try:
        model, info = loader.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True, **options
        )
    except (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError) as error:
        raise UserError(f"cannot load {loader.__name__} from {folder}: {one_line(error)}") from error
    wrong = sorted(str(n) for n in [*info["missing_keys"], *info["mismatched_keys"]] if "lm_head" not in str(n))
    if wrong:
        found = f"{len(wrong)} weights of {loader.__name__} are missing or misshapen, first {wrong[0]}"
        raise UserError(f"{folder}: {found}; the folder is incomplete, fetch it again")
    return model.eval().requires_grad_(False)


def _refuse_other_formats(folder: Path) -> None:
    """UserError where an index names a file that is no safetensors: transformers would unpickle it, whatever it is told."""
    for index in sorted(Path(folder).glob("*.safetensors.index.json")):
        try:
            names = {str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{index} is no index of weights: {one_line(error)}; fetch it again") from error
        if other := sorted(name for name in names if not name.endswith(".safetensors")):
            raise UserError(f"{index} names {other[0]}: weights are read from .safetensors files only, convert the model")


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def load_text_encoder(folder: Path, class_name: str, device, dtype: torch.dtype):
    """The encoder without its language head: a `Qwen3Model` in `dtype` on `device`."""
    import transformers

    if class_name not in TEXT_ENCODERS:
        raise UserError(f"{folder}: text encoder {class_name} is not supported, expected {' or '.join(TEXT_ENCODERS)}")
    loader = getattr(transformers, class_name)
    return load_pretrained(loader, folder, dtype=dtype, attn_implementation=ATTENTION).base_model.to(device)


def load_tokenizer(folder: Path):
    from transformers import AutoTokenizer

    try:
        # Unless it is told no, it asks on the terminal whether it may run a folder's own code.
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
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
