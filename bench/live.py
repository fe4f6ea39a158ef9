"""A benchmark while it runs: what it measures now, how long that will take, and its rows on the disk.

    with live(suites, write) as run:            # write: puts all rows so far on the disk
        run.begin("step")
        run.add(row)                            # a row of the same key with more measurements replaces the one before
        say("step: lora, building R1")          # from anywhere
        tick("R1", "round 3 of 20", 250.0)      # from the clock, before each call; seconds left of this timing

On a terminal the last line says `[2/5] step  0:07:41  lora, timing ours, R1: R1, round 3 of 20, 4:10 left`; elsewhere that
line is printed to stderr now and then. Nothing is drawn while something is timed: no thread refreshes the line.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import Any

from bench.results import Row, merged

REDRAWN = 0.2
"""Seconds between two drawings of a terminal's line, unless a call lasts longer than that."""
PRINTED = 15.0
"""Seconds between two printed lines where there is no terminal."""
WRITTEN = 1.0
"""Seconds between two writings of all rows, unless something begins that may take long."""
PASSED_ON = {"say": "measuring: ", "tick": "timing: ", "found": "found: "}
"""How a line begins by which a process tells the one that started it."""


class Stopped(KeyboardInterrupt):
    """SIGTERM, treated as Ctrl-C is: the rows are written and the children ended."""


class Live:
    """Made by `live`."""

    def __init__(self, suites: Sequence[str], write: Callable[[list[Row]], object], console: Any) -> None:
        self.suites, self.write, self.console = list(suites), write, console
        self.rows: list[Row] = []
        self.pending: list[Row] = []
        self.written = self.printed = self.drawn = 0.0
        self.began = time.monotonic()
        self.where = self.doing = ""
        self.status: Any = None

    def begin(self, suite: str) -> None:
        self.where, self.doing = f"[{self.suites.index(suite) + 1}/{len(self.suites)}] {suite}", ""
        self.draw(at_once=True)

    def add(self, row: Row) -> None:
        self.pending.append(row)
        if time.monotonic() - self.written > WRITTEN:
            self.flush()

    def flush(self) -> None:
        if self.pending:
            self.rows, self.pending = merged([*self.rows, *self.pending]), []
            self.write(self.rows)
            self.written = time.monotonic()

    def say(self, text: str) -> None:
        self.flush()
        self.doing = text
        self.draw()

    def tick(self, variant: str, round_: str, left: float | None, long: bool) -> None:
        if long or time.monotonic() - self.drawn > REDRAWN:
            ends = "" if left is None else f", {clock(left)} left"
            self.draw(f": {variant}, {round_}{ends}", long)

    def draw(self, more: str = "", at_once: bool = False) -> None:
        now = time.monotonic()
        line = f"{self.where}  {clock(now - self.began)}  {self.doing}{more}"
        if self.status is not None:
            if at_once or now - self.drawn > REDRAWN:
                self.status.update(line)
                self.drawn = now
        elif now - self.printed > PRINTED or (at_once and not more):
            print(line.rstrip(), file=sys.stderr, flush=True)
            self.printed = self.drawn = now


def clock(seconds: float) -> str:
    """0:04:10."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


class Line:
    """The last line of a terminal, drawn when it is told to and by no thread."""

    def __init__(self, console: Any) -> None:
        from rich.live import Live as RichLive

        self.live = RichLive(console=console, auto_refresh=False, transient=True)

    def update(self, line: str) -> None:
        from rich.text import Text

        self.live.update(Text(line, no_wrap=True, overflow="ellipsis"), refresh=True)


class Telling:
    """Stands for `Live` in a process that `forks.apart` started: passes on what it is told."""

    def say(self, text: str) -> None:
        print(PASSED_ON["say"] + text, flush=True)

    def tick(self, *given: Any) -> None:
        print(PASSED_ON["tick"] + json.dumps(given), flush=True)

    def found(self, value: Any) -> None:
        """A row, or anything else that JSON can hold."""
        print(PASSED_ON["found"] + json.dumps(asdict(value) if isinstance(value, Row) else value), flush=True)


_live: Live | Telling | None = None


@contextmanager
def live(suites: Sequence[str], write: Callable[[list[Row]], object], console: Any) -> Iterator[Live]:
    """What is measured inside is shown and written. Whatever ends it, all rows so far are on the disk: of a timing that was
    under way, those of its finished rounds."""
    global _live
    before, run = _live, Live(suites, write, console)
    _live = run
    handler = stop_at(signal.SIGTERM)
    try:
        if console.is_terminal and not console.is_dumb_terminal:
            run.status = Line(console)
            with run.status.live:
                yield run
        else:
            yield run
    finally:
        _live = before
        run.flush()
        with suppress(ValueError):
            signal.signal(signal.SIGTERM, handler)


def stop_at(number: int) -> Any:
    """The handler before."""

    def stop(*_: Any) -> None:
        raise Stopped

    with suppress(ValueError):  # not in the main thread, as in some tests
        return signal.signal(number, stop)
    return signal.SIG_DFL


def tell_parent() -> Telling:
    """From now on `say` and `tick` of this process are those of the process that started it."""
    global _live
    stop_at(signal.SIGTERM)
    _live = Telling()
    return _live


def passed_on(line: str) -> Any:
    """Does what a line of a child says; the value that it found, None for any other line."""
    if line.startswith(PASSED_ON["found"]):
        return json.loads(line.removeprefix(PASSED_ON["found"]))
    if line.startswith(PASSED_ON["say"]):
        say(line.removeprefix(PASSED_ON["say"]).strip())
    elif line.startswith(PASSED_ON["tick"]):
        tick(*json.loads(line.removeprefix(PASSED_ON["tick"])))
    return None


def say(text: str) -> None:
    """What is being built or measured now."""
    if _live is not None:
        _live.say(text)


def tick(variant: str, round_: str, left: float | None, long: bool) -> None:
    """The call that the clock makes next. left: seconds until this timing ends, None: not known. long: it lasts long enough to
    be seen."""
    if _live is not None:
        _live.tick(variant, round_, left, long)


def console() -> Any:
    """That of the line, for what is printed meanwhile; None: there is no line."""
    return _live.console if isinstance(_live, Live) else None
