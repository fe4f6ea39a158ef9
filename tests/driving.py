"""Drives the main job as a user does, and reads what it left behind."""

from __future__ import annotations

import atexit
import functools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from bench.processes import free_port
from tests import tiny

ROOT = Path(__file__).resolve().parents[1]
TRAIN = ROOT / "dopsd_fast" / "train.py"
PATIENCE = 420.0
"""Seconds after which a run counts as hanging; an ordinary one takes a few."""

TINY = {
    "data.resolution": "16", "train.steps": "4", "train.schedule": "constant", "train.batch_size": "2", "train.threads": "1",
    "train.learning_rate": "1e-3", "teacher.ema_decay": "0.5",
    "adapter.rank": "2", "adapter.alpha": "4", "conditioning.max_text_tokens": "48",
    "sample.every": "0", "sample.prompts": "[]", "sample.steps": "2", "sample.count": "1", "checkpoint.every": "1",
}
"""What every run here is given unless it says otherwise. adapter.* is added where adapter.kind=lora. One thread: the two of the
recipe wait for each other longer than they work on matrices as small as these."""

SAME_NUMBERS = ("step", "epoch", "loss", "state_losses", "grad_norm", "gap", "learning_rate")
"""The keys of a row of metrics that do not depend on the clock."""


def words(**settings: Any) -> list[str]:
    """`train__steps=3` -> `train.steps=3`, over TINY, on the tiny Z-Image pipeline."""
    merged = TINY | {"model.path": str(tiny.shared("zimage"))}
    for name, value in settings.items():
        merged[name.replace("__", ".")] = value if isinstance(value, str) else json.dumps(value)
    if merged.get("adapter.kind") != "lora":
        merged = {name: value for name, value in merged.items() if not name.startswith("adapter.") or name == "adapter.kind"}
    return [f"{name}={value}" for name, value in merged.items()]


@dataclass
class Job:
    """A started run: its processes (one a rank, or the launcher), and where they write."""

    pids: list[int]
    folder: Path
    popen: list[subprocess.Popen] = field(default_factory=list)
    codes: list[int | None] = field(default_factory=list)

    @property
    def out(self) -> str:
        return "".join(file.read_text(errors="replace") for file in sorted(self.folder.glob("*.out")))

    @property
    def err(self) -> str:
        return "".join(file.read_text(errors="replace") for file in sorted(self.folder.glob("*.err")))

    @property
    def errors(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("error:")]

    def running(self) -> bool:
        for i, pid in enumerate(self.pids):
            if self.codes[i] is None:
                self.codes[i] = self.popen[i].poll() if self.popen else _zygote().ask(poll=pid)["code"]
        return None in self.codes

    def kill(self, number: int = signal.SIGKILL, ranks: slice = slice(None)) -> None:
        for pid, code in list(zip(self.pids, self.codes))[ranks]:
            if code is None:
                os.kill(pid, number)

    def wait(self, seconds: float = PATIENCE) -> Job:
        ends = time.monotonic() + seconds
        while self.running():
            if time.monotonic() > ends:
                self.kill()
                raise AssertionError(f"still running after {seconds:.0f} s:\n{self.out}\n{self.err}")
            time.sleep(0.02)
        return self

    def succeed(self) -> Job:
        self.wait()
        assert not any(self.codes), f"exit codes {self.codes}\n{self.out}\n{self.err}"
        return self

    def fail(self, *parts: str) -> str:
        """The one line that the run failed with; `parts` must occur in it."""
        self.wait()
        assert all(self.codes), f"exit codes {self.codes}\n{self.out}\n{self.err}"
        assert "Traceback" not in self.err, self.err
        assert len(self.errors) == 1, self.err
        for part in parts:
            assert part in self.errors[0], (part, self.errors[0])
        return self.errors[0]


