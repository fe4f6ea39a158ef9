"""`python bench/first_run.py OUT [STAGE ...]`: the first minutes on a GPU. Z-Image at full size, random weights.

One process, stages in the order of what they decide (bench/suites/first_stages.py says what, stage by stage). Every line of
OUT/first.jsonl is flushed and printed at once, so whatever ends the process, a signal too, what it found is there. A stage that
raises leaves a line and frees its memory, and the next one begins; one that no longer fits `--minutes` leaves a line, too; when
the GPU's context has died, a line says so and the process ends, since every later call would raise. Profiler traces of the
steps lie beside, gzipped. A second call with the same OUT and the stages that are missing adds to it.

    QUICK=1 python bench/first_run.py OUT     tries every stage in a minute with a small model, on a CPU in fp32: no measurement

On a CPU, attention runs the backends that exist there, and both backends of pair_linear are its products. Status 0: all stages
that were asked for have run; 1: something failed, died or was stopped; 2: it did not begin, and one line says why. What must be
installed, and how to bring it to a machine without a network: bench/needed.py. Then, suite by suite: bench/run.py.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

BEGAN = time.monotonic()  # before PyTorch and the models are imported: those seconds are among a run's minutes
HERE = Path(__file__).resolve().parent
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != HERE]
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "kernels")]

from bench.needed import WELCOME, absent, refusal  # noqa: E402

if TYPE_CHECKING:
    from bench.suites.first_stages import Run

SCRIPT = "bench/first_run.py"
STAGES = {"env": 10, "gemm": 45, "attend": 30, "ops": 45, "lora": 60, "lora_cublas": 45, "r1": 50, "velocities": 25,
          "full": 60, "full_recompute": 40, "r4": 90}
"""Functions of bench/suites/first_stages.py in the order of what they decide, and the seconds that must be left for each to
begin: at full size on a GPU, the kernels' compilation included."""
FASTER = 30  # times shorter are the stages of QUICK=1


def main(argv: Sequence[str], began: float | None = None) -> int:
    """`began`: the moment, by time.monotonic(), from which --minutes count; None: now."""
    began = time.monotonic() if began is None else began
    arguments = parser().parse_args(argv)
    quick = os.environ.get("QUICK") == "1"
    refused = refusal(SCRIPT)
    unknown = [name for name in arguments.stages if name not in STAGES]
    if unknown:
        refused = f"{SCRIPT}: no stage {', '.join(unknown)}; stages: {', '.join(STAGES)}"
    if refused:
        print(refused, file=sys.stderr)
        return 2

    import torch

    from bench.machine import device_named, environment
    from bench.results import Options
    from bench.suites.first_stages import Run
    from dopsd_fast.errors import UserError
    from dopsd_fast.run.console import quiet_libraries

    quiet_libraries()
    try:
        device = device_named(arguments.device)
        if device.type != "cuda" and not quick:
            raise UserError("Z-Image at full size needs a GPU, there is none; QUICK=1 tries every stage on a CPU")
        model, threads = ("zimage-small", 1) if quick else ("zimage-turbo", min(4, os.cpu_count() or 1))
        options = Options(model, device, quick=quick, threads=threads)
        run = Run(arguments.out, options, began)
    except UserError as error:
        print(f"{SCRIPT}: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"{SCRIPT}: {arguments.out}: {error.strerror}: name a folder that can be written to", file=sys.stderr)
        return 2
    memory = torch.cuda.get_device_properties(device).total_memory if run.cuda else None
    run.say("start", **environment(options), cudnn=torch.backends.cudnn.version(), gpu_bytes=memory, missing=absent(WELCOME),
            minutes=arguments.minutes)
    return stages_of(run, arguments.stages or list(STAGES), 60 * arguments.minutes)


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog=SCRIPT, description="The first minutes on a GPU. QUICK=1 in the environment: every "
                                    "stage with a small model, on a CPU too.")
    found.add_argument("out", type=Path, metavar="OUT", help="folder for first.jsonl and the traces")
    found.add_argument("stages", nargs="*", metavar="STAGE", help=f"{', '.join(STAGES)}; none: all, in this order")
    found.add_argument("--minutes", type=float, default=9.5, help="all of it ends within, imports included (default: 9.5)")
    found.add_argument("--device", default="auto", help="auto, cuda, cuda:1, cpu")
    return found


def stages_of(run: Run, names: Sequence[str], limit: float) -> int:
    """Runs the stages as far as `limit` seconds allow. One that begins in time and hangs is ended with the process."""
    now = [""]

    def stop() -> None:
        run.say("stopped", name=now[0], why=f"{limit:.0f} s are over")
        os._exit(1)

    watch = threading.Timer(max(0.1, limit - run.elapsed), stop)
    watch.daemon = True
    watch.start()
    try:
        for place, name in enumerate(names):
            need = STAGES[name] / (FASTER if run.options.quick else 1)
            left = limit - run.elapsed
            if left < need:
                run.say(name, left_out=f"it needs {need:.0f} s, {max(left, 0.0):.0f} are left")
                continue
            now[0] = name
            guarded(run, name)
            if dead := run.dead():
                run.say("dead", after=name, why=dead, left_out=list(names[place + 1 :]))
                return 1
    except KeyboardInterrupt:
        run.say("stopped", name=now[0], why="interrupted")
        return 1
    finally:
        watch.cancel()
    run.say("end", failures=run.failures)
    return int(run.failures > 0)


def guarded(run: Run, name: str) -> None:
    """What the stage raises is a line, and nothing that it held is kept: the error, which holds its frames, ends here. A
    library that calls sys.exit ends only the stage."""
    from bench.suites import first_stages

    began = time.monotonic()
    try:
        getattr(first_stages, name)(run)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        run.fail(name, error)
    run.say("done", name=name, seconds=time.monotonic() - began)


if __name__ == "__main__":
    code = main(sys.argv[1:], BEGAN)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # libraries' threads can abort an ordinary exit, and all is written
