"""The files of a data set on disk: everything below a folder, and a file by its name whatever the case of its letters."""

from __future__ import annotations

import os
from collections import deque
from pathlib import Path

from dopsd_fast.errors import UserError


def files_below(folder: Path) -> list[Path]:
    """Every file below `folder`, sorted by path; hidden files and folders are left out.

    Linked folders are followed. Each real folder is read once, by its own path rather than by a link to it where both lie
    below `folder`: a link that leads back to a folder above it would otherwise never end, and a picture that is reached in
    two ways would be trained on twice. A link that leads nowhere, or to itself, counts as a file, so that it can be named.
    Raises UserError for a folder that cannot be read.
    """
    found: list[Path] = []
    seen: set[tuple[int, int]] = set()
    links: deque[Path] = deque()
    pending = [folder]
    while pending or links:
        here = pending.pop() if pending else links.popleft()
        try:
            status = here.stat()
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(here) as entries:
                for entry in sorted(entries, key=lambda one: one.name):
                    if entry.name.startswith("."):
                        continue
                    path = here / entry.name
                    if not _is_folder(entry):
                        found.append(path)
                    elif entry.is_symlink():
                        links.append(path)
                    else:
                        pending.append(path)
        except OSError as error:
            raise UserError(f"data set {folder} cannot be read: {here}: {error.strerror}") from None
    return sorted(found)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # links that lead to each other
        return False


class Locator:
    """Finds files by names that were perhaps written where the case of letters does not matter."""

    def __init__(self) -> None:
        self._listings: dict[Path, dict[str, list[str]]] = {}

    def find(self, root: Path, name: str) -> Path:
        """`root / name` if it is there; else the only file that differs from it in the case of letters alone; else
        `root / name`. ValueError for a name that no file can have."""
        exact = root / name
        if exact.exists():
            return exact
        given = Path(name)
        here = Path(given.anchor) if given.anchor else root
        for part in given.parts[1 if given.anchor else 0 :]:
            step = here / part
            if not step.exists():
                alike = self._listing(here).get(part.casefold(), [])
                if len(alike) != 1:
                    return exact
                step = here / alike[0]
            here = step
        return here

    def _listing(self, folder: Path) -> dict[str, list[str]]:
        if folder not in self._listings:
            names: dict[str, list[str]] = {}
            try:
                for name in sorted(os.listdir(folder)):
                    names.setdefault(name.casefold(), []).append(name)
            except OSError:
                names = {}
            self._listings[folder] = names
        return self._listings[folder]
