"""`python bench/run.py [SUITE ...] [--model nano|PATH] [--device auto] [--quick] [--out DIR]`: measure. `--help` lists all."""

import argparse
import importlib
import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != HERE]
sys.path.insert(0, str(HERE.parent))

SUITES = {
    "cost": "what a full-size step launches, moves and multiplies; needs no GPU",
    "cubins": "registers and shared memory of every kernel, compiled for GPUs that are not here",
    "kernels": "each op against plain PyTorch",
    "optimizer": "AdamW + EMA against torch's fused AdamW and a separate EMA",
    "step": "a whole training step against the published one and its stronger variants",
    "zero": "what ranks send each other in a step, and its time, by ZeRO stage and arrangement",
}
"""Suite -> what it shows. Each is `run(options) -> list[Row]` in bench/cases; zero takes the numbers of ranks, too."""
MODULES = {"kernels": "ops"}  # a module called kernels would hide Hugging Face's package


def main(argv: list[str]) -> int:
    arguments = parser().parse_args(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

    import torch

    from bench.results import Options, environment, show, write_results
    from dopsd_fast.errors import UserError
    from dopsd_fast.settings import ModelSettings
    from dopsd_fast.telemetry import quiet_libraries

    quiet_libraries()
    device = arguments.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    options = Options(
        model=ModelSettings(path=arguments.model).folder, device=torch.device(device), quick=arguments.quick,
        threads=arguments.threads, rounds=arguments.rounds, clock=arguments.clock,
        peers=tuple(arguments.peers), kinds=tuple(arguments.kinds),
    )  # fmt: skip
    torch.set_num_threads(options.threads)
    rows = []
    try:
        for suite in dict.fromkeys(arguments.suites or SUITES):
            own = {"ranks": tuple(arguments.ranks)} if suite == "zero" else {}
            found = importlib.import_module(f"bench.cases.{MODULES.get(suite, suite)}").run(options, **own)
            show(suite, found)
            rows += found
            if arguments.out:
                write_results(arguments.out, environment(options), rows)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if arguments.out:
        print(f"written: {arguments.out / 'results.json'}")
    return 0


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(
        prog="bench/run.py", description="Measures this program against its peers.",
        epilog="suites: " + "; ".join(f"{name}: {what}" for name, what in SUITES.items()),
    )  # fmt: skip
    found.add_argument("suites", nargs="*", metavar="SUITE", type=suite, help=f"{', '.join(SUITES)}; all by default")
    found.add_argument("--model", default="nano", help="pipeline folder in diffusers' layout (default: the embedded one)")
    found.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1")
    found.add_argument("--quick", action="store_true", help="fewest repetitions, to see that it works: no measurement")
    found.add_argument("--out", type=Path, help="folder for results.json")
    found.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    found.add_argument("--rounds", type=int, default=0, help="measurements of each variant (default: the suite's own)")
    found.add_argument("--clock", default="wall", choices=["wall", "cpu"],
                       help="cpu: CPU time of this process, for --threads 1 on a busy machine")  # fmt: skip
    found.add_argument("--peers", nargs="*", default=["R1", "R2", "R3", "R4"], choices=["R1", "R2", "R3", "R4"],
                       help="step: whom to compare with")  # fmt: skip
    found.add_argument("--kinds", nargs="*", default=["lora", "full"], choices=["lora", "full"],
                       help="cost, step, zero: what trains")  # fmt: skip
    found.add_argument("--ranks", nargs="+", type=int, default=[], metavar="N",
                       help="zero: numbers of ranks (default: 2, on GPUs one each)")  # fmt: skip
    return found


def suite(name: str) -> str:
    if name not in SUITES:
        raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(SUITES)}")
    return name


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
