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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from bench.reproduce.probes import FILE, Answerer, Probe, has_head, read_probes
from dopsd_fast.conditioning.text import load_pretrained, load_tokenizer, one_line
from dopsd_fast.data import images
from dopsd_fast.errors import UserError

DINO = ("vit", "dinov2", "dinov2_with_registers", "dinov3_vit", "dinov3_convnext")
BATCH = 16
BATCH_PIXELS = BATCH * 512 * 512
"""Most pictures in one call of a network, and most pixels where it takes them at their own size."""
Pictures = Sequence[Image.Image]


@dataclass(frozen=True)
class Scored:
    """`values`: one a picture, None for a metric of the two sets; `value`: their mean, or the sets' number, nan if it is not
    defined; `better`: "lower" or "higher"; `note`: what to know when reading it."""

    name: str
    unit: str
    values: list[float] | None
    value: float
    better: str
    note: str = ""


@dataclass(frozen=True)
class Missing:
    """A metric that is not computed; `why`, one line: what is missing and what it would give."""

    name: str
    why: str


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


def _image_processor(folder: Path) -> Callable[..., Any]:
    """The folder's image processor, computed by Pillow."""
    from transformers import AutoImageProcessor

    with _opening(folder / "preprocessor_config.json"):
        text = (folder / "preprocessor_config.json").read_text(encoding="utf-8")
        if str(json.loads(text).get("image_processor_type")).startswith("DINOv3"):
            return _Dino3Processor(**json.loads(text))
        return AutoImageProcessor.from_pretrained(folder, backend="pil", local_files_only=True)


class _Dino3Processor:  # rescale, resize with antialiasing, normalise; that of transformers needs torchvision
    def __init__(self, *, size: dict[str, int], image_mean: list[float], image_std: list[float], **others: Any):
        self.size = (size["height"], size["width"])
        self.scale = others.get("rescale_factor", 1 / 255)
        self.mode = {2: "bilinear", 3: "bicubic"}[others.get("resample", 2)]
        self.mean, self.std = (torch.tensor(v).view(1, 3, 1, 1) for v in (image_mean, image_std))

    def __call__(self, images: list[Image.Image], return_tensors: str = "pt") -> dict[str, Tensor]:
        full = (_pixels([picture]).float() * self.scale for picture in images)
        pixels = [nn.functional.interpolate(p, self.size, mode=self.mode, antialias=True) for p in full]
        return {"pixel_values": (torch.cat(pixels) - self.mean) / self.std}


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


def _rgb(pictures: Pictures) -> list[Image.Image]:
    return [p if p.mode == "RGB" and not p.has_transparency_data else images.to_rgb(p) for p in pictures]


def _pixels(pictures: Pictures) -> Tensor:
    """RGB pictures of one size -> uint8 [N, 3, H, W]."""
    return torch.from_numpy(np.stack([np.asarray(p) for p in pictures])).permute(0, 3, 1, 2).contiguous()


