"""Runs that are killed or stopped: nothing is lost, and continuing gives the uninterrupted numbers, bit for bit."""

import functools
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.driving import (
    ROOT,
    TRAIN,
    Job,
    assert_same_run,
    children,
    command,
    data,
    deepspeed,
    numbers,
    rows,
    start,
    wait_for_step,
    wait_gone,
    words,
)

STEPS = 20


def settings(run: Path, kind: str = "full", **more) -> list[str]:
    """Contexts on disk beside the run, so that caching too is continued."""
    common = dict(data__path=str(data()), output__dir=str(run), resume="auto", conditioning__cache="disk", adapter__kind=kind,
                  train__steps=STEPS, train__batch_size=1, checkpoint__every=3, sample__every=5)
    return words(**common | more)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Callable[[int, str], tuple[Path, float]]:
    """A run that nothing disturbs, made when first asked for, and the seconds it took."""

    @functools.cache
    def make(ranks: int, kind: str) -> tuple[Path, float]:
        run = tmp_path_factory.mktemp("whole") / "run"
        start(settings(run, kind), 1).kill()  # the zygote is warm from here on
        began = time.monotonic()
        start(settings(run, kind), ranks).succeed()
        return run, time.monotonic() - began

    return make


def assert_continued(run: Path, reference: Path) -> None:
    assert_same_run(run, reference, ("export", "export_teacher"))
    left = [file for file in run.rglob("*") if file.suffix in (".tmp", ".part", ".old")]
    assert not left, left
    pictures, wanted = ({file.name for file in (folder / "samples").glob("*.png")} for folder in (run, reference))
    assert pictures == wanted


# ---- SIGKILL -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks, kind, seed", [(1, "full", 0), (1, "lora", 1), (2, "lora", 2)])
def test_killed_at_random_moments(ranks, kind, seed, whole, tmp_path):
    reference, seconds = whole(ranks, kind)
    run, rng = tmp_path / "run", random.Random(seed)
    for _ in range(4):
        job = start(settings(run, kind), ranks)
        time.sleep(rng.uniform(0, seconds))
        job.running()
        if ranks > 1 and "trains" in job.out:  # one rank alone, now that they have met: the other notices, says so and ends
            alone = rng.randrange(ranks)
            job.kill(ranks=slice(alone, alone + 1))
            job.wait()
            assert "Traceback" not in job.err and all(code in (-signal.SIGKILL, 2, 0) for code in job.codes), job.err
            named = [f"error: rank {alone} (process {job.pids[alone]} "] * job.codes.count(2)
            assert [line[: len(name)] for line, name in zip(job.errors, named, strict=True)] == named, job.err
        else:
            job.kill()
            job.wait()
        assert len({row["step"] for row in rows(run)}) == len(rows(run))
    start(settings(run, kind), ranks).succeed()
    assert_continued(run, reference)


def exists(pattern: str) -> Callable[[Path], bool]:
    return lambda run: next(run.parent.glob(pattern), None) is not None


MOMENTS = {
    "caching": exists("run/settings.toml"),
    "first pictures": exists("run/samples/before"),
    "first step": exists("run/metrics.jsonl"),
    "checkpoint": exists("run/checkpoints/*.tmp"),
    "pictures": exists("run/samples/*.part"),
    "last checkpoint": exists(f"run/checkpoints/step-{STEPS:06}*"),
    "export": exists("run/export.tmp/transformer"),
    "teacher's export": exists("run/export_teacher.tmp"),
}


@pytest.mark.parametrize("ranks", [1, 2])
def test_killed_at_chosen_moments(ranks, whole, tmp_path):
    """One run, killed at each of them in turn; a moment that passed too quickly is a kill soon after it."""
    reference, seconds = whole(ranks, "full")
    run = tmp_path / "run"
    for moment, reached in MOMENTS.items():
        job = start(settings(run), ranks)
        ends = time.monotonic() + 120 + 30 * seconds  # a hang, and no busy disk: contexts and files are flushed before a step
        while not reached(run) and job.running():
            assert time.monotonic() < ends, f"{moment}: {job.out} {job.err}"
            time.sleep(0.002)
        job.running()
        job.kill()
        job.wait()
    start(settings(run), ranks).succeed()
    assert_continued(run, reference)


