"""What a benchmark shows while it measures, and that its rows are on the disk whatever ends it."""

import functools
import io
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console

from bench import clock, harness, live
from bench.report.tables import console_of, show
from bench.results import Options, Row, failed, merged, read_results

ROOT = Path(__file__).resolve().parent.parent


def row(metric: str = "seconds_per_step", n: int = 1, value: float = 1.0) -> Row:
    return Row("step", "lora", "ours", metric, value, "s", n=n)


# ---- what is shown ---------------------------------------------------------------------------------------------------


def test_without_a_terminal_variant_round_and_time_left_are_lines(capsys, monkeypatch):
    """One a suite, and further ones when PRINTED seconds have passed; here at once."""
    live.say("nobody listens")
    monkeypatch.setattr(live, "PRINTED", 0.0)
    calls = {"ours": lambda: None, "R1": lambda: None}
    with live.live(["cost", "step"], lambda rows: None, console_of()) as run:
        for suite in run.suites:
            run.begin(suite)
        live.say("step: lora, timing ours, R1")
        clock.interleaved(calls, rounds=3, warmup=1)
        show("step", [row()], run.console)
    out, err = capsys.readouterr()
    lines = [re.sub(r"  0:00:0\d", "", line) for line in err.splitlines()]
    assert lines[:3] == ["[1/2] cost", "[2/2] step", "[2/2] step  step: lora, timing ours, R1"]
    assert lines[3] == "[2/2] step  step: lora, timing ours, R1: ours, warm-up 1 of 1"  # nothing is known yet
    last = "[2/2] step  step: lora, timing ours, R1: ours, round 3 of 3, 0:00:00 left"
    assert lines[-1] == last and len(lines) == 3 + 2 * 4
    assert "seconds" not in err and "step" in out and "\x1b" not in out + err


def test_the_time_left_is_that_of_the_rounds_to_come(monkeypatch):
    """A clock on which ours takes 2 s and R1 10: after the first round, of four with the warm-up, 36 s are left."""
    told: list[tuple] = []
    now = [0.0]
    monkeypatch.setattr(clock, "tick", lambda *given: told.append(given))
    monkeypatch.setattr(clock.time, "perf_counter", lambda: now[0])

    def lasting(seconds):
        def call():
            now[0] += seconds

        return call

    found = clock.interleaved({"ours": lasting(2.0), "R1": lasting(10.0)}, rounds=3, warmup=1)
    assert found == {"ours": [2.0] * 3, "R1": [10.0] * 3}
    assert told[2] == ("R1", "round 1 of 3", 36.0) and told[3] == ("ours", "round 1 of 3", 30.0)
    assert [one[2] for one in told[:2]] == [None, None] and len(told) == 8


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_tables_and_the_live_line_share_a_terminal(monkeypatch, capsys):
    screen = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(live, "REDRAWN", 0.0)
    with pytest.raises(KeyError), live.live(["step", "cost"], lambda rows: None, console_of()) as run:
        run.begin("step")
        live.say("lora: R1 [not markup]")
        live.tick("ours", "round 2 of 20", 75.0)
        show("step", [row(value=0.516)], run.console)
        print("printed meanwhile")
        raise KeyError
    said = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())
    for text in ("[1/2] step", "lora: R1 [not markup]: ours, round 2 of 20, 0:01:15 left", "516 ms", "printed meanwhile"):
        assert text in said
    assert capsys.readouterr().err == ""
    hidden, shown = (screen.getvalue().rindex(f"\x1b[?25{end}") for end in "lh")
    assert hidden < shown  # the cursor is back


# ---- what is on the disk ---------------------------------------------------------------------------------------------


def test_rows_are_written_before_anything_that_may_take_long():
    written: list[list[Row]] = []
    with live.live(["step"], lambda rows: written.append(list(rows)), Console(file=io.StringIO())) as run:
        run.written = time.monotonic() + 60  # as if it had just been written
        run.add(row())
        assert written == []
        live.say("step: lora, compiling R3")
        assert written == [[row()]]
        live.say("step: lora, timing")
        run.add(row("peak_bytes"))
    assert written == [[row()], [row(), row("peak_bytes")]]


def test_the_row_with_most_measurements_stays():
    few, many, lost = row(n=2, value=2.0), row(n=3, value=3.0), failed(*row().key, "s", "no memory")
    assert merged([few, many]) == merged([many, few]) == [many] and merged([lost, few]) == merged([few, lost]) == [few]
    assert merged([few, row(n=2, value=5.0), row("peak_bytes")]) == [few, row("peak_bytes")]


