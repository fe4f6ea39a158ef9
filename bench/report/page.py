"""report.html of a folder of results, one file that needs nothing else and no network: the machine, what failed or fell back,
the plots, every suite's tables, and all rows as they are in results.json."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.report.tables import grids, notes, read, took
from bench.results import read_results
from dopsd_fast.storage.atomic import write_text

FILE, TEMPLATE, PLOTS = "report.html", "report.html.j2", "plots"
COLUMNS = 130
"""Characters that the page's tables may be wide, had they the spread beside the value: it stands below."""


def write_report(folder: Path) -> Path:
    """Draws the plots of `folder`/results.json into `folder`/plots, writes `folder`/report.html. UserError: no results."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    from bench.report.plots import draw

    facts, rows = read_results(folder)
    pictures = [*draw(rows, facts, folder / PLOTS), *sorted((folder / PLOTS).glob("reproduce_grid_*.png"))]
    sections = []
    for suite in dict.fromkeys(row.suite for row in rows):
        mine = [row for row in rows if row.suite == suite]
        sections.append({"name": suite, "took": took(mine), "grids": grids(mine, COLUMNS), "notes": notes(mine)})
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).resolve().parent), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )
    write_text(folder / FILE, environment.get_template(TEMPLATE).render(
        facts=facts, subject=f"{facts.get('model')} on {device(facts)}", sections=sections, rows=rows, read=read,
        pictures={path.stem: base64.b64encode(path.read_bytes()).decode() for path in pictures},
    ), flush=False)
    return folder / FILE


def device(facts: Mapping[str, Any]) -> str:
    """What it was measured on, in words."""
    threads = facts.get("threads")
    return str(facts.get("gpu") or f"{facts.get('cpu')}, {threads} thread{'s' * (threads != 1)}")
