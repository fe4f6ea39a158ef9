"""`python bench/full_size.py --out DIR`: Z-Image at full size on one GPU, in at most ten minutes, with random weights.

Parts in order of importance, each in a process of its own: correctness in bf16, the LoRA step against R1 and R4, the kernels,
full fine-tuning against R1 and R4, rollout, forward, optimizer, memory, then the steps' peers R2 and R3. A part whose time is
up is stopped, one that no longer fits is left out, and a row says so; a part that brings the GPU's context down takes no other
with it. After every part DIR holds results.json and results.csv with all rows so far; log.txt has what the parts said,
report.html comes last. A second call with --parts and the same DIR adds to it: of a row that both have, the one with more
measurements stays.

What it needs: torch, Triton, diffusers, transformers, peft, pydantic, numpy, Pillow, rich; without one of them most parts fail,
and say so. DeepSpeed is used if it is there (else its part at stage 0 is done here, and rows say "fallback"), so is flash-attn;
matplotlib and jinja2 are for report.html. Nothing is built: on a GPU the kernels are Triton's. On a machine without a
network that has torch 2.11, Triton 3.6 and Python 3.12, bring wheels, made elsewhere by

    python -m pip download --no-deps --only-binary=:all: --python-version 3.12 -d wheels diffusers
    python -m pip wheel --no-deps -w wheels deepspeed hjson      # DeepSpeed comes as source; DS_BUILD_OPS=0 builds no kernels

and there, in a copy of this repository:

    python -m pip install --no-index --no-deps --target /tmp/site wheels/*.whl
    export PYTHONPATH=/tmp/site
    python bench/full_size.py --out out
    python bench/full_size.py --out out --parts lora_rest full_rest      # in a second turn: what was left out
    python bench/full_size.py --out out --parts lora --rounds 20         # the headline with as many rounds as it deserves
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

HERE = Path(__file__).resolve().parent
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != HERE]
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "kernels")]

if TYPE_CHECKING:
    from bench.results import Options, Row


@dataclass(frozen=True)
class Part:
    """need: seconds that must be left for it to begin; most: seconds after which it is stopped. What of a step suite: the
    peers of "lora" or "full"."""

    name: str
    suite: str
    need: int
    most: int
    kind: str = ""
    peers: tuple[str, ...] = ()


PARTS = [
    Part("correctness", "correctness", 20, 75),
    Part("lora", "step", 90, 270, "lora", ("R1", "R4")),
    Part("kernels", "kernels", 30, 90),
    Part("full", "step", 60, 180, "full", ("R1", "R4")),
    Part("rollout", "rollout", 25, 70),
    Part("forward", "forward", 20, 50),
    Part("optimizer", "optimizer", 15, 40),
    Part("memory", "memory", 20, 75),
    Part("lora_rest", "step", 100, 240, "lora", ("R2", "R3")),
    Part("full_rest", "step", 80, 180, "full", ("R2", "R3")),
]
AS_FOUND = ("correctness", "rollout", "forward", "memory")
"""Suites whose `measure(options)` gives rows one by one: stopped, they leave what they had."""
NEEDED = ("diffusers", "transformers", "peft", "pydantic", "PIL", "rich")
WELCOME = ("triton", "deepspeed", "hjson", "flash_attn", "flash_attn_interface", "matplotlib", "jinja2")
WRITING = 12
"""Seconds that are kept for report.html."""
LARGEST = 20e6
"""Bytes that all files may have together."""


def main(argv: Sequence[str]) -> int:
    arguments = parser().parse_args(argv)
    if arguments.part:
        return run_part(arguments)
    began = time.monotonic()
    missing = [name for name in NEEDED + WELCOME if importlib.util.find_spec(name) is None]
    if missing:
        print(f"not installed here: {', '.join(missing)}", flush=True)
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)

    from bench.machine import environment
    from bench.results import FILE, read_results, write_results

    options = options_of(arguments)
    facts = environment(options) | {"missing": missing, "script": "bench/full_size.py"}
    rows = list(read_results(out)[1]) if (out / FILE).exists() else []
    deadline = began + 60 * arguments.minutes - WRITING
    for part in (part for part in PARTS if part.name in arguments.parts):
        left = deadline - time.monotonic()
        print(f"[{time.monotonic() - began:5.0f} s] {part.name} ...", flush=True)
        rows = merged(rows, measure(part, arguments, left))
        write_results(out, facts | {"seconds": time.monotonic() - began}, rows)
    report(out)
    print(headline(rows))
    print(f"written in {time.monotonic() - began:.0f} s: {', '.join(sorted(file.name for file in out.iterdir()))} in {out}")
    return 0


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="bench/full_size.py", description="Z-Image at full size on a GPU, random weights.")
    found.add_argument("--out", type=Path, required=True, help="folder for results.json, results.csv, report.html, log.txt")
    found.add_argument("--minutes", type=float, default=10.0, help="all of it ends within")
    found.add_argument("--model", choices=["zimage-turbo", "zimage-small"],
                       help="default: zimage-turbo on a GPU, zimage-small on a CPU")  # fmt: skip
    found.add_argument("--device", default="auto", help="auto, cuda, cuda:1, cpu")
    found.add_argument("--parts", nargs="+", default=[part.name for part in PARTS], choices=[part.name for part in PARTS])
    found.add_argument("--rounds", type=int, default=0, help="measurements of each variant (default: the suites' own)")
    found.add_argument("--threads", type=int, default=0, help="CPU threads (default: 2)")
    found.add_argument("--quick", action="store_true", help="fewest repetitions, to see that it works: no measurement")
    found.add_argument("--part", help=argparse.SUPPRESS)
    found.add_argument("--until", type=float, default=0.0, help=argparse.SUPPRESS)
    return found


def options_of(arguments: argparse.Namespace) -> Options:
    import torch

    from bench.results import Options

    name = arguments.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    model = arguments.model or ("zimage-turbo" if name.startswith("cuda") else "zimage-small")
    threads = arguments.threads or min(2, os.cpu_count() or 1)
    return Options(model, torch.device(name), arguments.quick, threads, arguments.rounds, tour=not arguments.quick)


# ---- the parts, each in its own process ------------------------------------------------------------------------------


def measure(part: Part, arguments: argparse.Namespace, left: float) -> list[Row]:
    """The rows of a part, as many as it found. left: seconds until all must have ended."""
    from bench.results import Row, failed

    if left < part.need:
        why = f"left out: it needs {part.need} s, {max(left, 0):.0f} are left"
        return [failed(part.suite, part.name, "ours", "part_seconds", "s", why)]
    limit = min(left, float(part.most))
    file = arguments.out / f"{part.name}.part"
    file.unlink(missing_ok=True)
    command = [sys.executable, str(Path(__file__).resolve()), "--part", part.name, "--until", str(time.monotonic() + limit),
               "--out", str(arguments.out), "--device", arguments.device, "--rounds", str(arguments.rounds),
               "--threads", str(arguments.threads), *(["--quick"] if arguments.quick else []),
               *(["--model", arguments.model] if arguments.model else [])]  # fmt: skip
    begun = time.monotonic()
    with (arguments.out / "log.txt").open("a", encoding="utf-8") as log:
        log.write(f"\n==== {part.name}, at most {limit:.0f} s\n")
        log.flush()
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        why = ""
        try:
            if process.wait(timeout=limit):
                why = f"its process ended with {process.returncode}, see log.txt"
        except subprocess.TimeoutExpired:
            why = f"stopped after {limit:.0f} s"
        finally:
            end(process)
    rows = [Row(**row) for row in json.loads(file.read_text(encoding="utf-8"))] if file.exists() else []
    file.unlink(missing_ok=True)
    seconds = time.monotonic() - begun
    if why:
        rows.append(failed(part.suite, part.name, "ours", "part_seconds", "s", why))
    else:
        rows.append(Row(part.suite, part.name, "ours", "part_seconds", seconds, "s"))
    return rows


def end(process: subprocess.Popen[Any]) -> None:
    """Ends a part and what it started, compilers among them."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def run_part(arguments: argparse.Namespace) -> int:
    """Inside a part's process: its rows go to `<name>.part` as they are found."""
    import torch

    from bench.results import failed

    part = next(part for part in PARTS if part.name == arguments.part)
    options = options_of(arguments)
    torch.set_num_threads(options.threads)
    file = arguments.out / f"{part.name}.part"
    rows: list[Row] = []
    try:
        if importlib.util.find_spec("diffusers") is not None:
            from dopsd_fast.telemetry import quiet_libraries

            quiet_libraries()
        for row in rows_of(part, options, arguments.until):
            rows.append(row)
            print(f"{row.case} {row.variant} {row.metric}: {row.value} {row.unit} {row.note}", flush=True)
            save(file, rows)
    except Exception as error:
        import traceback

        traceback.print_exc()
        rows.append(failed(part.suite, part.name, "ours", "suite", "", error))
    save(file, rows)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # libraries' threads can abort an ordinary exit, and all is written


