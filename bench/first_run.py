"""`python bench/first_run.py OUT [STAGE ...]`: the first minutes on a GPU. Z-Image at full size, random weights.

One process, stages in the order of what they decide (bench/cases/first_stages.py says what, stage by stage). Every line of
OUT/first.jsonl is flushed and printed at once, so whatever ends the process, what it found is there. A stage that raises leaves
a line with its error and frees its memory, and the next one begins; a stage that no longer fits `--minutes` is left out, with a
line; when the GPU's context has died, a line says so and the process ends, since every later call would raise. Profiler traces
of the steps lie beside, gzipped. A second call with the same OUT and the stages that are missing adds to it.

    QUICK=1 python bench/first_run.py OUT     tries every stage in a minute with a small model, on a CPU in fp32: no measurement

On a CPU, attention runs the backends that exist there, and both backends of pair_linear are its products. Status 0: all stages
that were asked for have run; 1: something failed, died or was stopped; 2: it did not begin, and one line says why. What must be
installed, and how to bring it to a machine without a network: bench/full_size.py.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

HERE = Path(__file__).resolve().parent
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != HERE]
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "kernels")]

from bench.needed import absent, refusal  # noqa: E402

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from bench.machine import Ceilings
    from bench.results import Options

SCRIPT = "bench/first_run.py"


class Run:
    """What the stages share: where they write, what they run on, and the seconds of the steps so far, by name."""

    def __init__(self, out: Path, options: Options) -> None:
        from bench.cases.ops import Size
        from bench.models import Model

        self.began, self.out, self.options, self.device = time.monotonic(), out, options, options.device
        self.model = Model(options.model, options.device)
        self.dtype, self.size = self.model.dtype, Size.of(self.model)
        self.cuda = self.device.type == "cuda"
        self.seconds: dict[str, float] = {}
        self.failures = 0
        out.mkdir(parents=True, exist_ok=True)
        self.file = (out / "first.jsonl").open("a", encoding="utf-8")

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.began

    def say(self, stage: str, **row: Any) -> None:
        """One line, on the disk and on the terminal before the next thing is done. Numbers have five digits."""
        line = json.dumps({"t": round(self.elapsed, 1), "stage": stage} | {key: plain(value) for key, value in row.items()})
        self.file.write(line + "\n")
        self.file.flush()
        print(line, flush=True)

    def fail(self, stage: str, error: BaseException, **row: Any) -> None:
        """The line of something that raised, of a whole stage or, with `row`, of one thing that it measures."""
        traceback.print_exception(error)
        self.failures += 1
        self.say(stage, **row, failed=one_line(error))

    @property
    def limits(self) -> Ceilings:
        """Measured once in a process, by whichever stage asks first."""
        from bench.machine import ceilings

        return ceilings(self.device, self.dtype, self.options.quick)

    def clock(self, call: Callable[[], Any], rounds: int = 20) -> float:
        """Median seconds of a call that lasts microseconds: by events behind a fill on a GPU (bench/clock.py)."""
        from bench.clock import interleaved, kernel_clock

        rounds, warmup = (2, 1) if self.options.quick else (rounds, 3)
        return median(interleaved({"": call}, rounds, warmup, self.device, kernel_clock(self.device))[""])

    def rate(self, operations: float, call: Callable[[], Any], rounds: int = 20) -> float:
        """TFLOP/s, or TB/s for bytes."""
        return operations / self.clock(call, rounds) / 1e12

    def draw(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        import torch

        return torch.randn(*shape, device=self.device, dtype=dtype or self.dtype) * scale

    def free(self) -> None:
        import torch

        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()

    def dead(self) -> str:
        """Why nothing runs on the device any more; empty: it does. An illegal access makes all later calls raise, a lack of
        memory does not."""
        import torch

        try:
            self.free()
            torch.zeros(8, device=self.device).add_(1).sum().item()
        except torch.OutOfMemoryError:
            return ""
        except Exception as error:
            return one_line(error)
        return ""


def plain(value: Any) -> Any:
    """As JSON has it: floats short, what is not finite and what JSON does not know by its name."""
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else str(value)
    if isinstance(value, list | tuple):
        return [plain(one) for one in value]
    return value if isinstance(value, str | int | None) else str(value)


def one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:400]


STAGES = {"env": 10, "gemm": 45, "attend": 30, "ops": 45, "lora": 60, "lora_cublas": 45, "r1": 50, "lora_512": 40, "full": 60,
          "full_recompute": 40, "r4": 90}  # fmt: skip
"""Functions of bench/cases/first_stages.py in the order of what they decide, and the seconds that must be left for each to
begin: at full size on a GPU, the kernels' compilation included."""
FASTER = 30
"""How many times shorter the stages of QUICK=1 are."""


