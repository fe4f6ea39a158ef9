"""Metrics of full-scale pictures by trained networks from a local folder; nothing is fetched, each metric is optional.

    FOLDER/dino/          DINO, DINOv2 or DINOv3: transformers model, image processor     -> dino_distance
    FOLDER/clip/          CLIPModel, tokenizer, image processor                           -> clip_score
    FOLDER/inception.pt   TorchScript Inception (inception-2015-12-05.pt of StyleGAN)     -> fid
    FOLDER/lpips.pt       TorchScript VGG16 with LPIPS heads (vgg16.pt of StyleGAN3)      -> lpips
    FOLDER/vqa/           Qwen3-VL: model, tokenizer, image processor                     -> probes, with
    FOLDER/probes.jsonl   {"prompt": "...", "questions": ["Is there a red ball?", ...]} a line

N pictures, H x W pixels, D features. Networks compute in float32 without TF32, distances in float64. Image processors are
those that need no torchvision. Pictures may have any size and mode: transparency is composited on white.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor, nn

from dopsd_fast.conditioning.text import load_pretrained, load_tokenizer, one_line
from dopsd_fast.conditioning.vlm import IMAGE_TOKEN
from dopsd_fast.data import images
from dopsd_fast.errors import UserError

DINO = ("vit", "dinov2", "dinov2_with_registers", "dinov3_vit", "dinov3_convnext")
FILE = "probes.jsonl"
FORM = '{"prompt": "...", "questions": ["...", ...]}'
"""Of the probes, and of a line of it."""
Pictures = Sequence[Image.Image]


class Probe(NamedTuple):
    """A prompt, and questions about its picture to which yes is the right answer."""

    prompt: str
    questions: tuple[str, ...]


class Scored(NamedTuple):
    """`values`: one a picture, None for a metric of the two sets; `value`: their mean, or the sets' number, nan if it is not
    defined; `better`: "lower" or "higher"; `note`: what to know when reading it."""

    name: str
    better: str
    values: list[float] | None
    value: float
    note: str = ""


@contextmanager
def _opening(path: Path) -> Iterator[None]:
    """Whatever a damaged file makes a library raise becomes a UserError that names `path`."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise UserError(f"{path} cannot be used: {type(error).__name__}: {one_line(error)}; fetch it again") from error


def _model_type(folder: Path, allowed: tuple[str, ...], what: str) -> str:
    try:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}: config.json is missing or damaged: put {what} there, or remove the folder") from error
    if found not in allowed:
        raise UserError(f"{folder}: model_type is {found!r}, not {' or '.join(allowed)}: put {what} there")
    return found


def _image_processor(folder: Path) -> Any:
    """The folder's image processor, computed by Pillow."""
    from transformers import AutoImageProcessor

    with _opening(folder / "preprocessor_config.json"):
        facts = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
        if str(facts.get("image_processor_type")).startswith("DINOv3"):
            return partial(_dino3_pixels, facts)
        return AutoImageProcessor.from_pretrained(folder, backend="pil", local_files_only=True)


def _dino3_pixels(facts: dict[str, Any], images: Pictures, return_tensors: str = "pt") -> dict[str, Tensor]:
    """Rescaled, resized with antialiasing, normalised: as the class of transformers does, which needs torchvision."""
    size, mode = (facts["size"]["height"], facts["size"]["width"]), {2: "bilinear", 3: "bicubic"}[facts.get("resample", 2)]
    full = _pixels(images[0]).float() * facts.get("rescale_factor", 1 / 255)
    pixels = nn.functional.interpolate(full, size, mode=mode, antialias=True)
    mean, std = (torch.tensor(facts[name]).view(1, 3, 1, 1) for name in ("image_mean", "image_std"))
    return {"pixel_values": (pixels - mean) / std}


@contextmanager
def _exact() -> Iterator[None]:
    """float32 as it is (no TF32), no choice of algorithm by timing, no fusion that begins with the second call."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    cudnn = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
    try:
        with torch.inference_mode(), cudnn, torch.jit.optimized_execution(False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def _pixels(picture: Image.Image) -> Tensor:
    """uint8 [1, 3, H, W]."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].contiguous()


# ---- networks: each is opened from a path and then called with a picture, its target and its prompt -----------------------


