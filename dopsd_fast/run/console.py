"""The console: streams that outlive their reader, and quiet libraries."""

from __future__ import annotations

import contextlib
import sys


class Deaf:
    """A console stream that outlives its reader: when the launcher dies and the pipe breaks, the run goes on to save."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self.stream.flush()

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


def outlive_console() -> None:
    sys.stdout, sys.stderr = Deaf(sys.stdout), Deaf(sys.stderr)


def quiet_libraries() -> None:
    """No progress bars and no advice from the model libraries: their errors reach the user as this program's."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
