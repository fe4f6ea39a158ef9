"""`python -m bench.baseline [--update]`: the counts that no machine changes, against bench/baseline.json.

    cost     launches, bytes, products of a full-size step of ours
    memory   bytes of a full-size step by activation policy, counted and planned
    zero     gathers, reductions, calls and their bytes of nano's step on 2 CPU ranks

A count that is more than 2 % above its baseline is worse: exit code 1, and a test fails. `--update` writes what is counted now;
a commit that does so says why. The file is {suite: {case: {metric: count}}}, all of ours.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence

import torch

from bench.results import ROOT, Options, Row, merged
from bench.suites import cost, memory, zero
from dopsd_fast.errors import UserError

FILE = ROOT / "bench" / "baseline.json"
LIMIT = 0.02
Counts = Mapping[str, Mapping[str, Mapping[str, float]]]


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.baseline", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--update", action="store_true", help="write what is counted now")
    arguments = parser.parse_args(argv)
    try:
        found = counts(measure())
        if arguments.update:
            FILE.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            print(f"written: {FILE}")
            return 0
        lines = changed(found, read())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    worse = sum(line.startswith("worse") for line in lines)
    print(*lines, f"{len(flat(found))} counts, {worse} worse", sep="\n")
    return int(worse > 0)


def measure() -> list[Row]:
    """The rows of all counts, full size but for zero's."""
    cpu = torch.device("cpu")
    options = Options("nano", cpu, threads=torch.get_num_threads())
    rows = [row for kind in options.kinds for row in cost.ours(kind, cost.Size())]
    rows += [row for kind in options.kinds for row in memory.counted(kind, options)]
    return rows + merged(zero.measure(Options("nano", cpu, tour=True, quick=True)))


def counts(rows: Iterable[Row]) -> dict[str, dict[str, dict[str, float]]]:
    """What of `rows` belongs into the file. UserError, one line: a count that could not be taken."""
    wanted = {"memory": ("activation_bytes", "peak_bytes"), "zero": (*zero.COUNTS,)}
    found: dict[str, dict[str, dict[str, float]]] = {}
    for row in rows:
        if row.variant != "ours" or row.suite in wanted and row.metric not in wanted[row.suite]:
            continue
        if row.value is None:
            raise UserError(f"bench.baseline: {row.suite} {row.case} {row.metric} was not counted: {row.note}")
        found.setdefault(row.suite, {}).setdefault(row.case, {})[row.metric] = round(row.value, 6)
    return found


def read() -> Counts:
    """UserError, one line: the file is missing or holds something else."""
    try:
        found: Counts = json.loads(FILE.read_text(encoding="utf-8"))
        flat(found)
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{FILE}: {error}; write it with python -m bench.baseline --update") from error
    return found


def flat(found: Counts) -> dict[tuple[str, str, str], float]:
    return {(suite, case, metric): float(value) for suite, cases in found.items() for case, metrics in cases.items()
            for metric, value in metrics.items()}


def changed(found: Counts, before: Counts) -> list[str]:
    """A line for each count that is more than `LIMIT` above its baseline (worse) or below it (better), and each that only one
    of the two has (worse)."""
    now, then = flat(found), flat(before)
    lines = []
    for key, value in then.items():
        new, name = now.get(key), " ".join(key)
        if new is None:
            lines.append(f"worse: {name} is not counted any more")
        elif abs(new - value) > LIMIT * value:
            percent = f" ({100 * (new / value - 1):+.1f} %)" if value else ""
            said = f"{name}: {new:,g}, before {value:,g}{percent}"
            lines.append(f"worse: {said}" if new > value else f"better: {said}; hold it with --update")
    return lines + [f"worse: {' '.join(key)} is not in {FILE.name}: --update" for key in now if key not in then]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