def dino(path: Path, device: torch.device) -> Callable[..., float]:
    """1 - cos(f(picture), f(target)), in 0..2. f: the class token after the last norm (`pooler_output`) [D]; for a
    convolutional DINOv3, its pooled features. The distance of Caron et al. (2021), as used by DreamBooth (2023)."""
    from transformers import AutoModel

    kind = _model_type(path, DINO, "a DINOv2 or DINOv3 model")
    pooler = {"add_pooling_layer": False} if kind == "vit" else {}  # the first DINO has none
    model, processor = load_pretrained(AutoModel, path, dtype=torch.float32, **pooler).to(device), _image_processor(path)

    def features(picture: Image.Image) -> Tensor:
        states = model(pixel_values=processor(images=[picture], return_tensors="pt")["pixel_values"].to(device))
        pooled = getattr(states, "pooler_output", None)
        return (states.last_hidden_state[:, 0] if pooled is None else pooled).double()

    def distance(picture: Image.Image, target: Image.Image, prompt: str) -> float:
        return max(1 - nn.functional.cosine_similarity(features(picture), features(target)).item(), 0.0)

    return distance


class Clip:
    """max(100 cos(image(picture), text(prompt)), 0), in 0..100 (Hessel et al., 2021, with 100 for their 2.5). A prompt is cut
    to what the text encoder holds, its end token kept; torchmetrics' CLIPScore drops that token, and does not run with
    transformers 5."""

    def __init__(self, path: Path, device: torch.device) -> None:
        from transformers import CLIPModel

        _model_type(path, ("clip",), "a CLIPModel with its tokenizer and image processor")
        self.model = load_pretrained(CLIPModel, path, dtype=torch.float32).to(device)
        self.tokenizer, self.processor = load_tokenizer(path), _image_processor(path)
        self.most = self.model.config.text_config.max_position_embeddings

    def __call__(self, picture: Image.Image, target: Image.Image, prompt: str) -> float:
        inputs = self.tokenizer([prompt], truncation=True, max_length=self.most, return_tensors="pt")
        inputs["pixel_values"] = self.processor(images=[picture], return_tensors="pt")["pixel_values"]
        found = self.model(**inputs.to(self.model.device))
        return max(100 * nn.functional.cosine_similarity(found.image_embeds.double(), found.text_embeds.double()).item(), 0.0)

    def note(self, prompts: Sequence[str]) -> str:
        cut = sum(len(self.tokenizer(prompt).input_ids) > self.most for prompt in prompts)
        return f"{cut} of {len(prompts)} prompts cut to the {self.most} tokens that the text encoder holds" if cut else ""


def scripted(path: Path, device: torch.device, dtype: torch.dtype, **options: bool) -> Callable[[Image.Image], Tensor]:
    """A TorchScript network, called with `options`: picture -> float32 [1, D]."""
    network = torch.jit.load(str(path), map_location=device).eval()

    def features(picture: Image.Image) -> Tensor:
        found = network(_pixels(picture).to(device, dtype), **options)
        if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != 1:
            raise UserError(f"{path}: gives no features [N, D]: it is not the network that this file is named after")
        return found

    return features


def frechet(features: Callable[[Image.Image], Tensor], pictures: Pictures, targets: Pictures) -> Scored:
    """|m_p - m_t|^2 + tr(S_p + S_t - 2 (S_p S_t)^(1/2)); m, S: mean and covariance of Inception features [N, D] of pictures
    and targets (Heusel et al., 2017). By torchmetrics, the root by eigenvalues in float64. nan for fewer than 2 pictures."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    n = len(pictures)
    if n < 2:
        return Scored("fid", "lower", None, float("nan"), f"{n} picture has no covariance: at least 2 are needed")
    found, goal = (torch.cat([features(picture) for picture in group]).double().cpu() for group in (pictures, targets))
    size = goal.shape[1]  # given as an image's width: how a metric of features that are there learns their number
    metric = FrechetInceptionDistance(nn.Identity(), input_img_size=(1, 1, size), sync_on_compute=False)
    metric.update(found, real=False)
    metric.update(goal, real=True)
    note = f"{n} pictures for {size} feature dimensions: the covariances are singular, compare only with as many pictures"
    # Singular covariances leave a rounding error of either sign, about 1e-6 of their traces.
    return Scored("fid", "lower", None, max(metric.compute().item(), 0.0), note if n <= size else "")


def lpips(path: Path, device: torch.device) -> Callable[..., float]:
    """|v(picture) - v(target)|^2; v: VGG16 activations, normalised over channels and scaled by the LPIPS heads, [D] (Zhang et
    al., 2018; the file and its options: Karras et al., 2021). A picture is resized to its target's size."""
    features = scripted(path, device, torch.float32, resize_images=False, return_lpips=True)

    def distance(picture: Image.Image, target: Image.Image, prompt: str) -> float:
        fits = picture if picture.size == target.size else picture.resize(target.size, Image.Resampling.LANCZOS)
        return (features(fits) - features(target)).square().sum(dtype=torch.float64).item()

    return distance