# ---- SIGTERM, Ctrl-C, and the death of the launcher --------------------------------------------------------------------------


def assert_stopped(run: Path, job: Job, after: int) -> int:
    """The last step; the run has saved it and no more, and has said so."""
    last = rows(run)[-1]["step"]
    assert after <= last < STEPS, "ended before it could be stopped"
    assert [row["step"] for row in rows(run)] == list(range(1, last + 1))
    assert (run / "checkpoints" / f"step-{last:06}" / "state.json").exists()
    assert not (run / "export").exists()
    assert f"after step {last}; state saved" in job.out
    # `deepspeed` itself, interrupted, has a traceback of its own
    assert "[rank" not in job.err and f'File "{ROOT / "dopsd_fast"}' not in job.err, job.err
    return last


@pytest.mark.parametrize("ranks", [1, 2])
def test_signals_to_a_rank(ranks, whole, tmp_path):
    """SIGTERM to one rank; then Ctrl-C, SIGTERM and SIGHUP to all of them, again and again while they save."""
    run = tmp_path / "run"
    job = start(settings(run), ranks)
    wait_for_step(run, 2, job)
    job.kill(signal.SIGTERM, slice(ranks - 1, None))
    job.wait()
    assert job.codes == [128 + signal.SIGTERM] * ranks
    last = assert_stopped(run, job, 2)

    job = start(settings(run), ranks)
    wait_for_step(run, last + 2, job)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) * 200:
        if not job.running():
            break
        job.kill(number)
        time.sleep(0.002)
    job.wait()
    # several that arrive at once are handled by number, not by arrival: any of them may be the first; the ranks agree on one
    assert len(set(job.codes)) == 1
    assert job.codes[0] - 128 in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    assert_stopped(run, job, last + 2)

    start(settings(run), ranks).succeed()
    assert_continued(run, whole(ranks, "full")[0])


def test_ctrl_c_before_the_first_step_is_one_line(tmp_path):
    run = tmp_path / "run"
    job = start(settings(run))
    while not (run / "settings.toml").exists():
        assert job.running()
    job.kill(signal.SIGINT)
    job.fail("interrupted before the first step")
    assert job.codes == [130]


def test_signals_to_the_launcher(whole, tmp_path):
    """`deepspeed` runs a launcher that runs the ranks. One run on 2 ranks: SIGTERM to `deepspeed` alone (which dies and tells
    nobody), Ctrl-C in the terminal (all processes at once), then continued without it; `tests/test_wheel.py` has a run under
    `deepspeed` that nothing disturbs."""
    run, last = tmp_path / "run", 0
    for send, number in ((os.kill, signal.SIGTERM), (os.killpg, signal.SIGINT)):
        job = deepspeed(settings(run), 2)
        wait_for_step(run, last + 1, job)
        below = children(job.pids[0])
        assert len(below) == 3  # the launcher and two ranks
        send(job.pids[0], number)
        job.wait()
        wait_gone(below)
        assert job.codes != [0]
        last = assert_stopped(run, job, last + 1)
    start(settings(run), 2).succeed()
    assert_continued(run, whole(2, "full")[0])


def test_death_of_the_launcher(whole, tmp_path):
    """SIGKILL to the process that started the rank, here one without DeepSpeed's libraries."""
    run = tmp_path / "run"
    launcher = "import subprocess, sys; sys.exit(subprocess.call([sys.executable, *sys.argv[1:]]))"
    job = command([sys.executable, "-c", launcher, str(TRAIN), "--local_rank=0", *settings(run)])
    wait_for_step(run, 1, job)
    below = children(job.pids[0])
    job.kill()
    job.wait()
    wait_gone(below)
    assert "the death of the launcher" in job.out
    assert_stopped(run, job, 1)
    start(settings(run)).succeed()
    assert_continued(run, whole(1, "full")[0])


