"""`deepspeed dopsd_fast/train.py [RECIPE | FILE.toml] [field=value ...]`: train. `--help` lists every field."""

import os
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != HERE]
sys.path.insert(0, str(HERE.parent))

from dopsd_fast.errors import UserError  # noqa: E402
from dopsd_fast.settings import help_text, load_settings, wants_help  # noqa: E402


def main(argv: list[str]) -> int:
    rank = int(os.environ.get("RANK", "0"))
    if wants_help(argv):
        if rank == 0:
            print(help_text())
        return 0
    try:
        settings = load_settings(argv)
        from dopsd_fast.trainer import train

        return train(settings)
    except UserError as error:
        if rank:
            time.sleep(3)  # rank 0 says the same and the launcher ends the others, unless this rank alone failed
        print(f"error: {error}" if rank == 0 else f"error on rank {rank}: {error}", file=sys.stderr, flush=True)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
