"""Runs lists of cases of tests/ranks.py, each list on a number of CPU ranks: all in forks of one process that has the libraries
loaded. Adds the cases that `tests/test_resume_matrix.py` needs.

`run(phases, folder)`: phases are (name, world, cases), one after the other; {name of phase: {name of case: numbers}}.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    sys.path.insert(1, str(ROOT / "kernels"))

import torch  # noqa: E402

from bench.forks import free_port  # noqa: E402
from dopsd_fast.storage import checkpoints  # noqa: E402
from tests import ranks  # noqa: E402

LAST = 2
"""Steps before the checkpoint."""


def joined(checkpoint: Path) -> dict[tuple[str, str], torch.Tensor]:
    """(name, kind) -> the whole flat tensor, put together without the code under test; "step": those of all fragments."""
    from safetensors.torch import load_file

    pieces: dict[tuple[str, str], list[tuple[int, torch.Tensor]]] = {}
    for file in checkpoint.glob("rank-*.safetensors"):
        for key, tensor in load_file(file).items():
            name, offset, kind = key.rsplit("|", 2)
            pieces.setdefault((name, kind), []).append((int(offset), tensor.view(-1)))
    return {key: torch.cat([tensor for _, tensor in sorted(found, key=lambda one: one[0])]) for key, found in pieces.items()}


def train_and_save(rig: Any) -> None:
    rig.train(0, LAST)
    checkpoints.save(Path(rig.case["folder"]), rig.engine, {"step": LAST}, LAST, keep=1)
    rig.numbers["norms"] = rig.train(LAST, LAST + 1)


def load_and_save(rig: Any) -> None:
    """Loads; looks at the weights of every rank; saves again; goes on."""
    engine = rig.engine
    source = checkpoints.latest(Path(rig.case["folder"]))
    assert checkpoints.load(source, engine) == {"step": LAST}
    saved, wrong, compared = joined(source), [], 0
    for trained in rig.pair.trained():
        for param, kind in ((trained.student, "master"), (trained.teacher, "ema")):
            with rig.gathered(param):
                compared += 1
                if not torch.equal(param.detach().view(-1), saved[trained.name, kind].to(param.dtype)):
                    wrong.append(f"{kind} {trained.name}")
    rig.numbers["wrong"], rig.numbers["compared"] = wrong, compared
    rig.numbers["masters"] = engine.describe()["masters"]
    rig.numbers["wrong_on"] = engine.gather_int(len(wrong))
    checkpoints.save(Path(rig.case["again"]), engine, {"step": LAST}, LAST, keep=1)
    rig.numbers["norms"] = rig.train(LAST, LAST + 1)


def run(phases: list[tuple[str, int, list[dict[str, Any]]]], folder: Path) -> dict[str, dict[str, Any]]:
    folder.mkdir(parents=True)
    for name, _, cases in phases:
        (folder / name).mkdir()
        (folder / name / "cases.json").write_text(json.dumps(cases))
    order = json.dumps([(name, world) for name, world, _ in phases])
    environment = os.environ | {"TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, __file__, str(folder), order], env=environment, capture_output=True, text=True,
                          timeout=600)  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return {name: json.loads((folder / name / "numbers.json").read_text()) for name, _, _ in phases}


def main(folder: Path, phases: list[tuple[str, int]]) -> int:
    import deepspeed  # noqa: F401
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401

    ranks.train_and_save, ranks.load_and_save = train_and_save, load_and_save
    for name, world in phases:
        port, children = str(free_port()), []
        for rank in range(world):
            child = os.fork()
            if child == 0:
                os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1",
                                  MASTER_PORT=port)  # fmt: skip
                try:
                    ranks.main(folder / name)
                    sys.stdout.flush()
                    os._exit(0)
                except BaseException:
                    sys.excepthook(*sys.exc_info())
                    sys.stderr.flush()
                    os._exit(1)
            children.append(child)
        if any(os.waitpid(child, 0)[1] for child in children):
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), json.loads(sys.argv[2])))
