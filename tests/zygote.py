"""Starts programs in forks of a process that has their libraries loaded and has trained before: the same program, the same
signals and files, in a second instead of ten. The script that `tests/driving.py` speaks to, one JSON object a line; its
argument is JSON too: the settings of the runs that it begins with.

    {"argv": [...], "env": {...}, "cwd": "...", "out": "...", "err": "..."}  ->  {"pid": ...}
        further, if wanted: "script": what to run instead of train.py, a file or "module:function" (given the words of argv);
        "file_bytes": the largest file it may write; "delay": seconds until it begins
    {"poll": pid}  ->  {"code": null while it runs, else the exit code, -N for signal N}
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import resource
import runpy
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TRAIN = ROOT / "dopsd_fast" / "train.py"
PRELOAD = """
    deepspeed deepspeed.runtime.zero.muon.muon_optimizer peft torch.utils.tensorboard
    diffusers.loaders.peft diffusers.image_processor
    diffusers.models.transformers.transformer_z_image diffusers.models.transformers.transformer_flux2
    diffusers.pipelines.z_image.pipeline_z_image diffusers.pipelines.flux2.pipeline_flux2_klein
    transformers.models.qwen3.modeling_qwen3 transformers.models.qwen3_vl.modeling_qwen3_vl
    transformers.models.auto.image_processing_auto transformers.models.auto.tokenization_auto
""".split()


def serve() -> None:
    for name in PRELOAD:
        importlib.import_module(name)
    train(json.loads(sys.argv[1]))
    gc.collect()
    gc.freeze()  # what is loaded stays shared, and out of every run's garbage collections, the long one at its end too
    for line in sys.stdin:
        order = json.loads(line)
        if "poll" in order:
            pid, status = os.waitpid(order["poll"], os.WNOHANG)
            answer = {"code": os.waitstatus_to_exitcode(status) if pid else None}
        else:
            pid = os.fork()
            if pid == 0:
                become(order)
                module, _, function = sys.argv[0].partition(":")
                if not function:
                    runpy.run_path(module, run_name="__main__")
                    return
                getattr(importlib.import_module(module), function)(*sys.argv[1:])
                sys.stdout.flush()
                os._exit(0)  # as train.py ends: nothing is left to take apart
            answer = {"pid": pid}
        print(json.dumps(answer), flush=True)


def train(runs: list[list[str]]) -> None:
    """Short runs in this process, by their settings: what is made at first use (modules, regular expressions, oneDNN's kernels)
    is nine tenths of the time of a short run, and every fork finds it made.

    Three things of a run do not survive a fork, and are not left behind: threads of OpenMP (`train.threads=1` starts none), the
    thread that watches over progress bars, and the process group, to which DeepSpeed keeps two references of its own."""
    from tqdm import tqdm

    main = runpy.run_path(str(TRAIN))["main"]
    interval, tqdm.monitor_interval = tqdm.monitor_interval, 0
    with as_before():
        for settings in runs:
            assert main(settings) == 0
        leave_group()
    tqdm.monitor_interval = interval


def leave_group() -> None:
    """The process group is gone, and so are DeepSpeed's two references to it."""
    import deepspeed
    import torch

    torch.distributed.destroy_process_group()
    deepspeed.comm.comm.cdb = deepspeed.utils.groups._WORLD_GROUP = None


@contextlib.contextmanager
def as_before() -> Iterator[None]:
    """The environment and the handlers of signals are put back; nothing is shown."""
    environment, streams = dict(os.environ), (os.dup(1), os.dup(2))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for number in (1, 2):
        os.dup2(nowhere, number)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, stream in zip((1, 2), streams):
            os.dup2(stream, number)
            os.close(stream)
        os.close(nowhere)
        os.environ.clear()
        os.environ.update(environment)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def become(order: dict) -> None:
    os.setsid()
    os.environ.clear()
    os.environ.update(order["env"])
    os.chdir(order["cwd"])
    for number, name, flags in ((0, os.devnull, os.O_RDONLY), (1, order["out"], os.O_WRONLY | os.O_CREAT | os.O_APPEND),
                                (2, order["err"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)):
        file = os.open(name, flags, 0o644)
        os.dup2(file, number)
        os.close(file)
    if order.get("file_bytes"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["file_bytes"],) * 2)
    time.sleep(order.get("delay", 0))
    script = order.get("script", str(TRAIN))
    sys.argv = [script, *order["argv"]]
    if ":" not in script:
        sys.path[0] = str(Path(script).parent)


if __name__ == "__main__":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    sys.path[0] = str(ROOT)
    sys.path.insert(1, str(ROOT / "kernels"))
    serve()
