"""`deepspeed dopsd_fast/train.py [RECIPE | FILE.toml] [field=value ...]`: train. `--help` lists every field."""

import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != HERE]
sys.path.insert(0, str(HERE.parent))

from dopsd_fast.errors import AgreedError, UserError  # noqa: E402
from dopsd_fast.peers import LostPeer  # noqa: E402
from dopsd_fast.settings import help_text, load_settings, wants_help  # noqa: E402
from dopsd_fast.stopping import StopRequest  # noqa: E402


def main(argv: list[str]) -> int:
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
        from dopsd_fast.trainer import train

        return train(settings, stop)
    except LostPeer as error:
        if error.speaks:
            complain(str(error))
        sys.stdout.flush()
        os._exit(2)  # what libraries do at the end may wait for the rank that is gone
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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
