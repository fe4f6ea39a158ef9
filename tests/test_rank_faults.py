"""One rank of several fails: all the others end soon, one of them says truthfully which it was, and nothing is lost."""

import functools
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from dopsd_fast.distributed import consensus
from dopsd_fast.distributed.lost_ranks import Peer, started
from dopsd_fast.run import accounts
from tests import tiny
from tests.driving import (
    ROOT,
    Job,
    assert_same_run,
    children,
    data,
    deepspeed,
    image_folder,
    numbers,
    picture,
    rows,
    start,
    wait_gone,
    words,
)

STRUCK = ROOT / "tests" / "struck.py"
HERE = socket.gethostname()
STEPS = 8
MINUTE = 60.0
"""Within which all processes have ended, from the death of the first."""


def settings(run: Path, stage: int, **more) -> list[str]:
    common = dict(data__path=str(data()), output__dir=str(run), resume="auto", conditioning__cache="disk",
                  deepspeed__stage=stage, train__steps=STEPS, train__batch_size=1, checkpoint__every=2)
    return words(**common | more)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Callable[[int, int], Path]:
    """A run that nothing disturbs, made when first asked for."""

    @functools.cache
    def make(ranks: int, stage: int) -> Path:
        run = tmp_path_factory.mktemp("whole") / "run"
        start(settings(run, stage), ranks).succeed()
        assert not (run / "ranks").exists()
        return run

    return make


@pytest.fixture(scope="module")
def late(tmp_path_factory) -> tuple[Job, Path]:
    """A run on 2 ranks, one of which begins 30 seconds after the other. Asked for early, it is ready when it is needed."""
    run = tmp_path_factory.mktemp("late") / "run"
    return start(settings(run, 3), 2, own={1: {"delay": 30}}), run


def assert_named(line: str, run: Path, rank: int, pid: int) -> None:
    """The one line names the dead rank, its process and host, and the checkpoint that is really the last."""
    complete = [file.parent.name for file in (run / "checkpoints").glob("step-*[0-9]/state.json")]
    hint = f"continues from the last checkpoint (step {int(max(complete)[5:])})" if complete else "resume=auto begins anew"
    assert line.startswith(f"error: rank {rank} (process {pid} on host {HERE}) has ended or was killed; "), line
    assert line.endswith(hint), line


def assert_one_line(job: Job) -> str:
    assert "Traceback" not in job.err, job.err
    assert len(job.errors) == 1, job.err
    return job.errors[0]


# ---- SIGKILL to one rank ---------------------------------------------------------------------------------------------------


def ended_under_launcher(job: Job, rank: int) -> int:
    """The process of `rank`, as the launcher started it, once it and then all the others have ended."""
    deadline = time.monotonic() + 400
    below: list[int] = []
    spawned: re.Match[str] | None = None
    while job.running():
        assert time.monotonic() < deadline
        spawned = re.search(rf"process (\d+) spawned with command: .*--local_rank={rank}'", job.out + job.err)
        below = children(job.pids[0]) or below
        if spawned and started(int(spawned[1])) is None:
            break
        time.sleep(0.05)
    assert spawned is not None
    job.wait(MINUTE)
    wait_gone(below, 1)
    assert job.codes != [0]
    return int(spawned[1])


LAUNCHED = "backward under the launcher"


@pytest.mark.parametrize(
    "ranks, stage, moments", [(2, 3, ["forward", LAUNCHED, "step", "save"]), (4, 2, ["backward", "save"])]
)
def test_one_rank_is_killed(ranks, stage, moments, whole, late, tmp_path):
    """One run, struck in turn at a random moment of each phase, rank 0 (which holds the store) and the last one by turns; then
    left in peace. `deepspeed` itself blames the command of its last rank."""
    run, rng = tmp_path / "run", random.Random(f"{ranks} {stage}")
    for i, moment in enumerate(moments):
        rank = (ranks - 1) * (1 - i % 2)
        call = rng.randint(1, 2 if moment in ("step", "save") else 6)
        order = {"STRIKE": json.dumps({"rank": rank, "at": moment.split()[0], "call": call, "share": rng.random()})}
        if moment == LAUNCHED:
            job = deepspeed(settings(run, stage), ranks, script=STRUCK, env=order)
            pid = ended_under_launcher(job, rank)
        else:
            job = start(settings(run, stage), ranks, script=STRUCK, env=order)
            while job.running() and job.codes[rank] is None:
                time.sleep(0.02)
            job.wait(MINUTE)
            assert job.codes == [-signal.SIGKILL if other == rank else 2 for other in range(ranks)], (order, job.err)
            assert "error:" in (job.folder / f"{0 if rank else 1}.err").read_text()
            pid = job.pids[rank]
        assert_named(assert_one_line(job), run, rank, pid)
        left = json.loads((run / "ranks" / f"{rank:04}.json").read_text())
        assert (left["rank"], left["pid"], left["host"]) == (rank, pid, HERE) and "end" not in left
        assert [row["step"] for row in rows(run)] == list(range(1, len(rows(run)) + 1))
    start(settings(run, stage), ranks).succeed()
    assert_same_run(run, whole(ranks, stage), ("export", "export_teacher"))
    assert not (run / "ranks").exists()


