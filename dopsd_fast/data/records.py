"""Data sets: from what a person has on disk to checked records, each with images, prompts and a bucket.

Three formats:
  authors' JSONL        {"local_path_list": ["reference.jpg", "target.jpg"], "h*w": "1024*1024", "short_en": "...", ...}
  Hugging Face folder   metadata.jsonl with {"file_name": "a.jpg", "text": "..."}
  image folder          a.jpg beside a.txt, the caption

Whatever is read otherwise than a person may expect (columns that are no prompts, references that are not used, sizes that
are not the picture's, pictures that are left out) stands in `Dataset.notes`, for the first screen of a run.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dopsd_fast.data import images
from dopsd_fast.data.buckets import bucket_sizes, nearest_bucket
from dopsd_fast.data.folder import Locator, files_below
from dopsd_fast.errors import UserError
from dopsd_fast.settings.schema import DataSettings
from dopsd_fast.storage.digests import hash_file

# Text fields of a JSONL line that describe the sample and are no prompts.
RESERVED = frozenset(
    "class_name local_path_list h*w w*h height width file_name file_names image images path "
    "id uid key url source split license hash md5 sha256".split()
)
PROMPT_FIELDS = re.compile(r"(text|prompt|caption|user_prompt)(_(en|zh))?|(short|medium|long|detailed)_(en|zh)")
"""Fields that are known to be prompts, in small letters: those of Hugging Face's folders and of the authors' JSONL. Any other
text field may as well say who wrote the caption, so it is a prompt only where data.prompt_keys names it."""

SAME_SHAPE = 1.02
"""A stated size whose aspect ratio differs from the picture's by more than this factor contradicts it."""
NAMED = 5
"""How many records, files or columns a note names before it only counts the rest."""


@dataclass
class Record:
    index: int
    """Position in Dataset.records."""
    images: list[Path]
    """Image files: the target first, then the reference images, in the order in which the data set gives them."""
    prompts: dict[str, str]
    """Prompt by the name of its field; never empty."""
    size: tuple[int, int] | None
    """(height, width) that the data set states, or None."""
    source: str
    """Where the record stands, as "file:line" or the image's path."""
    height: int = 0
    """Height of the bucket in pixels."""
    width: int = 0
    """Width of the bucket in pixels."""
    content: list[str] = field(default_factory=list)
    """sha256 of each image file, in the order of `images`."""


@dataclass
class Dataset:
    records: list[Record]
    repeats: int = 1
    """How often each record appears in an epoch."""
    format: str = ""
    """jsonl, huggingface or folder."""
    path: Path = Path()
    """The file or folder that was read."""
    root: Path = Path()
    """Folder that relative image paths start from."""
    skipped: list[tuple[str, str]] = field(default_factory=list)
    """(source, reason) of every record that was left out, and of captions without an image."""
    notes: list[tuple[str, str]] = field(default_factory=list)
    """(subject, what was read how) for the first screen of a run, a line each."""


@dataclass
class _Draft:
    """A record before its files were looked at; `problem` says why it is none."""

    source: str
    paths: list[str] = field(default_factory=list)
    """Names of the image files, the target first."""
    prompts: dict[str, str] = field(default_factory=dict)
    size: tuple[int, int] | None = None
    problem: str = ""
    caption: str = ""
    """An image folder's caption file."""
    unused: list[str] = field(default_factory=list)
    """Text fields that are no prompts, and that nothing else is known of."""


@dataclass
class _Seen:
    """What a record's files turned out to be. size: (height, width) of the target as shown."""

    files: list[Path] = field(default_factory=list)
    size: tuple[int, int] = (0, 0)
    content: list[str] = field(default_factory=list)
    problem: str = ""


