"""Where settings come from and how they are shown: recipe files, the command line, errors, the help text, TOML.

Knows nothing of any single setting: the pydantic model is handed in.
"""

from __future__ import annotations

import difflib
import json
import textwrap
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args, get_origin

import tomli_w
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from dopsd_fast.errors import UserError

COMMAND_LINE = "the command line"
Layers = dict[str, tuple[Any, str]]  # dotted field name -> (value, where it was set)


def by_path(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted path -> value of everything in a tree of tables."""
    out: dict[str, Any] = {}
    for name, value in tree.items():
        out |= by_path(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return out


def fields(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Dotted name and declaration of every field, sections opened."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from fields(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, field


def read_layers(argv: list[str], model: type[BaseModel], recipes: Path, default: str) -> Layers:
    """The recipe's values overlaid by those of the command line."""
    known = dict(fields(model))
    recipe, assignments = _split(argv, known)
    path = _recipe_path(recipe or default, recipes)
    layers: Layers = {}
    if "recipe" in known:
        layers["recipe"] = (path.stem, str(path))
    for file, table in _recipe_chain(path, recipes):
        for name, value in _flatten(table, known, str(file)):
            layers[name] = (value, str(file))
    for assignment in assignments:
        name, _, text = assignment.partition("=")
        name = name.strip()
        inner = next((key for key in known if name.startswith(key + ".") and _is(known[key], dict)), None)
        if inner:
            base = layers.get(inner, ({}, ""))[0]
            layers[inner] = (_with(base, name[len(inner) + 1 :].split("."), _value(text, None, name)), COMMAND_LINE)
        else:
            _require_known(name, known, COMMAND_LINE)
            layers[name] = (_value(text, known[name], name), COMMAND_LINE)
    return layers


def validate(model: type[BaseModel], layers: Layers) -> Any:
    """An instance of the model, or a UserError about the first field that does not fit."""
    nested: dict[str, Any] = {}
    for name, (value, _) in layers.items():
        nested = _with(nested, name.split("."), value)
    try:
        return model.model_validate(nested)
    except ValidationError as error:
        problem = error.errors()[0]
        name = ".".join(str(part) for part in problem["loc"])
        field = next((key for key in sorted(layers, key=len, reverse=True) if (name + ".").startswith(key + ".")), name)
        value, where = layers.get(field, (problem["input"], "the defaults"))
        text = problem["msg"].replace("Input should be", "must be").removeprefix("Value error, ")
        text = text.replace(" after validation", "")
        more = f" ({error.error_count() - 1} more like this)" if error.error_count() > 1 else ""
        raise UserError(f"{field} = {_shown(value)} in {where}: {text}{more}") from None


def describe(model: type[BaseModel], recipes: str, default: str) -> str:
    """The help text: usage, then every field with its type, default and meaning."""
    lines = [
        "usage: deepspeed dopsd_fast/train.py [RECIPE | FILE.toml] [field=value ...]",
        "       deepspeed --module dopsd_fast.train ...    where the package is installed without the checkout",
        "",
        *textwrap.wrap(f"recipes: {recipes} (without one: {default})", 110, subsequent_indent="  "),
        "Values are TOML: numbers, true, false, [\"lists\"]; anything else is taken as text.",
    ]
    section = None
    for name, field in fields(model):
        head = name.rpartition(".")[0]
        if head != section:
            section = head
            lines.append("")
        default_text = _shown(field.get_default(call_default_factory=True))
        lines.append(f"  {name} ({_type_text(field)}; default {default_text})")
        meaning = " ".join((field.description or "").split())
        lines.extend(textwrap.wrap(meaning, 110, initial_indent=" " * 6, subsequent_indent=" " * 6))
    return "\n".join(lines) + "\n"


def write_toml(values: dict[str, Any]) -> str:
    """TOML of nested tables."""
    return tomli_w.dumps(values)


def _split(argv: list[str], known: dict[str, FieldInfo]) -> tuple[str, list[str]]:
    recipe, assignments = "", []
    words = iter(argv)
    for word in words:
        if word in ("--local_rank", "--local-rank"):
            next(words, None)
        elif word in ("--help", "-h") or word.startswith(("--local_rank=", "--local-rank=")):
            continue
        elif word.startswith("-"):
            raise UserError(f"unknown option {word}: settings are given as field=value, and --help lists them")
        elif "=" in word and "/" not in word.partition("=")[0]:
            assignments.append(word)
        elif recipe:
            near = _nearest(word, list(known))
            hint = f"{near}={recipe if word == near else '...'}" if near else "field=value"
            raise UserError(f"two recipes, {recipe} and {word}: give one, and settings as field=value (such as {hint})")
        else:
            recipe = word
    return recipe, assignments


def _recipe_path(recipe: str, recipes: Path) -> Path:
    if recipe.endswith(".toml"):
        path = Path(recipe).expanduser()
        if not path.is_file():
            raise UserError(f"settings file {recipe} {'is not a file' if path.exists() else 'does not exist'}")
        return path
    names = sorted(path.stem for path in recipes.glob("*.toml"))
    if recipe not in names:
        near = difflib.get_close_matches(recipe, names, 1)
        meant = f" (did you mean {near[0]}?)" if near else ""
        raise UserError(f"unknown recipe {recipe}{meant}: there are {', '.join(names)}, or name a .toml file")
    return recipes / f"{recipe}.toml"


def _recipe_chain(path: Path, recipes: Path) -> list[tuple[Path, dict[str, Any]]]:
    """The recipe and those that it `extends`, the furthest first."""
    chain: list[tuple[Path, dict[str, Any]]] = []
    while True:
        table = _read_toml(path)
        base = table.pop("extends", None)
        chain.insert(0, (path, table))
        if base is None:
            return chain
        if not isinstance(base, str):
            raise UserError(f"extends = {_shown(base)} in {path}: must be the name of a recipe")
        path = _recipe_path(base, recipes)
        if any(path == known for known, _ in chain):
            raise UserError(f"extends = {base!r} in {chain[0][0]}: these recipes extend each other")


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path} is not TOML: {error}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text") from None
    except RecursionError:
        raise UserError(f"{path} is nested too deeply") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def _flatten(
    table: dict[str, Any], known: dict[str, FieldInfo], where: str, prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        name = prefix + key
        if name not in known and isinstance(value, dict) and any(other.startswith(name + ".") for other in known):
            yield from _flatten(value, known, where, name + ".")
        else:
            _require_known(name, known, where)
            yield name, value


def _require_known(name: str, known: dict[str, FieldInfo], where: str) -> None:
    if name in known:
        return
    inside = next((key for key in known if key.startswith(name + ".")), None)
    if inside:
        raise UserError(f"{name} in {where} is a section, not a setting: name a field of it, such as {inside}")
    near = _nearest(name, list(known))
    hint = f": did you mean {near}?" if near else "; --help lists all"
    raise UserError(f"unknown setting {name} in {where}{hint}")


def _nearest(name: str, known: list[str]) -> str | None:
    """The known name that was probably meant; one whose last part is the same counts as nearest."""
    last = name.rpartition(".")[2]
    same_last = [key for key in known if key.rpartition(".")[2] == last]
    by_last = {key.rpartition(".")[2]: key for key in reversed(known)}
    close = difflib.get_close_matches(name, known, 1, 0.5)
    close_last = [by_last[part] for part in difflib.get_close_matches(last, list(by_last), 1, 0.6)]
    for candidates in ([key for key in close if key in same_last], same_last, close, close_last):
        if candidates:
            return candidates[0]
    return None


def _value(text: str, field: FieldInfo | None, name: str) -> Any:
    """A command-line value. Text fields keep what was typed unless it is a quoted TOML string."""
    text = text.strip()
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (tomllib.TOMLDecodeError, RecursionError, ValueError):
        parsed = {}
    is_toml = list(parsed) == ["value"]
    value = parsed["value"] if is_toml else text
    if field is None:
        return value
    if _is(field, list):
        if not is_toml and text.startswith("[") and text.endswith("]"):
            raise UserError(f'{name}={text} is not a TOML list: quote its items, as in {name}=["a", "b"]')
        if isinstance(value, str):
            return [value]
    if _is_text(field) and not isinstance(value, str):
        return text
    return value


def _is(field: FieldInfo, kind: type) -> bool:
    return kind in (field.annotation, get_origin(field.annotation))


def _is_text(field: FieldInfo) -> bool:
    return field.annotation is str or all(isinstance(choice, str) for choice in get_args(field.annotation) or [None])


def _with(table: dict[str, Any], path: list[str], value: Any) -> dict[str, Any]:
    """A copy of the table with one value set, inner tables made as needed."""
    key, *rest = path
    if rest:
        inner = table.get(key)
        value = _with(inner if isinstance(inner, dict) else {}, rest, value)
    return {**table, key: value}


def _type_text(field: FieldInfo) -> str:
    annotation = field.annotation
    choices = get_args(annotation)
    if choices and all(isinstance(choice, str) for choice in choices):
        return " | ".join(choices)
    names = {str: "text", int: "integer", float: "number", bool: "true | false"}
    for kind, text in ((list, "list of text"), (tuple, "pair of numbers"), (dict, "table")):
        if _is(field, kind):
            return text
    return names.get(annotation, str(annotation))  # type: ignore[arg-type]


def _shown(value: Any) -> str:
    text = _toml(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # JSON's escapes are TOML's, but for DEL, which TOML does not allow as it stands.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {_toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if isinstance(value, float):
        return repr(value)
    return str(value)
