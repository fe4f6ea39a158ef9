"""When to stop early: signals, and the death of the launcher. Imports nothing heavy, so that it can watch from the start."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path


class StopRequest:
    """Remembers that the run was asked to stop: SIGTERM, SIGINT, SIGHUP, or the death of the launcher.

    Handlers only set a flag, so a signal (or ten) during a save tears nothing; the trainer looks at step boundaries.
    Until `arm`, signals act as usual: there is nothing to save yet. A SIGHUP that is ignored (nohup) stays ignored.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self.code = 0
        self.launchers = _launchers()

    def before_armed(self, call: Callable[[], None]) -> None:
        """From now until `arm`, SIGTERM runs `call` and then acts as usual."""

        def end(number: int, frame: object) -> None:
            call()
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

        signal.signal(signal.SIGTERM, end)

    def arm(self) -> None:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._note)

    def ignore(self) -> None:
        """At the end, when all is said and written: the interpreter gives up its handlers before the process ends."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)

    def _note(self, number: int, frame: object) -> None:
        if self.reason is None:
            self.reason, self.code = signal.Signals(number).name, 128 + number

    def asked(self) -> bool:
        if self.reason is None and any(_parent(child) != parent for child, parent in self.launchers):
            self.reason, self.code = "the death of the launcher", 1
        return self.reason is not None


def _launchers() -> list[tuple[int, int]]:
    """(process, its parent) up to the command that was typed: `deepspeed` starts a launcher that starts the ranks, passes no
    signal on to it, and when it dies leaves it running."""
    me, launcher = os.getpid(), os.getppid()
    links = [(me, launcher)]
    if "deepspeed.launcher.launch" in _command(launcher):
        runner = _parent(launcher)
        if any(Path(word).name in ("deepspeed", "ds", "deepspeed.launcher.runner") for word in _command(runner)):
            links.append((launcher, runner))
    return links


def _parent(process: int) -> int:
    """0 where it cannot be told, or the process is gone."""
    if process == os.getpid():
        return os.getppid()
    try:  # "pid (name) state parent ...", and the name may hold anything
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return 0


def _command(process: int) -> list[str]:
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []
