"""Rows of a benchmark and their files: `results.json` and `results.csv`, whose schema is the docstring of `Row`."""

from __future__ import annotations

import csv
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch

from dopsd_fast.errors import UserError
from dopsd_fast.storage.atomic import replacing, write_text

ROOT = Path(__file__).resolve().parent.parent
FILE, TABLE = "results.json", "results.csv"
Status = Literal["ok", "fallback", "failed"]


@dataclass(frozen=True)
class Row:
    """One number: an entry of "rows" in results.json, a line of results.csv.

    suite    the suite that measured it
    case     what was measured; "lora/R1" in a row of a ratio: ours against R1; "@" and what differs from the standard case
    variant  "ours", a peer ("R1" ... "R4", "eager", "compiled", "plain"), a ceiling ("copy", "gemm", "floor")
    metric   what the number is: "seconds_per_step", "speedup", ...
    value    the median of `n` measurements where there were several; None only where `status` is "failed"
    unit     "s", "x", "B", "" for a count or a share, ...
    p20, p80 their percentiles; None for what was counted or computed
    n        the number of measurements
    status   "ok"; "fallback": measured, but by another path than the variant stands for; "failed": not measured
    low, high the 95 % bootstrap interval of `value`, over seeds and prompts; None where nothing was resampled
    note     why, one line, where the status is not "ok"; else what a reader of the row should know, mostly nothing
    """

    suite: str
    case: str
    variant: str
    metric: str
    value: float | None
    unit: str
    p20: float | None = None
    p80: float | None = None
    n: int = 1
    status: Status = "ok"
    note: str = ""
    low: float | None = None
    high: float | None = None

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.suite, self.case, self.variant, self.metric


def failed(suite: str, case: str, variant: str, metric: str, unit: str, error: BaseException | str) -> Row:
    """The row of a variant that could not be measured."""
    said = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
    return Row(suite, case, variant, metric, None, unit, n=0, status="failed", note=" ".join(said.split())[:200])


@dataclass(frozen=True)
class Options:
    """What the command line gives to every suite, see `bench/run.py --help`. quick: the fewest repetitions that exercise
    everything, for tests; its numbers mean nothing. rounds: 0 leaves it to the suite. tour: the standard cases only, with
    fewer repetitions, all suites in five minutes. budget: a `bench.reproduce.arms.Budget` in place of the usual one."""

    model: str
    device: torch.device
    quick: bool = False
    threads: int = 2
    rounds: int = 0
    clock: str = "wall"
    peers: tuple[str, ...] = ("R1", "R2", "R3", "R4")
    kinds: tuple[str, ...] = ("lora", "full")
    tour: bool = False
    ranks: tuple[int, ...] = ()
    ablations: bool = False
    data: str = ""
    evaluation: str = ""
    recipe: str = ""
    more: tuple[str, ...] = ()
    steps: int = 0
    seeds: int = 0
    budget: Any = None

    def repeats(self, usual: int, tour: int, quick: int = 2) -> int:
        """Rounds of a suite: what the command line says, or its own."""
        return self.rounds or (quick if self.quick else tour if self.tour else usual)


def merged(rows: Iterable[Row]) -> list[Row]:
    """One row of each key: the first of those with most measurements. A failed one only if there is no other, or where it takes
    back as many measurements (`n`), since the program failed after them."""
    found: dict[tuple[str, str, str, str], Row] = {}
    for row in rows:
        old = found.get(row.key)
        if not old or old.status == "failed" or old.n < row.n or (row.status == "failed" and row.n == old.n):
            found[row.key] = row
    return list(found.values())


def check(rows: Sequence[Row]) -> None:
    """ValueError, one line: two rows of one key, no number where the row did not fail, or one that is not finite."""
    keys = Counter(row.key for row in rows)
    for row in rows:
        numbers = [number for number in (row.value, row.p20, row.p80, row.low, row.high) if number is not None]
        if keys[row.key] > 1:
            raise ValueError(f"row {' '.join(row.key)}: {keys[row.key]} rows of this key")
        if (row.value is None) != (row.status == "failed") or not all(map(math.isfinite, numbers)):
            raise ValueError(f"row {' '.join(row.key)}: a number is missing or not finite")


def write_results(folder: Path, facts: Mapping[str, Any], rows: Iterable[Row]) -> Path:
    """`{"environment": {...}, "rows": [...]}` in `folder`/results.json and the rows in results.csv. ValueError as `check`."""
    rows = list(rows)
    check(rows)
    folder.mkdir(parents=True, exist_ok=True)
    content = [asdict(row) for row in rows]
    text = json.dumps({"environment": dict(facts), "rows": content}, indent=1, allow_nan=False)
    write_text(folder / FILE, text + "\n", flush=False)
    with replacing(folder / TABLE, flush=False) as part, part.open("w", newline="", encoding="utf-8") as stream:
        table = csv.DictWriter(stream, [field.name for field in fields(Row)])
        table.writeheader()
        table.writerows(content)
    return folder / FILE


def read_results(folder: Path) -> tuple[dict[str, Any], list[Row]]:
    """The inverse of `write_results`. UserError when the file is not there or does not hold what it writes."""
    file = folder / FILE
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        facts, rows = dict(content["environment"]), [Row(**row) for row in content["rows"]]
        check(rows)
        return facts, rows
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}; write it with bench/run.py --out {folder}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file} is no benchmark result: {error}; write it with bench/run.py --out") from error