def test_a_rank_is_killed_before_it_joins(tmp_path):
    """The others wait for it in the rendezvous, and know nobody yet: the launcher ends them."""
    run = tmp_path / "run"
    job = deepspeed(settings(run, 2), 2, script=STRUCK, env={"STRIKE": json.dumps({"rank": 1, "at": "start"})})
    ended_under_launcher(job, 1)
    assert "Traceback" not in job.err and not run.exists()


# ---- the thread that watches -----------------------------------------------------------------------------------------------

PART = """
import dataclasses, os, sys, time
sys.path.insert(0, {root!r})
import torch.distributed as group
from pathlib import Path
from dopsd_fast import peers
from dopsd_fast.errors import UserError
rank, folder, far = int(os.environ["RANK"]), Path(sys.argv[1]), sys.argv[2] == "far"
lost_ranks.GRACE = 1.5
lost_ranks.PERIOD = 60 if sys.argv[3] == "first ends last" else lost_ranks.PERIOD
if far:  # what a rank on another host looks like: no process of it here
    lost_ranks.Peer.runs = None
    inner = lost_ranks.Peer.me.__func__
    lost_ranks.Peer.me = classmethod(lambda kind, rank: dataclasses.replace(inner(kind, rank), place=f"host {{rank}}"))
group.init_process_group("gloo")
try:
    with lost_ranks.RankWatch() as them:
        them.meet()
        them.register(folder)
        (folder / f"{{rank}}.here").touch()
        if sys.argv[3] == "first ends last":
            time.sleep(2 if rank == 0 else 0)
        elif sys.argv[3] == "fails" and rank == 1:
            raise UserError("out of luck")
        elif rank < 2:
            time.sleep(600)  # as stuck as in a collective: no line of Python runs
except UserError as error:
    print(f"error: rank {{rank}}: {{error}}", file=sys.stderr)
    sys.exit(2)
"""


@pytest.fixture
def part(tmp_path) -> Callable[..., Job]:
    script = tmp_path / "part.py"
    script.write_text(PART.format(root=str(ROOT)))

    def begin(place: str, what: str, ranks: int = 3) -> Job:
        folder = tmp_path / "run"
        folder.mkdir()
        job = start([str(folder), place, what], ranks, script=script)
        while len(list(folder.glob("*.here"))) < ranks:
            assert job.codes[0] is None and job.running(), job.err
            time.sleep(0.05)
        return job

    return begin


@pytest.mark.parametrize("place, said", [("near", "has ended or was killed"), ("far", "was killed or cannot be reached")])
def test_a_rank_that_is_stuck_is_ended_when_another_was_killed(place, said, part):
    """Rank 2 ends well and rank 1 stands still for a while: neither is taken for dead. Then rank 1 is killed."""
    job = part(place, "sleeps")
    while job.running() and job.codes[2] is None:
        time.sleep(0.05)
    os.kill(job.pids[1], signal.SIGSTOP)
    time.sleep(4)  # GRACE is 1.5
    assert job.running() and job.codes == [None, None, 0], job.err
    os.kill(job.pids[1], signal.SIGKILL)
    job.wait(MINUTE)
    assert job.codes == [2, -signal.SIGKILL, 0], job.err
    line = assert_one_line(job)
    assert line.startswith(f"error: rank 1 (process {job.pids[1]} on host {HERE}) ") and f" {said}; " in line


@pytest.mark.parametrize("place", ["near", "far"])
def test_a_rank_that_is_stuck_is_ended_when_another_has_failed(place, part):
    """It says why itself: nobody repeats it, and nobody calls it dead."""
    job = part(place, "fails", ranks=2)
    job.wait(MINUTE)
    assert job.codes == [2, 2]
    assert assert_one_line(job) == "error: rank 1: out of luck"


def test_nothing_is_left_of_ranks_that_ended_well(part, tmp_path):
    """Of those either that are gone before rank 0 has looked at them once."""
    job = part("near", "first ends last")
    job.wait(MINUTE)
    assert job.codes == [0, 0, 0] and not (tmp_path / "run" / "ranks").exists(), job.err


def test_a_process_is_told_from_a_later_one_with_its_number():
    me = Peer.me(0)
    assert me.runs() and me.pid == os.getpid()
    assert not Peer(0, me.host, me.pid, me.started - 1, me.place).runs()
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    there = Peer(1, me.host, child.pid, started(child.pid) or 0, me.place)
    assert there.runs()
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert not there.runs()  # a zombie
    child.wait()
    assert not there.runs()


# ---- a rank that is late, a rank that differs, a rank without space --------------------------------------------------------


