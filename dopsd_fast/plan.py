"""`python -m dopsd_fast.plan RECIPE [field=value ...] --gpus 8 --memory 80`: what each rank needs, and whether it fits.

    plan = make_plan(settings, Machine.here(world, local_world, device))
    plan.fits, plan.gather, plan.advice, plan.table()

A run passes through moments, and the peak is that of the fullest (memory/ledger.py). Weights, gradients and the optimizer's
tensors are counted from the model on the meta device; activations are measured there (memory/activations.py). GB = 1e9 bytes.
"""

from __future__ import annotations

import argparse
import math
import sys
from typing import NoReturn

from dopsd_fast.errors import UserError
from dopsd_fast.memory.ledger import Machine
from dopsd_fast.memory.planner import GB, make_plan
from dopsd_fast.settings.load import load_settings

# ---- the command -------------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def _size(text: str) -> float:
    value = float(text)
    if not (value > 0 and math.isfinite(value)):
        raise ValueError
    return value


_count.__name__, _size.__name__ = "whole number of at least 1", "positive number"


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = _Parser(prog="python -m dopsd_fast.plan", allow_abbrev=False, epilog="GB = 1e9 bytes. Exit code: 0 it fits, 1 it "
                     "does not, 2 something is wrong with what was asked.", description="Prints what a run needs on each rank.")
    parser.add_argument("--gpus", type=_count, required=True, metavar="N", help="GPUs of a node")
    parser.add_argument("--memory", type=_size, required=True, metavar="GB", help="memory of a GPU")
    parser.add_argument("--nodes", type=_count, default=1, metavar="N", help="nodes (default 1)")
    parser.add_argument("--host-memory", type=_size, metavar="GB", help="CPU memory of a node (default: not limited)")
    parser.add_argument("words", nargs="*", metavar="RECIPE | FILE.toml | field=value", help="as for train.py")
    return parser.parse_intermixed_args(argv)


def main(argv: list[str]) -> int:
    try:
        given = _arguments(argv)
        host = None if given.host_memory is None else int(given.host_memory * GB)
        machine = Machine(given.gpus * given.nodes, given.gpus, int(given.memory * GB), host, "cuda")
        plan = make_plan(load_settings(given.words), machine)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(plan.table()))
    return 0 if plan.fits else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
