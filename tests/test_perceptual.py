"""The metrics by networks from a local folder, on tiny networks of the real classes, against transformers', torchmetrics'
and numpy's own arithmetic. No number here says anything about pictures."""

import json
import math
import shutil
import socket
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bench.reproduce import perceptual
from bench.reproduce.perceptual import Metrics, Probe, read_probes
from dopsd_fast.errors import UserError
from dopsd_fast.nano.measure import frechet
from tests import tiny
from tests.tiny_metrics import (
    QUESTIONS,
    TEXTS,
    UNPOOLED,
    TinyInception,
    TinyVgg,
    make_all,
    make_dino,
    yes_no_tokenizer,
)

ALL = ["dino_distance", "clip_score", "fid", "lpips", "probes"]
class Grid(nn.Module):
    def forward(self, img: Tensor, return_features: bool = False) -> Tensor:
        return img.float()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with everything; not to be changed."""
    return make_all(tmp_path_factory.mktemp("eval"))


@pytest.fixture(scope="module")
def metrics(whole):
    return Metrics(whole, "cpu")


def picture(seed: int, width: int = 48, height: int = 40, mode: str = "RGB") -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (6, 5, len(Image.new(mode, (1, 1)).getbands())), dtype=np.uint8)
    return Image.fromarray(noise.squeeze(), mode).resize((width, height), Image.Resampling.BILINEAR)


def pictures(count: int, first: int = 0) -> list[Image.Image]:
    return [picture(first + i) for i in range(count)]


def only(folder, target, *names):
    """A folder with these of `folder`'s entries."""
    target.mkdir(exist_ok=True)
    for name in names:
        (shutil.copytree if (folder / name).is_dir() else shutil.copy)(folder / name, target / name)
    return target


def scores(metrics, *arguments) -> dict:
    return {scored.name: scored for scored in metrics.score(*arguments)}


