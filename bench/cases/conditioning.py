"""Suite `conditioning`: what it saves to compute contexts once instead of at every step.

One standard batch's contexts of student and teacher, from the records until they are tensors on the device, through the
trainer's own ContextCache. Case `contexts`, variants:

    every_step  conditioning.cache=off: the encoders run for every item of every batch
    memory      conditioning.cache=memory: computed once, kept in main memory
    disk        conditioning.cache=disk: computed once, read from safetensors; the files are in the system's file cache
    R1          the published step's encoders, the batch's prompts in one call; its pictures are decoded beforehand

    seconds_per_batch         at every step
    seconds_to_build          once, per record: hash, encode, write; the encoders are loaded already
    seconds_to_reopen         once a run on a cache that is full, per record: hash, read, verify
    bytes_per_record          tensors in memory, or files on the disk
    break_even_steps          steps on the same batch from which on the cache has paid for its building
    encoder_bytes             parameters that stay on the device, and are freed once the contexts are cached
    context_relative_error    of all contexts against the encoders in float64
    difference_from_encoders  largest difference between a cached value and every_step's: 0 means bit for bit

What conditioning takes of a whole step is `encoders_share` of the suite step.
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast
from unittest import mock

import torch
from torch import Tensor, nn

from bench.clock import interleaved, ratios, summary
from bench.models import Model
from bench.peers.random_encoders import RandomEncoders
from bench.peers.reference_eager import Condition, ReferenceEncoders
from bench.results import Options, Row, failed
from bench.show import step
from dopsd_fast.conditioning.cache import ContextCache, Crop
from dopsd_fast.conditioning.context import Context
from dopsd_fast.data.images import load_image
from dopsd_fast.data.records import read_records
from dopsd_fast.families.base import Family
from dopsd_fast.families.registry import open_family
from dopsd_fast.settings.schema import DataSettings
from dopsd_fast.storage.digests import digest

SUITE, CASE = "conditioning", "contexts"

Batch = list[Context]


def run(options: Options) -> list[Row]:
    torch.set_num_threads(options.threads)
    model = Model(options.model, options.device)
    with tempfile.TemporaryDirectory(prefix="contexts-") as folder:
        records = make_records(model, Path(folder) / "pictures")
        rows, contexts = measure(model, records, Path(folder), options)
        rows += errors(model, records, contexts)
    return rows


# ---- records and encoders --------------------------------------------------------------------------------------------


def make_records(model: Model, folder: Path) -> list[tuple[str, Crop]]:
    """(prompt, picture) of one standard batch: of the embedded data set, or noise drawn into `folder` for random models."""
    standard = model.standard
    if not model.random:
        data = read_records(DataSettings(resolution=standard.pixels), model.family.pixel_multiple)
        chosen = data.records[: standard.batch]
        return [(next(iter(r.prompts.values())), (r.images[0], r.height, r.width)) for r in chosen]
    from PIL import Image

    folder.mkdir(parents=True)
    draw = torch.Generator().manual_seed(0)
    found: list[tuple[str, Crop]] = []
    for place in range(standard.batch):
        pixels = torch.randint(0, 256, (standard.pixels, standard.pixels, 3), generator=draw, dtype=torch.uint8)
        file = folder / f"{place}.png"
        Image.fromarray(pixels.numpy()).save(file)
        found.append((f"prompt {place}", (file, standard.pixels, standard.pixels)))
    return found


class Standing:
    """What a ContextCache asks of a family: its encoders stay loaded, so that only encoding is measured."""

    def __init__(self, model: Model) -> None:
        self.random = RandomEncoders(model) if model.random else None
        self.family = shown(model)
        self.encoders = None if model.random else self.family.load_encoders(model.device, model.dtype)

    def fingerprint(self, kind: str, dtype: torch.dtype) -> str:
        return digest(["random weights", kind, str(dtype)]) if self.random else self.family.fingerprint(kind, dtype)

    def load_encoders(self, device: Any, dtype: torch.dtype) -> Standing:
        return self

    def student(self, prompts: list[str]) -> Batch:
        return stored(self.random.student(prompts)) if self.random else self.encoders.student(prompts)  # type: ignore[union-attr]

    def teacher(self, prompts: list[str], images: list[list[Any]]) -> Batch:
        if self.random:
            return stored(self.random.teacher(prompts, images))
        return self.encoders.teacher(prompts, images)  # type: ignore[union-attr]

    def release(self) -> None:
        """They stay."""

    def modules(self) -> list[nn.Module]:
        if self.random:
            return self.random.modules()
        return [self.encoders.text_encoder, self.encoders.vlm.model]  # type: ignore[union-attr]


def shown(model: Model) -> Family:
    """The model's family; a large model's encoder is shown no more of a picture than its tokens have room for."""
    if not model.shown_pixels:
        return model.family
    settings = model.settings.conditioning.model_copy(update={"max_pixels": model.shown_pixels})
    return open_family(model.family.path, settings)


def stored(conditions: Sequence[Condition]) -> Batch:
    """As Encoders hands contexts out: on the CPU."""
    return [{"text": one.text.detach().to("cpu", copy=True).contiguous()} for one in conditions]


class Cached:
    """A ContextCache as the trainer makes and asks it."""

    def __init__(
        self, policy: Literal["off", "memory", "disk"], standing: Standing, records: Sequence[tuple[str, Crop]], model: Model,
        folder: Path | None = None,
    ) -> None:  # fmt: skip
        self.device = model.device
        self.cache = ContextCache(
            policy, folder, cast(Family, standing), log=lambda _: None, device=model.device, dtype=model.dtype
        )
        self.keys = [self.cache.request("student", prompt) for prompt, _ in records]
        self.keys += [self.cache.request("teacher", prompt, crop) for prompt, crop in records]
        self.computed = self.cache.complete(self.keys)

    def batch(self) -> Batch:
        return [{name: tensor.to(self.device) for name, tensor in self.cache.get(key).items()} for key in self.keys]


# ---- the measurement -------------------------------------------------------------------------------------------------


def measure(
    model: Model, records: list[tuple[str, Crop]], folder: Path, options: Options
) -> tuple[list[Row], dict[str, Batch]]:
    """Rows of everything but the errors, and each variant's contexts, on the CPU."""
    case = CASE + model.suffix
    step("conditioning: loading the encoders")
    standing = Standing(model)
    made: list[Path] = []

    def new_folder() -> Path:
        made.append(folder / f"cache-{len(made)}")
        return made[-1]

    def build(policy: Literal["memory", "disk"]) -> Cached:
        return Cached(policy, standing, records, model, new_folder() if policy == "disk" else None)

    caches = {"memory": build("memory"), "disk": build("disk"), "every_step": Cached("off", standing, records, model)}
    full = made[0]
    calls: dict[str, Callable[[], Any]] = {name: caches[name].batch for name in ("every_step", "memory", "disk")}
    rows: list[Row] = []
    published: Any = None
    prompts, pictures = [prompt for prompt, _ in records], [load_image(*crop) for _, crop in records]
    try:
        published = standing.random or Published(model)
        as_published = partial(published_batch, published, prompts, pictures)
        as_published()
        calls["R1"] = as_published
    except Exception as error:
        rows.append(failed(SUITE, case, "R1", "seconds_per_batch", "s", error))
    step("conditioning: contexts of a batch")
    contexts = {name: on_cpu(call()) for name, call in calls.items()}
    seconds = interleaved(calls, options.repeats(15, 5), 2, options.device, options.clock)
    for name, values in seconds.items():
        rows.append(Row(SUITE, case, name, "seconds_per_batch", unit="s", **summary(values)))
    for name in ("memory", "disk"):
        gain = ratios(seconds["every_step"], seconds[name])
        rows.append(Row(SUITE, f"{CASE}/every_step{model.suffix}", name, "speedup", unit="x", **summary(gain)))
        rows.append(Row(SUITE, case, name, "difference_from_encoders", difference(contexts[name], contexts["every_step"]), ""))

    step("conditioning: building the cache")
    once: dict[str, Callable[[], Any]] = {
        "memory": partial(build, "memory"), "disk": partial(build, "disk"),
        "reopen": partial(Cached, "disk", standing, records, model, full),
    }  # fmt: skip
    built = interleaved(once, options.repeats(5, 2), 1, options.device, options.clock)
    per_record = {name: [value / len(records) for value in values] for name, values in built.items()}
    size = {"memory": sum(t.nbytes for context in contexts["memory"] for t in context.values()),
            "disk": sum(file.stat().st_size for file in full.glob("contexts-*.safetensors"))}  # fmt: skip
    for name in ("memory", "disk"):
        rows.append(Row(SUITE, case, name, "seconds_to_build", unit="s", **summary(per_record[name])))
        rows.append(Row(SUITE, case, name, "bytes_per_record", size[name] / len(records), "B"))
        paid = break_even(summary(built[name])["value"], *(summary(seconds[v])["value"] for v in ("every_step", name)))
        if paid is None:
            rows.append(failed(SUITE, case, name, "break_even_steps", "", "the cache is no faster than the encoders here"))
        else:
            rows.append(Row(SUITE, case, name, "break_even_steps", paid, "", note="steps on the same batch"))
    rows.append(Row(SUITE, case, "disk", "seconds_to_reopen", unit="s", **summary(per_record["reopen"])))
    rows.append(Row(SUITE, case, "every_step", "encoder_bytes", float(bytes_of(standing.modules())), "B"))
    if published is not None:
        rows.append(Row(SUITE, case, "R1", "encoder_bytes", float(bytes_of(published.modules())), "B"))
    return rows, contexts


