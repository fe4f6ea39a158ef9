"""A run that commit 352c74f of 2026-11-29 began, when dopsd_fast was one flat folder of modules, is continued today."""

import json
import shutil
from pathlib import Path

import pytest

from tests.driving import ROOT, rows, start

OLD = Path(__file__).resolve().parent / "old_run"


def test_a_run_of_the_flat_layout_is_continued(tmp_path):
    """Its settings, records and checkpoint of step 2 of 4 are read, and steps 3 and 4 give the numbers that were recorded then.

    Other processors sum in another order: 1e-4 is far above that and far below what another noise, prompt, average or moment
    would change."""
    run = Path(shutil.copytree(OLD / "run", tmp_path / "run"))
    settings = (run / "settings.toml").read_text().replace('dir = "RUN"', f"dir = {json.dumps(str(run))}")
    (run / "settings.toml").write_text(settings)
    start([str(run / "settings.toml"), "resume=auto"], cwd=ROOT).succeed()
    expected = [json.loads(line) for line in (OLD / "expected.jsonl").read_text().splitlines()]
    found = rows(run)[2:]
    assert [row["step"] for row in rows(run)] == [1, 2, 3, 4]
    for row, old in zip(found, expected, strict=True):
        for name in ("loss", "state_losses", "grad_norm", "gap", "learning_rate"):
            assert row[name] == pytest.approx(old[name], rel=1e-4), name