def read_records(data: DataSettings, multiple: int = 16) -> Dataset:
    """Reads data.path and checks every record, its images fully decoded once.

    multiple: what image sides must be multiples of (the family's pixel_multiple).
    Raises UserError for a data set that is missing, unreadable, of no known format or empty, for one whose text fields are
    all unknown (data.prompt_keys names those to train on), and for the first bad record (line that is not JSON, image
    missing, damaged or of a type that cannot be read, no prompt); with data.skip_bad, bad records are listed in
    Dataset.skipped instead, and only a set without a good one is an error.
    """
    if not data.path:
        raise UserError("data.path is empty: give a .jsonl file, or a folder of images with .txt captions")
    kind, path, files = _find(data.source, data.path)
    dataset = Dataset([], data.repeats, kind, path)
    locator = Locator()
    if kind == "folder":
        drafts = list(_read_folder(path, files, data.prompt_keys, dataset))
        dataset.root = path
    else:
        drafts = list(_read_jsonl(path, data.prompt_keys))
        _check_columns(path, data.prompt_keys, drafts)
        dataset.root = _find_root(data.root, path, drafts, locator)
    if not drafts:
        raise UserError(f"data set {path} has no records")

    sizes = bucket_sizes(data.resolution, multiple)
    read: list[_Draft] = []
    contradicted: list[str] = []
    for draft, seen in zip(drafts, _check_all(drafts, dataset.root, locator)):
        if seen.problem and not data.skip_bad:
            raise UserError(f"{draft.source}: {seen.problem} (data.skip_bad=true leaves bad records out)")
        if seen.problem:
            dataset.skipped.append((draft.source, seen.problem))
            continue
        shape = draft.size or seen.size
        if _contradicts(shape, seen.size):
            contradicted.append("{} ({}*{} stated, {}*{} found)".format(seen.files[0].name, *shape, *seen.size))
            shape = seen.size
        record = Record(len(read), seen.files, draft.prompts, draft.size, draft.source, content=seen.content)
        record.height, record.width = nearest_bucket(*shape, sizes)
        dataset.records.append(record)
        read.append(draft)
    if not read:
        source, problem = next(entry for entry in dataset.skipped if entry[1] != NO_PICTURE)
        raise UserError(f"every record of {path} is bad; the first: {source}: {problem}")
    dataset.notes += _notes(kind, read, contradicted)
    return dataset


def _contradicts(stated: tuple[int, int], found: tuple[int, int]) -> bool:
    """Whether two (height, width) have aspect ratios that differ by more than SAME_SHAPE."""
    ratio = stated[0] * found[1] / (stated[1] * found[0])
    return max(ratio, 1 / ratio) > SAME_SHAPE + 1e-9


# ---- what the first screen says --------------------------------------------------------------------------------------


def some_of(names: Iterable[str], most: int = NAMED) -> str:
    """The first names, and how many more there are, on one line that any console can show."""
    found = [" ".join(name.split()).encode("utf-8", "backslashreplace").decode() for name in names]
    return ", ".join(found[:most]) + (f" and {len(found) - most} more" if len(found) > most else "")


def _notes(kind: str, read: list[_Draft], contradicted: list[str]) -> Iterator[tuple[str, str]]:
    columns = Counter(name for draft in read for name in draft.prompts)
    texts = [name if count == len(read) else f"{name} (in {count} of {len(read)} records)" for name, count in columns.items()]
    unused = dict.fromkeys(name for draft in read for name in draft.unused)
    if kind == "folder":
        yield "prompts", "the text beside each picture"
    else:
        no_prompts = f"; no prompts: {some_of(unused)} (data.prompt_keys chooses the columns)" if unused else ""
        yield "prompts", "column " * (len(texts) == 1) + "columns " * (len(texts) > 1) + some_of(texts, 20) + no_prompts
    shared = Counter(draft.caption for draft in read if draft.caption)
    twice = [f"{Path(name).name} ({count} pictures)" for name, count in shared.items() if count > 1]
    if twice:
        yield "prompts", f"one caption serves several pictures, each of which is a record: {some_of(twice)}"
    pairs = [Path(draft.paths[0]).name for draft in read if len(draft.paths) > 1]
    if pairs:
        yield "pictures", (
            f"{len(pairs)} record(s) have several pictures ({some_of(pairs)}): the last one is the target, the ones before "
            "it are references, which are left out: no recipe here uses them yet"
        )
    if contradicted:
        yield "sizes", (
            f"{len(contradicted)} record(s) state another shape (height*width) than their picture has, whose own is used: "
            f"{some_of(contradicted)}"
        )


# ---- the formats -----------------------------------------------------------------------------------------------------

NO_PICTURE = "no image of this name"


def _find(source: Path, shown: str) -> tuple[str, Path, list[Path]]:
    """Format of a data set, the file or folder that holds it, and a folder's files."""
    if not source.exists():
        raise UserError(f"data set {shown} does not exist (data.path)")
    if source.is_file():
        if source.suffix.lower() not in (".jsonl", ".json"):
            raise UserError(f"data set {shown} is neither a .jsonl file nor a folder (data.path)")
        return ("huggingface" if _is_metadata(source) else "jsonl"), source, []
    files = files_below(source)
    for file in files:
        if file.parent == source and _is_metadata(file):
            return "huggingface", file, files
    pictures = [file for file in files if images.is_readable(file) or images.is_other_picture(file)]
    captions = _Captions(files)
    if any(captions.of(file) for file in pictures):
        return "folder", source, files
    below = [file for file in files if file.suffix.lower() == ".jsonl"]
    if len(below) == 1:
        return ("huggingface" if _is_metadata(below[0]) else "jsonl"), below[0], files
    if below:
        names = ", ".join(str(file.relative_to(source)) for file in below[:4])
        raise UserError(f"data set {shown} has {len(below)} .jsonl files ({names}...): name one of them in data.path")
    if pictures:
        raise UserError(f"data set {shown} has images but no captions: put a.txt beside a.jpg, or write a .jsonl")
    raise UserError(f"data set {shown} has neither a .jsonl file nor images with .txt captions")


