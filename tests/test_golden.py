"""The losses of the embedded pipeline's first steps, as diffusers' own forward gave them (golden_nano.json).

A change of kernels, packing or sharding must leave them where they are. The first loss and gradient norm are functions of
the weights alone: both programs' fp32 errors are below 1e-6 (tests/test_pair_forward.py), and 1e-5 leaves room for another
processor's GEMMs. After that Adam divides small gradients by small gradients: a weight whose gradient is rounding noise may
move by up to the learning rate in either direction, so later losses agree to 2e-3, as in tests/test_train.py.

`python -m tests.test_golden` prints the file's content anew, with backbone=diffusers.
"""

import json
import sys
import tempfile
from pathlib import Path

import pytest

from tests.driving import rows, start

FILE = Path(__file__).with_name("golden_nano.json")
KINDS = ("full", "lora")
KEYS = ("loss", "grad_norm", "gap", "state_losses")
STEPS = 3


def first_steps(kind: str, folder: Path, *more: str) -> list[dict]:
    settings = [f"nano_{kind}", f"train.steps={STEPS}", "train.threads=1", "train.schedule=constant", "conditioning.cache=off",
                "sample.count=0", "sample.prompts=[]", "sample.every=0", "checkpoint.every=0", f"output.dir={folder}", *more]
    start(settings).succeed()
    return [{key: row[key] for key in KEYS} for row in rows(folder)]


@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_those_of_diffusers(kind, tmp_path):
    golden, found = json.loads(FILE.read_text())[kind], first_steps(kind, tmp_path / "run")
    assert len(found) == len(golden) == STEPS
    for step, (ours, theirs) in enumerate(zip(found, golden)):
        for key in KEYS:
            assert ours[key] == pytest.approx(theirs[key], rel=2e-3 if step else 1e-5), (step, key)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as parent:
        golden = {kind: first_steps(kind, Path(parent) / kind, "backbone=diffusers") for kind in KINDS}
    json.dump(golden, sys.stdout, indent=1)
    print()
