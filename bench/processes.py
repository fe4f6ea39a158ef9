"""What ranks on one machine need to find each other, and what a process that failed said last."""

from __future__ import annotations

import random
import re
import socket
from pathlib import Path


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


def last_error(log: Path) -> str:
    """The last line of it that names an exception; else its last line."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    named = [line for line in lines if re.match(r"(\w+\.)*\w*(Error|Exception|Failed|Exit|Interrupt)\b", line)]
    return (named or lines or ["it said nothing"])[-1].strip()
