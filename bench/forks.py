"""What ranks on one machine need to find each other."""

from __future__ import annotations

import random
import socket


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