def _is_metadata(file: Path) -> bool:
    return file.name.lower() == "metadata.jsonl"


class _Captions:
    """The .txt files of a folder, by the pictures they belong to: of the same name, whatever the case of letters."""

    def __init__(self, files: Iterable[Path]) -> None:
        self.files = [file for file in files if file.suffix.lower() == ".txt"]
        self._by_name: dict[tuple[Path, str], list[Path]] = {}
        for file in self.files:
            self._by_name.setdefault((file.parent, file.stem.casefold()), []).append(file)

    def of(self, picture: Path) -> list[Path]:
        """The picture's captions: the one that is written exactly as the picture, or all that differ in letters' case."""
        alike = self._by_name.get((picture.parent, picture.stem.casefold()), [])
        same = [file for file in alike if file.stem == picture.stem]
        exact = [file for file in same if file.suffix == ".txt"]
        return exact or same or alike


def _read_folder(folder: Path, files: list[Path], wanted: list[str], dataset: Dataset) -> Iterator[_Draft]:
    captions = _Captions(files)
    used: set[Path] = set()
    stray: list[str] = []
    nowhere: list[str] = []
    for file in files:
        readable = images.is_readable(file)
        if not readable and not images.is_other_picture(file):
            if file.is_symlink() and not file.exists():
                nowhere.append(str(file.relative_to(folder)))
            continue
        found = captions.of(file)
        used.update(found)
        draft = _Draft(str(file), [str(file.relative_to(folder))])
        if not readable and not found:
            stray.append(file.name)
            continue
        if not readable:
            draft.problem = f"pictures of type {file.suffix} cannot be read: convert it to PNG or JPEG"
        elif len(found) > 1:
            draft.problem = f"captions {' and '.join(one.name for one in found)} both fit: remove one"
        elif not found:
            draft.problem = f"caption {file.with_suffix('.txt').name} does not exist"
        else:
            _read_caption(found[0], wanted, draft)
        yield draft
    dataset.skipped += [(str(caption), NO_PICTURE) for caption in captions.files if caption not in used]
    if nowhere:
        dataset.notes.append(("left out", f"{len(nowhere)} link(s) that lead nowhere: {some_of(nowhere)}"))
    if stray:
        dataset.notes.append(("left out", f"{len(stray)} picture(s) of types that cannot be read, without captions: "
                                          f"{some_of(stray)}"))


def _read_caption(caption: Path, wanted: list[str], draft: _Draft) -> None:
    draft.caption = str(caption)
    try:
        text = caption.read_text(encoding="utf-8-sig").strip()
        if not text:
            draft.problem = f"caption {caption.name} is empty"
        elif wanted and "caption" not in wanted:
            draft.problem = f"an image folder has only the prompt caption: no {', '.join(wanted)} (prompt_keys)"
        draft.prompts = {"caption": text}
    except FileNotFoundError:
        draft.problem = f"caption {caption.name} does not exist"
    except UnicodeDecodeError:
        draft.problem = f"caption {caption.name} is not UTF-8 text"
    except OSError as error:
        draft.problem = f"caption {caption.name} cannot be read: {error.strerror}"


def _read_jsonl(path: Path, wanted: list[str]) -> Iterator[_Draft]:
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines()
    except OSError as error:
        raise UserError(f"data set {path} cannot be read: {error.strerror}") from None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        draft = _Draft(f"{path}:{number}")
        try:
            content = json.loads(line.decode("utf-8"))
            if isinstance(content, dict):
                _read_object(content, wanted, draft)
            else:
                draft.problem = f"the line is a JSON {type(content).__name__}, an object was expected"
        except UnicodeDecodeError:
            draft.problem = "the line is not UTF-8 text"
        except json.JSONDecodeError as error:
            draft.problem = f"the line is not JSON: {error.msg} at column {error.colno}"
        except (ValueError, RecursionError) as error:
            draft.problem = f"the line is not JSON: {error}"
        yield draft