def test_a_run_that_is_still_saving_is_waited_for(tmp_path):
    """The second process starts while the first holds the folder, and goes on where it ends."""
    run = tmp_path / "run"
    first = start(settings(run, train__steps=400, checkpoint__every=0, sample__every=0))
    wait_for_step(run, 2, first)
    second = start(settings(run, train__steps=400, checkpoint__every=0, sample__every=0))
    while "waiting for the other process" not in second.out:
        assert second.running(), second.err
        time.sleep(0.05)
    first.kill(signal.SIGTERM)
    first.wait()
    saved = int(first.out.partition("after step ")[2].partition(";")[0])
    wait_for_step(run, saved + 1, second)
    second.kill(signal.SIGTERM)
    second.wait()
    assert f"continues after step {saved}" in second.out
    assert [row["step"] for row in rows(run)] == list(range(1, len(rows(run)) + 1))


# ---- what may change when a run continues ------------------------------------------------------------------------------------


def test_resume_refuses_other_numbers_and_takes_the_rest(tmp_path):
    run = tmp_path / "run"
    start(settings(run, train__steps=3)).succeed()
    before = (run / "metrics.jsonl").read_bytes()
    for name, value in {
        "train__learning_rate": "2e-3", "train__seed": 1, "method__weight": "mu", "teacher__ema_decay": 0.75,
        "data__resolution": 32, "train__precision": "bf16", "train__schedule": "cosine", "train__batch_size": 2,
        "adapter__kind": "lora",
    }.items():
        line = start(settings(run, **{"train__steps": 3, name: value})).fail(str(run), "output.dir")
        assert name.replace("__", ".").replace("adapter.kind", "adapter.") in line
    assert "train.steps=2" in start(settings(run, train__steps=2)).fail("has done 3 steps")
    assert "4 samples a step" not in start(settings(run, train__steps=3), ranks=2).fail("number of ranks")
    assert (run / "metrics.jsonl").read_bytes() == before

    harmless = dict(checkpoint__every=1, checkpoint__keep=1, sample__every=1, conditioning__cache="memory")
    start(settings(run, train__steps=6, **harmless)).succeed()
    reference = tmp_path / "six" / "run"
    start(settings(reference, train__steps=6)).succeed()
    assert_same_run(run, reference, ("export", "export_teacher"))

    shrunk = tmp_path / "cosine"
    start(settings(shrunk, train__steps=3, train__schedule="cosine")).succeed()
    start(settings(shrunk, train__steps=6, train__schedule="cosine")).fail("train.steps=3")


def test_a_run_moves_to_another_number_of_ranks(tmp_path):
    """2 ranks x 1, then 1 rank x 2, then 1 x 1 x 2: the same global batch, so the same numbers but for the order of sums."""
    run, reference = tmp_path / "run", tmp_path / "one"
    start(settings(reference, train__steps=6, train__batch_size=2)).succeed()
    start(settings(run, train__steps=2), ranks=2).succeed()
    start(settings(run, train__steps=4, train__batch_size=2)).succeed()
    start(settings(run, train__steps=6, train__accumulation=2)).succeed()
    assert [row["step"] for row in rows(run)] == [1, 2, 3, 4, 5, 6]
    for found, wanted in zip(numbers(run), numbers(reference)):
        assert found["loss"] == pytest.approx(wanted["loss"], rel=2e-3)


def test_resume_from_a_path(tmp_path):
    """In place; from the latest checkpoint of another run; from an earlier one; and what is refused."""
    run, whole_run = tmp_path / "run", tmp_path / "whole"
    start(settings(whole_run, train__steps=6, checkpoint__every=2, checkpoint__keep=3)).succeed()
    start(settings(run, train__steps=4, checkpoint__every=2)).succeed()
    start(settings(run, train__steps=6, checkpoint__every=2, resume=str(run))).succeed()
    assert_same_run(run, whole_run)

    branch = tmp_path / "branch"
    early = settings(branch, train__steps=6, resume=str(whole_run / "checkpoints" / "step-000002"))
    start(early).succeed()
    assert_same_run(branch, whole_run)
    assert list((branch / "samples" / "before").glob("*.png"))

    start(early).fail("holds another run")
    start(settings(whole_run, train__steps=6, resume=str(whole_run / "checkpoints" / "step-000002"))).fail("step-000006")
    start(settings(tmp_path / "new", resume=str(tmp_path / "nothing"))).fail("settings.toml is missing")
    assert not (tmp_path / "new").exists()
