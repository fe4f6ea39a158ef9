"""CPU ranks (gloo) for `tests/ranks.py`: forks of a process that has its libraries loaded, one set of them for each `run`."""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    sys.path.insert(1, str(ROOT / "kernels"))


def run(world: int, cases: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cases.json").write_text(json.dumps(cases))
    codes = _server().ask(world, folder)
    outputs = [(folder / f"{rank}.out").read_text(errors="replace") for rank in range(world)]
    for code, output in zip(codes, outputs):
        assert code == 0, f"exit codes {codes}: {output[-4000:]}"
    numbers = json.loads((folder / "numbers.json").read_text())
    tensors: dict[str, dict[str, Any]] = {case["name"]: {} for case in cases}
    for key, tensor in load_file(folder / "tensors.safetensors").items():
        name, rest = key.split("//")
        tensors[name][rest] = tensor
    results = {name: SimpleNamespace(numbers=numbers[name], tensors=tensors[name]) for name in numbers}
    return results | {"output": "".join(outputs)}


class Server:
    """`python tests/rank_processes.py`, in a session of its own."""

    def __init__(self) -> None:
        environment = os.environ | {
            "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu",
        }  # fmt: skip
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            environment.pop(name, None)
        self.process = subprocess.Popen(
            [sys.executable, __file__], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            start_new_session=True,
        )  # fmt: skip
        atexit.register(self.end)

    def ask(self, world: int, folder: Path) -> list[int]:
        """The exit codes of `world` ranks that run the cases in `folder`."""
        from bench.forks import free_port

        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            order = {"world": world, "folder": str(folder), "port": free_port()}
            print(json.dumps(order), file=self.process.stdin, flush=True)
            return json.loads(self.process.stdout.readline())
        except BaseException:
            self.end()
            _server.cache_clear()
            raise

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)


@functools.cache
def _server() -> Server:
    return Server()


def serve() -> None:
    from tests.zygote import PRELOAD

    ours = ["tests.ranks", "dopsd_fast.distributed.zero_engine", "dopsd_fast.pair.student_teacher", "dopsd_fast.storage.checkpoints"]
    for name in [*PRELOAD, *ours, "safetensors.torch"]:
        importlib.import_module(name)
    gc.freeze()  # ZeRO-3 collects garbage at every start: half a second over all of torch's and transformers' objects
    from bench.forks import fork, rank_environment, wait
    from tests import ranks

    answers = os.dup(1)
    for line in sys.stdin:
        order = json.loads(line)
        folder, world = Path(order["folder"]), order["world"]
        call = functools.partial(ranks.main, folder)
        pids = [fork(call, rank_environment(rank, world, order["port"]), folder / f"{rank}.out") for rank in range(world)]
        os.write(answers, (json.dumps(wait(pids, 300)) + "\n").encode())


if __name__ == "__main__":
    serve()
