"""report.html of a folder of results, one file that needs nothing else and no network.

`bench/run.py` writes it after every run. It holds the headline, the machine, what failed or fell back, every suite's tables and
plots, and all rows as they are in results.json.
"""

from __future__ import annotations

import argparse
import ast
import base64
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.report.tables import Cell, Grid, Note, counts, digits, grids, notes, read, title, took
from bench.results import ROOT, Row, read_results

FILE, TEMPLATE = "report.html", "report.html.j2"
PLOTS = "plots"
COLUMNS = 110
"""Characters that the page's tables may be wide."""
PEERS = {
    "ours": "this program",
    "R1": "the published step: diffusers and PEFT, encoders in every step, gradient checkpointing over K graphs",
    "R2": "R1 with conditions computed once",
    "R3": "R2 with its blocks compiled by torch.compile",
    "R4": "R3 with RoPE in real numbers and one backward pass a state: the strongest",
    "eager": "the same operation in plain PyTorch",
    "compiled": "the same in torch.compile",
    "plain": "ZeRO-3 as one would write it first",
}

@dataclass(frozen=True)
class Section:
    """A suite on the page."""

    name: str
    about: str
    took: str
    counts: str
    grids: list[Grid]
    notes: list[Note]


@dataclass(frozen=True)
class Headline:
    """A large number: `text`, what it is, and its spread or "" ."""

    text: str
    what: str
    spread: str
    status: str


def write_report(folder: Path) -> Path:
    """Draws the plots of `folder`/results.json into `folder`/plots, writes `folder`/report.html. ValueError: no results."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    from bench.report.plots import draw

    facts, rows = read_results(folder)
    made = [*draw(rows, facts, folder / PLOTS), *sorted((folder / PLOTS).glob("reproduce_grid_*.png"))]
    suites = list(dict.fromkeys(row.suite for row in rows))
    sections = []
    for suite in suites:
        mine = [row for row in rows if row.suite == suite]
        sections.append(Section(suite, about(suite), took(mine), counts(mine), grids(mine, COLUMNS), notes(mine)))
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).resolve().parent), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )
    environment.globals.update(title=title, exact=exact)
    variants = {row.variant for row in rows} | {peer for row in rows for peer in row.case.partition("@")[0].split("/")[1:]}
    page = environment.get_template(TEMPLATE).render(
        machine=machine(facts), subject=subject(facts), facts=facts, headlines=headlines(rows), sections=sections, rows=rows,
        warnings=[(suite.name, note) for suite in sections for note in suite.notes if note.status != "ok"],
        pictures=[(picture(path), path.stem.replace("_", " ")) for path in made],
        peers={name: what for name, what in PEERS.items() if name in variants}, command=command(facts),
    )
    file = folder / FILE
    part = file.with_suffix(".part")
    part.write_text(page, encoding="utf-8")
    part.replace(file)
    return file


def picture(path: Path) -> str:
    """A PNG as a data URI."""
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def exact(cell: Cell) -> str:
    """What stands behind a cell: its row's key, number and count."""
    row = cell.row
    said = f"{row.case}, {row.variant}: {row.metric}"
    number = f" = {row.value!r} {row.unit}".rstrip() if row.value is not None else ""
    return said + number + (f", n = {row.n}" if row.n > 1 else "") + (f"; {row.note}" if row.note else "")


def headlines(rows: Sequence[Row]) -> list[Headline]:
    """Rollout states a second and its speedup, the step's speedup against the published and the strongest peer."""
    found = {row.key: row for row in rows}
    made = []
    for kind in ("lora", "full"):
        called = {"lora": "LoRA", "full": "full fine-tuning"}[kind]
        wanted = [("rollout", kind, "states_per_second", f"trajectory states a second, {called}")]
        wanted += [("rollout", f"{kind}/R1", "speedup", f"rollout against the published one, {called}")]
        wanted += [("step", f"{kind}/{peer}", "speedup", f"training step against {peer}, {called}") for peer in ("R1", "R4")]
        for suite, case, metric, what in wanted:
            row = standard(found, suite, case, metric)
            if row is not None:
                text, spread = read(row)
                options = "".join(f", {option}" for option in row.case.split("@")[1:])
                made.append(Headline(text.removesuffix(" 1/s"), what + options, spread, row.status))
    return made


def standard(found: Mapping[tuple[str, str, str, str], Row], suite: str, case: str, metric: str) -> Row | None:
    """The row of the standard configuration, or of the nearest to it, as of a model with a suffix ("lora@zimage-small")."""
    if (suite, case, "ours", metric) in found:
        return found[suite, case, "ours", metric]
    others = [row for row in found.values() if (row.suite, row.variant, row.metric) == (suite, "ours", metric)
              and row.case.partition("@")[0] == case]
    fewest = min((row.case.count("@") for row in others), default=0)
    nearest = [row for row in others if row.case.count("@") == fewest]
    return nearest[0] if len(nearest) == 1 else None


def about(suite: str) -> str:
    """What its module says of it: what is measured, and what each of its rows is."""
    file = ROOT / "bench" / {"profile": "breakdown.py", "kernels": "suites/ops.py"}.get(suite, f"suites/{suite}.py")
    return ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "" if file.exists() else ""


def machine(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The environment as (name, value); what is not there is left out."""
    return [(key.replace("_", " "), plain(value)) for key, value in facts.items() if value is not None]


def plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(plain, value))
    return digits(value) if isinstance(value, float) else str(value)


def subject(facts: Mapping[str, Any]) -> str:
    """What was measured on what."""
    threads = facts.get("threads", "?")
    device = facts.get("gpu") or f"{facts.get('cpu', 'unknown CPU')}, {threads} thread{'s' * (threads != 1)}"
    return f"{facts.get('model', 'unknown model')} on {device}"


def command(facts: Mapping[str, Any]) -> str:
    """What repeats this run."""
    return str(facts.get("command") or f"python {facts.get('script', 'bench/run.py')} --model {facts.get('model')}")


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description="Writes report.html of a folder of results.")
    parser.add_argument("folder", type=Path, help="with results.json, as bench/run.py --out writes it")
    try:
        print(f"written: {write_report(parser.parse_args(argv).folder)}")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
