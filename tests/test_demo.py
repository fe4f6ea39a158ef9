"""What the demonstration promises, at a fraction of its length: the style is learned, the old domain is kept."""

import subprocess
import sys
from pathlib import Path

from dopsd_fast.nano.report import measure

ROOT = Path(__file__).parents[1]


def test_a_short_run_learns_the_style_and_keeps_the_old_domain(tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, "dopsd_fast/train.py", f"output.dir={run}", "train.steps=30", "sample.every=0",
               "checkpoint.every=0", "data.prompt_keys=['medium_en']"]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    report = measure(run, count=48)
    assert (run / "demo.png").stat().st_size > 0
    # After 30 of the recipe's steps; the full run's figures are in the README.
    assert report["style_distance_ratio"] < 0.9
    assert report["original_fd_ratio"] < 1.25
