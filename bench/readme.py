"""`python -m bench.readme [--check]`: writes the tables of README.md and of docs/results.md from the newest committed results.

Of the folders in bench/results of one machine the last one by name counts, a CPU's and each GPU's. README has the four rows
that the paper's claim rests on, docs/results.md the tables of speeds and of the suite reproduce in full; each table stands
between two marks of its own. `--check` writes nothing and fails when a table is not that of the results.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.report.tables import digits, read
from bench.reproduce import paper
from bench.reproduce.arms import ABLATIONS, MAIN, OURS, START
from bench.results import ROOT, Row, read_results
from dopsd_fast.errors import UserError

README, PAGE, RESULTS = ROOT / "README.md", ROOT / "docs" / "results.md", ROOT / "bench" / "results"
FROM_PAGE = "../bench/results"
"""RESULTS, as a link in PAGE names it."""
METHODS = "<!-- methods: begin; written by python -m bench.readme -->", "<!-- methods: end -->"
MEASURED = "<!-- measured: begin; written by python -m bench.readme -->", "<!-- measured: end -->"
REPRODUCED = "<!-- reproduced: begin; written by python -m bench.readme -->", "<!-- reproduced: end -->"
SUITE = "reproduce"
GRID = "plots/reproduce_grid_target.png"
KINDS = {"lora": "LoRA", "full": "full fine-tuning"}
PEERS = {
    "R1": "the published step",
    "R2": "R2: conditions cached",
    "R3": "R3: compiled, too",
    "R4": "R4: real RoPE and one backward a state, too",
}
COUNTED = {
    "launches_per_step": "kernel launches a step",
    "elementwise_bytes_per_token_block_forward": "elementwise bytes a token and block, forward",
    "elementwise_bytes_per_token_block_backward": "the same, backward",
    "saved_bytes_per_token_block": "bytes saved for backward, a token and block",
    "gemm_tflop_per_step": "products",
}
PICTURE = "plots/ratios.png"
Found = Mapping[tuple[str, str, str, str], Row]


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.readme",
                                     description="Writes the tables of README.md and docs/results.md from bench/results.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 when a table is another one")
    arguments = parser.parse_args(argv)
    try:
        stale = {file: text for file, text in pages(RESULTS).items() if text != file.read_text(encoding="utf-8")}
    except (UserError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not stale:
        print(f"{README.name} and {PAGE.name} are up to date")
        return 0
    if arguments.check:
        names = " and ".join(file.name for file in stale)
        print(f"{names}: the tables are not those of {RESULTS}: run python -m bench.readme", file=sys.stderr)
        return 1
    for file, text in stale.items():
        file.write_text(text, encoding="utf-8")
        print(f"written: {file}")
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
    """The folder that counts of each machine, the CPU's first; of speeds or of the suite reproduce. UserError: there is
    none."""
    found: dict[str, Path] = {}
    for folder in sorted(path.parent for path in results.glob("*/results.json")):
        facts, rows = read_results(folder)
        if not facts.get("quick") and of_reproduce == any(row.suite == SUITE for row in rows):
            found[str(facts.get("gpu") or "")] = folder
    if not found:
        raise UserError(f"{results}: no results; write them with bench/run.py --out {results}/NAME")
    return [found[gpu] for gpu in sorted(found)]


def four_rows(folder: Path) -> str:
    """Start, SFT, PSO and D-OPSD by our own measures, in Markdown."""
    facts, rows = read_results(folder)
    lines = paper.markdown({row.key: row for row in rows}, [START, "sft", "pso", OURS])
    return "\n".join([*lines, "", f"({source(folder, facts)}.)\n"])


def source(folder: Path, facts: Mapping[str, Any]) -> str:
    """Where figures with an interval come from."""
    commit = str(facts.get("commit") or "unknown")[:9]
    return f"`bench/results/{folder.name}`, commit {commit}; 95 % intervals; {subject(facts)}"


def reproduced(folder: Path) -> list[str]:
    """The methods, the verdicts on the claims, a grid, and what there is of ablations and customisation, in Markdown."""
    facts, rows = read_results(folder)
    found, measured = {row.key: row for row in rows}, {row.variant for row in rows if "_steps" in row.case}
    lines = paper.markdown(found, [START, *(arm.name for arm in MAIN)], paper.FULL, paper.COLUMNS)
    parts = ["\n".join([*lines, ""]), f"Claims {'; '.join(paper.verdicts(rows))}. ({source(folder, facts)}.)\n"]
    if (folder / GRID).exists():
        parts.append(f"![the same captions by every method]({FROM_PAGE}/{folder.name}/{GRID})\n")
    few = [arm.name for arm in ABLATIONS if arm.data == "few" and arm.name in measured]
    others = [arm.name for arm in ABLATIONS if arm.data != "few" and arm.name in measured]
    if few:
        lines = paper.markdown(found, [START, *few], paper.CUSTOM, paper.OF_CUSTOM)
        parts.append("\n".join(["A low-rank adapter on four images of the style, without anchors:\n", *lines, ""]))
    if others:
        parts.append("\n".join(["D-OPSD changed in one thing:\n", *paper.markdown(found, [OURS, *others]), ""]))
    return parts


def block(folders: Sequence[Path]) -> str:
    return "\n".join(part for folder in folders for part in tables(folder))


def tables(folder: Path) -> list[str]:
    """What one folder has to say, in Markdown: how fast ours is, and the counts."""
    facts, rows = read_results(folder)
    found = {row.key: row for row in rows}
    parts = []
    if lines := [line for line in fast(found) if line]:
        head = f"| {subject(facts)}: over the peer's, median (p20..p80) | {' | '.join(KINDS.values())} |"
        parts.append("\n".join([head, "| --- " * (1 + len(KINDS)) + "|", *lines, ""]))
    if lines := [line for line in counted(found) if line]:
        head = f"| Z-Image at 1024^2 by count, ours / published | {' | '.join(KINDS.values())} |"
        parts.append("\n".join([head, "| --- " * (1 + len(KINDS)) + "|", *lines, ""]))
    if parts:
        commit = str(facts.get("commit") or "unknown")[:9]
        parts.append(f"(`bench/results/{folder.name}`, commit {commit}, torch {facts.get('torch')}.)\n")
        if (folder / PICTURE).exists():
            parts.append(f"![how much faster ours is than each peer]({FROM_PAGE}/{folder.name}/{PICTURE})\n")
    return parts


def subject(facts: Mapping[str, Any]) -> str:
    threads = facts.get("threads")
    device = facts.get("gpu") or f"{facts.get('cpu')}, {threads} thread{'s' * (threads != 1)}"
    return f"`{facts.get('model')}` on {device}"


def fast(found: Found) -> list[str]:
    lines = [line(f"training step over {what}", [ratio(found, "step", f"{kind}/{peer}", "speedup") for kind in KINDS])
             for peer, what in PEERS.items()]
    for peer in ("R1", "R4"):
        cells = [ratio(found, "rollout", f"{kind}/{peer}", "speedup") for kind in KINDS]
        lines.append(line(f"trajectory states a second over {PEERS[peer]}", cells))
    lines.append(line("the same, a second", [ratio(found, "rollout", kind, "states_per_second") for kind in KINDS]))
    cells = [ratio(found, "forward", f"{kind}/diffusers", "speedup_forward") for kind in KINDS]
    lines.append(line("student and teacher velocity over diffusers'", cells))
    cells = [pair(found, "step", kind, "gradient_relative_error") for kind in KINDS]
    return [*lines, line("relative error of the gradient, ours / published", cells)]


def counted(found: Found) -> list[str]:
    lines = [line(what, [pair(found, "cost", kind, metric) for kind in KINDS]) for metric, what in COUNTED.items()]
    for end, what in (("", "peak memory"), ("@recompute", "the same, `train.activations=recompute`")):
        lines.append(line(what, [peaks(found, kind, end) for kind in KINDS]))
    return lines


def line(what: str, cells: Sequence[str]) -> str:
    """A line of a table, nothing where no cell has anything."""
    return f"| {what} | {' | '.join(cells)} |" if any(cells) else ""


def ratio(found: Found, suite: str, case: str, metric: str) -> str:
    row = found.get((suite, case, "ours", metric))
    if row is None:
        return ""
    text, spread = read(row)
    return text.removesuffix(" 1/s").replace("x", " x") + (f" ({spread})" if spread else "")


def pair(found: Found, suite: str, case: str, metric: str) -> str:
    """Ours / R1's."""
    ours, theirs = (found.get((suite, case, variant, metric)) for variant in ("ours", "R1"))
    return f"{read(ours)[0]} / {read(theirs)[0]}" if ours and theirs else ""


def peaks(found: Found, kind: str, end: str) -> str:
    ours = found.get(("memory", f"{kind}@full_size{end}", "ours", "peak_bytes"))
    theirs = found.get(("memory", f"{kind}@full_size", "R1", "peak_bytes"))
    if ours is None or theirs is None or not ours.value or not theirs.value:
        return ""
    return f"{read(ours)[0]} / {read(theirs)[0]} ({digits(ours.value / theirs.value)} x)"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
