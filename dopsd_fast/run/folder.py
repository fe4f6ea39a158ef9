"""Opens the folder of a run: decides whether this run may use it, whether a continued run is still the same, and from which
checkpoint it continues."""

from __future__ import annotations

import fcntl
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from dopsd_fast.data.records import some_of
from dopsd_fast.errors import UserError
from dopsd_fast.settings.load import load_settings
from dopsd_fast.settings.schema import Settings
from dopsd_fast.settings.source import by_path
from dopsd_fast.storage import checkpoints
from dopsd_fast.storage.atomic import link_tree, write_text

PARTS = ("metrics.jsonl", "checkpoints", "samples", "tensorboard", "export", "export_teacher")
"""Files and folders that a run writes beside its settings.toml. In a folder without any of them there is nothing to lose and
nothing to continue."""

DATA = "data.json"
"""The records that the run began with: {"format": 1, "records": {index: fields}}, as `accounts.of_records` gives them."""

MAY_CHANGE = ("resume", "recipe", "model.allow", "output.", "sample.every", "checkpoint.", "train.threads",
              "conditioning.cache", "conditioning.folder", "data.skip_bad")
"""Settings that may differ when a run continues, because they never enter the numbers of a step."""

SAME_SUMS = ("deepspeed.stage", "deepspeed.gather", "train.masters", "train.activations", "train.attention", "backbone",
             "method.backward", "deepspeed.config.zero_optimization.", "deepspeed.config.train_micro_batch_size_per_gpu",
             "deepspeed.config.gradient_accumulation_steps", "deepspeed.config.aio.", "deepspeed.config.comms_logger.",
             "deepspeed.config.flops_profiler.", "deepspeed.config.steps_per_print", "deepspeed.config.wall_clock_breakdown",
             "deepspeed.config.memory_breakdown")
"""Settings that say where and how the same sums are computed: ZeRO's stage, gathers, offload and buckets, how masters are kept,
what backward computes again, and which kernel runs. They may differ too when a run continues. The state is taken over bit for
bit, and from there on the numbers differ by the order of sums, as they do between world sizes."""

OTHER_SUMS = ("quantized", "zenflow")
"""Words that mark those settings below zero_optimization that do enter the numbers, and so may not differ."""

LOCK_SECONDS = 60.0


class FolderLock:
    """Keeps other processes out of a run folder for as long as this process lives. It is needed because ranks whose launcher
    was killed may still be saving when the user starts the run again."""

    def __init__(self) -> None:
        self.file: IO[str] | None = None

    def take(self, folder: Path, say: Callable[[str], None]) -> None:
        """Locks `folder`. Waits up to LOCK_SECONDS for another process to end, then raises UserError."""
        self.file = open(folder / ".lock", "a", encoding="utf-8")
        started = time.monotonic()
        while True:
            try:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                pass
            except OSError:  # this file system has no locks
                return
            if time.monotonic() - started > LOCK_SECONDS:
                raise UserError(f"output.dir={folder} is in use by a run that is still going: stop it, or name another folder")
            if say is not _silent:
                say(f"{folder} is still in use: waiting for the other process to end")
                say = _silent
            time.sleep(0.2)


def open_run(
    settings: Settings, global_batch: int, records: dict[str, Any], lock: FolderLock, say: Callable[[str], None]
) -> tuple[Path, Path | None]:
    """Makes the run folder if it is missing, locks it, and returns it with the checkpoint to continue from, which is None for a
    run that begins. Rank 0 calls it.

    records: the data set as it was read (`accounts.of_records`).

    With resume=never the folder must hold no run. With auto the run begins or continues. With the path of a run or of one of
    its checkpoints, the run continues from there: in its own folder, or in another output.dir, which then starts as a copy of
    the run up to that checkpoint. Raises UserError when the folder holds a run that may not be continued, or one with other
    settings or other records, or when it cannot be written.
    """
    try:
        return _open(settings, global_batch, records, lock, say)
    except OSError as error:
        raise UserError(f"output.dir={error.filename or settings.output.dir}: cannot be written ({error.strerror})") from error