class Broken(Exception):
    pass


def test_a_timing_that_is_stopped_leaves_its_finished_rounds(monkeypatch):
    """In the fourth round: of ours three measurements, and the ratio of three; what raises alone is left out before."""
    monkeypatch.setattr(harness, "TOLD_AGAIN", 0.0)
    calls = [0]

    def stopped():
        calls[0] += 1
        if calls[0] == 1 + 4:  # the first call tries it
            raise KeyboardInterrupt

    def broken():
        raise Broken("no room")

    contest = harness.Contest("step", "lora{}@K8", Options("nano", torch.device("cpu"), threads=1, rounds=20))
    told: list[Row] = []
    with pytest.raises(KeyboardInterrupt):
        for one in contest.time({"ours": stopped, "R1": lambda: None, "R2": broken}, contest.speeds, warmup=0):
            told.append(one)
    found = {(one.case, one.variant): one for one in merged(told)}
    assert found["lora@K8", "ours"].n == found["lora@K8", "R1"].n == found["lora/R1@K8", "ours"].n == 3
    assert found["lora/R1@K8", "ours"].metric == "speedup" and len(found) == 5
    for place in (("lora@K8", "R2"), ("lora/R2@K8", "ours")):
        assert (found[place].status, found[place].note) == ("failed", "Broken: no room")


@pytest.mark.parametrize("broken", ["R2", "ours"])
def test_what_fails_in_a_later_round_has_failed_and_the_others_begin_anew(broken, monkeypatch):
    """Rows of its first rounds were told already; they are taken back, with those that compare something with it."""
    monkeypatch.setattr(harness, "TOLD_AGAIN", -1.0)
    contest = harness.Contest("step", "lora{}", Options("nano", torch.device("cpu"), threads=1, rounds=4))
    counts = {"ours": 0, "R1": 0, "R2": 0}

    def call(name):
        counts[name] += 1
        if name == broken and counts[name] == 4:  # after the first call and two rounds
            raise RuntimeError("no room")

    contest.alive = {name: None for name in counts}
    rows = list(contest.time({name: functools.partial(call, name) for name in counts}, contest.speeds, warmup=0))
    assert {row.status for row in rows} == {"ok", "failed"}
    found = {(row.case, row.variant): row for row in merged(rows)}
    lost = {"R2": {("lora", "R2"), ("lora/R2", "ours")}, "ours": {("lora", "ours"), ("lora/R1", "ours"), ("lora/R2", "ours")}}
    assert {key for key, row in found.items() if row.status == "failed"} == lost[broken]
    assert all(row.note == "RuntimeError: no room" if row.status == "failed" else row.n == 4 for row in found.values())
    assert len(found) == 5


def test_a_fallback_is_one_of_the_ratio_too():
    contest = harness.Contest("step", "lora{}", Options("nano", torch.device("cpu"), threads=1))
    contest.notes["R4"] = "not compiled"
    rows = list(contest.speeds({"ours": [1.0, 1.0], "R4": [2.0, 2.0]}, {"states_per_second": ("1/s", 8.0)}))
    assert [(one.case, one.variant, one.value, one.status, one.note) for one in rows] == [
        ("lora", "ours", 1.0, "ok", ""), ("lora", "ours", 8.0, "ok", ""),
        ("lora", "R4", 2.0, "fallback", "not compiled"), ("lora", "R4", 4.0, "fallback", "not compiled"),
        ("lora/R4", "ours", 2.0, "fallback", "R4: not compiled"),
    ]


PROGRAM = """
    import sys, time
    from bench import run
    from bench.results import Row

    def rows_of(suite, options, out):
        yield Row(suite, "lora", "ours", "seconds_per_step", 1.0, "s", n=3)
        print("measured", flush=True)
        time.sleep(60)

    run.rows_of = rows_of
    sys.exit(run.main(["cost", "--threads", "1", "--out", sys.argv[1]]))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_what_is_measured_is_on_the_disk_when_it_is_stopped(number, tmp_path):
    lines = [line.removeprefix("    ") for line in PROGRAM.splitlines()]
    process = subprocess.Popen([sys.executable, "-c", "\n".join(lines), str(tmp_path)], cwd=ROOT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == "measured\n"
    os.kill(process.pid, number)
    _, err = process.communicate(timeout=60)
    assert [one.metric for one in read_results(tmp_path)[1]] == ["seconds_per_step"]
    if number == signal.SIGKILL:
        assert process.returncode == -number
    else:
        assert process.returncode == 130 and "what is finished has been written" in err
