"""train.py, on a rank that is to die: the script that `tests/test_rank_faults.py` runs instead of it.

The environment variable STRIKE holds JSON: {"rank": 1, "at": "forward", "call": 3, "share": 0.4}. That rank ends itself with
SIGKILL during its 3rd forward, backward, step or save since it began, after the given share of the time that the one before
took (the first: of 20 ms), in whatever instruction that is. {"at": "start"}: before it joins the others.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TRAIN = ROOT / "dopsd_fast" / "train.py"
sys.path[0] = str(ROOT)


class Strike:
    def __init__(self, call: int, share: float) -> None:
        self.call, self.share = call, share
        self.calls, self.seconds, self.began = 0, 0.02, 0.0

    def begin(self) -> None:
        self.calls += 1
        self.began = time.monotonic()
        if self.calls == self.call:
            threading.Thread(target=self._end_it, daemon=True).start()

    def end(self) -> None:
        if self.calls == self.call:  # it was faster than the one before
            die()
        self.seconds = time.monotonic() - self.began

    def _end_it(self) -> None:
        time.sleep(self.share * self.seconds)
        die()

    def around(self, owner: Any, name: str) -> None:
        inner = getattr(owner, name)

        def call(*arguments: Any, **named: Any) -> Any:
            self.begin()
            try:
                return inner(*arguments, **named)
            finally:
                self.end()

        setattr(owner, name, call)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def before(owner: Any, name: str, call: Callable[[], None]) -> None:
    inner = getattr(owner, name)

    def both(*arguments: Any, **named: Any) -> Any:
        call()
        return inner(*arguments, **named)

    setattr(owner, name, both)


def prepare(at: str, strike: Strike) -> None:
    if at == "start":
        die()
    from dopsd_fast.run.trainer import Trainer
    from dopsd_fast.storage import checkpoints

    if at == "forward":  # from the micro-batch's inputs to its first backward
        begun = [False]

        def begin() -> None:
            begun[0] = True
            strike.begin()

        def end() -> None:
            if begun[0]:
                begun[0] = False
                strike.end()

        before(Trainer, "inputs", begin)
        before(Engine, "backward", end)
    elif at == "save":
        strike.around(checkpoints, "save")
    else:
        strike.around(Engine, at)


if __name__ == "__main__":
    order = json.loads(os.environ["STRIKE"])
    if int(os.environ.get("RANK", "0")) == order["rank"]:
        prepare(order["at"], Strike(order.get("call", 1), order.get("share", 0.5)))
    sys.argv[0] = str(TRAIN)
    sys.path[0] = str(TRAIN.parent)
    runpy.run_path(str(TRAIN), run_name="__main__")
