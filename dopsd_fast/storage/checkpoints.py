"""The trainer's state on disk: safetensors and JSON, atomic, readable at any world size and ZeRO stage.

    <folder>/step-000100/rank-0000.safetensors    "name|offset|kind" -> flat fp32 elements from `offset` of a trained
                                                  tensor; kind master, exp_avg, exp_avg_sq, ema; step (int64 scalar)
                                                  metadata: step, rank and world that the file belongs to
    <folder>/step-000100/state.json               step, world, stage, the size of every file, the caller's `extra`

A folder counts only when state.json is there and every file it lists has its size; anything else is ignored, but for a
checkpoint of a newer format, which is refused.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from dopsd_fast.errors import UserError
from dopsd_fast.storage.atomic import sync_folder
from dopsd_fast.storage.safetensors_layout import Shard

FORMAT = 1
_NAME = re.compile(r"step-(\d{6,})")


class Stored(Protocol):
    """What a checkpoint asks of an engine, which says what each of these is (`distributed.engine.Engine`)."""

    rank: int
    world: int
    stage: int
    kinds: tuple[str, ...]

    def any(self, flag: bool) -> bool: ...

    def gather_int(self, value: int) -> list[int]: ...

    @property
    def trained_parameters(self) -> int: ...

    def fragment_sizes(self) -> list[tuple[str, int, int]]: ...

    def state_fragments(self) -> Iterable[tuple[str, int, dict[str, Tensor], int]]: ...

    def load_fragments(self, reader: Callable[[str, str, int, int], Tensor]) -> None: ...


class NewerFormat(UserError):
    """A checkpoint of a later version of this program: there, but not for this one to read or to replace."""


def save(folder: Path, engine: Stored, extra: dict[str, Any], step: int, keep: int) -> Path:
    """Writes `<folder>/step-<step>` and then removes the oldest beyond `keep` (0: none). Every rank calls it.

    The folder appears under its name only when it is complete and on the disk. A complete checkpoint of the same step
    is left as it is. Raises UserError on every rank when any rank cannot write; earlier checkpoints are then untouched.
    """
    folder = Path(folder)
    final = folder / f"step-{step:06d}"
    if engine.any(engine.rank == 0 and _state(final) is not None):
        return final
    # A name of its own: a rank that outlived its launcher may still be writing into the folder of the run before.
    work = folder / f"{final.name}.{engine.gather_int(time.time_ns())[0]:x}.tmp"
    reason = ""
    if engine.rank == 0:
        reason = _attempt(_prepare, folder, work, final)
    _agree(engine, reason, work, final)
    file = work / f"rank-{engine.rank:04d}.safetensors"
    reason = _attempt(_write_fragments, file, engine) or _attempt(file.stat)
    _agree(engine, reason, work, final)
    sizes = engine.gather_int(file.stat().st_size)
    if engine.rank == 0:
        state = {
            "format": FORMAT,
            "step": step,
            "world": engine.world,
            "stage": engine.stage,
            "files": {f"rank-{rank:04d}.safetensors": size for rank, size in enumerate(sizes)},
            "extra": extra,
        }
        reason = _attempt(_finish, work, final, state)
    _agree(engine, reason, work, final)
    if engine.rank == 0 and keep > 0:
        for old in _complete(folder)[:-keep]:
            _remove(old)
    return final


def latest(folder: Path) -> Path | None:
    """The complete checkpoint with the highest step, or None. NewerFormat where one of a later version is among them."""
    for path in _named(Path(folder)):
        with contextlib.suppress(_Incomplete):
            read_state(path)
    complete = _complete(Path(folder))
    return complete[-1] if complete else None


def read_extra(path: Path) -> dict[str, Any]:
    """What `save` was given as `extra`, without loading anything else."""
    return read_state(Path(path))["extra"]


def read_state(path: Path) -> dict[str, Any]:
    """state.json of a complete checkpoint. UserError, with the file that is at fault, where it is not complete;
    NewerFormat where a later version wrote it."""
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        version, files = state["format"], state["files"].items()
        state["step"], state["world"], state["extra"]
    except OSError:
        raise _Incomplete(path, "state.json is missing") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise _Incomplete(path, "state.json is damaged") from None
    if isinstance(version, int) and version > FORMAT:
        raise NewerFormat(f"{path} was written by a newer version of this program (format {version}, this one knows "
                          f"{FORMAT}): update the program, or choose another checkpoint")
    if version != FORMAT:
        raise _Incomplete(path, f"state.json is of format {version}")
    for name, size in files:
        try:
            found = (path / name).stat().st_size
        except OSError:
            raise _Incomplete(path, f"{name} is missing") from None
        if found != size:
            raise _Incomplete(path, f"{name} has {found} of {size} bytes")
    return state


def load(path: Path, engine: Stored) -> dict[str, Any]:
    """Puts the checkpoint `path` (or the latest one in the folder `path`) into the engine; `extra`. Every rank calls
    it.

    The saving run may have had another world size or ZeRO stage: each rank reads the ranges it needs. Raises UserError
    on every rank, and before anything is changed, when one of them finds the checkpoint damaged or of another model.
    """
    path = Path(path)
    with contextlib.ExitStack() as files:
        reason, extra = "", {}
        try:
            if _state(path) is None:
                path = latest(path) or path
            extra = read_extra(path)
            reader = CheckpointReader(path, files)
            reader.check(engine)
        except UserError as error:
            reason = str(error)
        if engine.any(bool(reason)):
            raise UserError(reason or f"{path} cannot be loaded: another rank failed, see its message")
        engine.load_fragments(reader)
    return extra


class _Incomplete(UserError):
    def __init__(self, path: Path, why: str) -> None:
        super().__init__(f"{path} is not a complete checkpoint ({why}): choose another, or remove it")


class _Piece(NamedTuple):
    """Elements [begin, end) of a tensor, at byte `position` of `stream`."""

    begin: int
    end: int
    stream: IO[bytes]
    position: int
    file: Path


class CheckpointReader:
    """reader(name, kind, offset, numel) over the rank files of one complete checkpoint: a flat fp32 tensor (the start of
    `out` where it is given), for kind "step" an int64 scalar.

    No memory map, so that nothing stays in memory but what is returned. The files are open until `files` closes: a
    checkpoint that a running job removes meanwhile is still read to the end.
    Raises UserError, with the file's name, for one that is damaged or belongs to another checkpoint.
    """

    def __init__(self, path: Path, files: contextlib.ExitStack) -> None:
        self.path = path
        self._pieces: dict[tuple[str, str], list[_Piece]] = {}
        state = read_state(path)
        for rank, name in enumerate(sorted(state["files"])):
            file = path / name
            try:
                stream = files.enter_context(open(file, "rb", buffering=0))
                shard = Shard.read(file)
                for key, entry in shard.entries.items():
                    tensor, offset, kind = key.rsplit("|", 2)
                    if entry["dtype"] != ("I64" if kind == "step" else "F32"):
                        raise ValueError(f"{key} is of type {entry['dtype']}")
                    numel = entry["shape"][0] if entry["shape"] else 1
                    position = len(shard.header) + entry["data_offsets"][0]
                    piece = _Piece(int(offset), int(offset) + numel, stream, position, file)
                    self._pieces.setdefault((tensor, kind), []).append(piece)
            except (OSError, ValueError, UserError) as error:
                raise self._damaged(file, str(error)) from error
            belongs = {"step": str(state["step"]), "rank": str(rank), "world": str(state["world"])}
            for what, value in belongs.items():
                if shard.metadata.get(what, value) != value:
                    raise self._damaged(file, f"it is of {what} {shard.metadata[what]}, not {value}")
        for (tensor, kind), pieces in self._pieces.items():
            pieces.sort()
            end = 0
            for piece in pieces if kind != "step" else ():
                if piece.begin != end:
                    raise self._damaged(piece.file, f"{tensor} ({kind}) goes on at {piece.begin}, not at {end}")
                end = piece.end

    def sizes(self, kind: str) -> dict[str, int]:
        """Number of elements of every tensor that has this kind."""
        return {name: pieces[-1].end for (name, found), pieces in self._pieces.items() if found == kind}

    def check(self, engine: Stored) -> None:
        """Raises UserError unless everything that this rank will ask for is there, and belongs to a model of one size."""
        for name, offset, numel in engine.fragment_sizes():
            for kind in engine.kinds:
                self._find(name, kind, offset, numel)
        held = sum(self.sizes("master").values())
        if held != engine.trained_parameters:
            raise UserError(f"{self.path} holds {held} trained numbers, the model has {engine.trained_parameters}: "
                            "it was written with a model or adapter of another size")

    def __call__(self, name: str, kind: str, offset: int, numel: int, out: Tensor | None = None) -> Tensor:
        if kind == "step":
            pieces = self._find(name, kind, 0, 0)
            steps = [int(self._read(piece, torch.empty(1, dtype=torch.int64), 0)) for piece in pieces]
            for step, piece in zip(steps, pieces):
                if step != steps[0]:
                    raise self._damaged(piece.file, f"its {name} has done {step} steps, in {pieces[0].file.name} {steps[0]}")
            return torch.tensor(steps[0])
        out = torch.empty(numel, dtype=torch.float32) if out is None else out[:numel]
        for piece in self._find(name, kind, offset, numel):
            low, high = max(offset, piece.begin), min(offset + numel, piece.end)
            if low < high:
                self._read(piece, out[low - offset : high - offset], low - piece.begin)
        return out

    def _find(self, name: str, kind: str, offset: int, numel: int) -> list[_Piece]:
        pieces = self._pieces.get((name, kind))
        if pieces is None:
            raise UserError(
                f"{self.path} holds no {kind} of {name}: it was written with another model, adapter or teacher.kind"
            )
        if kind != "step" and offset + numel > pieces[-1].end:
            raise UserError(
                f"{self.path} holds {pieces[-1].end} elements of {name} ({kind}), elements up to {offset + numel} are needed: "
                "it was written with a model or adapter of another size"
            )
        return pieces

    def _read(self, piece: _Piece, out: Tensor, start: int) -> Tensor:
        """Fills `out` from element `start` of the piece."""
        view = out.numpy().data.cast("B")
        position = piece.position + start * out.element_size()
        try:
            while view:
                count = os.preadv(piece.stream.fileno(), [view], position)
                if not count:
                    raise OSError(errno.EIO, "it ends too early")
                view, position = view[count:], position + count
        except OSError as error:
            raise self._damaged(piece.file, error.strerror or str(error)) from error
        return out

    def _damaged(self, file: Path, why: str) -> UserError:
        return UserError(f"{file} is damaged ({why}): remove {self.path} to go on from an earlier one")


def _write_fragments(path: Path, engine: Stored) -> None:
    """This rank's safetensors file, one fragment in memory at a time, on the disk when it returns."""
    fragments = engine.fragment_sizes()
    entries = [(_key(name, offset, kind), "F32", [numel]) for name, offset, numel in fragments for kind in engine.kinds]
    entries += [(_key(name, offset, "step"), "I64", []) for name, offset, _ in fragments]
    found = _NAME.match(path.parent.name)
    assert found is not None
    metadata = {"step": str(int(found[1])), "rank": str(engine.rank), "world": str(engine.world)}
    steps = []
    with open(path, "wb") as file:
        file.write(Shard.of(path.name, entries, metadata).header)
        for _, _, tensors, step in engine.state_fragments():
            for kind in engine.kinds:
                file.write(tensors[kind].contiguous().numpy().data)
            steps.append(step)
        file.write(torch.tensor(steps, dtype=torch.int64).numpy().data)
        file.flush()
        os.fsync(file.fileno())


