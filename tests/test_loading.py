"""What a model folder that somebody else made may do: weights come from safetensors, no code of it runs, nothing is fetched."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from dopsd_fast.conditioning.text import load_pretrained, load_text_encoder, load_tokenizer
from dopsd_fast.conditioning.vlm import VisionLanguageEncoder
from dopsd_fast.errors import UserError
from dopsd_fast.nano.build import HERE

LOADERS = {
    "text_encoder": ("transformers", "Qwen3Model"),
    "vlm": ("transformers", "Qwen3VLForConditionalGeneration"),
    "transformer": ("diffusers", "ZImageTransformer2DModel"),
    "vae": ("diffusers", "AutoencoderKL"),
}


def copy(part: str, folder: Path) -> Path:
    return Path(shutil.copytree(HERE / "pipeline" / part, folder / part))


def change(file: Path, **more) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | more))


def load(part: str, folder: Path):
    library, name = LOADERS[part]
    return load_pretrained(getattr(__import__(library), name), folder)


class Owned:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return open, (str(self.mark), "w")


@pytest.mark.parametrize("part", LOADERS)
@pytest.mark.parametrize("how", ["beside", "named so", "indexed"])
def test_weights_are_never_unpickled(part, how, tmp_path, monkeypatch):
    folder, mark = copy(part, tmp_path), tmp_path / "owned"
    weights = next(folder.glob("*.safetensors"))
    weights.unlink()
    pickle = {"beside": folder / ("pytorch_model.bin" if part in ("text_encoder", "vlm") else f"{weights.stem}.bin"),
              "named so": weights, "indexed": folder / "weights.bin"}[how]
    torch.save({"weight": Owned(mark)}, pickle)
    if how == "indexed":
        index = {"metadata": {"total_size": 1}, "weight_map": {"weight": "weights.bin"}}
        (folder / f"{weights.name}.index.json").write_text(json.dumps(index))
    read: list = []
    monkeypatch.setattr(torch, "load", lambda *given, **named: read.append(given))
    with pytest.raises(UserError) as caught:
        load(part, folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
    assert read == [] and not mark.exists()
    if how == "indexed":
        assert "weights.bin" in str(caught.value) and ".safetensors files only" in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}', '{"weight_map": {}}'])
def test_an_index_that_is_none_is_one_line(text, tmp_path):
    folder = copy("text_encoder", tmp_path)
    weights = next(folder.glob("*.safetensors"))
    weights.rename(folder / "other.safetensors")
    (folder / f"{weights.name}.index.json").write_text(text)
    with pytest.raises(UserError, match=str(folder)):
        load("text_encoder", folder)


@pytest.mark.parametrize("where", ["code", "someone/else--code"])
def test_a_tokenizers_code_is_refused_without_a_question(where, tmp_path, monkeypatch):
    folder, mark = copy("tokenizer", tmp_path), tmp_path / "owned"
    (folder / "code.py").write_text(f"open({str(mark)!r}, 'w')\n")
    change(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": [f"{where}.T", f"{where}.T"]}, tokenizer_class="T")
    asked: list = []
    monkeypatch.setattr("builtins.input", lambda *given: asked.append(given) or "y")
    with pytest.raises(UserError, match=str(folder)):
        load_tokenizer(folder)
    assert asked == [] and not mark.exists()


def test_attention_code_that_a_config_names_on_a_hub_is_not_looked_for(tmp_path):
    text, vlm = copy("text_encoder", tmp_path), copy("vlm", tmp_path)
    for folder in (text, vlm):
        config = json.loads((folder / "config.json").read_text())
        for table in (config, *(value for value in config.values() if isinstance(value, dict))):
            table |= {"attn_implementation": "someone/attention", "_attn_implementation": "someone/attention"}
        (folder / "config.json").write_text(json.dumps(config))
    encoder = load_text_encoder(text, "Qwen3Model", "cpu", torch.float32)
    seer = VisionLanguageEncoder(vlm, encoder, 0, 0, 512)
    configs = [encoder.config, seer.model.config, seer.model.config.vision_config, seer.model.config.text_config]
    assert [config._attn_implementation for config in configs] == ["sdpa"] * 4
    usual = load_text_encoder(HERE / "pipeline" / "text_encoder", "Qwen3Model", "cpu", torch.float32)
    tokens = torch.arange(8)[None]
    assert torch.equal(encoder(tokens).last_hidden_state, usual(tokens).last_hidden_state)


QUANTISED = [("text_encoder", "gptq"), ("text_encoder", "bitsandbytes"), ("transformer", "bitsandbytes")]


@pytest.mark.parametrize("part, method", QUANTISED)
def test_a_quantised_folder_whose_library_is_missing_is_one_line(part, method, tmp_path):
    folder = copy(part, tmp_path)
    change(folder / "config.json", quantization_config={"quant_method": method, "load_in_4bit": True, "bits": 4})
    with pytest.raises(UserError, match=f"from {folder}"):
        load(part, folder)


def test_pictures_are_read_without_torchvision(monkeypatch):
    """Up to 5.17 transformers' AutoImageProcessor raises where torchvision is missing, whatever backend it is asked for."""
    import transformers

    class Auto:
        @classmethod
        def from_pretrained(cls, *given, **named):
            raise ImportError("AutoImageProcessor requires the Torchvision library")

    monkeypatch.setattr(transformers, "AutoImageProcessor", Auto)
    encoder = load_text_encoder(HERE / "pipeline" / "text_encoder", "Qwen3Model", "cpu", torch.float32)
    assert VisionLanguageEncoder(HERE / "pipeline" / "vlm", encoder, 0, 0, 512).processor.patch_size == 8