def _of_one_size(pictures: Pictures) -> Iterator[list[int]]:
    """Positions of pictures of one size, at most BATCH and, but for a single one, at most BATCH_PIXELS at a time."""
    by_size: dict[tuple[int, int], list[int]] = {}
    for i, picture in enumerate(pictures):
        by_size.setdefault(picture.size, []).append(i)
    for (width, height), found in by_size.items():
        step = max(1, min(BATCH, BATCH_PIXELS // (width * height)))
        yield from (found[start : start + step] for start in range(0, len(found), step))


class Dino:
    """d_i = 1 - cos(f(picture_i), f(target_i)), in 0..2. f: the class token after the last norm (`pooler_output`) [D]; for a
    convolutional DINOv3, its pooled features. The distance of Caron et al. (2021), as used by DreamBooth (2023)."""

    def __init__(self, folder: Path, device: torch.device):
        from transformers import AutoModel

        self.folder, self.device = folder, device
        kind = _model_type(folder, DINO, "a DINOv2 or DINOv3 model")
        pooler = {"add_pooling_layer": False} if kind == "vit" else {}  # the first DINO has none
        with _opening(folder):
            self.model = load_pretrained(AutoModel, folder, dtype=torch.float32, **pooler).to(device)
        self.processor = _image_processor(folder)

    def features(self, pictures: Pictures) -> Tensor:
        """Float64 [N, D]."""
        found = []
        for start in range(0, len(pictures), BATCH):
            with _opening(self.folder):
                inputs = self.processor(images=list(pictures[start : start + BATCH]), return_tensors="pt")
                states = self.model(pixel_values=inputs["pixel_values"].to(self.device))
            pooled = getattr(states, "pooler_output", None)
            found.append(states.last_hidden_state[:, 0] if pooled is None else pooled)
        return torch.cat(found).double()

    def score(self, pictures: Pictures, targets: Pictures, prompts: Sequence[str]) -> Scored:
        near = nn.functional.cosine_similarity(self.features(pictures), self.features(targets))
        return _mean("dino_distance", "1 - cos", (1 - near).clamp(min=0).tolist(), "lower")


class Clip:
    """s_i = max(100 cos(image(picture_i), text(prompt_i)), 0), in 0..100 (Hessel et al., 2021, with 100 for their 2.5). A
    prompt is cut to what the text encoder holds, its end token kept; torchmetrics' CLIPScore drops that token, and does not
    run with transformers 5."""

    def __init__(self, folder: Path, device: torch.device):
        from transformers import CLIPModel

        self.folder, self.device = folder, device
        _model_type(folder, ("clip",), "a CLIPModel with its tokenizer and image processor")
        with _opening(folder):
            self.model = load_pretrained(CLIPModel, folder, dtype=torch.float32).to(device)
            self.tokenizer, self.processor = load_tokenizer(folder), _image_processor(folder)
        self.most = self.model.config.text_config.max_position_embeddings

    def score(self, pictures: Pictures, targets: Pictures, prompts: Sequence[str]) -> Scored:
        values: list[float] = []
        for start in range(0, len(pictures), BATCH):
            part = slice(start, start + BATCH)
            with _opening(self.folder):
                pixels = self.processor(images=list(pictures[part]), return_tensors="pt")["pixel_values"]
                text = self.tokenizer(
                    list(prompts[part]), padding=True, truncation=True, max_length=self.most, return_tensors="pt"
                )
                found = self.model(**text.to(self.device), pixel_values=pixels.to(self.device))
            near = nn.functional.cosine_similarity(found.image_embeds.double(), found.text_embeds.double())
            values += (100 * near).clamp(min=0).tolist()
        cut = sum(len(self.tokenizer(prompt).input_ids) > self.most for prompt in prompts)
        note = f"{cut} of {len(prompts)} prompts cut to the {self.most} tokens that the text encoder holds" if cut else ""
        return _mean("clip_score", "100 cos", values, "higher", note)


class Scripted:
    """A TorchScript network: `features(pictures)` calls it with pictures of one size at a time, `options` as keywords."""

    dtype: torch.dtype
    options: dict[str, bool]

    def __init__(self, path: Path, device: torch.device):
        self.path, self.device = path, device
        with _opening(path):
            self.network = torch.jit.load(str(path), map_location=device).eval()

    def features(self, pictures: Pictures) -> Tensor:
        """Float32 [N, D] of pictures of one size."""
        with _opening(self.path):
            found = self.network(_pixels(pictures).to(self.device, self.dtype), **self.options)
            if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != len(pictures):
                raise UserError(f"{self.path}: gives no features [N, D]: it is not the network that this file is named after")
        return found


class Inception(Scripted):
    """|m_p - m_t|^2 + tr(S_p + S_t - 2 (S_p S_t)^(1/2)); m, S: mean and covariance of Inception features [N, D] of pictures
    and targets (Heusel et al., 2017). By torchmetrics, the root by eigenvalues in float64. nan for fewer than 2 pictures."""

    dtype, options = torch.uint8, {"return_features": True}

    def score(self, pictures: Pictures, targets: Pictures, prompts: Sequence[str]) -> Scored:
        from torchmetrics.image.fid import FrechetInceptionDistance

        n = len(pictures)
        if n < 2:
            return Scored("fid", "", None, float("nan"), "lower", f"{n} picture has no covariance: at least 2 are needed")
        found, goal = (
            torch.cat([self.features([group[i] for i in batch]).double().cpu() for batch in _of_one_size(group)])
            for group in (pictures, targets)
        )
        size = goal.shape[1]  # given as an image's width: how a metric of features that are there learns their number
        metric = FrechetInceptionDistance(nn.Identity(), input_img_size=(1, 1, size), sync_on_compute=False)
        metric.update(found, real=False)
        metric.update(goal, real=True)
        note = f"{n} pictures for {size} feature dimensions: the covariances are singular, compare only with as many pictures"
        # Singular covariances leave a rounding error of either sign, about 1e-6 of their traces.
        return Scored("fid", "", None, max(metric.compute().item(), 0.0), "lower", note if n <= size else "")


class Lpips(Scripted):
    """d_i = |v(picture_i) - v(target_i)|^2; v: VGG16 activations, normalised over channels and scaled by the LPIPS heads,
    [D] (Zhang et al., 2018; the file and its options: Karras et al., 2021). A picture is resized to its target's size."""

    dtype, options = torch.float32, {"resize_images": False, "return_lpips": True}

    def score(self, pictures: Pictures, targets: Pictures, prompts: Sequence[str]) -> Scored:
        fits = [p if p.size == t.size else p.resize(t.size, Image.Resampling.LANCZOS) for p, t in zip(pictures, targets)]
        values = [0.0] * len(pictures)
        for batch in _of_one_size(targets):
            found, goal = (self.features([group[i] for i in batch]) for group in (fits, targets))
            for i, distance in zip(batch, (found - goal).square().sum(1, dtype=torch.float64).tolist()):
                values[i] = distance
        return _mean("lpips", "", values, "lower")


def answerer(folder: Path, device: torch.device) -> Answerer:
    from transformers import AutoModelForImageTextToText

    _model_type(folder, ("qwen3_vl",), "a Qwen3-VL with its tokenizer and image processor")
    with _opening(folder):
        model = load_pretrained(AutoModelForImageTextToText, folder, dtype=torch.float32).to(device)
        if model.lm_head.weight is not model.get_input_embeddings().weight and not has_head(folder):
            raise UserError(f"{folder}: the weights of the language head (lm_head) are missing: fetch the folder again")
        return Answerer(model, load_tokenizer(folder), _image_processor(folder), folder)


def _mean(name: str, unit: str, values: list[float], better: str, note: str = "") -> Scored:
    return Scored(name, unit, values, sum(values) / len(values), better, note)


@dataclass(frozen=True)
class Part:
    needs: tuple[str, ...]  # names in the folder; `opens` reads the first
    opens: Callable[[Path, torch.device], Any]
    gives: str


PARTS = {
    "dino_distance": Part(("dino",), Dino, "a DINOv2 or DINOv3 folder there gives the distance of every picture to its target"),
    "clip_score": Part(("clip",), Clip, "a CLIP folder there gives how well every picture fits its prompt"),
    "fid": Part(("inception.pt",), Inception, "StyleGAN's inception-2015-12-05.pt there gives the FID to the targets"),
    "lpips": Part(("lpips.pt",), Lpips, "StyleGAN3's vgg16.pt there gives the perceptual distance of pictures to targets"),
    "probes": Part(("vqa", FILE), answerer, f"a Qwen3-VL folder and {FILE} give what is left of what the model knew before"),
}


class Metrics:
    """What the networks in `folder` tell about pictures, computed on `device`. A network is opened when it is first used and
    kept. UserError if the folder is missing, and, on use, if something in it is damaged or not what it should be."""

    def __init__(self, folder: Path, device: torch.device | str):
        self.folder, self.device = Path(folder), torch.device(device)
        self._opened: dict[str, Any] = {}
        if not self.folder.is_dir():
            names = ", ".join(name for part in PARTS.values() for name in part.needs)
            raise UserError(f"{self.folder} is no folder: make one with any of {names}")

    def available(self) -> list[str]:
        """Names of the metrics whose networks are there."""
        return [name for name in PARTS if name not in {m.name for m in self.missing()}]

    def missing(self) -> list[Missing]:
        """The other metrics, each with what is missing."""
        found = []
        for name, part in PARTS.items():
            lost = [str(self.folder / need) for need in part.needs if not (self.folder / need).exists()]
            if lost:
                found.append(Missing(name, f"no {' and no '.join(lost)}: {part.gives}"))
            elif name == "fid" and importlib.util.find_spec("torchmetrics") is None:
                found.append(Missing(name, "torchmetrics is not installed: pip install -c constraints.txt -e '.[bench]'"))
        return found

    def check(self) -> None:
        """Scores grey pictures on the CPU: what is damaged or unfit says so now, not after a training."""
        trial, grey = Metrics(self.folder, "cpu"), [Image.new("RGB", (64, 64), "grey")] * 2
        trial.score(grey, grey, ["grey"] * 2)
        if "probes" in self.available():
            trial.probe(grey[:1], read_probes(self.folder)[:1])

    def score(self, pictures: Pictures, targets: Pictures, prompts: Sequence[str]) -> list[Scored]:
        """Every available metric but the probes, in the order of PARTS; picture i belongs to target i and prompt i."""
        if not pictures or not len(pictures) == len(targets) == len(prompts):
            counts = f"{len(pictures)} pictures, {len(targets)} targets, {len(prompts)} prompts"
            raise UserError(f"{counts}: as many of each are needed, and at least one")
        pictures, targets = _rgb(pictures), _rgb(targets)
        with _exact():
            return [self._open(n).score(pictures, targets, prompts) for n in self.available() if n != "probes"]

    def probe(self, pictures: Pictures, probes: Sequence[Probe]) -> Scored:
        """The share of its questions that the model of vqa/ says yes to about picture i, made of probe i's prompt (after
        VQAScore, Lin et al., 2024). Stands in for GenEval and DPG, which need detectors or larger models."""
        if not pictures or len(pictures) != len(probes):
            raise UserError(f"{len(pictures)} pictures for {len(probes)} probes: one of each is needed, and at least one")
        if not (self.folder / "vqa").exists():
            raise UserError(f"no {self.folder / 'vqa'}: {PARTS['probes'].gives}")
        with _exact(), _opening(self.folder / "vqa"):
            model = self._open("probes")
            shares = [model.share(picture, probe) for picture, probe in zip(_rgb(pictures), probes)]
        return _mean("probes", "share", shares, "higher")

    def _open(self, name: str) -> Any:
        if name not in self._opened:
            self._opened[name] = PARTS[name].opens(self.folder / PARTS[name].needs[0], self.device)
        return self._opened[name]
