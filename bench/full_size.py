r"""`python bench/full_size.py --out DIR`: Z-Image at full size on one GPU, in at most ten minutes, with random weights.

Parts in order of importance, each in a process of its own: the headline (the LoRA step against R1, a few rounds), correctness
in bf16, the LoRA step against R1 and R4 with its errors, the kernels, full fine-tuning against R1 and R4, rollout, forward,
optimizer, memory, then the steps' peers R2 and R3. A part whose time is up is stopped and keeps the rows that it has found, one
that no longer fits is left out, and a row says so; a part that brings the GPU's context down takes no other with it. SIGTERM,
SIGHUP and SIGINT end the part at work, too: what it has found is written, a report is not.

results.json and results.csv are written whenever a part has found rows, so the headline's ratio (case lora/R1, metric speedup)
is on the disk a minute or two after the start; log.txt has what the parts said; report.html and plots.tar.gz come last. These
are all files, none of them large. A second call with --parts and the same DIR adds to it: of a row that both have, the one
with more measurements stays.

What it needs is listed in bench/needed.py; where something of it is missing, it says so and ends at once with status 2.
flash-attn is used if it is there; stage 0, which is all that runs here, needs no DeepSpeed; matplotlib and jinja2 are for
report.html. Nothing is built: on a GPU the kernels are Triton's. On a machine without a network that has
Python 3.12, torch 2.11, Triton 3.6, transformers and PEFT, bring wheels, made elsewhere by

    python -m pip download --no-deps --only-binary=:all: --python-version 3.12 --platform manylinux2014_x86_64 \
        --platform manylinux_2_28_x86_64 -c constraints.txt -d wheels \
        pydantic pydantic-core annotated-types typing-inspection typing-extensions diffusers hjson tomli-w
    DS_BUILD_OPS=0 python -m pip wheel --no-deps --no-build-isolation -c constraints.txt -w wheels deepspeed  # has no wheel

and there, in a copy of this repository:

    python -m pip install --no-index --no-deps --target /tmp/site wheels/*.whl
    export PYTHONPATH=/tmp/site
    python bench/full_size.py --out out
    python bench/full_size.py --out out --parts lora_rest full_rest      # in a second turn: what was left out
    python bench/full_size.py --out out --parts lora --rounds 20         # the headline with as many rounds as it deserves
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

HERE = Path(__file__).resolve().parent
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != HERE]
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "kernels")]

from bench.needed import absent, refusal  # noqa: E402

if TYPE_CHECKING:
    from bench.results import Options, Row


@dataclass(frozen=True)
class Part:
    """need: seconds that must be left for it to begin; most: seconds after which it is stopped. Of a step suite: kind and peers
    as in --kinds and --peers, rounds at most (0: as many as usual), and whether the exact gradient is computed."""

    name: str
    suite: str
    need: int
    most: int
    kind: str = ""
    peers: tuple[str, ...] = ()
    rounds: int = 0
    exact: bool = True


PARTS = [
    Part("headline", "step", 30, 150, "lora", ("R1",), rounds=3, exact=False),
    Part("correctness", "correctness", 20, 75),
    Part("lora", "step", 90, 240, "lora", ("R1", "R4")),
    Part("kernels", "kernels", 30, 90),
    Part("full", "step", 60, 180, "full", ("R1", "R4")),
    Part("rollout", "rollout", 25, 70),
    Part("forward", "forward", 20, 50),
    Part("optimizer", "optimizer", 15, 40),
    Part("memory", "memory", 20, 75),
    Part("lora_rest", "step", 100, 240, "lora", ("R2", "R3")),
    Part("full_rest", "step", 80, 180, "full", ("R2", "R3")),
]
SCRIPT = Path(__file__).resolve()
"""What runs a part in its process."""
LOOKING = 1.0
"""Seconds between two looks at what a part has found."""
WRITING = 12
"""Seconds that are kept for report.html."""
LARGEST = 16e6
"""Bytes that a file may have."""


class Stopped(BaseException):
    """A signal asked for the end of it all; its name. No `except Exception` on the way out holds it up."""


@contextmanager
def signals_raised() -> Iterator[None]:
    """Inside, the first signal that asks for the end raises Stopped, so that the part at work is ended and its rows are
    written; further ones are ignored meanwhile. What is ignored already stays so, as nohup wants it."""
    asking = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
    numbers = [number for number in asking if signal.getsignal(number) is not signal.SIG_IGN]

    def stop(number: int, frame: object) -> None:
        for one in numbers:
            signal.signal(one, signal.SIG_IGN)
        raise Stopped(signal.Signals(number).name)

    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main(argv: Sequence[str]) -> int:
    arguments = parser().parse_args(argv)
    if arguments.part:
        return run_part(arguments)
    try:
        with signals_raised():
            return run_parts(arguments)
    except Stopped as stopped:
        print(f"bench/full_size.py: stopped by {stopped}; what was found until then is in {arguments.out}", file=sys.stderr)
        return 128 + signal.Signals[str(stopped)]


def run_parts(arguments: argparse.Namespace) -> int:
    began = time.monotonic()
    refused = refusal("bench/full_size.py")
    if refused:
        print(refused, file=sys.stderr)
        return 2
    missing = absent(needed=False)
    if missing:
        print(f"not installed here, what needs them falls back: {', '.join(missing)}", flush=True)
    from bench.machine import environment
    from bench.results import FILE, merged, read_results, write_results
    from dopsd_fast.errors import UserError

    try:
        options = options_of(arguments)
    except UserError as error:
        print(f"bench/full_size.py: {error}", file=sys.stderr)
        return 2
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    facts = environment(options) | {"missing": missing, "script": "bench/full_size.py"}
    rows = list(read_results(out)[1]) if (out / FILE).exists() else []

    def write(found: Iterable[Row]) -> list[Row]:
        """Everything so far and what a part has found so far, to the disk."""
        both = merged([*rows, *found])
        write_results(out, facts | {"seconds": time.monotonic() - began}, both)
        return both

    deadline = began + 60 * arguments.minutes - WRITING
    for part in (part for part in PARTS if part.name in arguments.parts):
        left = deadline - time.monotonic()
        print(f"[{time.monotonic() - began:5.0f} s] {part.name} ...", flush=True)
        rows = write(measure(part, arguments, left, write))
        if part.name == "headline":
            print(headline(rows), flush=True)
    report(out)
    print(headline(rows))
    print(f"written in {time.monotonic() - began:.0f} s: {', '.join(sorted(file.name for file in out.iterdir()))} in {out}")
    return 0


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="bench/full_size.py", description="Z-Image at full size on a GPU, random weights.")
    found.add_argument("--out", type=Path, required=True, help="folder for results.json, results.csv, report.html, log.txt")
    found.add_argument("--minutes", type=float, default=10.0, help="all of it ends within")
    found.add_argument("--model", choices=["zimage-turbo", "zimage-small"],
                       help="default: zimage-turbo on a GPU, zimage-small on a CPU")
    found.add_argument("--device", default="auto", help="auto, cuda, cuda:1, cpu")
    found.add_argument("--parts", nargs="+", default=[part.name for part in PARTS], choices=[part.name for part in PARTS])
    found.add_argument("--rounds", type=int, default=0, help="measurements of each variant (default: the suites' own)")
    found.add_argument("--threads", type=int, default=0, help="CPU threads (default: 2)")
    found.add_argument("--quick", action="store_true", help="fewest repetitions, to see that it works: no measurement")
    found.add_argument("--part", help=argparse.SUPPRESS)
    found.add_argument("--until", type=float, default=0.0, help=argparse.SUPPRESS)
    return found


def options_of(arguments: argparse.Namespace) -> Options:
    from bench.machine import device_named
    from bench.results import Options

    device = device_named(arguments.device)
    model = arguments.model or ("zimage-turbo" if device.type == "cuda" else "zimage-small")
    threads = arguments.threads or min(2, os.cpu_count() or 1)
    return Options(model, device, arguments.quick, threads, arguments.rounds, tour=not arguments.quick)


# ---- the parts, each in its own process ------------------------------------------------------------------------------


def measure(
    part: Part, arguments: argparse.Namespace, left: float, tell: Callable[[list[Row]], object] = lambda rows: None
) -> list[Row]:
    """The rows of a part, as many as it found. left: seconds until all must have ended. tell: called with all rows so far
    whenever there are more."""
    from bench.results import Row, failed

    if left < part.need:
        why = f"left out: it needs {part.need} s, {max(left, 0):.0f} are left"
        return [failed(part.suite, part.name, "ours", "part_seconds", "s", why)]
    limit = min(left, float(part.most))
    file = arguments.out / f"{part.name}.part"
    file.unlink(missing_ok=True)
    command = [sys.executable, str(SCRIPT), "--part", part.name, "--until", str(time.monotonic() + limit),
               "--out", str(arguments.out), "--device", arguments.device, "--rounds", str(arguments.rounds),
               "--threads", str(arguments.threads), *(["--quick"] if arguments.quick else []),
               *(["--model", arguments.model] if arguments.model else [])]
    begun = time.monotonic()
    with (arguments.out / "log.txt").open("a", encoding="utf-8") as log:
        log.write(f"\n==== {part.name}, at most {limit:.0f} s\n")
        log.flush()
        why, known = "", 0
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            while process.poll() is None and not why:
                if time.monotonic() - begun > limit:
                    why = f"stopped after {limit:.0f} s"
                elif len(rows := saved(file)) > known:
                    known = len(rows)
                    tell(rows)
                try:
                    process.wait(timeout=max(0.0, min(LOOKING, begun + limit - time.monotonic())))
                except subprocess.TimeoutExpired:
                    pass
            if process.returncode:
                why = f"its process ended with {process.returncode}, see log.txt"
        finally:  # with what it started, compilers among them; at the first signal it writes its last rows. By Stopped too
            end(process)
            rows = saved(file)
            tell(rows)
            for left_over in (file, file.with_suffix(".new")):
                left_over.unlink(missing_ok=True)
    seconds = time.monotonic() - begun
    if why:
        rows.append(failed(part.suite, part.name, "ours", "part_seconds", "s", why))
    else:
        rows.append(Row(part.suite, part.name, "ours", "part_seconds", seconds, "s"))
    return rows


def end(process: subprocess.Popen[Any]) -> None:
    """Ends a part and what it started, compilers among them; at the first signal it writes its last rows."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, number)
            process.wait(timeout=2.0)
    process.wait()


