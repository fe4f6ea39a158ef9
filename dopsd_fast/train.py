"""`deepspeed dopsd_fast/train.py [RECIPE | FILE.toml] [field=value ...]`: train. `--help` lists every field.

From an installed package: `deepspeed --module dopsd_fast.train ...`.
"""

import contextlib
import os
import sys
from pathlib import Path
from typing import NoReturn

HERE = Path(__file__).resolve().parent
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != HERE]
if all(Path(entry or ".").resolve() != HERE.parent for entry in sys.path):
    # In a checkout that is not installed. Where it is, its folder stays where it was: site-packages has no place before the
    # standard library.
    sys.path.insert(0, str(HERE.parent))

# Everything is read from local folders. This keeps the libraries from asking a hub all the same; who sets it keeps the say.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from dopsd_fast.distributed.lost_ranks import LostRank  # noqa: E402
from dopsd_fast.distributed.stopping import StopRequest  # noqa: E402
from dopsd_fast.errors import AgreedError, UserError, require_platform  # noqa: E402
from dopsd_fast.settings.load import help_text, load_settings, wants_help  # noqa: E402


def main(argv: list[str]) -> int:
    try:
        require_platform()  # before signals are looked at, which Windows has fewer of
    except UserError as error:
        complain(str(error))
        return 2
    stop = StopRequest()
    rank = int(os.environ.get("RANK", "0"))
    if wants_help(argv):
        if rank == 0:
            print(help_text())
        return 0
    try:
        try:
            settings = load_settings(argv)
        except UserError as error:
            raise AgreedError(str(error)) from None
        from dopsd_fast.run.trainer import train

        return train(settings, stop)
    except LostRank as error:
        if error.speaks:
            complain(str(error))
        return 2
    except UserError as error:
        if rank == 0:
            complain(str(error))
        elif not isinstance(error, AgreedError):
            complain(f"rank {rank}: {error}")
        return 2
    except KeyboardInterrupt:
        if rank == 0:
            complain("interrupted before the first step; nothing is lost, and resume=auto goes on from here")
        return 130
    finally:
        stop.ignore()


def complain(text: str) -> None:
    print(f"error: {text}", file=sys.stderr, flush=True)


def end(code: int) -> NoReturn:
    """Ends the process at once: everything is on the disk, and threads of the libraries that are still there while the
    interpreter takes itself apart have been seen to abort it."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    end(main(sys.argv[1:]))
