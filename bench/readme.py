"""`python -m bench.readme [--check]`: writes the tables of README.md and of docs/results.md from the newest committed results.

Of the folders in bench/results of one machine the last one by name counts, a CPU's and each GPU's. README has the four rows
that the paper's claim rests on, docs/results.md the tables of speeds and of the suite reproduce in full; each table stands
between two marks of its own. `--check` writes nothing and fails when a table is not that of the results."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.report.page import device
from bench.report.tables import digits, read
from bench.reproduce import paper
from bench.reproduce.arms import ABLATIONS, MAIN, OURS, START
from bench.results import ROOT, Row, read_results
from dopsd_fast.errors import UserError

README, PAGE, RESULTS = ROOT / "README.md", ROOT / "docs" / "results.md", ROOT / "bench" / "results"
METHODS, MEASURED, REPRODUCED = (
    (f"<!-- {name}: begin; written by python -m bench.readme -->", f"<!-- {name}: end -->")
    for name in ("methods", "measured", "reproduced")
)
GRID, PICTURE = "plots/reproduce_grid_target.png", "plots/ratios.png"
KINDS = {"lora": "LoRA", "full": "full fine-tuning"}
PEERS = {"R1": "the published step", "R2": "R2: conditions cached", "R3": "R3: compiled, too",
         "R4": "R4: real RoPE and one backward a state, too"}
FAST = (
    *((f"training step over {what}", "step", f"{{}}/{peer}", "speedup") for peer, what in PEERS.items()),
    *((f"trajectory states a second over {PEERS[peer]}", "rollout", f"{{}}/{peer}", "speedup") for peer in ("R1", "R4")),
    ("the same, a second", "rollout", "{}", "states_per_second"),
    ("student and teacher velocity over diffusers'", "forward", "{}/diffusers", "speedup_forward"),
    ("relative error of the gradient, ours / published", "step", "{}", "gradient_relative_error"),
)
"""What a line of the table says of the row: suite, case (of a kind), metric."""
COUNTED = (
    ("kernel launches a step", "cost", "{}", "launches_per_step"),
    ("elementwise bytes a token and block, forward", "cost", "{}", "elementwise_bytes_per_token_block_forward"),
    ("the same, backward", "cost", "{}", "elementwise_bytes_per_token_block_backward"),
    ("bytes saved for backward, a token and block", "cost", "{}", "saved_bytes_per_token_block"),
    ("products", "cost", "{}", "gemm_tflop_per_step"),
    ("peak memory", "memory", "{}@full_size", "peak_bytes"),
    ("the same, `train.activations=recompute`", "memory", "{}@full_size@recompute", "peak_bytes"),
)


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.readme", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 when a table is another one")
    arguments = parser.parse_args(argv)
    try:
        stale = {file: text for file, text in pages(RESULTS).items() if text != file.read_text(encoding="utf-8")}
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if arguments.check and stale:
        names = " and ".join(file.name for file in stale)
        print(f"{names}: the tables are not those of {RESULTS}: run python -m bench.readme", file=sys.stderr)
        return 1
    for file, text in stale.items():
        file.write_text(text, encoding="utf-8")
        print(f"written: {file}")
    if not stale:
        print(f"{README.name} and {PAGE.name} are up to date")
    return 0


def pages(results: Path) -> dict[Path, str]:
    """README.md and docs/results.md with their tables as `results` has them."""
    speeds, methods = newest(results), newest(results, True)
    readme = replaced(README, README.read_text(encoding="utf-8"), "\n".join(map(four_rows, methods)), METHODS)
    page = replaced(PAGE, PAGE.read_text(encoding="utf-8"), block(speeds), MEASURED)
    page = replaced(PAGE, page, "\n".join(part for folder in methods for part in reproduced(folder)), REPRODUCED)
    return {README: readme, PAGE: page}


def replaced(file: Path, text: str, table: str, marks: tuple[str, str]) -> str:
    """`text`, which `file` holds, with `table` between the marks. UserError: there are none."""
    before, begin, rest = text.partition(marks[0])
    _, end, after = rest.partition(marks[1])
    if not begin or not end:
        raise UserError(f"{file}: the lines {marks[0]!r} and {marks[1]!r} are missing; put them where the table belongs")
    return f"{before}{begin}\n{table}{end}{after}"


def newest(results: Path, of_reproduce: bool = False) -> list[Path]:
    """The folder that counts of each machine, the CPU's first; of speeds or of the suite reproduce. UserError: none."""
    found: dict[str, Path] = {}
    for folder in sorted(path.parent for path in results.glob("*/results.json")):
        facts, rows = read_results(folder)
        if not facts.get("quick") and of_reproduce == any(row.suite == "reproduce" for row in rows):
            found[str(facts.get("gpu") or "")] = folder
    if not found:
        raise UserError(f"{results}: no results; write them with bench/run.py --out {results}/NAME")
    return [found[gpu] for gpu in sorted(found)]


