"""Files and folders that appear under their final name only when they are complete and on the disk."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from dopsd_fast.errors import UserError


def sync_folder(folder: Path) -> None:
    """The names in `folder` are on the disk when this returns: renaming alone does not put them there."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace(temporary: Path, final: Path) -> None:
    """fsync, rename, fsync of the folder: after a crash the final name holds the old or the whole new content."""
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, final)
    sync_folder(final.parent)


def replace_all(files: Mapping[Path, Path]) -> None:
    """`replace` for many files (temporary -> final name) of one folder, with one flush for all of them: the file system is
    synchronised as a whole, instead of file by file."""
    folders = {final.parent for final in files.values()}
    for folder in folders:
        _sync_file_system(folder)
    for temporary, final in files.items():
        os.replace(temporary, final)
    for folder in folders:
        sync_folder(folder)


def _sync_file_system(folder: Path) -> None:
    """Linux's syncfs(2), which Python does not offer; os.sync would wait for every other disk of the machine, too."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        if ctypes.CDLL(None, use_errno=True).syncfs(handle):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), str(folder))
    finally:
        os.close(handle)


@contextmanager
def replacing(file: Path, flush: bool = True) -> Iterator[Path]:
    """`<file>.part`, which is to be written inside; at the end it takes the place of `file`, on an error it stays behind.

    flush: what is written survives a crash of the machine, too; without, only the end of this process. Pictures and what is
    told often do without, since a flush waits for the disk."""
    part = file.with_name(file.name + ".part")
    yield part
    if flush:
        replace(part, file)
    else:
        os.replace(part, file)


def write_text(file: Path, text: str, flush: bool = True) -> None:
    """Replaces `file`, UTF-8, as `replacing` does."""
    with replacing(file, flush) as part:
        part.write_text(text, encoding="utf-8")


def link_tree(source: Path, target: Path, skip: Path | None = None, skip_suffixes: Iterable[str] = ()) -> None:
    """Hard-links (else copies) the files below `source`; hidden files, `skip` and `skip_suffixes` are left out."""
    target.mkdir(parents=True, exist_ok=True)
    for entry in sorted(source.iterdir()):
        if entry.name.startswith(".") or entry == skip:
            continue
        if entry.is_dir():
            link_tree(entry, target / entry.name, skip, skip_suffixes)
        elif entry.suffix not in skip_suffixes:
            link_or_copy(entry, target / entry.name)


def link_or_copy(source: Path, target: Path) -> None:
    real = source.resolve()  # a hub snapshot holds symbolic links
    try:
        os.link(real, target)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        shutil.copy2(real, target)


@contextmanager
def atomic_folder(out: Path, mark: str = "") -> Iterator[Path]:
    """A temporary folder beside `out` that takes its place at the end, when its files are on the disk; on an error it vanishes
    and `out` stays.

    `<out><mark>.tmp` and `<out><mark>.old` are this function's own: what is there from a killed run is removed."""
    out = Path(out)
    temporary, old = out.with_name(f"{out.name}{mark}.tmp"), out.with_name(f"{out.name}{mark}.old")
    try:
        if old.exists() and not out.exists():  # a run was killed between the two renames below
            old.rename(out)
        for leftover in (temporary, old):
            if leftover.exists():
                shutil.rmtree(leftover)
        temporary.mkdir(parents=True)
        yield temporary
        _sync_file_system(temporary)
        if out.exists():
            out.rename(old)
        temporary.rename(out)
        sync_folder(out.parent)
        shutil.rmtree(old, ignore_errors=True)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError | SafetensorError):
            reason = getattr(error, "strerror", None) or str(error)
            full = any(os.strerror(number) in reason for number in (errno.ENOSPC, errno.EDQUOT))
            hint = "free some space and run again (training: with resume=auto)" if full else "check the folder"
            raise UserError(f"cannot write {out}: {reason}; {hint}") from error
        raise
