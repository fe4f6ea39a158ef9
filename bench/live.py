"""A benchmark while it runs: what it measures now, how long that will take, and its rows on the disk.

    with live(suites, write, console) as run:   # write: puts all rows so far on the disk
        run.add(row)                            # a row of the same key with more measurements replaces the one before
        say("step: lora, building R1")          # from anywhere
        tick("R1", "round 3 of 20", 250.0)      # from the clock, before each call; seconds left of this timing

On a terminal the last line says `[2/5] step  0:07:41  lora, timing ours, R1: R1, round 3 of 20, 0:04:10 left`; elsewhere that
line is printed to stderr now and then. Nothing is drawn while something is timed: no thread refreshes the line.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from typing import Any

from bench.results import Row, merged

REDRAWN, PRINTED, WRITTEN = 0.2, 15.0, 1.0
"""Seconds between two drawings of a terminal's line, two printed lines where there is no terminal, and two writings of all
rows, unless something begins that may take long."""


class Live:
    """Made by `live`. line: rich's, on a terminal."""

    def __init__(self, suites: Sequence[str], write: Callable[[list[Row]], object], console: Any) -> None:
        self.suites, self.write, self.console = list(suites), write, console
        self.rows, self.pending = list[Row](), list[Row]()
        self.written, self.shown, self.began = 0.0, 0.0, time.monotonic()
        self.where = self.doing = ""
        self.line: Any = None

    def begin(self, suite: str) -> None:
        self.where, self.doing = f"[{self.suites.index(suite) + 1}/{len(self.suites)}] {suite}", ""
        self.show(at_once=True)

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
        self.show(at_once=self.line is None)

    def tick(self, variant: str, round_: str, left: float | None) -> None:
        self.show(f": {variant}, {round_}" + ("" if left is None else f", {timedelta(seconds=round(left))} left"))

    def show(self, more: str = "", at_once: bool = False) -> None:
        now = time.monotonic()
        if not at_once and now - self.shown <= (PRINTED if self.line is None else REDRAWN):
            return
        self.shown = now
        text = f"{self.where}  {timedelta(seconds=round(now - self.began))}  {self.doing}{more}".rstrip()
        if self.line is None:
            print(text, file=sys.stderr, flush=True)
        else:
            from rich.text import Text

            self.line.update(Text(text, no_wrap=True, overflow="ellipsis"), refresh=True)


_live: Live | None = None


@contextmanager
def live(suites: Sequence[str], write: Callable[[list[Row]], object], console: Any) -> Iterator[Live]:
    """What is measured inside is shown and written. Whatever ends it, all rows so far are on the disk: of a timing that was
    under way, those of its finished rounds."""
    global _live
    before, run = _live, Live(suites, write, console)
    _live = run
    handler = stop_at_sigterm()
    try:
        if console.is_terminal and not console.is_dumb_terminal:
            from rich.live import Live as Line

            run.line = Line(console=console, auto_refresh=False, transient=True)
        with run.line or nullcontext():
            yield run
    finally:
        _live = before
        run.flush()
        with suppress(ValueError):
            signal.signal(signal.SIGTERM, handler)


def stop_at_sigterm() -> Any:
    """From now on SIGTERM does what Ctrl-C does: the rows are written and the children ended. The handler before."""
    with suppress(ValueError):  # not in the main thread, as in some tests
        return signal.signal(signal.SIGTERM, signal.default_int_handler)
    return signal.SIG_DFL


def say(text: str) -> None:
    """What is being built or measured now."""
    if _live:
        _live.say(text)


def tick(variant: str, round_: str, left: float | None) -> None:
    """The clock's next call. left: seconds until this timing ends, None: not known."""
    if _live:
        _live.tick(variant, round_, left)