def run_part(arguments: argparse.Namespace) -> int:
    """Inside a part's process: its rows go to `<name>.part` as they are found."""
    threading.Thread(target=end_when_alone, args=(os.getppid(), arguments.until), daemon=True).start()
    import torch
    from rich.console import Console

    from bench.live import live
    from bench.results import failed
    from dopsd_fast.run.console import quiet_libraries

    part = next(part for part in PARTS if part.name == arguments.part)
    options = options_of(arguments)
    torch.set_num_threads(options.threads)
    with live([part.name], partial(save, arguments.out / f"{part.name}.part"), Console(file=sys.stdout)) as run:
        run.begin(part.name)
        try:
            quiet_libraries()
            for row in rows_of(part, options, arguments.until):
                run.add(row)
                print(f"{row.case} {row.variant} {row.metric}: {row.value} {row.unit} {row.note}", flush=True)
        except Exception as error:
            traceback.print_exc()
            run.add(failed(part.suite, part.name, "ours", "suite", "", error))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # libraries' threads can abort an ordinary exit, and all is written


def end_when_alone(parent: int, until: float) -> None:
    """Ends this process and the compilers that it started when nobody is left to do it: its parent has been killed, or did not
    stop it in time."""
    while os.getppid() == parent and time.monotonic() < until + 3 * LOOKING:
        time.sleep(LOOKING)
    os.killpg(os.getpid(), signal.SIGKILL)


