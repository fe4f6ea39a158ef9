"""`python -m dopsd_fast.convert CHECKPOINT_OR_RUN OUT`: the export of a checkpoint, without the run that wrote it.

Full fine-tuning gives the complete pipeline folder, LoRA the adapter's folder: the files that a finished run leaves in
export/ (student, the fp32 masters) and export_teacher/ (the fp32 average), bit for bit unless --dtype or --max-shard-size
asks for others. Needs neither the ranks that wrote the checkpoint nor an accelerator; of a full model one tensor is in
memory at a time.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from dopsd_fast.errors import UserError, require_platform
from dopsd_fast.families.base import Family
from dopsd_fast.families.registry import open_family
from dopsd_fast.settings.load import load_settings
from dopsd_fast.settings.schema import Settings
from dopsd_fast.storage import checkpoints
from dopsd_fast.storage.atomic import atomic_folder
from dopsd_fast.storage.checkpoints import CheckpointReader
from dopsd_fast.storage.lora import save_lora
from dopsd_fast.storage.pipeline import arrange, source_shards, write_full
from dopsd_fast.storage.safetensors_layout import DTYPES, Shard
from dopsd_kernels.adamw_ema_triton import untie_

KINDS = {"student": "master", "teacher": "ema"}
PLACES = {"student": "export", "teacher": "export_teacher"}
STORED = {"source": "", "bf16": "BF16", "fp32": "F32"}
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
EXPORT_HAS = ("model_index.json", "adapter_config.json", *PLACES.values())


def main(argv: list[str]) -> int:
    """0: written. 2: not written, for a reason that is said in one line. 130: interrupted."""
    try:
        require_platform()
        print(convert(_arguments(argv)))
        return 0
    except UserError as error:
        complaint, code = str(error), 2
    except KeyboardInterrupt:
        complaint, code = "interrupted; what was there before is as it was", 130
    print(f"error: {complaint}", file=sys.stderr, flush=True)
    return code


def convert(arguments: argparse.Namespace) -> str:
    """Writes the export; what was written, for the user. Raises UserError, and `arguments.out` is then as it was."""
    started = time.perf_counter()
    run, checkpoint = _find(Path(arguments.checkpoint).expanduser())
    settings = load_settings([str(run / "settings.toml")])
    branches = ["student", "teacher"] if arguments.which == "both" else [arguments.which]
    _check_asked(settings, branches, arguments)
    out = Path(arguments.out).expanduser().resolve()
    family = _family(settings, arguments.model)
    _check_out(out, arguments.overwrite, {"checkpoint": checkpoint, "model": family.path})
    with ExitStack() as files:
        reader = CheckpointReader(checkpoint, files)
        write = _full if settings.adapter.kind == "full" else _lora
        export = write(family, settings, reader, arguments)
        for branch in branches:
            export.check(KINDS[branch])
        with atomic_folder(out, mark=".convert") as folder:
            for branch in branches:
                export.write(KINDS[branch], folder / PLACES[branch] if len(branches) > 1 else folder)
    seconds = time.perf_counter() - started
    places = [str(out / PLACES[branch]) if len(branches) > 1 else str(out) for branch in branches]
    lines = [f"{place}: {branch} of {checkpoint}" for place, branch in zip(places, branches)]
    return "\n".join([*lines, f"{export.describe()}, {seconds:.1f} s"])


@dataclass
class _Export(ABC):
    """Describes and writes an export: the name and shape of every tensor, in the order in which they are written."""

    reader: CheckpointReader
    shapes: dict[str, list[int]]
    model: Path
    untie: bool
    """The run kept masters as low bits, see `untie_`."""

    def check(self, kind: str) -> None:
        """UserError unless the checkpoint holds just these tensors, in these sizes."""
        sizes, path = self.reader.sizes(kind), self.reader.path
        for name, shape in self.shapes.items():
            if name not in sizes:
                raise UserError(f"{path} holds no {kind} of {name}, which {self.model} has: name the model that was trained "
                                "with --model")
            if sizes[name] != torch.Size(shape).numel():
                raise UserError(f"{path} holds {sizes[name]} elements of {name}, in {self.model} its shape is {shape}: name "
                                "the model that was trained with --model")
        if unknown := sizes.keys() - self.shapes.keys():
            raise UserError(f"{path} holds {min(unknown)}, which {self.model} does not have: name the model that was trained "
                            "with --model")

    def tensors(self, kind: str, buffer: Tensor | None = None) -> Iterator[tuple[str, Tensor]]:
        """Each lies in `buffer`, where that is given, until the next is asked for."""
        for name, shape in self.shapes.items():
            found = self.reader(name, kind, 0, torch.Size(shape).numel(), buffer)
            yield name, (untie_(found) if self.untie else found).view(shape)

    @abstractmethod
    def write(self, kind: str, folder: Path) -> None:
        """The files of one branch."""

    def describe(self) -> str:
        return f"{sum(torch.Size(shape).numel() for shape in self.shapes.values()) / 1e6:.1f} M numbers a model"


@dataclass
class _FullExport(_Export):
    family: Family
    shards: list[Shard] | None

    def write(self, kind: str, folder: Path) -> None:
        buffer = torch.empty(max(torch.Size(shape).numel() for shape in self.shapes.values()))
        write_full(self.family.path, self.tensors(kind, buffer), folder, self.shards)


@dataclass
class _LoraExport(_Export):
    family: Family
    config: Any
    dtype: torch.dtype

    def write(self, kind: str, folder: Path) -> None:
        save_lora(self.family.pipeline_class, dict(self.tensors(kind)), self.config, folder, self.dtype)


def _full(family: Family, settings: Settings, reader: CheckpointReader, arguments: argparse.Namespace) -> _Export:
    stored = source_shards(family.path)
    shards = None
    if arguments.dtype != "source" or arguments.max_shard_size:
        shards = arrange(stored, STORED[arguments.dtype], arguments.max_shard_size)
    shapes = {name: entry["shape"] for shard in shards or stored for name, entry in shard.entries.items()}
    return _FullExport(reader, shapes, family.path, settings.train.masters == "low_bits", family, shards)


def _lora(family: Family, settings: Settings, reader: CheckpointReader, arguments: argparse.Namespace) -> _Export:
    """Names and shapes from the transformer on the meta device: nothing of the model is read."""
    from dopsd_fast.pair.lora import add_adapters
    from dopsd_fast.pair.student_teacher import STUDENT

    model, adapter = family.meta_transformer().requires_grad_(False), settings.adapter
    targets = adapter.targets or family.lora_targets
    config = add_adapters(model, targets, adapter.rank, adapter.alpha, settings.train.seed, [STUDENT])
    shapes = {name.replace(f".{STUDENT}.", "."): list(p.shape) for name, p in model.named_parameters() if p.requires_grad}
    dtype = torch.float32 if arguments.dtype == "source" else DTYPES[STORED[arguments.dtype]]
    return _LoraExport(reader, shapes, family.path, settings.train.masters == "low_bits", family, config, dtype)


def _find(path: Path) -> tuple[Path, Path]:
    """(run folder, complete checkpoint) that `path` names: a run by its latest checkpoint, or a checkpoint of a run."""
    if not path.exists():
        raise UserError(f"{path} does not exist: name a run folder, or one of its checkpoints")
    path = path.resolve()
    if (path / "settings.toml").is_file():
        found = checkpoints.latest(path / "checkpoints")
        if found is None:
            raise UserError(f"{path} has no complete checkpoint")
        return path, found
    if path.name == "checkpoints":
        return _find(path.parent)
    checkpoints.read_state(path)
    run = path.parent.parent
    if not (run / "settings.toml").is_file():
        raise UserError(f"{run / 'settings.toml'} is missing: a checkpoint is read with the settings of its run, leave it in "
                        "RUN/checkpoints/")
    return run, path


def _check_asked(settings: Settings, branches: list[str], arguments: argparse.Namespace) -> None:
    kind = settings.teacher.kind
    if "teacher" in branches and kind != "ema":
        what = f"its weights are the source's, {settings.model.folder}" if kind == "frozen" else "it is the student itself"
        raise UserError(f"--which {arguments.which}: teacher.kind={kind} has no average ({what}): use --which student")
    if arguments.max_shard_size and settings.adapter.kind == "lora":
        raise UserError("--max-shard-size: adapter.kind=lora is exported as one small file: leave it out")


def _family(settings: Settings, model: str) -> Family:
    folder = Path(model).expanduser() if model else settings.model.folder
    if not folder.is_dir():
        what = "--model" if model else "the run's model.path"
        raise UserError(f"{what}={folder}: no such folder: where the model has moved to is told by --model PATH")
    return open_family(folder.resolve(), settings.conditioning, settings.model.family)


def _check_out(out: Path, overwrite: bool, kept: dict[str, Path]) -> None:
    for what, folder in kept.items():
        folder = folder.resolve()
        if out == folder or out in folder.parents or folder in out.parents:
            raise UserError(f"{out} and the {what} {folder} lie inside each other: choose another folder to write to")
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: name a folder")
    if out.exists() and any(out.iterdir()):
        if not overwrite:
            raise UserError(f"{out} is not empty: name another folder, or replace it with --overwrite")
        if not any((out / name).exists() for name in EXPORT_HAS):
            raise UserError(f"{out} holds something else than an export: remove it yourself, or name another folder")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help lists what there is")


def _size(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", text.strip(), re.IGNORECASE)
    size = int(float(match[1]) * UNITS[match[2].upper()]) if match else 0
    if size <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 5GB or 500MB")
    return size


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = _Parser(
        prog="python -m dopsd_fast.convert", allow_abbrev=False,
        description="Writes the student or the teacher of a checkpoint as other programs load it: a complete pipeline folder, "
        "or for adapter.kind=lora the adapter's folder. Needs no GPU; one tensor is in memory at a time.",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT_OR_RUN", help="RUN/checkpoints/step-000100, or RUN: its latest one")
    parser.add_argument("out", metavar="OUT", help="folder to write; new or empty, unless --overwrite")
    parser.add_argument("--which", choices=("student", "teacher", "both"), default="student",
                        help="both writes OUT/export and OUT/export_teacher (default: student)")
    parser.add_argument("--model", metavar="PATH", default="",
                        help="the pipeline folder that was trained, where the run's model.path is no longer right")
    parser.add_argument("--max-shard-size", metavar="SIZE", type=_size, default=0,
                        help="write the weights as files of at most SIZE (5GB, 500MB) with an index, as diffusers does "
                        "(default: the source's files)")
    parser.add_argument("--dtype", choices=tuple(STORED), default="source",
                        help="type of the stored weights (default: as in the source; LoRA: fp32)")
    parser.add_argument("--overwrite", action="store_true", help="replace the export in OUT, once the new one is complete")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