class Answerer:
    """The share, in 0..1, of a probe's questions q with p(yes | picture, q) > p(no | picture, q) by a Qwen3-VL (after VQAScore,
    Lin et al., 2024). Stands in for GenEval and DPG, which need detectors or larger models.

    p: the probability of the next token after one user turn (picture, q, a request), summed over the spellings. One question
    a call, without padding: an answer does not depend on what else is asked."""

    def __init__(self, path: Path, device: torch.device) -> None:
        from transformers import AutoModelForImageTextToText

        _model_type(path, ("qwen3_vl",), "a Qwen3-VL with its tokenizer and image processor")
        self.model = load_pretrained(AutoModelForImageTextToText, path, dtype=torch.float32).to(device)
        names = (name for file in path.glob("*.safetensors") for name in safe_open(file, "pt").keys())
        tied = self.model.lm_head.weight is self.model.get_input_embeddings().weight
        if not tied and not any("lm_head" in name for name in names):  # one of random numbers would answer as well
            raise UserError(f"{path}: the weights of the language head (lm_head) are missing: fetch the folder again")
        self.path, self.tokenizer, self.processor = path, load_tokenizer(path), _image_processor(path)
        self.yes, self.no = self.spellings("yes"), self.spellings("no")

    def spellings(self, word: str) -> list[int]:
        """Ids of the single tokens that spell `word`: as it is, capitalised, in capitals, each also after a space."""
        forms = [space + form for form in (word, word.capitalize(), word.upper()) for space in ("", " ")]
        found = [self.tokenizer(form, add_special_tokens=False).input_ids for form in forms]
        single = sorted({ids[0] for ids in found if len(ids) == 1 and ids[0] != self.tokenizer.unk_token_id})
        if not single:
            raise UserError(f"{self.path}: its tokenizer has no single token that spells {word!r}: use a Qwen3-VL")
        return single

    def __call__(self, picture: Image.Image, target: Image.Image, probe: Probe) -> float:
        seen = self.processor(images=[picture], return_tensors="pt").to(self.model.device)
        tokens = IMAGE_TOKEN * (int(seen["image_grid_thw"].prod()) // self.processor.merge_size**2)
        yes = 0
        for question in probe.questions:
            text = self.turn(question).replace(IMAGE_TOKEN, tokens)
            ids = self.tokenizer(text, return_tensors="pt").input_ids.to(self.model.device)
            kinds = (ids == self.model.config.image_token_id).int()
            logits = self.model(
                input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=kinds, use_cache=False, logits_to_keep=1,
                pixel_values=seen["pixel_values"], image_grid_thw=seen["image_grid_thw"],
            ).logits[0, -1].double()
            yes += bool(logits[self.yes].logsumexp(0) > logits[self.no].logsumexp(0))
        return yes / len(probe.questions)

    def turn(self, question: str) -> str:
        """The chat up to where the answer begins, with one IMAGE_TOKEN."""
        content = [{"type": "image"}, {"type": "text", "text": f"{question} Please answer yes or no."}]
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        if text.count(IMAGE_TOKEN) != 1 or question.strip() not in text or text.rstrip().endswith("<think>"):
            raise UserError(f"{self.path}: its chat template does not let it answer a question about a picture at once")
        return text


def read_probes(folder: Path) -> list[Probe]:
    """Those of FOLDER/probes.jsonl, one a line, in its order; blank lines are skipped. UserError, with file and line, for a
    line that is not FORM, and for a file that is missing, unreadable or without probes."""
    path = Path(folder) / FILE
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): it holds a line {FORM} for every probe") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}): save it as UTF-8") from error
    probes = [_probe(f"{path}:{number}", line) for number, line in enumerate(lines, 1) if line.strip()]
    if not probes:
        raise UserError(f"{path} is empty: put a line {FORM} there for every probe, or remove it")
    return probes


def _probe(where: str, line: str) -> Probe:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: is not JSON ({error}): write {FORM}") from error
    if not isinstance(record, dict):
        raise UserError(f"{where}: is a {type(record).__name__}, not an object: write {FORM}")
    for key in ("prompt", "questions"):
        if key not in record:
            raise UserError(f'{where}: has no "{key}": write {FORM}')
    prompt, questions = record["prompt"], record["questions"]
    if not isinstance(questions, list) or not questions:
        raise UserError(f'{where}: "questions" is {questions!r:.60}, not a list of at least one text')
    for what, text in (('"prompt"', prompt), *(("a question", question) for question in questions)):
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{where}: {what} is {text!r:.60}, not a text")
        if what == "a question" and IMAGE_TOKEN in text:
            raise UserError(f"{where}: a question contains {IMAGE_TOKEN}, which stands for the picture: {text!r:.60}")
    return Probe(prompt, tuple(questions))


