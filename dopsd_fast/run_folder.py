"""The folder of one run: whose it is, what a resumed run may change, and where its parts lie."""

from __future__ import annotations

import time
from pathlib import Path

from dopsd_fast.errors import UserError
from dopsd_fast.settings import Settings, load_settings

MAY_CHANGE = ("resume", "recipe", "output.", "sample.every", "checkpoint.", "train.threads", "train.steps", "conditioning.cache",
              "conditioning.folder", "data.skip_bad")
"""Settings that do not enter the numbers of a step, and so may differ when a run continues."""


def open_run(settings: Settings) -> tuple[Path, Path | None]:
    """The run folder, made if need be, and the folder to resume from (None to start anew). Rank 0 calls it.

    Raises UserError when the folder holds a run and `resume` does not say to continue it, or when that run had other
    settings.
    """
    folder = Path(settings.output.dir).expanduser() if settings.output.dir else _new_folder(settings)
    source = folder
    if settings.resume not in ("auto", "never"):
        source = Path(settings.resume).expanduser()
        if source.parent.name == "checkpoints":
            source = source.parent.parent
        if not (source / "settings.toml").is_file():
            raise UserError(f"resume={settings.resume}: no run there (settings.toml is missing)")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output.dir={folder} is a file: name a folder")
    occupied = (folder / "settings.toml").is_file()
    if occupied and settings.resume == "never":
        raise UserError(f"output.dir={folder} holds another run: choose a new folder, or continue it with resume=auto")
    if not occupied and folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"output.dir={folder} is not empty and holds no run of this program: choose a new folder")
    resuming = (source / "settings.toml").is_file()
    if resuming:
        _check_same(settings, load_settings([str(source / "settings.toml")]), source)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / "settings.toml.part"
        part.write_text(settings.model_copy(update={"output": settings.output.model_copy(update={"dir": str(folder)})})
                        .to_toml(), encoding="utf-8")
        part.replace(folder / "settings.toml")
    except OSError as error:
        raise UserError(f"output.dir={folder}: cannot be written ({error.strerror})") from error
    return folder, source / "checkpoints" if resuming else None


def _new_folder(settings: Settings) -> Path:
    stem = f"runs/{settings.recipe or 'run'}-{time.strftime('%Y%m%d-%H%M%S')}"
    return next(path for i in range(1000) if not (path := Path(f"{stem}-{i}" if i else stem)).exists())


def _check_same(now: Settings, before: Settings, folder: Path) -> None:
    for name, value in _flat(now.model_dump()).items():
        old = _flat(before.model_dump()).get(name)
        if value != old and not name.startswith(MAY_CHANGE):
            raise UserError(f"{folder} holds a run with {name}={old!r}, not {value!r}: "
                            f"give {name}={old} to continue it, or another output.dir")


def _flat(tree: dict, prefix: str = "") -> dict:
    out = {}
    for name, value in tree.items():
        out |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return out