def rows_of(part: Part, options: Options, until: float) -> Iterable[Row]:
    from dataclasses import replace

    if part.suite == "step":
        from bench.cases.step import Cell
        from bench.cases.step import measure as step

        building = 0.25 * max(0.0, until - time.monotonic())  # a variant that begins later would not be finished
        options = replace(options, kinds=(part.kind,))
        return step(options, [Cell()], part.peers, deadline=until - building)
    module: Any = importlib.import_module(f"bench.cases.{'ops' if part.suite == 'kernels' else part.suite}")
    return module.measure(options) if part.suite in AS_FOUND else module.run(options)


def save(file: Path, rows: Iterable[Row]) -> None:
    part = file.with_suffix(".new")
    part.write_text(json.dumps([asdict(row) for row in rows], allow_nan=False), encoding="utf-8")
    part.replace(file)


# ---- the whole -------------------------------------------------------------------------------------------------------


def merged(rows: Iterable[Row], more: Iterable[Row]) -> list[Row]:
    """One row of each key: the first of those with most measurements, a failed one only if there is no other."""
    found: dict[Any, Row] = {}
    for row in (*rows, *more):
        if row.key not in found or found[row.key].status == "failed" or found[row.key].n < row.n:
            found[row.key] = row
    return list(found.values())


def report(out: Path) -> None:
    try:
        from bench.report import write_report

        write_report(out)
    except Exception as error:
        print(f"no report.html: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
    files = [file for file in out.rglob("*") if file.is_file()]
    if sum(file.stat().st_size for file in files) > LARGEST:
        log = out / "log.txt"
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
