"""Suite `conditioning`: what it saves to compute contexts once instead of at every step.

One standard batch's contexts of student and teacher, from the records until they are tensors on the device, through the
trainer's own ContextCache. Case `contexts`, variants:

    every_step  conditioning.cache=off: the encoders run for every item of every batch
    memory      conditioning.cache=memory: computed once, kept in main memory
    disk        conditioning.cache=disk: computed once, read from safetensors; the files are in the system's file cache
    R1          the published step's encoders, the batch's prompts in one call; its pictures are decoded beforehand

    seconds_per_batch         at every step; speedup, in the case `contexts/every_step`: every_step's over a cache's
    difference_from_encoders  largest difference between a cached value and every_step's: 0 means bit for bit
    seconds_to_build          once, per record: hash, encode, write; the encoders are loaded already
    bytes_per_record          tensors in memory, or files on the disk
    break_even_steps          steps on the same batch from which on the cache has paid for its building
    encoder_bytes             parameters that stay on the device, and are freed once the contexts are cached
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from torch import nn

from bench.clock import ratios
from bench.harness import Contest, Seconds
from bench.live import say
from bench.models import Model
from bench.references.random_encoders import RandomEncoders
from bench.references.reference_eager import ReferenceEncoders
from bench.results import Options, Row, failed
from dopsd_fast.conditioning.cache import ContextCache, Crop
from dopsd_fast.conditioning.context import Context
from dopsd_fast.data.images import load_image
from dopsd_fast.data.records import read_records
from dopsd_fast.families.registry import open_family
from dopsd_fast.settings.schema import DataSettings
from dopsd_fast.storage.digests import digest

SUITE, CACHES = "conditioning", ("memory", "disk")
Batch = list[Context]


class OnCpu:
    """Random encoders as a ContextCache asks them: what `student` and `teacher` give comes to the CPU."""

    def __init__(self, encoders: RandomEncoders) -> None:
        self.random = encoders

    def __getattr__(self, name: str) -> Callable[..., Batch]:
        return lambda *given: [{"text": one.text.cpu()} for one in getattr(self.random, name)(*given)]


def standing(model: Model) -> tuple[Any, Any, list[nn.Module]]:
    """A family for a ContextCache, whose encoders stay loaded so that only encoding is measured; they, and their modules. A
    large model's encoder is shown no more of a picture than its tokens have room for."""
    family: Any = model.family
    encoders: Any
    if model.random:
        encoders = OnCpu(RandomEncoders(model))
        modules = encoders.random.modules()
        family.fingerprint = lambda kind, dtype: digest(["random weights", kind, str(dtype)])
    else:
        limit = {"max_pixels": model.shown_pixels} if model.shown_pixels else {}
        family = open_family(family.path, model.settings.conditioning.model_copy(update=limit))
        encoders = family.load_encoders(model.device, model.dtype)
        modules = [encoders.text_encoder, encoders.vlm.model]
    encoders.release = lambda: None
    family.load_encoders = lambda device, dtype: encoders
    return family, encoders, modules


def published(model: Model, encoders: Any) -> tuple[Any, list[nn.Module]]:
    """The published step's encoders, of a random model those that there are already; and their modules."""
    if model.random:
        return encoders.random, encoders.random.modules()
    found = ReferenceEncoders(model.family.path, device=model.device, dtype=model.dtype, max_pixels=model.shown_pixels)
    return found, [found.pipeline.text_encoder, found.vlm]


class Cached:
    """A ContextCache as the trainer makes and asks it; on the disk, in a new folder in `root`."""

    def __init__(self, family: Any, model: Model, records: Sequence[tuple[str, Crop]], root: str, policy: Any) -> None:
        self.device, self.folder = model.device, Path(tempfile.mkdtemp(dir=root)) if policy == "disk" else None
        self.cache = ContextCache(policy, self.folder, family, log=lambda _: None, device=model.device, dtype=model.dtype)
        self.keys = [self.cache.request("student", prompt) for prompt, _ in records]
        self.keys += [self.cache.request("teacher", prompt, crop) for prompt, crop in records]
        self.cache.complete(self.keys)

    def batch(self) -> Batch:
        return [{name: tensor.to(self.device) for name, tensor in self.cache.get(key).items()} for key in self.keys]

    @property
    def bytes(self) -> int:
        if self.folder is not None:
            return sum(file.stat().st_size for file in self.folder.glob("*.safetensors"))
        return sum(tensor.nbytes for context in self.batch() for tensor in context.values())