def _open(
    settings: Settings, global_batch: int, records: dict[str, Any], lock: FolderLock, say: Callable[[str], None]
) -> tuple[Path, Path | None]:
    records = json.loads(json.dumps(records))  # in the form in which the file is read back
    source = _named_checkpoint(settings.resume) if settings.resume not in ("auto", "never") else None
    if settings.output.dir:
        folder = Path(settings.output.dir).expanduser()
    else:
        folder = source.parent.parent if source else _new_folder(settings)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output.dir={folder} is a file: name a folder")
    in_place = source is not None and folder.resolve() == source.parent.parent.resolve()
    _check_free(folder, settings, in_place)
    folder.mkdir(parents=True, exist_ok=True)
    lock.take(folder, say)
    _check_free(folder, settings, in_place)  # the process that held the lock may have begun a run

    if source is not None and not in_place:
        _check_same(settings, source.parent.parent, source, global_batch)
        _check_data(settings, source.parent.parent, records)
        _branch(source, folder)
    found = checkpoints.latest(folder / "checkpoints")
    if _holds_run(folder):
        _check_same(settings, folder, found, global_batch)
        if found is not None:
            _check_data(settings, folder, records)
    if in_place and found is not None and source is not None and found.name != source.name:
        raise UserError(f"resume={settings.resume}: {folder} has gone on to {found.name}: give another output.dir")
    write_text(folder / DATA, json.dumps({"format": 1, "records": records}, indent=1) + "\n")
    output = settings.output.model_copy(update={"dir": str(folder)})
    write_text(folder / "settings.toml", settings.model_copy(update={"output": output}).to_toml())
    return folder, found


def _holds_run(folder: Path) -> bool:
    return (folder / "settings.toml").is_file() and any((folder / part).exists() for part in PARTS)


def _check_free(folder: Path, settings: Settings, in_place: bool) -> None:
    """Raises UserError where `folder` holds a run that `resume` does not allow, or parts of a run without its settings."""
    if _holds_run(folder):
        if settings.resume == "never":
            raise UserError(f"output.dir={folder} holds another run: choose a new folder, or continue it with resume=auto")
        if settings.resume != "auto" and not in_place:
            raise UserError(f"output.dir={folder} holds another run than resume={settings.resume}: "
                            "choose a new folder, or continue it with resume=auto")
        return
    for part in PARTS:
        if (folder / part).exists():  # although there is no settings.toml
            raise UserError(f"output.dir={folder} holds {part} but no settings.toml of a run: choose a new folder")


def _named_checkpoint(resume: str) -> Path:
    """Returns the checkpoint that `resume` names: a checkpoint's own path, or a run's path, which means its latest. Raises
    UserError where there is none."""
    path = Path(resume).expanduser()
    named = path.parent.name == "checkpoints"
    run = path.parent.parent if named else path
    if not (run / "settings.toml").is_file():
        raise UserError(f"resume={resume}: no run there (settings.toml is missing)")
    found = path if named else checkpoints.latest(run / "checkpoints")
    if found is None:
        raise UserError(f"resume={resume}: that run has no complete checkpoint")
    checkpoints.read_extra(found)
    return found


def _new_folder(settings: Settings) -> Path:
    stem = f"runs/{settings.recipe or 'run'}-{time.strftime('%Y%m%d-%H%M%S')}"
    for i in range(1000):
        folder = Path(f"{stem}-{i}" if i else stem)
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError:
            continue
    raise UserError(f"output.dir: {stem} and a thousand like it exist, name a folder")


def _branch(source: Path, folder: Path) -> None:
    """Gives `folder` the checkpoint (as hard links), the metrics and the first pictures of another run."""
    run = source.parent.parent
    (folder / "settings.toml").unlink(missing_ok=True)  # left by a run that never began
    begun = folder / "checkpoints.part"
    shutil.rmtree(begun, ignore_errors=True)
    link_tree(source, begun / source.name)
    (folder / "samples").mkdir(exist_ok=True)
    if (run / "samples" / "before").is_dir():
        shutil.copytree(run / "samples" / "before", folder / "samples" / "before", dirs_exist_ok=True)
    if (run / "metrics.jsonl").is_file():
        shutil.copyfile(run / "metrics.jsonl", folder / "metrics.jsonl")
    begun.rename(folder / "checkpoints")