def rows_of(part: Part, options: Options, until: float) -> Iterable[Row]:
    """Rows one by one as the part finds them: stopped, it leaves those."""
    if part.suite == "step":
        from bench.suites.step import Cell
        from bench.suites.step import measure as step

        building = 0.25 * max(0.0, until - time.monotonic())  # a variant that begins later would not be finished
        rounds = min(options.rounds or part.rounds, part.rounds) if part.rounds else options.rounds
        options = replace(options, kinds=(part.kind,), rounds=0 if options.quick else rounds)
        return step(options, [Cell()], part.peers, until - building, part.exact)
    module: Any = importlib.import_module(f"bench.suites.{'ops' if part.suite == 'kernels' else part.suite}")
    return module.measure(options)


def save(file: Path, rows: Iterable[Row]) -> None:
    part = file.with_suffix(".new")
    part.write_text(json.dumps([asdict(row) for row in rows], allow_nan=False), encoding="utf-8")
    part.replace(file)


def saved(file: Path) -> list[Row]:
    from bench.results import Row

    return [Row(**row) for row in json.loads(file.read_text(encoding="utf-8"))] if file.exists() else []


# ---- the whole -------------------------------------------------------------------------------------------------------


def report(out: Path) -> None:
    """report.html, and the plots that it shows in one archive; then no file is larger than LARGEST. Drawn elsewhere, so that
    whatever ends this leaves no plots beside the results."""
    try:
        from bench.report.page import FILE, PLOTS, write_report
        from bench.results import FILE as RESULTS

        with tempfile.TemporaryDirectory() as folder:
            drawn, archive = Path(folder), f"{PLOTS}.tar.gz"
            shutil.copy(out / RESULTS, drawn)
            write_report(drawn)
            with tarfile.open(drawn / archive, "w:gz") as packed:
                packed.add(drawn / PLOTS, PLOTS)
            for name in (FILE, archive):
                shutil.copy(drawn / name, out)
    except Exception as error:
        print(f"no report.html: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
    log = out / "log.txt"
    if log.exists() and log.stat().st_size > LARGEST:
        log.write_text(log.read_text(encoding="utf-8", errors="replace")[-1_000_000:], encoding="utf-8")


HEADLINES = {
    "step": ("seconds_per_step", "mfu", "mfu_nominal", "peak_bytes", "gradient_relative_error"),
    "correctness": ("error_over_eager",),
    "rollout": ("states_per_second",),
    "memory": ("peak_bytes",),
}
"""Beside the speedups of all suites but the kernels."""


def headline(rows: Sequence[Row]) -> str:
    """The numbers that matter, a line each; then what failed."""
    lines = []
    for row in rows:
        ratio = row.unit == "x" and row.metric.startswith("speedup") and row.suite != "kernels"
        known = row.metric in HEADLINES.get(row.suite, ()) and row.variant not in ("encoders", "floor")
        if row.value is not None and (ratio or known):
            spread = f" ({row.p20:.3g} .. {row.p80:.3g})" if row.p20 is not None and row.p80 is not None else ""
            name, fell = f"{row.suite} {row.case} {row.variant}", "" if row.status == "ok" else row.status
            lines.append(f"{name:<44} {row.metric:<26} {row.value:>10.4g} {row.unit}{spread} {fell}")
    lost = [f"{row.suite} {row.case} {row.variant} {row.metric}: {row.note}" for row in rows if row.status == "failed"]
    return "\n".join([line.rstrip() for line in lines] + [f"failed: {line}" for line in lost])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