def measure(options: Options) -> Iterator[Row]:
    """Rows as they are found."""
    model = Model(options.model, options.device)
    side, chosen = model.standard.pixels, read_records(DataSettings(), 1).records[: model.standard.batch]
    records = [(next(iter(one.prompts.values())), (one.images[0], side, side)) for one in chosen]
    contest = Contest(SUITE, f"contexts{{}}{model.suffix}", options, "seconds_per_batch")
    row = contest.row
    seconds: dict[str, Sequence[float]] = {}
    say("conditioning: loading the encoders")
    family, encoders, modules = standing(model)
    yield row("every_step", "encoder_bytes", "B", bytes_of(modules))

    def of_steps(found: Seconds) -> Iterator[Row]:
        seconds.update(found)
        for name, values in found.items():
            yield row(name, contest.seconds, "s", values)
            if name in CACHES and "every_step" in found:
                yield row(name, contest.ratio, "x", ratios(found["every_step"], values), peer="every_step")

    def of_building(found: Seconds) -> Iterator[Row]:
        for name, values in found.items():
            yield row(name, "seconds_to_build", "s", [value / len(records) for value in values])
            if {name, "every_step"} <= set(seconds):
                paid = break_even(*map(median, (values, seconds["every_step"], seconds[name])))
                note = "steps on the same batch" if paid < float("inf") else "the cache is no faster than the encoders here"
                yield row(name, "break_even_steps", "", paid, note)

    with tempfile.TemporaryDirectory(prefix="contexts-") as root:
        new = partial(Cached, family, model, records, root)
        caches = {"every_step": new("off")} | {name: new(name) for name in CACHES}
        calls: dict[str, Callable[[], Any]] = {name: cache.batch for name, cache in caches.items()}
        try:
            theirs, modules = published(model, encoders)
            prompts, pictures = [prompt for prompt, _ in records], [load_image(*crop) for _, crop in records]
            calls["R1"] = lambda: (theirs.student(prompts), theirs.teacher(prompts, pictures))
            yield row("R1", "encoder_bytes", "B", bytes_of(modules))
        except Exception as error:
            yield failed(SUITE, contest.place(), "R1", contest.seconds, "s", error)
        encoded = caches["every_step"].batch()
        for name in CACHES:
            yield row(name, "difference_from_encoders", "", difference(caches[name].batch(), encoded))
            yield row(name, "bytes_per_record", "B", caches[name].bytes / len(records))
        yield from contest.time(calls, of_steps, usual=15, tour=5, warmup=2)
        yield from contest.time({name: partial(new, name) for name in CACHES}, of_building, usual=5, tour=2, warmup=1)


def break_even(build: float, every_step: float, cached: float) -> float:
    """Steps n on one batch with build + n * cached = n * every_step (seconds); infinite where that never happens."""
    return build / (every_step - cached) if every_step > cached else float("inf")


def bytes_of(modules: Sequence[nn.Module]) -> int:
    """Of the parameters; what two modules share counts once."""
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for m in modules for p in m.parameters()}
    return sum(storages.values())


def difference(found: Batch, expected: Batch) -> float:
    """Largest |found - expected|. ValueError: other names, shapes or dtypes."""
    most = 0.0
    for ours, theirs in zip(found, expected, strict=True):
        if {n: (t.shape, t.dtype) for n, t in ours.items()} != {n: (t.shape, t.dtype) for n, t in theirs.items()}:
            raise ValueError("a cached context has another shape or dtype than the encoders' own")
        most = max([most, *((ours[name].double() - theirs[name].double()).abs().max().item() for name in theirs)])
    return most