def four_rows(folder: Path) -> str:
    """Start, SFT, PSO and D-OPSD by our own measures, in Markdown."""
    facts, rows = read_results(folder)
    lines = paper.markdown({row.key: row for row in rows}, [START, "sft", "pso", OURS])
    return "\n".join([*lines, "", f"({'; 95 % intervals; '.join(origin(folder, facts))}.)\n"])


def origin(folder: Path, facts: Mapping[str, Any]) -> tuple[str, str]:
    """Where numbers come from, and what was measured on what."""
    commit = str(facts.get("commit") or "unknown")[:9]
    return f"`bench/results/{folder.name}`, commit {commit}", f"`{facts.get('model')}` on {device(facts)}"


def reproduced(folder: Path) -> list[str]:
    """The methods, the verdicts on the claims, a grid, and what there is of ablations and customisation, in Markdown."""
    facts, rows = read_results(folder)
    found, measured = {row.key: row for row in rows}, {row.variant for row in rows if "_steps" in row.case}
    lines = paper.markdown(found, [START, *(arm.name for arm in MAIN)], paper.FULL, paper.COLUMNS)
    parts = ["\n".join([*lines, ""]), f"Claims {'; '.join(paper.verdicts(rows))}. "
             f"({'; 95 % intervals; '.join(origin(folder, facts))}.)\n"]
    if (folder / GRID).exists():
        parts.append(f"![the same captions by every method](../bench/results/{folder.name}/{GRID})\n")
    for head, few, first, more in (
        ("A low-rank adapter on four images of the style, without anchors:\n", True, START, (paper.CUSTOM, paper.OF_CUSTOM)),
        ("D-OPSD changed in one thing:\n", False, OURS, ()),
    ):
        if arms := [arm.name for arm in ABLATIONS if (arm.data == "few") == few and arm.name in measured]:
            parts.append("\n".join([head, *paper.markdown(found, [first, *arms], *more), ""]))
    return parts


def block(folders: Sequence[Path]) -> str:
    """What the folders have to say of speeds, in Markdown: how fast ours is, and the counts."""
    parts = []
    for folder in folders:
        facts, rows = read_results(folder)
        found, (source, subject) = {row.key: row for row in rows}, origin(folder, facts)
        said = [*table(f"{subject}: over the peer's, median (p20..p80)", FAST, found),
                *table("Z-Image at 1024^2 by count, ours / published", COUNTED, found)]
        if said:
            said.append(f"({source}, torch {facts.get('torch')}.)\n")
            if (folder / PICTURE).exists():
                said.append(f"![how much faster ours is than each peer](../bench/results/{folder.name}/{PICTURE})\n")
        parts += said
    return "\n".join(parts)


def table(head: str, lines: Sequence[tuple[str, str, str, str]], found: Mapping[Any, Row]) -> list[str]:
    """A line that has nothing of any kind is left out, and a table without a line."""
    cells = [[what, *(cell(found, suite, case.format(kind), metric) for kind in KINDS)] for what, suite, case, metric in lines]
    written = [f"| {' | '.join(line)} |" for line in cells if any(line[1:])]
    head = f"| {' | '.join([head, *KINDS.values()])} |"
    return ["\n".join([head, "| --- " * (1 + len(KINDS)) + "|", *written, ""])] if written else []


def cell(found: Mapping[Any, Row], suite: str, case: str, metric: str) -> str:
    """A ratio or a rate with its spread; else ours / R1's, which has no @recompute, and of memory what ours is of it."""
    ours, theirs = found.get((suite, case, "ours", metric)), found.get((suite, case.removesuffix("@recompute"), "R1", metric))
    text, spread = read(ours) if ours else ("", "")
    if not ours or ours.unit in ("x", "1/s"):
        return text.removesuffix(" 1/s").replace("x", " x") + (f" ({spread})" if spread else "")
    if not theirs:
        return ""
    share = f" ({digits(ours.value / theirs.value)} x)" if suite == "memory" and ours.value and theirs.value else ""
    return f"{text} / {read(theirs)[0]}{share}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