class Published(ReferenceEncoders):
    def __init__(self, model: Model) -> None:
        super().__init__(model.family.path, device=model.device, dtype=model.dtype, max_pixels=model.shown_pixels)

    def modules(self) -> list[nn.Module]:
        return [self.pipeline.text_encoder, self.vlm]


def published_batch(encoders: Any, prompts: list[str], pictures: list[Any]) -> Batch:
    return [{"text": one.text} for one in [*encoders.student(prompts), *encoders.teacher(prompts, pictures)]]


def break_even(build: float, every_step: float, cached: float) -> float | None:
    """Steps n on one batch with build + n * cached = n * every_step (seconds); None where that never happens."""
    return build / (every_step - cached) if every_step > cached else None


def bytes_of(modules: Sequence[nn.Module]) -> int:
    """Of the parameters; what two modules share counts once."""
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for m in modules for p in m.parameters()}
    return sum(storages.values())


def on_cpu(batch: Batch) -> Batch:
    return [{name: tensor.cpu() for name, tensor in context.items()} for context in batch]


def difference(found: Batch, expected: Batch) -> float:
    """Largest |found - expected|. ValueError: other names, shapes or dtypes."""
    most = 0.0
    for ours, theirs in zip(found, expected, strict=True):
        if {n: (t.shape, t.dtype) for n, t in ours.items()} != {n: (t.shape, t.dtype) for n, t in theirs.items()}:
            raise ValueError("a cached context has another shape or dtype than the encoders' own")
        most = max([most, *((ours[name].double() - theirs[name].double()).abs().max().item() for name in theirs)])
    return most