def _read_object(content: dict[str, Any], wanted: list[str], draft: _Draft) -> None:
    lower = {key.lower(): value for key, value in content.items()}
    paths = lower.get("local_path_list", lower.get("file_name"))
    paths = [paths] if isinstance(paths, str) else paths
    if not isinstance(paths, list) or not paths or not all(isinstance(name, str) and name for name in paths):
        draft.problem = 'no image: expected "local_path_list": ["image.jpg"] or "file_name": "image.jpg"'
        return
    draft.paths = [paths[-1], *paths[:-1]]
    for key in ("h*w", "w*h"):
        if key in lower:
            size = _parse_size(lower[key], len(paths))
            if size is None:
                shown = json.dumps(lower[key])[:60]
                draft.problem = f'"{key}" is {shown}, expected two numbers as in "1024*768", or a list of such, one a picture'
                return
            draft.size = size if key == "h*w" else size[::-1]
            break
    texts = [key for key, value in content.items() if isinstance(value, str) and key.lower() not in RESERVED]
    keys = wanted or [key for key in content if PROMPT_FIELDS.fullmatch(key.lower())]
    draft.unused = [key for key in texts if key not in keys]
    for key in keys:
        value = content.get(key)
        if value is not None and not isinstance(value, str) and not _is_nan(value):
            draft.problem = f'no prompt: "{key}" is not text'
            return
        if isinstance(value, str) and value.strip():
            draft.prompts[key] = value.strip()
    if not draft.prompts:
        known = ", ".join(wanted) or "every field that is known to be a prompt is"
        draft.problem = f"no prompt: {known} missing or empty"
        if draft.unused:
            hint = "" if wanted else ": data.prompt_keys makes one of them a prompt"
            draft.problem += f" (the record has {some_of(draft.unused)}{hint})"
    elif not all(_encodes(prompt) for prompt in draft.prompts.values()):
        draft.problem = "a prompt holds half of a surrogate pair, which is no text"


def _check_columns(path: Path, wanted: list[str], drafts: list[_Draft]) -> None:
    """UserError for a set without any field that is known to be a prompt: what to train on is then the user's to say."""
    unknown = list(dict.fromkeys(name for draft in drafts for name in draft.unused))
    if unknown and not wanted and not any(draft.prompts for draft in drafts):
        raise UserError(
            f"data set {path} has no column that is known to be a prompt, only {some_of(unknown)}: name those to train on, as "
            f'in data.prompt_keys=["{unknown[0]}"]'
        )


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_nan(value: Any) -> bool:
    """A missing value, as tables are exported to JSON."""
    return isinstance(value, float) and math.isnan(value)


def _parse_size(value: Any, pictures: int) -> tuple[int, int] | None:
    """The target's two numbers, in the order given: "1024*768", [1024, 768], or a list of such entries, one a picture (the
    last is the target's) or one for all."""
    if isinstance(value, list) and len(value) in (1, pictures) and all(isinstance(entry, str | list) for entry in value):
        value = value[-1]
    try:
        first, second = value.split("*") if isinstance(value, str) else value
        size = int(float(first)), int(float(second))
    except (TypeError, ValueError, OverflowError):
        return None
    return size if min(size) > 0 else None


def _find_root(given: str, path: Path, drafts: list[_Draft], locator: Locator) -> Path:
    """data.root, or the first of the file's folder, its ancestors and the working folder that has a record's image."""
    if given:
        root = Path(given).expanduser()
        if not root.is_dir():
            raise UserError(f"data.root {given} is not a folder")
        return root
    folder = path.resolve().parent
    candidates = [folder, *folder.parents, Path.cwd()]
    for find in (lambda root, name: root / name, locator.find):
        for draft in drafts:
            for candidate in candidates if draft.paths else ():
                try:
                    if find(candidate, draft.paths[0]).is_file():
                        return candidate
                except (OSError, ValueError):
                    break
    return folder


def _check_all(drafts: list[_Draft], root: Path, locator: Locator) -> Iterator[_Seen]:
    """What the files of every draft are, in order; images are decoded on every core this process may use."""

    def check(draft: _Draft) -> _Seen:
        if draft.problem:
            return _Seen(problem=draft.problem)
        seen = _Seen()
        try:
            for name in draft.paths:
                seen.files.append(_located(locator, root, name))
            seen.size = [images.check_image(file) for file in seen.files][0]
            seen.content = [hash_file(file) for file in seen.files]
        except UserError as error:
            seen.problem = str(error)
        return seen

    with ThreadPoolExecutor(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 4) as pool:
        yield from pool.map(check, drafts)


def _located(locator: Locator, root: Path, name: str) -> Path:
    try:
        return locator.find(root, name)
    except (OSError, ValueError):  # a name too long, or with a zero byte: reading it says what is wrong
        return root / name
