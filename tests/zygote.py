"""Starts the main job in forks of a process that has its libraries loaded: the same program, the same signals and files, a
second instead of eight. The script that `tests/driving.py` speaks to, one JSON object a line.

    {"argv": [...], "env": {...}, "cwd": "...", "out": "...", "err": "..."}  ->  {"pid": ...}
        further, if wanted: "script": what to run instead; "file_bytes": the largest file it may write;
        "delay": seconds until it begins
    {"poll": pid}  ->  {"code": null while it runs, else the exit code, -N for signal N}
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import resource
import runpy
import sys
import time
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
    # Only libraries: the program's own modules are imported by each run, in its own order.
    for name in PRELOAD:
        importlib.import_module(name)
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
                runpy.run_path(sys.argv[0], run_name="__main__")
                return
            answer = {"pid": pid}
        print(json.dumps(answer), flush=True)


def become(order: dict) -> None:
    os.setsid()
    os.environ.clear()
    os.environ.update(order["env"])
    os.chdir(order["cwd"])
    for number, name, flags in ((0, os.devnull, os.O_RDONLY), (1, order["out"], os.O_WRONLY | os.O_CREAT | os.O_APPEND),
                                (2, order["err"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)):  # fmt: skip
        file = os.open(name, flags, 0o644)
        os.dup2(file, number)
        os.close(file)
    if order.get("file_bytes"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["file_bytes"],) * 2)
    time.sleep(order.get("delay", 0))
    script = order.get("script", str(TRAIN))
    sys.argv = [script, *order["argv"]]
    sys.path[0] = str(Path(script).parent)


if __name__ == "__main__":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    serve()
