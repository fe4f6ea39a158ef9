"""What `tests/test_resume_matrix.py` does on the ranks of `tests/ranks.py`, and checkpoints put together without the code under
test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dopsd_fast.storage import checkpoints

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
