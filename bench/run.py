"""`python bench/run.py [SUITE ...]`: measure; `compare A B`: two result folders of one machine. `--help` lists all."""

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

HERE = Path(__file__).resolve().parent
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != HERE]
sys.path.insert(0, str(HERE.parent))

import torch  # noqa: E402

from bench.live import live  # noqa: E402
from bench.machine import device_named, environment  # noqa: E402
from bench.models import Model  # noqa: E402
from bench.report.compare import main as compare  # noqa: E402
from bench.report.page import write_report  # noqa: E402
from bench.report.tables import SUITE_SECONDS, console_of, show  # noqa: E402
from bench.results import Options, Row, failed, write_results  # noqa: E402
from dopsd_fast.errors import UserError  # noqa: E402
from dopsd_fast.run.console import quiet_libraries  # noqa: E402

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


def main(argv: list[str]) -> int:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        return compare(argv[1:]) if argv[:1] == ["compare"] else bench(argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; what is finished has been written", file=sys.stderr)
        return 130


def bench(argv: list[str]) -> int:
    arguments = parser().parse_args(argv)
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"bench: {', '.join(missing)} not installed: pip install -c constraints.txt -e '.[bench]'")
    quiet_libraries()
    warnings.filterwarnings("ignore", ".*complex operators", UserWarning)  # R3's RoPE is in complex numbers, as published
    device = device_named(arguments.device)
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it found nothing better
    trains = arguments.suites == ["reproduce"]
    model = arguments.model or ("zimage-turbo" if device.type == "cuda" and not trains else "nano")
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in vars(arguments).items()
             if name in Options.__annotations__}
    options = Options(**given | {"model": model, "device": device, "tour": not arguments.suites})
    suites = list(dict.fromkeys(arguments.suites)) or list(TOUR)
    if set(suites) - COUNTED - {"reproduce"}:
        Model(model, device)
    if not trains and (options.data or options.evaluation or options.ablations):
        raise UserError("--data, --eval and --ablations are for the suite reproduce, which then runs by itself")
    if options.clock == "cpu" and (options.threads > 1 or device.type != "cpu"):
        raise UserError("--clock cpu adds up the time of all threads and sees no GPU: use it with --threads 1 --device cpu")
    out: Path = arguments.out or Path("runs") / "bench" / time.strftime("%Y-%m-%d-%H%M%S")
    try:
        out.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out).close()
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}: name a folder that can be written to") from None
    place = argparse.ArgumentParser(add_help=False)
    place.add_argument("--out")  # where it is written concerns nobody else
    command = shlex.join(["python", "bench/run.py", *place.parse_known_args(argv)[1]])
    rows = measure(suites, options, out, command, arguments.profile)
    return int(any(row.metric == WHOLE and row.status == "failed" for row in rows))


def measure(suites: Sequence[str], options: Options, out: Path, command: str = "", profile: bool = False) -> list[Row]:
    """Runs the suites in order and shows the rows of each; `out` has every row soon after it was measured. A suite that fails
    as a whole is one row. UserError, of the first suite, ends it all: bad options. `command`: what repeats the run."""
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
            except Exception as error:
                if number == 0 and isinstance(error, UserError):
                    raise
                run.add(failed(suite, suite, "ours", WHOLE, "", error))
            run.add(Row(suite, suite, "ours", SUITE_SECONDS, time.perf_counter() - begun, "s"))
            run.flush()
            show(suite, [row for row in run.rows if row.suite == suite], run.console)
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
    module = "ops" if suite == "kernels" else suite  # a module called kernels would hide Hugging Face's package
    found: Iterable[Row] = importlib.import_module(f"bench.suites.{module}").measure(options)
    return found


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="bench/run.py", description="Measures this program against its peers; without a SUITE a tour of five minutes.",
        epilog="; ".join(f"{name}: {what}" for name, what in SUITES.items()) + "; compare A B: two folders of one machine",
    )
    found.add_argument("suites", nargs="*", metavar="SUITE", type=suite, help=f"{', '.join(SUITES)}; none: a tour")
    found.add_argument("--model", help="nano (the embedded pipeline; on a CPU the default), zimage-turbo (random weights; on a "
                       "GPU the default), zimage-small, or a pipeline folder in diffusers' layout")
    found.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1")
    found.add_argument("--quick", action="store_true", help="fewest repetitions, to see that it works: no measurement")
    found.add_argument("--out", type=Path, help="folder for results, plots and report.html (default: a new one in runs/bench)")
    found.add_argument("--profile", action="store_true", help="also a torch profiler trace of the step, and where its time is")
    found.add_argument("--threads", type=count, default=min(2, os.cpu_count() or 1), help="CPU threads (default: 2)")
    found.add_argument("--rounds", type=count, default=0, help="measurements of each variant (default: the suite's own)")
    found.add_argument("--clock", default="wall", choices=["wall", "cpu"], help="cpu: CPU time, with --threads 1")
    found.add_argument("--peers", nargs="*", default=Options.peers, choices=Options.peers, help="step, rollout: against whom")
    found.add_argument("--kinds", nargs="+", default=Options.kinds, choices=Options.kinds, help="what trains")
    found.add_argument("--ranks", nargs="+", type=count, default=[], metavar="N", help="zero: how many (default: 2, GPUs: all)")
    own = found.add_argument_group("reproduce")
    own.add_argument("--ablations", action="store_true", help="the paper's ablations and customisation, too")
    own.add_argument("--data", default="", metavar="PATH", help="the records to train on, as data.path takes them")
    own.add_argument("--eval", default="", dest="evaluation", metavar="PATH", help="held-out records, models that measure")
    own.add_argument("--recipe", default="", help="recipe for a model of your own (default: the family's)")
    own.add_argument("--set", nargs="+", default=[], dest="more", metavar="FIELD=VALUE", help="settings of all its runs")
    own.add_argument("--steps", type=count, default=0, help="optimizer steps of every run")
    own.add_argument("--seeds", type=count, default=0, help="seeds of every method")
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
