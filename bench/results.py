"""Rows of a benchmark and their files: `results.json` and `results.csv`, whose schema is the docstring of `Row`."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch

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
    """What the command line gives to every suite. `model`: "nano", "zimage-turbo", or a pipeline folder in diffusers' layout
    (see bench/models.py). `quick`: the fewest repetitions that exercise everything, for tests; its numbers mean nothing.
    `tour`: the standard cases only, with fewer repetitions, so that all suites together take five minutes."""

    model: str
    device: torch.device
    quick: bool = False
    threads: int = 2
    rounds: int = 0
    """Measurements of each variant; 0 leaves it to the suite."""
    clock: str = "wall"
    """"wall", or "cpu": this process's CPU time, which other programs on the machine disturb less; for one thread."""
    peers: tuple[str, ...] = ("R1", "R2", "R3", "R4")
    kinds: tuple[str, ...] = ("lora", "full")
    tour: bool = False
    ranks: tuple[int, ...] = ()
    """zero: how many processes, one or several numbers; empty: 2 on a CPU, one a GPU."""
    ablations: bool = False
    """reproduce: the paper's ablations and customisation, too."""
    data: str = ""
    """reproduce: records to train on, in any format of data.path; empty: the embedded world's."""
    evaluation: str = ""
    """reproduce: the folder of what real pictures are measured with and by."""
    recipe: str = ""
    """reproduce: the recipe of a user's own model; empty: the family's for full fine-tuning."""
    more: tuple[str, ...] = ()
    """reproduce: further settings of all runs on a user's own model, as the trainer takes them."""
    steps: int = 0
    """reproduce: optimizer steps of every run; 0: 160 on the embedded pipeline, else the recipe's."""
    seeds: int = 0
    """reproduce: of every arm; 0: 3 on the embedded pipeline, else 1."""
    budget: Any = None
    """reproduce: a `bench.reproduce.arms.Budget` in place of the usual one."""

    def repeats(self, usual: int, tour: int, quick: int = 2) -> int:
        """Rounds of a suite: what the command line says, or its own."""
        return self.rounds or (quick if self.quick else tour if self.tour else usual)


def merged(rows: Iterable[Row]) -> list[Row]:
    """One row of each key: the first of those with most measurements, a failed one only if there is no other."""
    found: dict[tuple[str, str, str, str], Row] = {}
    for row in rows:
        if row.key not in found or found[row.key].status == "failed" or found[row.key].n < row.n:
            found[row.key] = row
    return list(found.values())


def write_results(folder: Path, facts: Mapping[str, Any], rows: Iterable[Row]) -> Path:
    """`{"environment": {...}, "rows": [...]}` in `folder`/results.json and the rows in results.csv, each whole or not at
    all. ValueError for a number that is none, or two rows of one key."""
    rows = list(rows)
    if len({row.key for row in rows}) != len(rows):
        keys = [row.key for row in rows]
        raise ValueError(f"two rows of one key: {next(key for key in keys if keys.count(key) > 1)}")
    for row in rows:
        if (row.value is None) != (row.status == "failed"):
            raise ValueError(f"{row.key}: a row has a value unless it failed: {row.value}, {row.status}")
    folder.mkdir(parents=True, exist_ok=True)
    content = {"environment": dict(facts), "rows": [asdict(row) for row in rows]}
    file = folder / FILE
    part = file.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    part.replace(file)
    part = folder / f"{TABLE}.part"
    with part.open("w", newline="", encoding="utf-8") as stream:
        table = csv.DictWriter(stream, [field.name for field in fields(Row)])
        table.writeheader()
        table.writerows(content["rows"])  # type: ignore[arg-type]
    part.replace(folder / TABLE)
    return file


def read_results(folder: Path) -> tuple[dict[str, Any], list[Row]]:
    """The inverse of `write_results`. ValueError, one line, when the file is not there or does not hold what it writes."""
    file = folder / FILE
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return dict(content["environment"]), [Row(**row) for row in content["rows"]]
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}; write it with bench/run.py --out {folder}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} is no benchmark result: {error}; write it with bench/run.py --out") from error