def _key(name: str, offset: int, kind: str) -> str:
    return f"{name}|{offset}|{kind}"


def _prepare(folder: Path, work: Path, final: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob("step-*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        read_state(final)
    except NewerFormat:
        raise OSError(errno.EEXIST, "a newer version of this program has written it") from None
    except UserError:
        if final.exists():
            _remove(final)
    work.mkdir()


def _finish(work: Path, final: Path, state: dict[str, Any]) -> None:
    with open(work / "state.json", "w", encoding="utf-8") as file:
        json.dump(state, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(work)
    os.rename(work, final)
    sync_folder(final.parent)


def _attempt(action: Any, *arguments: Any) -> str:
    """Runs `action`; the empty string, or what the operating system said."""
    try:
        action(*arguments)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            return "no space left on the device"
        return error.strerror or str(error)
    return ""


def _agree(engine: Stored, reason: str, work: Path, final: Path) -> None:
    """Raises the same UserError on every rank when one has a reason, after removing the unfinished folder."""
    if engine.any(bool(reason)):
        if engine.rank == 0:
            shutil.rmtree(work, ignore_errors=True)
        raise UserError(
            f"could not save {final}: {reason or 'another rank failed, see its message'}; earlier checkpoints are "
            "intact: free some space (or lower checkpoint.keep), then run again with resume=auto"
        )


def _remove(checkpoint: Path) -> None:
    """Takes the name away first, so that a half-removed folder can never look complete."""
    doomed = checkpoint.with_name(checkpoint.name + ".old.tmp")
    with contextlib.suppress(OSError):
        os.rename(checkpoint, doomed)
        shutil.rmtree(doomed)


def _complete(folder: Path) -> list[Path]:
    """Oldest first."""
    return [path for path in _named(folder) if _state(path) is not None]


def _named(folder: Path) -> list[Path]:
    """Whatever has a checkpoint's name, lowest step first."""
    found = [(int(match[1]), path) for path in _children(folder) if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def _children(folder: Path) -> Iterable[Path]:
    return folder.iterdir() if folder.is_dir() else []


def _state(checkpoint: Path) -> dict[str, Any] | None:
    """state.json, or None unless the checkpoint is complete."""
    try:
        return read_state(checkpoint)
    except UserError:
        return None
