"""Ranks as forks of a process that has its libraries loaded: a second each instead of eight."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

GRACE = 5.0
"""Seconds that the other ranks have once one has failed."""


def rank_environment(rank: int, world: int, port: int) -> dict[str, str]:
    """What torch.distributed wants to know of a rank on this machine."""
    return {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port)}  # fmt: skip


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


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
    """Exit codes (-N: ended by signal N); once one has failed, or the time is up, the others end soon."""
    codes: dict[int, int] = {}
    ends = time.monotonic() + seconds
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
    return [codes[pid] for pid in pids]