def start(
    settings: list[str],
    ranks: int = 1,
    cwd: Path | None = None,
    file_bytes: int = 0,
    env: dict | None = None,
    script: Path | str = TRAIN,
    own: dict[int, dict[str, Any]] | None = None,
) -> Job:
    """Runs train.py (or another script, or "module:function") once per rank in a fork of the zygote, each in a session of its
    own.

    own: what one rank has otherwise, by rank: "argv" (its settings), "env" (more of it), "file_bytes", "delay" in seconds."""
    folder = Path(tempfile.mkdtemp(dir=_scratch()))
    job = Job([], folder)
    environment = _environment() | {"DS_ACCELERATOR": "cpu"} | (env or {})
    if ranks > 1:
        environment |= {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    for rank in range(ranks):
        mine = environment | ({"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {})
        order = {"argv": settings, "cwd": str(cwd or folder), "file_bytes": file_bytes, "script": str(script),
                 "out": str(folder / f"{rank}.out"), "err": str(folder / f"{rank}.err")}
        order |= (own or {}).get(rank, {})
        order["env"] = mine | order.get("env", {})
        job.pids.append(_zygote().ask(**order)["pid"])
        job.codes.append(None)
    return job


def command(argv: list[str], cwd: Path | None = None, env: dict[str, str] | None = None, **options: Any) -> Job:
    """Runs a command of its own, in a session of its own; env: more of it."""
    folder = Path(tempfile.mkdtemp(dir=_scratch()))
    with open(folder / "0.out", "w") as out, open(folder / "0.err", "w") as err:
        streams = dict(stdin=subprocess.DEVNULL, stdout=out, stderr=err)
        process = subprocess.Popen(argv, cwd=cwd or folder, env=_environment() | (env or {}), start_new_session=True,
                                   **streams, **options)
    return Job([process.pid], folder, [process], [None])


def python(settings: list[str], **options: Any) -> Job:
    return command([sys.executable, str(TRAIN), *settings], **options)


def deepspeed(settings: list[str], ranks: int = 2, script: Path = TRAIN, **options: Any) -> Job:
    """The real launcher. `Job.pids` is it alone; `children` finds the others."""
    launcher = Path(sys.executable).parent / "deepspeed"
    argv = [str(launcher), "--num_accelerators", str(ranks), "--master_port", str(free_port()), str(script), *settings]
    return command(argv, **options)


def children(pid: int) -> list[int]:
    """All processes below `pid`, the nearest first."""
    tasks = Path(f"/proc/{pid}/task")
    found: list[int] = []
    for file in tasks.glob("*/children") if tasks.is_dir() else []:
        found += [int(word) for word in file.read_text().split()]
    return found + [below for child in found for below in children(child)]


def wait_gone(pids: list[int], seconds: float = PATIENCE) -> None:
    ends = time.monotonic() + seconds
    while alive := [pid for pid in pids if _alive(pid)]:
        assert time.monotonic() < ends, f"processes {alive} are still there after {seconds:.0f} s"
        time.sleep(0.05)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for_step(run: Path, step: int, job: Job) -> None:
    """Until the run's metrics hold `step`."""
    ends = time.monotonic() + PATIENCE
    while not any(row["step"] >= step for row in rows(run)):
        assert job.running(), f"ended before step {step}: {job.codes}\n{job.out}\n{job.err}"
        assert time.monotonic() < ends, f"no step {step} within {PATIENCE:.0f} s\n{job.err}"
        time.sleep(0.02)


def rows(run: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl; a last line that is being written is left out."""
    file = run / "metrics.jsonl"
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return [json.loads(line) for line in lines]


def numbers(run: Path) -> list[dict[str, Any]]:
    return [{name: row[name] for name in SAME_NUMBERS} for row in rows(run)]


def assert_same_run(run: Path, whole: Path, exports: tuple[str, ...] = ("export",)) -> None:
    """Both runs have the same rows, each step once, bit for bit, and the same exported weights."""
    assert [row["step"] for row in rows(run)] == list(range(1, len(rows(whole)) + 1))
    assert numbers(run) == numbers(whole)
    for name in exports:
        files = sorted(file.relative_to(whole) for file in (whole / name).rglob("*.safetensors"))
        assert files
        for file in files:
            assert (run / file).read_bytes() == (whole / file).read_bytes(), file


# ---- data sets -------------------------------------------------------------------------------------------------------------


def picture(seed: int, size: tuple[int, int] = (24, 24)) -> Image.Image:
    return Image.frombytes("RGB", size, random.Random(seed).randbytes(size[0] * size[1] * 3))


def image_folder(folder: Path, count: int = 4, **size: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        picture(i, **size).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"a cat number {i} in the [V] style")
    return folder


def huggingface_folder(folder: Path, count: int = 4) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(count):
        picture(i).save(folder / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": f"a cat number {i} in the [V] style"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def authors_jsonl(folder: Path, count: int = 4) -> Path:
    """Two prompts a record, images in two aspect ratios below a folder that the paths start from."""
    (folder / "set" / "images").mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(count):
        size = (24, 24) if i % 2 else (32, 18)
        picture(i, size).save(folder / "set" / "images" / f"{i}.png")
        lines.append(json.dumps({
            "class_name": "cat", "local_path_list": [f"set/images/{i}.png"], "h*w": f"{size[1]}*{size[0]}",
            "short_en": f"cat {i}", "detailed_en": f"a cat number {i} in the [V] style", "short_zh": f"[V] 猫 {i}",
        }))
    file = folder / "set" / "data.jsonl"
    file.write_text("\n".join(lines) + "\n")
    return file


@functools.cache
def data() -> Path:
    """A set of 4 images, built once. Do not write into it."""
    return image_folder(_scratch() / "data")


# ---- machinery ---------------------------------------------------------------------------------------------------------------


def _environment() -> dict[str, str]:
    drop = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "DS_ACCELERATOR", "TRITON_INTERPRET")
    kept = {name: value for name, value in os.environ.items() if name not in drop}
    return kept | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"}


@functools.cache
def _scratch() -> Path:
    folder = tempfile.TemporaryDirectory(prefix="driving-")
    atexit.register(folder.cleanup)
    return Path(folder.name)


class _Zygote:
    def __init__(self) -> None:
        first = [words(data__path=str(data()), output__dir=str(_scratch() / kind), adapter__kind=kind, train__steps=1)
                 for kind in ("full", "lora")]
        command = [sys.executable, str(Path(__file__).with_name("zygote.py")), json.dumps(first)]
        self.process = subprocess.Popen(command, env=_environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        atexit.register(self.process.kill)

    def ask(self, **order: Any) -> dict[str, Any]:
        print(json.dumps(order), file=self.process.stdin, flush=True)
        while line := self.process.stdout.readline():
            if line.startswith("{"):  # a library may greet
                return json.loads(line)
        raise AssertionError("the process that starts the runs has died")


@functools.cache
def _zygote() -> _Zygote:
    return _Zygote()
