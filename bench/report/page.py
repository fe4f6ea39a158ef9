"""report.html of a folder of results, one file that needs nothing else and no network.

`bench/run.py` writes it after every run. It holds the headline, the machine, what failed or fell back, every suite's tables and
plots, and all rows as they are in results.json.
"""

from __future__ import annotations

import argparse
import base64
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.report.tables import Cell, Grid, Note, counts, digits, grids, notes, read, title, took
from bench.results import Row, read_results

FILE, TEMPLATE = "report.html", "report.html.j2"
PLOTS = "plots"
COLUMNS = 110
"""Characters that the page's tables may be wide."""
ABOUT = {
    "cost": "What one full-size training step launches, moves, keeps and multiplies, counted on tensors without memory. These "
            "numbers are the same on every machine.",
    "rollout": "Trajectory states a second: student and teacher velocity, loss and Euler step along a trajectory, no backward "
               "pass.",
    "step": "A whole training step: K states forward and backward, clipping, AdamW, the EMA and the teacher's refresh. R1 runs "
            "its encoders in every step; floor is the step's matrix products alone, encoders what conditioning takes of R1.",
    "profile": "Where the wall time of a training step goes, from torch.profiler.",
    "forward": "Student and teacher velocity at one state, packed into one forward (ours), in two calls, and by diffusers.",
    "kernels": "Each op against plain PyTorch and torch.compile. The ceiling of an op is the time that a copy needs for its "
               "bytes, or a large matrix product for its operations, whichever is longer, both measured in this run; more than "
               "100 % of it means that a cache held the tensors.",
    "optimizer": "AdamW, EMA and casts in one pass, against torch's fused AdamW and a separate EMA.",
    "conditioning": "Contexts computed at every step, or once and then read from memory or disk.",
    "memory": "The peak of a training step's memory by what is kept for the backward pass. The ratios in a peer's line are "
              "ours over the peer's: below 1 ours needs less.",
    "zero": "What ranks send each other in a training step, and its time, by ZeRO stage and arrangement.",
    "cubins": "Registers and shared memory of every kernel, compiled for GPUs that are not here.",
    "reproduce": "The paper's comparison on the embedded pipeline: all methods from the same weights, with the same steps, "
                 "records, noise and prompts, and learning rates searched in the same way. Intervals: 95 % bootstrap over "
                 "seeds and prompts. patch_fd stands for the paper's FID, style_distance for its DINO distance, accuracy (of "
                 "the judge's readings) for GenEval and DPG. A claim's value: 1 supported, 0 undecided, -1 contradicted.",
    "correctness": "Relative errors of ours and of eager PyTorch in the same precision.",
}  # fmt: skip
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
MACHINE = {
    "gpu": "GPU", "compute_capability": "compute capability", "driver": "driver", "cuda": "CUDA", "cpu": "CPU",
    "cpu_capability": "vector instructions", "cores": "cores", "threads": "threads", "load": "load at the start",
    "platform": "platform", "python": "Python", "commit": "commit", "model": "model", "device": "device", "clock": "clock",
    "quick": "quick", "tour": "tour", "seconds": "seconds the run took",
}  # fmt: skip
"""Key of the environment -> what the page calls it, in its order; other keys follow."""
ALT = {
    "ratios": "speedup of ours over each peer", "ratios_other": "speedups away from the standard configuration",
    "breakdown": "parts of a training step's time", "memory": "peak memory by arrangement",
    "memory_full_size": "peak memory of a full-size step", "kernels": "speedup of each op", "roofline": "roofline of each op",
    "reproduce_curves": "measures over optimizer steps, by method", "reproduce_teachers": "the same by teacher",
    "reproduce_states": "the same by states",
    "reproduce_grid_target": "pictures of the target style by method", "reproduce_grid_original": "of the original domain",
    "reproduce_grid_ablations_target": "pictures of the target style by ablation",
    "reproduce_grid_ablations_original": "of the original domain by ablation",
    "zero": "whole-model gathers a step", "cost": "counts of a full-size step against their targets",
}  # fmt: skip


@dataclass(frozen=True)
class Section:
    """A suite on the page."""

    name: str
    about: str
    took: str
    counts: str
    grids: list[Grid]
    notes: list[Note]
    plots: list[tuple[str, str]]


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

    from bench.report.plots import SHOWN_IN, draw

    facts, rows = read_results(folder)
    made = [*draw(rows, facts, folder / PLOTS), *sorted((folder / PLOTS).glob("reproduce_grid_*.png"))]
    pictures = {path.stem: picture(path) for path in made}
    suites = list(dict.fromkeys(row.suite for row in rows))
    sections = []
    for suite in suites:
        mine = [row for row in rows if row.suite == suite]
        shown = [(pictures[name], ALT[name]) for name, where in SHOWN_IN.items() if where == suite and name in pictures]
        about = ABOUT.get(suite, "")
        sections.append(Section(suite, about, took(mine), counts(mine), grids(mine, COLUMNS), notes(mine), shown))
    homeless = {name for name in pictures if SHOWN_IN.get(name, "") not in suites}
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).resolve().parent), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.globals.update(title=title, exact=exact)
    variants = {row.variant for row in rows} | {peer for row in rows for peer in row.case.partition("@")[0].split("/")[1:]}
    page = environment.get_template(TEMPLATE).render(
        machine=machine(facts), subject=subject(facts), facts=facts, headlines=headlines(rows), sections=sections, rows=rows,
        warnings=[(suite.name, note) for suite in sections for note in suite.notes if note.status != "ok"],
        overview=[(pictures[name], ALT[name]) for name in pictures if name in homeless],
        peers={name: what for name, what in PEERS.items() if name in variants}, command=command(facts, suites),
    )  # fmt: skip
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
              and row.case.partition("@")[0] == case]  # fmt: skip
    fewest = min((row.case.count("@") for row in others), default=0)
    nearest = [row for row in others if row.case.count("@") == fewest]
    return nearest[0] if len(nearest) == 1 else None


def machine(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The environment as (name, value) in reading order; what is not there is left out."""
    ordered = {key: facts[key] for key in MACHINE if key in facts} | {key: facts[key] for key in facts if key not in MACHINE}
    return [(MACHINE.get(key, key), plain(value)) for key, value in ordered.items() if value is not None]


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


def command(facts: Mapping[str, Any], suites: Sequence[str]) -> str:
    """What repeats this run."""
    if facts.get("command"):
        return str(facts["command"])
    words = ["python", "bench/run.py", *(suite for suite in suites if suite != "profile")]
    for option in ("model", "device", "threads"):
        if facts.get(option) is not None:
            words += [f"--{option}", str(facts[option])]
    words += ["--clock", "cpu"] * (facts.get("clock") == "cpu") + ["--quick"] * bool(facts.get("quick"))
    return shlex.join(words + ["--profile"] * ("profile" in suites))


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description="Writes report.html of a folder of results.")
    parser.add_argument("folder", type=Path, help="with results.json, as bench/run.py --out writes it")
    try:
        print(f"written: {write_report(parser.parse_args(argv).folder)}")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
