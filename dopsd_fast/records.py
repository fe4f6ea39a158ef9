"""Data sets: from what a person has on disk to checked records, each with images, prompts and a bucket.

Three formats:
  authors' JSONL        {"local_path_list": ["a.jpg"], "h*w": "1024*1024", "short_en": "...", "short_zh": "...", ...}
  Hugging Face folder   metadata.jsonl with {"file_name": "a.jpg", "text": "..."}
  image folder          a.jpg beside a.txt, the caption
"""

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dopsd_fast import images
from dopsd_fast.buckets import bucket_sizes, nearest_bucket
from dopsd_fast.errors import UserError
from dopsd_fast.settings import DataSettings

# Text fields of a JSONL line that describe the sample and are no prompts.
RESERVED = frozenset(
    "class_name local_path_list h*w w*h height width file_name file_names image images path "
    "id uid key url source split license hash md5 sha256".split()
)
# Caption columns of a Hugging Face metadata.jsonl; where one of them stands, other text columns are no prompts.
CAPTION_COLUMNS = ("text", "prompt", "caption")


@dataclass
class Record:
    index: int
    """Position in Dataset.records."""
    images: list[Path]
    """Image files, the target first."""
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


@dataclass
class _Draft:
    """A record before its files were looked at; `problem` says why it is none."""

    source: str
    paths: list[str] = field(default_factory=list)
    prompts: dict[str, str] = field(default_factory=dict)
    size: tuple[int, int] | None = None
    problem: str = ""


def read_records(data: DataSettings, multiple: int = 16) -> Dataset:
    """Reads data.path and checks every record, its images fully decoded once.

    multiple: what image sides must be multiples of (the family's pixel_multiple).
    Raises UserError for a data set that is missing, unreadable, of no known format or empty, and for the first bad
    record (line that is not JSON, image missing or damaged, no prompt); with data.skip_bad, bad records are listed in
    Dataset.skipped instead, and only a set without a good one is an error.
    """
    if not data.path:
        raise UserError("data.path is empty: give a .jsonl file, or a folder of images with .txt captions")
    kind, path = _find(data.source, data.path)
    skipped: list[tuple[str, str]] = []
    if kind == "folder":
        drafts = list(_read_folder(path, data.prompt_keys, skipped))
        root = path
    else:
        drafts = list(_read_jsonl(path, data.prompt_keys))
        root = _find_root(data.root, path, drafts)
    if not drafts:
        raise UserError(f"data set {path} has no records")

    sizes = bucket_sizes(data.resolution, multiple)
    records: list[Record] = []
    for draft, (shown, problem) in zip(drafts, _check_all(drafts, root)):
        if problem and not data.skip_bad:
            raise UserError(f"{draft.source}: {problem} (data.skip_bad=true leaves bad records out)")
        if problem:
            skipped.append((draft.source, problem))
            continue
        height, width = nearest_bucket(*(draft.size or shown), sizes)
        files = [root / name for name in draft.paths]
        records.append(Record(len(records), files, draft.prompts, draft.size, draft.source, height, width))
    if not records:
        raise UserError(f"every record of {path} is bad; the first: {skipped[0][0]}: {skipped[0][1]}")
    return Dataset(records, data.repeats, kind, path, root, skipped)


def _find(source: Path, shown: str) -> tuple[str, Path]:
    """Format of a data set, and the file or folder that holds it."""
    if not source.exists():
        raise UserError(f"data set {shown} does not exist (data.path)")
    if source.is_file():
        if source.suffix not in (".jsonl", ".json"):
            raise UserError(f"data set {shown} is neither a .jsonl file nor a folder (data.path)")
        return "jsonl", source
    if (source / "metadata.jsonl").is_file():
        return "huggingface", source / "metadata.jsonl"
    if any(file.with_suffix(".txt").is_file() for file in _images_in(source)):
        return "folder", source
    below = sorted(file for file in source.rglob("*.jsonl") if file.is_file() and not _hidden(file, source))
    if len(below) == 1:
        return ("huggingface" if below[0].name == "metadata.jsonl" else "jsonl"), below[0]
    if below:
        names = ", ".join(str(file.relative_to(source)) for file in below[:4])
        raise UserError(f"data set {shown} has {len(below)} .jsonl files ({names}...): name one of them in data.path")
    if any(_images_in(source)):
        raise UserError(f"data set {shown} has images but no captions: put a.txt beside a.jpg, or write a .jsonl")
    raise UserError(f"data set {shown} has neither a .jsonl file nor images with .txt captions")