METRICS: dict[str, tuple[Callable[[Path, torch.device], Any], str, tuple[str, ...], str]] = {
    "dino_distance": (dino, "lower", ("dino",), "a DINOv2 or DINOv3 folder there gives every picture's distance to its target"),
    "clip_score": (Clip, "higher", ("clip",), "a CLIP folder there gives how well every picture fits its prompt"),
    "fid": (partial(scripted, dtype=torch.uint8, return_features=True), "lower", ("inception.pt",),
            "StyleGAN's inception-2015-12-05.pt there gives the FID to the targets"),
    "lpips": (lpips, "lower", ("lpips.pt",), "StyleGAN3's vgg16.pt there gives the perceptual distance of pictures to targets"),
    "probes": (Answerer, "higher", ("vqa", FILE), f"a Qwen3-VL folder and {FILE} give what is left of what was known before"),
}
"""What opens it, which is better, what it needs in the folder (the first is what is opened), and what that gives."""


class Metrics:
    """What the networks in `folder` tell about pictures, computed on `device`. A network is opened when it is first used and
    kept. UserError if the folder is missing, and, on use, if something in it is damaged or not what it should be."""

    def __init__(self, folder: Path, device: torch.device | str):
        self.folder, self.device = Path(folder), torch.device(device)
        self.opened: dict[str, Any] = {}
        if not self.folder.is_dir():
            names = ", ".join(name for _, _, needs, _ in METRICS.values() for name in needs)
            raise UserError(f"{self.folder} is no folder: make one with any of {names}")

    def available(self) -> list[str]:
        """Names of the metrics whose networks are there."""
        return [name for name in METRICS if name not in self.missing()]

    def missing(self) -> dict[str, str]:
        """The other metrics, each with what is missing and what it would give."""
        found = {}
        for name, (_, _, needs, gives) in METRICS.items():
            if lost := [str(self.folder / need) for need in needs if not (self.folder / need).exists()]:
                found[name] = f"no {' and no '.join(lost)}: {gives}"
            elif name == "fid" and importlib.util.find_spec("torchmetrics") is None:
                found[name] = "torchmetrics is not installed: pip install -c constraints.txt -e '.[bench]'"
        return found

    def check(self) -> None:
        """Scores grey pictures on the CPU: what is damaged or unfit says so now, not after a training."""
        trial, grey = Metrics(self.folder, "cpu"), [Image.new("RGB", (64, 64), "grey")] * 2
        trial.score(grey, grey, ["grey"] * 2)
        if "probes" in self.available():
            trial.probe(grey[:1], read_probes(self.folder)[:1])

    def score(self, pictures: Pictures, targets: Pictures, prompts: Sequence[str], only: str = "") -> list[Scored]:
        """Every available metric but the probes, or `only` one; picture i belongs to target i and prompt i."""
        if not pictures or not len(pictures) == len(targets) == len(prompts):
            counts = f"{len(pictures)} pictures, {len(targets)} targets, {len(prompts)} prompts"
            raise UserError(f"{counts}: as many of each are needed, and at least one")
        names = [name for name in self.available() if name != "probes" and only in ("", name)]
        return [self._score(name, pictures, targets, prompts) for name in names]

    def probe(self, pictures: Pictures, probes: Sequence[Probe]) -> Scored:
        """Of picture i, made of probe i's prompt."""
        if not pictures or len(pictures) != len(probes):
            raise UserError(f"{len(pictures)} pictures for {len(probes)} probes: one of each is needed, and at least one")
        if not (self.folder / "vqa").exists():
            raise UserError(f"no {self.folder / 'vqa'}: {METRICS['probes'][-1]}")
        return self._score("probes", pictures, pictures, probes)

    def _score(self, name: str, pictures: Pictures, targets: Pictures, prompts: Sequence[Any]) -> Scored:
        opens, better, needs, _ = METRICS[name]
        pictures, targets = ([images.to_rgb(picture) for picture in group] for group in (pictures, targets))
        with _exact(), _opening(self.folder / needs[0]):
            if name not in self.opened:
                self.opened[name] = opens(self.folder / needs[0], self.device)
            network = self.opened[name]
            if name == "fid":
                return frechet(network, pictures, targets)
            values = [network(*one) for one in zip(pictures, targets, prompts)]
            note = network.note(prompts) if name == "clip_score" else ""
            return Scored(name, better, values, sum(values) / len(values), note)