def cosine(a, b) -> float:
    a, b = (np.asarray(v, dtype=np.float64).ravel() for v in (a, b))
    return float(a @ b / math.sqrt((a @ a) * (b @ b)))


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dinov2", "vit", "dinov3_vit", "dinov3_convnext"])
def test_dino_distance_is_that_of_transformers_own_features(tmp_path, kind):
    import transformers as t

    make_dino(tmp_path / "dino", kind)
    found, goal = pictures(3), pictures(3, first=10)
    scored = Metrics(tmp_path, "cpu").score(found, goal, TEXTS[:3])[0]
    model = t.AutoModel.from_pretrained(tmp_path / "dino", **UNPOOLED.get(kind, {})).eval()

    def features(image):
        if not kind.startswith("dinov3"):
            pixels = t.BitImageProcessorPil.from_pretrained(tmp_path / "dino")(images=image, return_tensors="pt").pixel_values
            return model(pixels).last_hidden_state[0, 0]
        # rescaled first, then resized with antialiasing: by Pillow, a channel of floats at a time
        channels = [Image.fromarray(c) for c in np.moveaxis(np.asarray(image, dtype=np.float32) / 255, 2, 0).copy()]
        small = np.stack([np.asarray(c.resize((32, 32), Image.Resampling.BILINEAR)) for c in channels])
        mean, std = (np.array(v, dtype=np.float32)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        return model(torch.from_numpy((small - mean) / std)[None]).pooler_output[0]

    expected = [1 - cosine(features(a), features(b)) for a, b in zip(found, goal)]
    assert scored.values == pytest.approx(expected, rel=1e-3) and min(expected) > 1e-4
    assert scored.value == pytest.approx(sum(expected) / 3, rel=1e-3) and scored.better == "lower"


def own_clip(folder):
    """transformers' model, with the results that torchmetrics expects, and its processors as one function."""
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

    model, tokenizer, pixels = (c.from_pretrained(folder) for c in (CLIPModel, CLIPTokenizer, CLIPImageProcessorPil))

    def process(images=None, text=None, **options):
        return tokenizer(text, **options) if images is None else pixels(images=images, return_tensors="pt")

    adapter = SimpleNamespace(config=model.config, to=lambda device: adapter)
    adapter.get_image_features = lambda pixels: model.get_image_features(pixels).pooler_output
    adapter.get_text_features = lambda *ids_and_mask: model.get_text_features(*ids_and_mask).pooler_output
    return adapter, process


@torch.no_grad()
def test_clip_score_is_that_of_torchmetrics_on_transformers_own_features(whole, metrics):
    from torchmetrics.functional.multimodal import clip_score

    own = own_clip(whole / "clip")
    found, texts = pictures(8), TEXTS + ["x", "y z", "rain", "a b c"]
    scored = scores(metrics, found, found, texts)["clip_score"]
    tensors = [torch.from_numpy(np.asarray(p).copy()).permute(2, 0, 1) for p in found]
    expected = [clip_score([x], [text], lambda: own).item() for x, text in zip(tensors, texts)]
    assert scored.values == pytest.approx(expected, abs=1e-3) and scored.value == pytest.approx(np.mean(expected), abs=1e-3)
    assert min(scored.values) == 0 < max(scored.values) and scored.better == "higher" and scored.note == ""


@torch.no_grad()
def test_a_long_prompt_is_cut_and_keeps_its_end_token(whole, metrics):
    model, process = own_clip(whole / "clip")
    long = "abcdefgh ijkl mnopqrstuvw xyz " * 3
    ids = process(text=long).input_ids
    text = model.get_text_features(torch.tensor([[*ids[:23], ids[-1]]]))
    scored = scores(metrics, pictures(6), pictures(6), [long] * 5 + ["x"])["clip_score"]
    images = model.get_image_features(process(images=pictures(5)).pixel_values)
    assert len(ids) > 24 and max(scored.values[:5]) > 0 and scored.note.startswith("5 of 6 prompts cut to the 24 tokens")
    assert scored.values[:5] == pytest.approx([max(100 * cosine(i, text), 0) for i in images], abs=1e-3)


def quadrants(images) -> np.ndarray:
    """What TinyInception gives for pictures of 48 x 40, by numpy: [N, 12]."""
    parts = np.stack([np.asarray(p, dtype=np.float64) for p in images]).reshape(-1, 2, 20, 2, 24, 3)
    return np.moveaxis(parts.mean((2, 4)), -1, 1).reshape(-1, 12)


@pytest.mark.parametrize("count", [40, 7])
def test_fid_is_the_frechet_distance_of_the_features(metrics, count):
    """The root's trace by singular values: tr (S_a S_b)^(1/2) = sum of those of A B^T / sqrt((n-1)(m-1)), A, B centred."""
    found, goal = pictures(count), pictures(count, first=100)
    a, b = quadrants(found), quadrants(goal)
    centred = a - a.mean(0), b - b.mean(0)
    root = np.linalg.svd(centred[0] @ centred[1].T / (count - 1), compute_uv=False).sum()
    traces = sum((c**2).sum() / (count - 1) for c in centred)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + traces - 2 * root
    scored = scores(metrics, found, goal, TEXTS[:1] * count)["fid"]
    assert scored.value == pytest.approx(expected, rel=1e-5) and expected > 10
    assert scored.value == pytest.approx(frechet(torch.from_numpy(a), torch.from_numpy(b)), rel=1e-5)
    assert scored.values is None and scored.better == "lower"
    assert ("7 pictures for 12 feature dimensions" in scored.note) == (count == 7) and bool(scored.note) == (count == 7)


def test_lpips_is_the_squared_distance_at_the_targets_size(metrics):
    found, goal = pictures(3), [picture(10), picture(11, 56, 24), picture(12)]
    arrays = [np.asarray(p.resize(t.size, Image.Resampling.LANCZOS), dtype=np.float64) for p, t in zip(found, goal)]
    expected = [((a - np.asarray(t)) ** 2).sum() / 64**2 for a, t in zip(arrays, goal)]
    scored = scores(metrics, found, goal, TEXTS[:3])["lpips"]
    assert scored.values == pytest.approx(expected, rel=1e-5) and scored.better == "lower"


def test_a_set_against_itself(metrics):
    same = pictures(6)
    found = scores(metrics, same, same, [TEXTS[0]] * 6)
    assert list(found) == ALL[:-1] and found["lpips"].values == [0.0] * 6
    assert found["dino_distance"].values == pytest.approx([0] * 6, abs=1e-6)
    assert 0 <= found["fid"].value < 0.02  # 1e-6 of the traces, which are about 1e4
    alone = scores(metrics, same[:1], same[:1], TEXTS[:1])["fid"]
    assert math.isnan(alone.value) and "at least 2" in alone.note


def test_sizes_and_modes_mix_and_every_picture_keeps_its_value(metrics):
    """As every picture gets alone, whatever is beside it."""
    found = [picture(i, *((48, 40), (64, 33), (40, 72))[i % 3], "L" if i % 5 == 0 else "RGB") for i in range(19)]
    goal = [picture(50 + i, *((48, 40), (30, 60))[i % 2]) for i in range(19)]
    texts = [f"{text} {i}" for i, text in enumerate(TEXTS * 5)][:19]
    together = scores(metrics, found, goal, texts)
    for i in (0, 4, 15, 16, 18):
        alone = scores(metrics, found[i : i + 1], goal[i : i + 1], texts[i : i + 1])
        for name in ("dino_distance", "clip_score", "lpips"):
            assert together[name].values[i] == pytest.approx(alone[name].value, rel=1e-3, abs=1e-4), (name, i)
    assert scores(metrics, found, goal, texts) == together


@pytest.mark.parametrize("mode", ["L", "RGBA", "LA", "P", "1", "CMYK"])
def test_every_mode_is_scored_as_its_rgb(metrics, mode):
    plain = picture(1, mode={"P": "RGB", "1": "L"}.get(mode, mode))
    given = plain.convert(mode)
    if "A" in mode:  # composited on white, by hand
        values = np.asarray(plain.convert("RGBA"), dtype=np.float64)
        alpha = values[..., 3:] / 255
        rgb = Image.fromarray(np.round(values[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8))
    else:
        rgb = given.convert("RGB")
    goal = [picture(2)]
    found, expected = scores(metrics, [given], goal, ["x"]), scores(metrics, [rgb], goal, ["x"])
    for name in ("dino_distance", "clip_score", "lpips"):
        assert found[name].value == pytest.approx(expected[name].value, rel=0.02, abs=1e-3), name
    assert scores(metrics, goal, [given], ["x"])["lpips"].value == pytest.approx(expected["lpips"].value, rel=0.02)


def test_a_whole_folder_passes_its_check_and_nothing_is_fetched(whole, monkeypatch):
    def refuse(*arguments):
        raise AssertionError("a connection was asked for")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    metrics = Metrics(whole, "cpu")
    assert metrics.available() == ALL and metrics.missing() == {}
    metrics.check()


def test_settings_of_torch_are_left_as_they_were(metrics):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    scores(metrics, pictures(2), pictures(2), TEXTS[:2])
    after = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(before)
    assert after == "high" and torch.is_grad_enabled() and not torch.is_inference_mode_enabled()


@torch.no_grad()
def test_the_share_of_yes_is_that_of_the_models_probabilities(whole, metrics):
    """The turn written out by hand, the probabilities over the whole vocabulary by softmax."""
    from transformers import Qwen2VLImageProcessorPil, Qwen3VLForConditionalGeneration

    model = Qwen3VLForConditionalGeneration.from_pretrained(whole / "vqa").eval()
    processor, tokenizer = Qwen2VLImageProcessorPil.from_pretrained(whole / "vqa"), yes_no_tokenizer()
    vocab = tokenizer.get_vocab()
    found, expected = [picture(i, 64, 48) for i in range(4)], []
    for image in found:
        features, said = processor(images=[image], return_tensors="pt"), []
        seen = "<|image_pad|>" * int(features.image_grid_thw.prod() // 4)
        for question in QUESTIONS:
            text = f"<|im_start|>user\n<|vision_start|>{seen}<|vision_end|>{question} Please answer yes or no.<|im_end|>\n"
            ids = tokenizer(text + "<|im_start|>assistant\n<think>\n\n</think>\n\n", return_tensors="pt").input_ids
            types = (ids == vocab["<|image_pad|>"]).int()
            p = model(input_ids=ids, mm_token_type_ids=types, **features).logits[0, -1].softmax(0)
            said.append(p[vocab["yes"]] + p[vocab[" yes"]] > p[vocab["no"]] + p[vocab[" no"]])
        expected.append(float(np.mean(said)))
    probes = read_probes(whole)
    scored = metrics.probe(found, probes)
    assert probes == [Probe(text, QUESTIONS) for text in TEXTS]
    assert scored.values == expected and scored.name == "probes" and scored.better == "higher"
    assert scored.value == pytest.approx(np.mean(expected)) and any(0 < share < 1 for share in expected)


class Says(nn.Module):
    """A language head that gives these probabilities, whatever it sees."""

    def __init__(self, p: dict[str, float]):
        super().__init__()
        vocab, self.logits = yes_no_tokenizer().get_vocab(), torch.full((tiny.VOCAB_SIZE,), -20.0)
        self.logits[[vocab[word] for word in p]] = torch.tensor([*p.values()]).log()

    def forward(self, states):
        return self.logits.expand(*states.shape[:-1], -1)


SAID = [({"yes": 0.6, "no": 0.3}, 1.0), ({"yes": 0.3, "no": 0.6}, 0.0), ({"yes": 0.3, " yes": 0.25, "no": 0.45}, 1.0),
        ({"yes": 0.45, "no": 0.3, " no": 0.25}, 0.0), ({"yes": 0.4, "no": 0.4}, 0.0)]


@pytest.mark.parametrize("p, share", SAID)
def test_spellings_add_up(whole, p, share):
    metrics = Metrics(whole, "cpu")
    metrics.probe(pictures(1), [Probe("x", QUESTIONS)])
    metrics.opened["probes"].model.lm_head = Says(p)
    assert metrics.probe(pictures(2), [Probe("x", QUESTIONS), Probe("y", QUESTIONS[:1])]).values == [share, share]


@pytest.mark.parametrize(
    "line, said",
    [
        ('{"prompt": "x", "questions": ["a?"]', "not JSON"),
        ('["x"]', "is a list"),
        ('{"questions": ["a?"]}', 'no "prompt"'),
        ('{"prompt": "x"}', 'no "questions"'),
        ('{"prompt": "x", "questions": []}', "at least one"),
        ('{"prompt": "x", "questions": "a?"}', "at least one"),
        ('{"prompt": "x", "questions": ["a?", " "]}', "a question is ' '"),
        ('{"prompt": "x", "questions": ["a?", 3]}', "a question is 3"),
        ('{"prompt": "", "questions": ["a?"]}', "\"prompt\" is ''"),
        ('{"prompt": "x", "questions": ["<|image_pad|>?"]}', "stands for the picture"),
        ("[" * 20000, "not JSON"),
    ],
)
def test_a_bad_probe_names_its_line(tmp_path, line, said):
    (tmp_path / "probes.jsonl").write_text('{"prompt": "x", "questions": ["a?"]}\n\n' + line + "\n", encoding="utf-8")
    with pytest.raises(UserError) as error:
        read_probes(tmp_path)
    assert f"{tmp_path / 'probes.jsonl'}:3: " in str(error.value) and said in str(error.value)


@pytest.mark.parametrize("content, said", [(None, "cannot be read"), (b"\n \n", "is empty"), (b"\xff\xfe{", "not UTF-8")])
def test_a_file_without_probes(tmp_path, content, said):
    if content is not None:
        (tmp_path / "probes.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=said):
        read_probes(tmp_path)


def test_without_the_folder(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "none", tmp_path / "file"):
        with pytest.raises(UserError, match="is no folder: make one with any of dino, clip"):
            Metrics(path, "cpu")


def test_an_empty_folder_gives_nothing_and_says_what_each_would(tmp_path):
    metrics = Metrics(tmp_path, "cpu")
    assert metrics.available() == [] and metrics.score(pictures(1), pictures(1), ["x"]) == []
    assert list(metrics.missing()) == ALL
    for why, name in zip(metrics.missing().values(), ["dino", "clip", "inception.pt", "lpips.pt", "vqa"]):
        assert f"no {tmp_path / name}" in why and "give" in why and "\n" not in why
    metrics.check()
    with pytest.raises(UserError, match="no .*vqa: "):
        metrics.probe(pictures(1), [Probe("x", ("a?",))])


@pytest.mark.parametrize("name, needs", [("lpips", ["lpips.pt"]), ("probes", ["probes.jsonl"]), ("probes", ["vqa"])])
def test_one_is_missing(whole, tmp_path, name, needs):
    kept = {"dino", "clip", "inception.pt", "lpips.pt", "vqa", "probes.jsonl"} - set(needs)
    metrics = Metrics(only(whole, tmp_path / "some", *kept), "cpu")
    assert metrics.available() == [n for n in ALL if n != name]
    ((missing, why),) = metrics.missing().items()
    assert missing == name and f"no {tmp_path / 'some' / needs[0]}: " in why
    assert name not in scores(metrics, pictures(2), pictures(2), TEXTS[:2])


def test_without_torchmetrics(whole, monkeypatch):
    monkeypatch.setattr(perceptual.importlib.util, "find_spec", lambda name: None)
    ((missing, why),) = Metrics(whole, "cpu").missing().items()
    assert missing == "fid" and "pip install" in why


@pytest.mark.parametrize("counts", [(2, 3, 2), (3, 2, 3), (2, 2, 1), (0, 0, 0)])
def test_as_many_of_each(metrics, counts):
    with pytest.raises(UserError, match=f"{counts[0]} pictures, {counts[1]} targets, {counts[2]} prompts"):
        metrics.score(pictures(counts[0]), pictures(counts[1]), ["x"] * counts[2])
    for few, probes in ((pictures(2), [Probe("x", ("a?",))]), ([], [])):
        with pytest.raises(UserError, match=f"{len(few)} pictures for {len(probes)} probes"):
            metrics.probe(few, probes)


def without_a_weight(path):
    weights = load_file(path)
    weights.pop(sorted(weights)[-1])
    save_file(weights, path, metadata={"format": "pt"})


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def text(content):
    return lambda path: path.write_text(content)


def config(**changes):
    return lambda path: path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def script(network):
    return lambda path: torch.jit.script(network).save(str(path))


DAMAGE = [
    ("dino", "config.json", lambda path: path.unlink(), "config.json is missing"),
    ("dino", "config.json", text("{"), "config.json is missing or damaged"),
    ("dino", "config.json", text("[]"), "config.json is missing or damaged"),
    ("dino", "config.json", config(model_type="bert"), "model_type is 'bert'"),
    ("dino", "config.json", config(hidden_size="wide"), "cannot be used|cannot load"),
    ("dino", "config.json", config(hidden_size=48), "misshapen|cannot load"),
    ("dino", "model.safetensors", cut, "cannot load"),
    ("dino", "model.safetensors", without_a_weight, "missing"),
    ("dino", "model.safetensors", lambda path: path.unlink(), "cannot load"),
    ("dino", "preprocessor_config.json", lambda path: path.unlink(), "preprocessor_config.json"),
    ("dino", "preprocessor_config.json", text("{"), "preprocessor_config.json"),
    ("dino", "preprocessor_config.json", config(image_processor_type="None"), "preprocessor_config.json"),
    ("clip", "config.json", config(model_type="dinov2"), "model_type is 'dinov2'"),
    ("clip", "tokenizer.json", text("{"), "tokenizer"),
    ("inception.pt", "", cut, "inception.pt cannot be used"),
    ("inception.pt", "", text(""), "inception.pt cannot be used"),
    ("inception.pt", "", script(TinyVgg()), "inception.pt cannot be used"),
    ("inception.pt", "", script(Grid()), "no features"),
    ("lpips.pt", "", text("<html>not found</html>"), "lpips.pt cannot be used"),
    ("lpips.pt", "", script(TinyInception()), "lpips.pt cannot be used"),
    ("vqa", "config.json", config(model_type="llava"), "model_type is 'llava'"),
    ("vqa", "config.json", config(tie_word_embeddings=False), "language head"),
    ("vqa", "tokenizer.json", lambda path: tiny.make_tokenizer().save_pretrained(path.parent), "spells .yes."),
    ("vqa", "preprocessor_config.json", config(merge_size=1), "vqa cannot be used"),
    ("vqa", "chat_template.jinja", lambda path: path.write_text(path.read_text() + "<think>"), "chat template"),
    ("probes.jsonl", "", text("{"), "probes.jsonl:1: is not JSON"),
]


@pytest.mark.parametrize("name, inside, damage, said", DAMAGE, ids=[f"{d[0]}-{d[1]}-{i}" for i, d in enumerate(DAMAGE)])
def test_damage_is_one_line_that_says_where(whole, tmp_path, name, inside, damage, said):
    folder = only(whole, tmp_path / "some", name, *(["vqa"] if name == "probes.jsonl" else ["probes.jsonl"] * (name == "vqa")))
    damage(folder / name / inside if inside else folder / name)
    with pytest.raises(UserError, match=said) as error:
        Metrics(folder, "cpu").check()
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


def test_what_is_damaged_is_found_on_use_as_well(whole, tmp_path):
    folder = only(whole, tmp_path / "some", "lpips.pt", "dino", "vqa")
    cut(folder / "lpips.pt")
    metrics = Metrics(folder, "cpu")
    assert metrics.available() == ["dino_distance", "lpips"]
    with pytest.raises(UserError, match="lpips.pt cannot be used"):
        metrics.score(pictures(2), pictures(2), TEXTS[:2])
    assert len(metrics.probe(pictures(1), [Probe("x", ("a?", "b?"))]).values) == 1  # needs no probes.jsonl
    config(image_mean=[0.5])(folder / "dino" / "preprocessor_config.json")
    with pytest.raises(UserError, match="dino cannot be used"):
        Metrics(folder, "cpu").score(pictures(2), pictures(2), TEXTS[:2])
