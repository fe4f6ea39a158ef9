"""`python bench/run.py [SUITE ...] [--model NAME] [--device auto] [--quick] [--out DIR] [--profile]`: measure.
`python bench/run.py compare A B`: two result folders of one machine. `--help` lists all."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import shlex
import sys
import tempfile
import time
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

HERE = Path(__file__).resolve().parent
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != HERE]
sys.path.insert(0, str(HERE.parent))

if TYPE_CHECKING:
    from bench.results import Options, Row

SUITES = {
    "cost": "what a full-size step launches, moves and multiplies; needs no GPU",
    "rollout": "trajectory states a second against the eager reference",
    "step": "a whole training step against the published one and its stronger variants",
    "forward": "student and teacher velocities: packed, in two calls, diffusers",
    "kernels": "each op against plain PyTorch, compiled PyTorch and what the machine can do",
    "optimizer": "AdamW + EMA against torch's fused AdamW and a separate EMA",
    "conditioning": "contexts from the cache against the encoders in every step",
    "memory": "peak memory of a step by what is kept for the backward pass",
    "zero": "what ranks send each other in a step, and its time, by ZeRO stage and arrangement",
    "reproduce": "the paper's result: what each method learns, keeps and loses, with its claims tested",
    "cubins": "registers and shared memory of every kernel, compiled for GPUs that are not here",
}
"""Suite -> what it shows. Each is `measure(options)` in bench/suites, an iterator over its rows."""
TOUR = tuple(suite for suite in SUITES if suite not in ("cubins", "reproduce"))
COUNTED = {"cost", "cubins"}
"""Suites that read no model."""
NEEDED = ("rich", "matplotlib", "jinja2")
WHOLE = "suite"
"""Metric of the row of a suite that failed as a whole."""
MODULES = {"kernels": "ops"}  # a module called kernels would hide Hugging Face's package


def main(argv: list[str]) -> int:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from dopsd_fast.errors import UserError

    try:
        if argv[:1] == ["compare"]:
            from bench.report.compare import main as compare

            return compare(argv[1:])
        return bench(argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; what is finished has been written", file=sys.stderr)
        return 130


def bench(argv: list[str]) -> int:
    arguments = parser().parse_args(argv)
    from dopsd_fast.errors import UserError

    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"bench: {', '.join(missing)} not installed: pip install -c constraints.txt -e '.[bench]'")

    from bench.machine import device_named
    from bench.models import Model
    from bench.results import Options
    from dopsd_fast.run.console import quiet_libraries

    quiet_libraries()
    warnings.filterwarnings("ignore", ".*complex operators", UserWarning)  # R3's RoPE is in complex numbers, as published
    device = device_named(arguments.device)
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it found nothing better
    threads = arguments.threads or min(2, os.cpu_count() or 1)
    trains = arguments.suites == ["reproduce"]
    model = arguments.model or ("zimage-turbo" if device.type == "cuda" and not trains else "nano")
    options = Options(
        model=model, device=device, quick=arguments.quick, threads=threads, rounds=arguments.rounds, clock=arguments.clock,
        peers=tuple(arguments.peers), kinds=tuple(arguments.kinds), tour=not arguments.suites, ranks=tuple(arguments.ranks),
        ablations=arguments.ablations, data=arguments.data, evaluation=arguments.eval, recipe=arguments.recipe,
        more=tuple(arguments.set), steps=arguments.steps, seeds=arguments.seeds,
    )
    suites = list(dict.fromkeys(arguments.suites)) or list(TOUR)
    if set(suites) - COUNTED - {"reproduce"}:
        Model(model, device)
    if not trains and (arguments.data or arguments.eval or arguments.ablations):
        raise UserError("--data, --eval and --ablations are for the suite reproduce, which then runs by itself")
    if arguments.clock == "cpu" and (threads > 1 or device.type != "cpu"):
        raise UserError("--clock cpu adds up the time of all threads and sees no GPU: use it with --threads 1 --device cpu")
    out: Path = arguments.out or Path("runs") / "bench" / time.strftime("%Y-%m-%d-%H%M%S")
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}: name a folder that can be written to") from None
    command = shlex.join(["python", "bench/run.py", *repeated(argv)])
    rows = measure(suites, options, out, command, arguments.profile)
    return int(any(row.metric == WHOLE and row.status == "failed" for row in rows))


def measure(suites: Sequence[str], options: Options, out: Path, command: str = "", profile: bool = False) -> list[Row]:
    """Runs the suites in order and shows the rows of each; `out` has every row soon after it was measured. What a suite
    cannot do is a row of status "failed"; a suite that fails as a whole is one row, too. UserError, of the first
    suite, ends it all: bad options.

    command: what repeats the run, for the report."""
    import torch

    from bench.live import live
    from bench.machine import environment
    from bench.report.page import write_report
    from bench.report.tables import console_of, show
    from bench.results import Row, failed, write_results
    from dopsd_fast.errors import UserError

    torch.set_num_threads(options.threads)
    facts, started = environment(options) | ({"command": command} if command else {}), time.perf_counter()
    names = [*suites, *(["profile"] if profile else [])]

    def write(rows: Sequence[Row]) -> None:
        write_results(out, facts | {"seconds": time.perf_counter() - started}, rows)

    with live(names, write, console_of()) as run:
        for number, suite in enumerate(names):
            run.begin(suite)
            begun = time.perf_counter()
            try:
                for row in rows_of(suite, options, out):
                    run.add(row)
            except UserError as error:
                if number == 0:
                    raise
                run.add(failed(suite, suite, "ours", WHOLE, "", error))
            except Exception as error:
                run.add(failed(suite, suite, "ours", WHOLE, "", error))
            run.add(Row(suite, suite, "ours", "suite_seconds", time.perf_counter() - begun, "s"))
            run.flush()
            show(suite, [row for row in run.rows if row.suite == suite])
    print(f"written: {out / 'results.json'}, results.csv, {write_report(out).name}")
    return run.rows


def rows_of(suite: str, options: Options, out: Path) -> Iterable[Row]:
    """As they are found."""
    if suite == "profile":
        from bench.breakdown import profile_step

        return profile_step(options, out)
    if suite == "reproduce":
        from bench.suites.reproduce import run as reproduce

        return reproduce(options, out)
    found: Iterable[Row] = importlib.import_module(f"bench.suites.{MODULES.get(suite, suite)}").measure(options)
    return found


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="bench/run.py", description="Measures this program against its peers; without a SUITE a tour of five minutes. "
        "`bench/run.py compare A B` compares two result folders of one machine.",
        epilog="suites: " + "; ".join(f"{name}: {what}" for name, what in SUITES.items()),
    )
    found.add_argument("suites", nargs="*", metavar="SUITE", type=suite, help=f"{', '.join(SUITES)}; none: a tour")
    found.add_argument("--model", help="nano (the embedded pipeline; default on a CPU), zimage-turbo (random weights; default "
                       "on a GPU), zimage-small, or a pipeline folder in diffusers' layout")
    found.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1")
    found.add_argument("--quick", action="store_true", help="fewest repetitions, to see that it works: no measurement")
    found.add_argument("--out", type=Path, help="folder for results.json, results.csv, plots and report.html (default: a new "
                       "one in runs/bench)")
    found.add_argument("--profile", action="store_true", help="also a torch profiler trace of the step, and where its time is")
    found.add_argument("--threads", type=count, default=0, help="CPU threads (default: 2)")
    found.add_argument("--rounds", type=count, default=0, help="measurements of each variant (default: the suite's own)")
    found.add_argument("--clock", default="wall", choices=["wall", "cpu"],
                       help="cpu: CPU time of this process, for --threads 1 on a busy machine")
    found.add_argument("--peers", nargs="*", default=["R1", "R2", "R3", "R4"], choices=["R1", "R2", "R3", "R4"],
                       help="step, rollout: whom to compare with")
    found.add_argument("--kinds", nargs="+", default=["lora", "full"], choices=["lora", "full"], help="what trains")
    found.add_argument("--ranks", nargs="+", type=count, default=[], metavar="N",
                       help="zero: numbers of ranks (default: 2, on GPUs one each)")
    found.add_argument("--ablations", action="store_true", help="reproduce: the paper's ablations and customisation, too")
    found.add_argument("--data", default="", metavar="PATH", help="reproduce: the records to train on, as data.path takes them")
    found.add_argument("--eval", default="", metavar="PATH", help="reproduce: held-out records and the models that measure")
    found.add_argument("--recipe", default="", help="reproduce: recipe for a model of your own (default: the family's)")
    found.add_argument("--set", nargs="+", default=[], metavar="FIELD=VALUE", help="reproduce: settings of all its runs")
    found.add_argument("--steps", type=count, default=0, help="reproduce: optimizer steps of every run")
    found.add_argument("--seeds", type=count, default=0, help="reproduce: seeds of every method")
    return found


def repeated(argv: Sequence[str]) -> list[str]:
    """The arguments without --out, which concerns nobody else."""
    found, words = [], iter(argv)
    for word in words:
        if word == "--out":
            next(words, None)
        elif not word.startswith("--out="):
            found.append(word)
    return found


def count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 on")
    return int(text)


def suite(name: str) -> str:
    if name not in SUITES:
        raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(SUITES)}")
    return name


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
