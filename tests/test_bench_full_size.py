"""bench/full_size.py when it is stopped, killed, or cannot draw its report."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from dataclasses import asdict
from importlib.metadata import requires, version

import pytest

from bench import full_size, needed
from bench.report import plots
from bench.results import ROOT, Row, read_results, write_results
from tests.test_bench_step import SMALL, changed_script


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_ends_the_part_and_keeps_its_rows(tmp_path, monkeypatch, capsys, number):
    """Also those that it has found since it was last looked at."""
    found = Row("kernels", "swiglu", "ours", "seconds", 1.0, "s")
    script = tmp_path / "part.py"
    script.write_text(textwrap.dedent(f"""
        import os, pathlib, time
        out = pathlib.Path({str(tmp_path / "out")!r})
        (out / "pid").write_text(str(os.getpid()))
        (out / "new").write_text({json.dumps([asdict(found)])!r})
        (out / "new").replace(out / "kernels.part")
        time.sleep(60)
    """))
    monkeypatch.setattr(full_size, "SCRIPT", script)
    monkeypatch.setattr(full_size, "LOOKING", 60.0)

    def signalled():
        while not (tmp_path / "out" / "kernels.part").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    def unexpected(*_):
        raise AssertionError("nobody handles it")

    before = signal.signal(number, unexpected)
    sender = threading.Thread(target=signalled, daemon=True)
    sender.start()
    try:
        assert full_size.main(["--out", str(tmp_path / "out"), *SMALL, "--parts", "kernels"]) == 128 + number
        assert signal.getsignal(number) is unexpected
    finally:
        signal.signal(number, before)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"stopped by {number.name}" in said
    assert read_results(tmp_path / "out")[1] == [found]
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"results.json", "results.csv", "log.txt", "pid"}
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "out" / "pid").read_text()), 0)


def test_a_part_that_nobody_stops_ends_itself(tmp_path, monkeypatch):
    script = changed_script(tmp_path, """
        from bench import full_size
        full_size.LOOKING = 0.01
        full_size.options_of = lambda arguments: time.sleep(60)
    """)
    command = [sys.executable, str(script), "--part", "kernels", "--until", "0", "--out", str(tmp_path)]
    assert subprocess.run(command, start_new_session=True, timeout=60).returncode == -signal.SIGKILL

    ended = []
    monkeypatch.setattr(full_size, "LOOKING", 0.01)
    monkeypatch.setattr(full_size.os, "killpg", lambda *given: ended.append(given))
    began = time.monotonic()
    full_size.end_when_alone(os.getppid(), began + 0.2)
    assert time.monotonic() - began > 0.2
    full_size.end_when_alone(os.getppid() + 1, time.monotonic() + 1e6)  # at once: its parent is another one by now
    assert ended == [(os.getpid(), signal.SIGKILL)] * 2


@pytest.mark.parametrize("error", [RuntimeError("no font"), full_size.Stopped("SIGTERM")], ids=["failed", "stopped"])
def test_a_report_that_is_not_finished_leaves_no_plots(tmp_path, monkeypatch, capsys, error):
    """Between drawing and archiving, where twelve of them would lie beside the results."""
    drawn = []

    def draw(rows, facts, folder):
        folder.mkdir()
        for number in range(12):
            drawn.append(folder / f"{number}.png")
            drawn[-1].write_bytes(b"")
        raise error

    write_results(tmp_path, {}, [])
    monkeypatch.setattr(plots, "draw", draw)
    if isinstance(error, Exception):
        full_size.report(tmp_path)
        assert "no report.html: RuntimeError: no font" in capsys.readouterr().out
    else:
        with pytest.raises(full_size.Stopped):
            full_size.report(tmp_path)
    assert len(drawn) == 12 and not any(file.exists() for file in drawn)
    assert {file.name for file in tmp_path.iterdir()} == {"results.json", "results.csv"}


@pytest.mark.parametrize("here", ["4.15.0", "4.9.0", "3.20"])
def test_nothing_begins_with_a_package_that_is_too_old(tmp_path, monkeypatch, capsys, here):
    monkeypatch.setattr(needed, "version", lambda name: here if name == "typing-extensions" else version(name))
    assert full_size.main(["--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"typing_extensions is {here}, needs 4.16.0 or newer" in said
    assert "constraints.txt typing-extensions`" in said and not (tmp_path / "out").exists()


@pytest.mark.parametrize("here", ["4.16.0", "4.16.1rc1", "5.0"])
def test_a_package_that_is_new_enough_is_taken(monkeypatch, here):
    monkeypatch.setattr(needed, "version", lambda name: here if name == "typing-extensions" else version(name))
    assert needed.outdated() == {}


def test_the_oldest_versions_are_those_of_whoever_needs_them():
    least = {package.name: package.least for package in needed.PACKAGES if package.least}
    declared = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f"typing-extensions>={least.pop('typing-extensions')}" in requires("pydantic")
    assert f'"transformers>={least.pop("transformers")}"' in declared and not least