# ---- the run ---------------------------------------------------------------------------------------------------------


def main(argv: Sequence[str]) -> int:
    arguments = parser().parse_args(argv)
    quick = os.environ.get("QUICK") == "1"
    refused = refusal(SCRIPT)
    unknown = [name for name in arguments.stages if name not in STAGES]
    if unknown:
        refused = f"{SCRIPT}: no stage {', '.join(unknown)}; stages: {', '.join(STAGES)}"
    if refused:
        print(refused, file=sys.stderr)
        return 2

    from bench.machine import device_named, environment
    from bench.results import Options
    from dopsd_fast.errors import UserError
    from dopsd_fast.run.console import quiet_libraries

    quiet_libraries()
    threads = 1 if quick else min(4, os.cpu_count() or 1)
    try:
        device = device_named(arguments.device)
        if device.type != "cuda" and not quick:
            raise UserError("Z-Image at full size needs a GPU, there is none; QUICK=1 tries every stage on a CPU")
        options = Options("zimage-small" if quick else "zimage-turbo", device, quick=quick, threads=threads)
        run = Run(arguments.out, options)
    except UserError as error:
        print(f"{SCRIPT}: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"{SCRIPT}: {arguments.out}: {error.strerror}: name a folder that can be written to", file=sys.stderr)
        return 2
    run.say("start", **environment(options), missing=absent(needed=False), minutes=arguments.minutes)
    return stages_of(run, arguments.stages or list(STAGES), 60 * arguments.minutes)


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog=SCRIPT, description="The first minutes on a GPU. QUICK=1 in the environment: every "
                                    "stage with a small model, on a CPU too.")  # fmt: skip
    found.add_argument("out", type=Path, metavar="OUT", help="folder for first.jsonl and the traces")
    found.add_argument("stages", nargs="*", metavar="STAGE", help=f"{', '.join(STAGES)}; none: all, in this order")
    found.add_argument("--minutes", type=float, default=10.0, help="all of it ends within")
    found.add_argument("--device", default="auto", help="auto, cuda, cuda:1, cpu")
    return found


def stages_of(run: Run, names: Sequence[str], limit: float) -> int:
    """Runs the stages as far as `limit` seconds allow. One that begins in time and hangs is ended with the process."""
    now = [""]
    watch = threading.Timer(max(0.1, limit - run.elapsed), lambda: stop(run, now[0], limit))
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
            dead = run.dead()
            if dead:
                run.say("dead", after=name, why=dead, left_out=list(names[place + 1 :]))
                return 1
    finally:
        watch.cancel()
    run.say("end", failures=run.failures)
    return int(run.failures > 0)


def guarded(run: Run, name: str) -> None:
    """What the stage raises is a line, and nothing that it held is kept: the error, which holds its frames, ends here."""
    from bench.cases import first_stages

    began = time.monotonic()
    try:
        getattr(first_stages, name)(run)
    except Exception as error:
        run.fail(name, error)
    run.say("done", name=name, seconds=time.monotonic() - began)


def stop(run: Run, name: str, limit: float) -> None:
    run.say("stopped", name=name, why=f"{limit:.0f} s are over")
    os._exit(1)


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # libraries' threads can abort an ordinary exit, and all is written
