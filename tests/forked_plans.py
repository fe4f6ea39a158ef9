"""The processes of a `bench.reproduce.runs.Plan` as forks of a warm process (see tests/zygote.py): the same program, arguments,
environment, log and exit code, without starting Python, torch and DeepSpeed anew."""

from __future__ import annotations

import asyncio
import runpy
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from bench.reproduce import runs
from tests import driving

REAL = runs.start


class Fork:
    """What a plan uses of an `asyncio.subprocess.Process`."""

    returncode: int | None = None

    def __init__(self, job: driving.Job) -> None:
        self.job = job

    async def wait(self) -> int | None:
        while self.job.running():
            await asyncio.sleep(0.05)
        (self.returncode,) = self.job.codes
        return self.returncode

    def terminate(self) -> None:
        self.job.kill(signal.SIGTERM)


async def start(arguments: Sequence[str], log: Path, environment: Mapping[str, str]) -> Fork:
    """In place of `runs.start`."""
    program, *rest = arguments
    script = "tests.forked_plans:module" if program == "-m" else str(driving.ROOT / program)
    said = {0: {"out": str(log), "err": str(log)}}
    return Fork(driving.start(rest, cwd=driving.ROOT, env=dict(environment), script=script, own=said))


def module(name: str, *words: str) -> None:
    """`python -m name words`."""
    sys.argv = [name, *words]
    try:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code:
            raise


@contextmanager
def used() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "start", start)
        yield
