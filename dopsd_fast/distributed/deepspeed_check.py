"""Checks those parts of `deepspeed.config` that can only be checked when the number and kind of the ranks are known, or by
letting DeepSpeed read them."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterator, KeysView
from typing import TYPE_CHECKING, Any

from dopsd_fast.errors import UserError
from dopsd_fast.settings.deepspeed_dict import deepspeed_config, leaves, quantizes_gradients, shown

if TYPE_CHECKING:
    from dopsd_fast.settings.schema import Settings



# ---- when the ranks are known ----------------------------------------------------------------------------------------------


def check_world(settings: Settings, world: int, device_type: str) -> None:
    """Raises UserError for fields that DeepSpeed does not know or cannot read, and for values that `world` ranks on devices of
    `device_type` ("cuda", "cpu") cannot have.

    DeepSpeed must have been imported (`init_distributed`). Every rank comes to the same result, without collective calls."""
    s, given = settings, dict(leaves(settings.deepspeed.config))
    _read_by_deepspeed(s)
    path = "train_batch_size"
    batch = s.train.batch_size * s.train.accumulation * world
    if given.get(path, batch) != batch:
        raise UserError(f"{shown(path, given[path])} contradicts train.batch_size={s.train.batch_size} x train.accumulation="
                        f"{s.train.accumulation} x {world} ranks = {batch}: leave it out")
    path = "zero_optimization.zero_hpz_partition_size"
    near = int(given.get(path, 1))
    if near > 1 and (near > world or world % near):
        fits = ", ".join(str(n) for n in range(2, world + 1) if world % n == 0) or "none"
        raise UserError(f"{shown(path, near)} must divide the {world} rank(s) of deepspeed.stage=3 (the ranks of a node, "
                        f"usually): {fits} would")
    for key in ("zero_quantized_weights", "zero_quantized_gradients"):
        if given.get(f"zero_optimization.{key}") and device_type == "cpu":
            raise UserError(f"{shown(f'zero_optimization.{key}', True)} needs DeepSpeed's CUDA kernels, the ranks run on the "
                            "CPU: leave it out here")
    if quantizes_gradients(s):
        from deepspeed.accelerator import get_accelerator

        near = get_accelerator().device_count()
        if world <= near or world % near:
            path = "zero_optimization.zero_quantized_gradients"
            raise UserError(f"{shown(path, True)} quantises between nodes, {world} rank(s) of deepspeed.stage=3 with {near} "
                            "device(s) a node are not several whole ones: leave it out")


class _Asked(dict):  # type: ignore[type-arg]
    """A dict that remembers which of its keys were read. A reader that goes through all items counts as having read each.
    Nested dicts remember it too, down to `depth` levels."""

    def __init__(self, values: dict[str, Any], depth: int = 1) -> None:
        nested = {k: _Asked(v, depth - 1) if depth and isinstance(v, dict) else v for k, v in values.items()}
        super().__init__(nested)
        self.asked: set[str] = set()
        self.wholly = False

    def __contains__(self, key: object) -> bool:
        self.asked.add(str(key))
        return super().__contains__(key)

    def __getitem__(self, key: str) -> Any:
        self.asked.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        self.asked.add(key)
        return super().get(key, default)

    def __iter__(self) -> Iterator[str]:
        self.wholly = True
        return super().__iter__()

    def keys(self) -> Any:
        return KeysView(self)

    def items(self) -> Any:
        self.wholly = True
        return super().items()

    def __copy__(self) -> _Asked:
        return self

    def ignored(self, prefix: str = "") -> Iterator[tuple[str, set[str]]]:
        """Yields, for each entry that nobody read, (its path, the keys that were read beside it)."""
        for key, value in dict.items(self):
            if not self.wholly and key not in self.asked:
                yield prefix + key, self.asked
            elif isinstance(value, _Asked) and value.asked:  # an unread dict was handed on whole, to code that checks it
                yield from value.ignored(f"{prefix}{key}.")


def _read_by_deepspeed(settings: Settings) -> None:
    """Lets DeepSpeed read the configuration, and raises UserError for its objections. DeepSpeed ignores most fields that it
    does not know, so the unknown fields are found as those that it never reads."""
    from deepspeed.runtime.config import DeepSpeedConfig
    from pydantic import ValidationError

    config = _Asked(deepspeed_config(settings))
    logger = logging.getLogger("DeepSpeed")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        DeepSpeedConfig(config)
        usual = DeepSpeedConfig({"train_micro_batch_size_per_gpu": 1})
    except ValidationError as error:
        raise UserError(f"deepspeed.config: {_first(error)}") from error
    except Exception as error:  # DeepSpeed uses assertions, and fails anyhow on wrong types
        raise UserError(f"deepspeed.config: DeepSpeed cannot read it: {error or type(error).__name__}") from error
    finally:
        logger.setLevel(level)
    for path, value in settings.deepspeed.config.items():  # DeepSpeed does not check the type of top-level fields
        like = getattr(usual, path, None)
        kind = "true or false" if isinstance(like, bool) else "a number" if isinstance(like, int | float) else ""
        right = isinstance(value, bool) if isinstance(like, bool) else type(value) in (int, float)
        if kind and value != "auto" and not right:
            raise UserError(f"{shown(path, value)} must be {kind}")
    for path, known in config.ignored():
        parent, _, name = path.rpartition(".")
        near = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {f'{parent}.' if parent else ''}{near[0]}?" if near else "leave it out"
        raise UserError(f"deepspeed.config.{path}: DeepSpeed knows no such field: {hint}")


def _first(error: Any) -> str:
    """Describes the first problem that pydantic found. For an unknown field it names the most similar known one."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    problem = error.errors()[0]
    path = ".".join(str(part) for part in problem["loc"])
    text = f"{error.title}, {path}: {problem['msg']}"
    if problem["type"] == "extra_forbidden" and error.title == DeepSpeedZeroConfig.__name__ and len(problem["loc"]) == 1:
        fields = DeepSpeedZeroConfig.model_fields
        near = difflib.get_close_matches(path, [field.alias or name for name, field in fields.items()], 1)
        text += f": did you mean zero_optimization.{near[0]}?" if near else ""
    return text
