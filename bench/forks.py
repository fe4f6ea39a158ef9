"""Forks of a process that has its libraries loaded: a second each instead of eight. That process is one of its own (`apart`):
a fork inherits neither threads nor the other side of a process group, and waits for them in vain."""

from __future__ import annotations

import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.live import passed_on
from bench.results import ROOT

GRACE = 5.0
"""Seconds that the other ranks have once one has failed."""


class ChildFailed(RuntimeError):
    """How a process of `apart` ended, one line."""


def apart(call: str, arguments: Sequence[str], log: Path, environment: Mapping[str, str]) -> Iterator[Any]:
    """Runs `call`, as "module:function", in a new process with one thread and `environment` added; what it says is in `log`.
    Gives what it finds (`live.tell_parent().found`), one after the other. ChildFailed: it did not come to its end."""
    module, _, function = call.partition(":")
    program = f"import sys; from {module} import {function}; {function}(*sys.argv[1:])"
    whole = {name: value for name, value in os.environ.items() if name not in rank_environment(0, 1, 0)}  # of another group
    whole |= {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0", "TOKENIZERS_PARALLELISM": "false", **environment}
    command = [sys.executable, "-c", program, *arguments]
    with log.open("w") as said:
        process = subprocess.Popen(command, cwd=ROOT, env=whole, stdout=subprocess.PIPE, stderr=said, text=True)
        try:
            for line in process.stdout or ():
                if (found := passed_on(line)) is not None:
                    yield found
            process.wait()
        finally:
            process.terminate()  # it ends its forks, see `wait`; nothing where it has ended
            process.wait()
    if process.returncode:
        raise ChildFailed(f"its process ended with {process.returncode}: {last_error(log)}")


def last_error(log: Path) -> str:
    """The last line of it that names an exception; else its last line."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"(\w+\.)*\w*(Error|Exception|Failed|Exit|Interrupt)\b", line)]
    return (named or lines or ["it said nothing"])[-1].strip()


def rank_environment(rank: int, world: int, port: int) -> dict[str, str]:
    """What torch.distributed wants to know of a rank on this machine."""
    return {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port)}


def free_port() -> int:
    """One that nobody has now. Below those that the system gives to connections (Linux: from 32768), which could take it before
    its user does."""
    while True:
        port = random.SystemRandom().randrange(15000, 32000)
        with socket.socket() as free:
            try:
                free.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def fork(call: Callable[[], Any], environment: Mapping[str, str], log: Path | None = None) -> int:
    """Process id of a fork of this process that runs `call` with `environment` added, its output in `log` if there is one. It
    exits with 0, or with 1 after the traceback of what `call` raised."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        if log is not None:
            file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            os.dup2(file, 1)
            os.dup2(file, 2)
        os.environ.update(environment)
        call()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(pids: Sequence[int], seconds: float) -> list[int]:
    """Exit codes (-N: ended by signal N); once one has failed, or the time is up, the others end soon.
    None outlives the call."""
    codes: dict[int, int] = {}
    ends = time.monotonic() + seconds
    try:
        while len(codes) < len(pids):
            for pid in pids:
                if pid not in codes:
                    found, status = os.waitpid(pid, os.WNOHANG)
                    if found:
                        codes[pid] = os.waitstatus_to_exitcode(status)
                        if codes[pid]:
                            ends = min(ends, time.monotonic() + GRACE)
                    elif time.monotonic() > ends:
                        os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)
    finally:
        for pid in pids:
            if pid not in codes:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
    return [codes[pid] for pid in pids]
