"""Shared set-up of the test session."""

import os
import sys
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