def _hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


def _images_in(folder: Path) -> Iterator[Path]:
    try:
        for file in sorted(folder.rglob("*")):
            if file.suffix.lower() in images.SUFFIXES and not _hidden(file, folder):
                yield file
    except OSError as error:
        raise UserError(f"data set {folder} cannot be read: {error.strerror}") from None


def _read_folder(folder: Path, wanted: list[str], skipped: list[tuple[str, str]]) -> Iterator[_Draft]:
    captions = {file for file in folder.rglob("*.txt") if not _hidden(file, folder)}
    for file in _images_in(folder):
        caption = file.with_suffix(".txt")
        captions.discard(caption)
        draft = _Draft(str(file), [str(file.relative_to(folder))])
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
        yield draft
    skipped += [(str(caption), "no image of this name") for caption in sorted(captions)]


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
    paths = content.get("local_path_list", content.get("file_name"))
    paths = [paths] if isinstance(paths, str) else paths
    if not isinstance(paths, list) or not paths or not all(isinstance(name, str) and name for name in paths):
        draft.problem = 'no image: expected "local_path_list": ["image.jpg"] or "file_name": "image.jpg"'
        return
    draft.paths = paths
    for key in ("h*w", "w*h"):
        if key in content:
            size = _parse_size(content[key])
            if size is None:
                draft.problem = f'"{key}" is {json.dumps(content[key])[:60]}, expected two numbers as in "1024*768"'
                return
            draft.size = size if key == "h*w" else size[::-1]
            break
    keys = wanted
    if not wanted:
        captions = [key for key in CAPTION_COLUMNS if key in content]
        keys = captions if captions and "file_name" in content else [key for key in content if key not in RESERVED]
    for key in keys:
        value = content.get(key)
        if wanted and value is not None and not isinstance(value, str):
            draft.problem = f'prompt "{key}" is not text'
            return
        if isinstance(value, str) and value.strip():
            draft.prompts[key] = value.strip()
    if not draft.prompts:
        there = [key for key in content if key not in RESERVED and isinstance(content[key], str)]
        draft.problem = f"no prompt: {', '.join(wanted) or 'every text field'} missing or empty"
        draft.problem += f" (the record has {', '.join(there)})" if wanted and there else ""
    elif not all(_encodes(prompt) for prompt in draft.prompts.values()):
        draft.problem = "a prompt holds half of a surrogate pair, which is no text"


def _encodes(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _parse_size(value: Any) -> tuple[int, int] | None:
    try:
        first, second = value.split("*")
        size = int(float(first)), int(float(second))
    except (AttributeError, ValueError, OverflowError):
        return None
    return size if min(size) > 0 else None


def _find_root(given: str, path: Path, drafts: list[_Draft]) -> Path:
    """data.root, or the first of the file's folder, its ancestors and the working folder that has a record's image."""
    if given:
        root = Path(given).expanduser()
        if not root.is_dir():
            raise UserError(f"data.root {given} is not a folder")
        return root
    folder = path.resolve().parent
    candidates = [folder, *folder.parents, Path.cwd()]
    for draft in drafts:
        for candidate in candidates if draft.paths else ():
            try:
                if (candidate / draft.paths[0]).is_file():
                    return candidate
            except (OSError, ValueError):
                break
    return folder


def _check_all(drafts: list[_Draft], root: Path) -> Iterator[tuple[tuple[int, int], str]]:
    """((height, width), problem) of every draft, in order; images are decoded on every core this process may use."""

    def check(draft: _Draft) -> tuple[tuple[int, int], str]:
        if draft.problem:
            return (0, 0), draft.problem
        try:
            return [images.check_image(root / name) for name in draft.paths][0], ""
        except UserError as error:
            return (0, 0), str(error)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 4) as pool:
        yield from pool.map(check, drafts)
