"""Shared set-up of the test session, and `--fast`."""

import ast
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel's module is imported

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# The only reasons for which a test may be skipped on a machine that decides about a change.
ALLOWED = ("needs GPU", "needs shared")

_skips: list[tuple[str, str]] = []


def _note(report: pytest.TestReport | pytest.CollectReport) -> None:
    if report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        _skips.append((report.nodeid, reason.removeprefix("Skipped: ")))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _note(report)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    _note(report)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """With CI=true, a test that skipped itself for any other reason fails the session: it proves nothing."""
    if os.environ.get("CI") != "true" or hasattr(session.config, "workerinput"):
        return
    wrong = [(node, reason) for node, reason in _skips if not reason.startswith(ALLOWED)]
    for node, reason in wrong:
        print(f"\nskipped by mistake: {node}: {reason!r} starts with none of {ALLOWED}", file=sys.stderr)
    if wrong:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


# ---- order -----------------------------------------------------------------------------------------------------------

LONGEST = ("test_reproduce", "test_same_numbers", "test_bench_step", "test_plan", "test_faults", "test_rank_faults",
           "test_train", "test_bench_forward", "test_reproduce_given", "test_gathers", "test_baseline",
           "test_wheel", "test_nano")
"""Files of tests that take longest, which begin first: workers that share the files then end at about the same time."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONGEST)))


# ---- --fast ----------------------------------------------------------------------------------------------------------

WHOLE = ("subprocess", "multiprocessing", "bench", "dopsd_fast.nano", "tests.driving", "tests.ranks", "tests.template_family")
"""What a file of tests imports that starts processes, trains or measures. `--fast` leaves such files out."""
STARTS = ("subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.system")

_running: list[str] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fast", action="store_true", help="only the files whose tests start no process and train nothing")


def is_whole(file: Path) -> bool:
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return any(f"{name}.".startswith(f"{whole}.") for name in names for whole in WHOLE)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    fast = config.getoption("fast") and collection_path.name.startswith("test_") and collection_path.suffix == ".py"
    return True if fast and is_whole(collection_path) else None


def pytest_configure(config: pytest.Config) -> None:
    """A fast test that starts a process fails, and one that makes a process group, which every training run begins with."""
    if config.getoption("fast"):
        sys.addaudithook(lambda event, _: _refuse(event) if event in STARTS else None)
        torch.distributed.init_process_group = lambda *_, **__: _refuse("a process group")


def _refuse(what: str) -> None:
    if _running:
        raise RuntimeError(f"{what} in {_running[-1]}, a test of `make test-fast`: import what starts it in the test's file")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    _running.append(item.nodeid)
    try:
        return (yield)
    finally:
        _running.pop()