# ---- errors ----------------------------------------------------------------------------------------------------------


def errors(model: Model, records: list[tuple[str, Crop]], contexts: dict[str, Batch]) -> list[Row]:
    """context_relative_error of each variant."""
    case, metric = CASE + model.suffix, "context_relative_error"
    step("conditioning: the encoders in float64")
    gc.collect()
    if model.device.type == "cuda":
        torch.cuda.empty_cache()
    try:
        true = exact(model, records)
    except Exception as error:
        return [failed(SUITE, case, name, metric, "", error) for name in contexts]
    return [Row(SUITE, case, name, metric, relative_error(found, true), "") for name, found in contexts.items()]


def exact(model: Model, records: list[tuple[str, Crop]]) -> Batch:
    """Contexts in float64, on the CPU: the same weights, every operation wide. One encoder is wide at a time."""
    prompts = [prompt for prompt, _ in records]
    pictures = [[load_image(*crop)] for _, crop in records]
    if model.random:
        encoders = RandomEncoders(model)
        with wide_encoders(encoders.text_encoder.double()):
            found = stored(encoders.student(prompts))
        del encoders.text_encoder
        with wide_encoders(encoders.vlm.double()):
            return found + stored(encoders.teacher(prompts, pictures))
    loaded = shown(model).load_encoders(model.device, model.dtype)
    vision = loaded.vlm.model  # both are read in the measured dtype, then widened
    with wide_encoders(loaded.text_encoder.double()):
        found = loaded.student(prompts)
    del loaded.text_encoder
    with wide_encoders(vision.double()):
        found += loaded.teacher(prompts, pictures)
    loaded.release()
    return found


@contextmanager
def wide_encoders(model: nn.Module):
    """Keeps transformers' float64 models from casting to fp32 in norms and rotations; the rotations' frequencies, which
    they keep in fp32, are computed anew."""
    to, arange = Tensor.to, torch.arange

    def kept(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        narrow = torch.float32
        args = tuple(torch.float64 if one is narrow else one for one in args)
        kwargs = {name: torch.float64 if one is narrow else one for name, one in kwargs.items()}
        return to(tensor, *args, **kwargs)

    def wide_arange(*args: Any, **kwargs: Any) -> Tensor:
        return arange(*args, **(kwargs | {"dtype": torch.float64} if kwargs.get("dtype") is torch.float32 else kwargs))

    with (
        mock.patch.object(Tensor, "to", kept),
        mock.patch.object(Tensor, "float", lambda tensor: to(tensor, torch.float64)),
        mock.patch.object(torch, "arange", wide_arange),
    ):
        for module in model.modules():
            if hasattr(module, "inv_freq"):
                renew_frequencies(module)
        yield


def renew_frequencies(module: Any) -> None:
    """ValueError: a kind of rotation that is neither of the two of these encoders."""
    kind = module.rope_type
    if kind not in ("default", "axial"):
        raise ValueError(f"{type(module).__name__}: rotation {kind!r} has no float64 form here")
    found, _ = getattr(module, f"compute_{kind}_rope_parameters")(module.config)
    module.inv_freq = found.to(module.inv_freq.device)


def relative_error(found: Batch, true: Batch) -> float:
    """|found - true| / |true| over all values of all contexts. ValueError: another number of tokens."""
    lost = size = 0.0
    for ours, theirs in zip(found, true, strict=True):
        for name, exact_values in theirs.items():
            if ours[name].shape != exact_values.shape:
                raise ValueError(f"context {name}: {[*ours[name].shape]} against {[*exact_values.shape]} in float64")
            lost += (ours[name].double() - exact_values.double()).square().sum().item()
            size += exact_values.double().square().sum().item()
    return (lost / size) ** 0.5
