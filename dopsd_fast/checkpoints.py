"""The trainer's state on disk: safetensors and JSON, atomic, readable at any world size and ZeRO stage.

    <folder>/step-000100/rank-0000.safetensors    "name|offset|kind" -> flat fp32 elements from `offset` of a trained
                                                  tensor; kind master, exp_avg, exp_avg_sq, ema; step (int64 scalar)
    <folder>/step-000100/state.json               step, world, stage, the size of every file, the caller's `extra`

A folder counts only when state.json is there and every file it lists has its size; anything else is ignored.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dopsd_fast.errors import UserError

if TYPE_CHECKING:
    from dopsd_fast.sharding import Engine

FORMAT = 1
_NAME = re.compile(r"step-(\d{6,})")


def save(folder: Path, engine: Engine, extra: dict[str, Any], step: int, keep: int) -> Path:
    """Writes `<folder>/step-<step>` and then removes the oldest beyond `keep` (0: none). Every rank calls it.

    The folder appears under its name only when it is complete and on the disk. A complete checkpoint of the same step
    is left as it is. Raises UserError on every rank when any rank cannot write; earlier checkpoints are then untouched.
    """
    folder = Path(folder)
    final = folder / f"step-{step:06d}"
    if engine.any(engine.rank == 0 and _state(final) is not None):
        return final
    work = folder / f"{final.name}.tmp"
    reason = ""
    if engine.rank == 0:
        reason = _attempt(_prepare, folder, work)
    _agree(engine, reason, work, final)
    file = work / f"rank-{engine.rank:04d}.safetensors"
    reason = _attempt(_write_fragments, file, engine)
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
    """The complete checkpoint with the highest step, or None."""
    complete = _complete(Path(folder))
    return complete[-1] if complete else None


def read_extra(path: Path) -> dict[str, Any]:
    """What `save` was given as `extra`, without loading anything else."""
    state = _state(Path(path))
    if state is None:
        raise UserError(f"{path} is not a complete checkpoint: choose another, or remove it")
    return state["extra"]


def load(path: Path, engine: Engine) -> dict[str, Any]:
    """Puts the checkpoint `path` (or the latest one in the folder `path`) into the engine; `extra`. Every rank calls
    it.

    The saving run may have had another world size or ZeRO stage: each rank reads the ranges it needs.
    """
    path = Path(path)
    if _state(path) is None:
        path = latest(path) or path
    extra = read_extra(path)
    with contextlib.ExitStack() as files:
        engine.load_fragments(_Reader(path, files))
    return extra


class _Reader:
    """reader(name, kind, offset, numel) over the rank files of one checkpoint."""

    def __init__(self, path: Path, files: contextlib.ExitStack) -> None:
        from safetensors import SafetensorError, safe_open

        self.path = path
        self._pieces: dict[tuple[str, str], list[tuple[int, Any]]] = {}
        for file in sorted(path.glob("rank-*.safetensors")):
            try:
                handle = files.enter_context(safe_open(file, framework="pt"))
            except SafetensorError as error:
                raise UserError(f"{file} is damaged ({error}): remove {path} to go on from an earlier one") from error
            for key in handle.keys():
                name, offset, kind = key.rsplit("|", 2)
                self._pieces.setdefault((name, kind), []).append((int(offset), (handle, key)))

    def __call__(self, name: str, kind: str, offset: int, numel: int) -> Tensor:
        pieces = self._pieces.get((name, kind))
        if pieces is None:
            raise UserError(
                f"{self.path} holds no {kind} of {name}: it was written with another model, adapter or teacher.kind"
            )
        if kind == "step":
            handle, key = pieces[0][1]
            return handle.get_tensor(key)
        out = torch.empty(numel, dtype=torch.float32)
        filled = 0
        for begin, (handle, key) in pieces:
            piece = handle.get_slice(key)
            low, high = max(offset, begin), min(offset + numel, begin + piece.get_shape()[0])
            if low < high:
                out[low - offset : high - offset] = piece[low - begin : high - begin]
                filled += high - low
        if filled != numel:
            raise UserError(
                f"{self.path} holds {filled} of the elements {offset} to {offset + numel} of {name} ({kind}): "
                "it was written with a model or adapter of another size"
            )
        return out


def _write_fragments(path: Path, engine: Engine) -> None:
    """This rank's safetensors file, one fragment in memory at a time, on the disk when it returns.

    Layout: https://github.com/huggingface/safetensors#format (header length as 8 bytes, JSON header, data without
    gaps).
    """
    header: dict[str, Any] = {}
    end = 0
    for name, offset, numel in engine.fragment_sizes():
        for kind in engine.kinds:
            begin, end = end, end + 4 * numel
            header[_key(name, offset, kind)] = {"dtype": "F32", "shape": [numel], "data_offsets": [begin, end]}
    for name, offset, _ in engine.fragment_sizes():
        header[_key(name, offset, "step")] = {"dtype": "I64", "shape": [], "data_offsets": [end, end + 8]}
        end += 8
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    steps = []
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, _, tensors, step in engine.state_fragments():
            for kind in engine.kinds:
                file.write(tensors[kind].contiguous().numpy().data)
            steps.append(step)
        file.write(torch.tensor(steps, dtype=torch.int64).numpy().data)
        file.flush()
        os.fsync(file.fileno())


def _key(name: str, offset: int, kind: str) -> str:
    return f"{name}|{offset}|{kind}"


def _prepare(folder: Path, work: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob("step-*.tmp"):
        shutil.rmtree(leftover)
    incomplete = work.with_suffix("")
    if incomplete.exists():
        _remove(incomplete)
    work.mkdir()


def _finish(work: Path, final: Path, state: dict[str, Any]) -> None:
    with open(work / "state.json", "w", encoding="utf-8") as file:
        json.dump(state, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    _sync_folder(work)
    os.rename(work, final)
    _sync_folder(final.parent)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _attempt(action: Any, *arguments: Any) -> str:
    """Runs `action`; the empty string, or what the operating system said."""
    try:
        action(*arguments)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            return "no space left on the device"
        return error.strerror or str(error)
    return ""


def _agree(engine: Engine, reason: str, work: Path, final: Path) -> None:
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
    found = [(int(match[1]), path) for path in _children(folder) if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found) if _state(path) is not None]


def _children(folder: Path) -> Iterable[Path]:
    return folder.iterdir() if folder.is_dir() else []


def _state(checkpoint: Path) -> dict[str, Any] | None:
    """state.json, or None unless the checkpoint is complete."""
    try:
        state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
        sizes = {name: (checkpoint / name).stat().st_size for name in state["files"]}
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return state if state.get("format") == FORMAT and sizes == state["files"] else None