def test_one_rank_starts_late(late, whole):
    job, run = late
    job.succeed()
    assert numbers(run) == numbers(whole(2, 3))
    assert_same_run(run, whole(2, 3), ("export", "export_teacher"))


def other_prompt(folder: Path) -> dict:
    image_folder(folder)
    (folder / "3.txt").write_text("no cat")
    return {"data__path": str(folder)}


def other_model(folder: Path) -> dict:
    shutil.copytree(tiny.shared("zimage"), folder)
    file = next((folder / "transformer").glob("*.safetensors"))
    tensors = load_file(file)
    tensors["layers.0.attention.to_q.weight"][0, 0] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    return {"model__path": str(folder)}


DIFFERENCES = {
    "prompt": (other_prompt, f"rank 1 on host {HERE} reads other records than rank 0 on host {HERE}: record 3 (3.png) differs "
                             "in its prompt caption: give every host the same data set"),
    "model": (other_model, "transformer/diffusion_pytorch_model.safetensors has other contents"),
    "setting": (lambda folder: {"train__seed": 7}, f"rank 1 on host {HERE} has train.seed=7, rank 0 on host"),
}


@pytest.mark.parametrize("what", DIFFERENCES)
def test_a_rank_that_differs_is_refused(what, tmp_path):
    make, text = DIFFERENCES[what]
    run = tmp_path / "run"
    other = settings(run, 2, **make(tmp_path / "other"))
    line = start(settings(run, 2), 2, own={1: {"argv": other}}).fail(text)
    assert what == "setting" or "path=" in line
    assert not run.exists()


def test_a_rank_that_reads_another_picture_is_refused(tmp_path):
    """Same names and sizes, one other pixel."""
    folders = tmp_path / "one", tmp_path / "two"
    for folder, seed in zip(folders, (5, 6)):
        image_folder(folder)
        (folder / "2.png").unlink()
        picture(seed).save(folder / "2.bmp")
    mine, other = (settings(tmp_path / "run", 2, data__path=str(folder)) for folder in folders)
    start(mine, 2, own={1: {"argv": other}}).fail(f"rank 1 on host {HERE}", "record 2 (2.bmp) differs in its picture")


def test_accounts_differ_in_the_first_thing_that_differs():
    record = {"file": "a.png", "prompts": {"short_en": "a cat", "short_zh": "x"}, "bucket": [16, 16]}
    account = {"versions": {"torch": "2.13.0"}, "settings": {"train.seed": 0}, "records": {"0": record}}
    assert consensus.describe(account, account, "rank 1", "rank 0") is None
    for section, name, value, text in (
        ("versions", "torch", "2.12.1", "rank 1 runs torch 2.12.1, rank 0 2.13.0"),
        ("settings", "train.seed", 1, "rank 1 has train.seed=1, rank 0 train.seed=0"),
        ("records", "0", record | {"prompts": {"short_en": "a cat", "short_zh": "y"}}, "differs in its prompt short_zh"),
        ("records", "0", record | {"prompts": {"short_en": "a cat"}}, "differs in its prompt short_zh"),
        ("records", "0", record | {"bucket": [16, 32]}, "record 0 (a.png) differs in its bucket"),
        ("records", "1", record, "rank 1 reads 2 records, rank 0 1"),
    ):
        mine = account | {section: account[section] | {name: value}}
        found = consensus.describe(account, mine, "rank 1", "rank 0")
        assert found and text in found[1]


def test_large_files_are_told_apart_by_samples(tmp_path):
    """Training changes nearly all of the bytes; a size and a beginning that differ are found wherever they are."""
    file, content = tmp_path / "model.safetensors", bytearray(random.Random(0).randbytes(3 << 20))
    file.write_bytes(content)
    first = accounts.sampled_digest(file)
    assert first == accounts.sampled_digest(file)
    trained = bytes(byte ^ 1 for byte in content[1 << 16 :])
    for changed in (content[: 1 << 16] + trained, b"x" + content[1:], content[:-1], content[:-1] + b"\0\0"):
        file.write_bytes(changed)
        assert accounts.sampled_digest(file) != first


def test_a_full_disk_on_one_rank_of_a_sharded_run(whole, tmp_path):
    """Only rank 1 has no space, for its part of the last checkpoint of a run that goes on from another's."""
    run, source = tmp_path / "run", whole(2, 3) / "checkpoints" / "step-000006"
    before = {file.name: file.read_bytes() for file in source.iterdir()}
    limits = {1: {"file_bytes": len(before["rank-0001.safetensors"]) - 1}}
    job = start(settings(run, 3, resume=str(source)), 2, own=limits)
    job.fail(f"rank 1 on host {HERE}: could not save", "step-000008: File too large", "earlier checkpoints are intact")
    saved = run / "checkpoints" / source.name
    assert list((run / "checkpoints").iterdir()) == [saved]
    assert {file.name: file.read_bytes() for file in saved.iterdir()} == before
    start(settings(run, 3), 2).succeed()
    assert_same_run(run, whole(2, 3), ("export", "export_teacher"))