def _check_same(settings: Settings, run: Path, checkpoint: Path | None, global_batch: int) -> None:
    """Raises UserError where the run's settings differ from `settings` in a way that changes its numbers."""
    now, before = settings, load_settings([str(run / "settings.toml")])
    ran = checkpoints.read_extra(checkpoint).get("global_batch") if checkpoint is not None else None
    old, new = by_path(before.model_dump()), by_path(now.model_dump())
    for name in new | old:
        value = new.get(name)
        if value == old.get(name) or name.startswith(MAY_CHANGE):
            continue
        if name.startswith(SAME_SUMS) and not any(part in name for part in OTHER_SUMS):
            continue
        if name.startswith("deepspeed.config.") and not value and not old.get(name):  # false and absent mean the same
            continue
        if name == "train.steps" and now.train.schedule == before.train.schedule == "constant":
            continue
        if name in ("train.batch_size", "train.accumulation") and ran == global_batch:
            continue
        raise UserError(f"{run} holds a run with {name}={old.get(name)!r}, not {value!r}: "
                        f"give {name}={old.get(name)} to continue it, or another output.dir")
    if ran is not None and ran != global_batch:
        raise UserError(f"{run} holds a run with {ran} samples a step, now train.batch_size={now.train.batch_size} x "
                        f"train.accumulation={now.train.accumulation} x the number of ranks = {global_batch}: make them equal")


def _check_data(settings: Settings, run: Path, records: dict[str, Any]) -> None:
    """Raises UserError where the run did not begin with `records`, because their number and order decide which records, and
    which noise, belong to a step."""
    began = _read_data(run / DATA)
    if began is not None and (changes := _changes(began, records)):
        raise UserError(f"data.path={settings.data.path} is not what {run} began with: {changes}: restore the data set to "
                        "continue the run, or begin another in a new output.dir")


def _changes(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Says in one line what differs between two accounts of the same data set. The line is empty where nothing does."""
    old, new = _by_name(before), _by_name(now)
    added, removed = [new[key]["file"] for key in new if key not in old], [old[key]["file"] for key in old if key not in new]
    found = [f"{len(names)} record(s) {what} ({some_of(names)})" for names, what in ((added, "added"), (removed, "removed"))
             if names]
    for field, what in (("picture", "the picture"), ("prompts", "the prompts"), ("images", "the list of pictures"),
                        ("size", "the stated size"), ("bucket", "the bucket")):
        names = [new[key]["file"] for key in new if key in old and old[key].get(field) != new[key].get(field)]
        found += [f"{what} of {some_of(names)} changed"] if names else []
    if not found and before != now:
        found = ["the order of its records or of their prompts changed"]
    return "; ".join(found)


def _by_name(records: dict[str, Any]) -> dict[tuple[str, int], dict[str, Any]]:
    """Files records under (name of the record's first file, how often the name occurred before), so that records are compared
    even when their index has changed."""
    found: dict[tuple[str, int], dict[str, Any]] = {}
    counts: dict[str, int] = {}
    for record in records.values():
        counts[record["file"]] = counts.get(record["file"], -1) + 1
        found[record["file"], counts[record["file"]]] = record
    return found


def _read_data(file: Path) -> dict[str, Any] | None:
    """Returns the records that a run began with, or None for a run from before they were kept. Raises UserError for a damaged
    file."""
    try:
        records = json.loads(file.read_text(encoding="utf-8"))["records"]
        for record in records.values():
            if not isinstance(record["file"], str):
                raise ValueError("a record names no file")
        return records
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is damaged ({error}): it says which records this run began with; remove it to continue "
                        "without that check") from None


def _silent(text: str) -> None:
    pass
