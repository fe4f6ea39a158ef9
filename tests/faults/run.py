"""`make faults`: does a test notice when the program is wrong?

Each `NN-name.patch` beside this file is a deliberate fault. What stands above its diff says what is wrong, and which tests must
notice:

    One sentence.
    part: kernels
    caught-by: tests/test_x.py::test_name

`caught-by` may stand several times, each with what pytest takes: a file, a test's id, `tests/test_x.py -k "one or other"`. All
of them have to pass on the unchanged program; then each fault is applied to a copy of its own, where each of its tests has to
fail. An error while a file of tests is collected is no failure: it would say nothing about the test. The fault of part `import`
is the exception. It raises when the program is imported, so no file that any fault names may be collected: otherwise the tests
would be looking at another program than the copy.

    python tests/faults/run.py [NN ...]     prints the table; the exit code is 1 when something was not caught
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
AT_ONCE = 2
"""Processes of pytest at the same time."""
SECONDS = 300
"""A test that takes longer has not noticed: it hangs."""
RAISED = "deliberate fault"
"""What the fault of part `import` says."""
PLUG = """import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__name__ != "ScikitBuildRedirectingFinder"]
"""
"""The sitecustomize of the processes. An editable install finds the program by an import hook, which comes before sys.path:
with it every copy would import the checkout."""


_running: set[subprocess.Popen[str]] = set()


class Wrong(Exception):
    """A fault that cannot be tried, in one line."""


@dataclass
class Fault:
    file: Path
    what: str
    part: str
    caught_by: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Outcome:
    code: int
    output: str
    seconds: float

    @property
    def passed(self) -> bool:
        return self.code == 0 and " passed" in self.output

    def caught(self, part: str) -> bool:
        return RAISED in self.output and self.code != 0 if part == "import" else self.code == 1

    def __str__(self) -> str:
        if self.code < 0:
            return f"no answer in {SECONDS} s"
        last = next((line for line in reversed(self.output.splitlines()) if line.strip()), "no output")
        return f"pytest ends with {self.code}: {last.strip(' =')}"


def read(file: Path) -> Fault:
    head = file.read_text(encoding="utf-8").partition("\n--- ")[0].splitlines()
    values: dict[str, list[str]] = {"part": [], "caught-by": []}
    for line in head[1:]:
        key, _, value = line.partition(": ")
        if key in values:
            values[key].append(value.strip())
    if not head or not head[0].strip() or len(values["part"]) != 1:
        raise Wrong(f"{file.name}: begin with a sentence that says what is wrong, then 'part: ...' and 'caught-by: ...'")
    fault = Fault(file, head[0].strip(), values["part"][0], values["caught-by"])
    if (fault.part == "import") == bool(fault.caught_by):
        raise Wrong(f"{file.name}: name the tests that must notice as 'caught-by: ...' (with 'part: import' none: all must)")
    for test in fault.caught_by:
        if not (ROOT / file_of(test)).is_file():
            raise Wrong(f"{file.name}: there is no {file_of(test)}: name a file of tests as it is now")
    return fault


def file_of(test: str) -> str:
    return shlex.split(test)[0].partition("::")[0]


def copy_program(target: Path) -> None:
    """The checkout's files, those that are not committed too, and the native module, wherever it was built."""
    listed = subprocess.run(["git", "ls-files", "-zco", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True)
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file() and not name.startswith(("bench/results/", "shared/")):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    native = importlib.util.find_spec("dopsd_kernels._native")
    if native is None or native.origin is None:
        raise Wrong("the native module dopsd_kernels._native is not built: run make install")
    shutil.copy2(native.origin, target / "kernels" / "dopsd_kernels")


def apply(fault: Fault, program: Path) -> None:
    done = subprocess.run(
        ["git", "apply", str(fault.file)], cwd=program, capture_output=True, text=True,
        env={**os.environ, "GIT_CEILING_DIRECTORIES": str(program.parent)},
    )
    if done.returncode:
        raise Wrong(f"{fault.file.name} does not apply: {' '.join(done.stderr.split())}: make it anew from the code as it is")


def pytest(test: str, program: Path, plug: Path) -> Outcome:
    path = os.pathsep.join(map(str, (plug, program, program / "kernels")))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-xq", "-p", "no:cacheprovider", *shlex.split(test)]
    started = time.monotonic()
    process = subprocess.Popen(command, cwd=program, env=environment, text=True, start_new_session=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    _running.add(process)
    try:
        output, code = process.communicate(timeout=SECONDS)[0], process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, code = process.communicate()[0], -1
    _running.discard(process)
    return Outcome(code, output, time.monotonic() - started)


def run(faults: list[Fault], work: Path) -> Iterable[tuple[Fault, str, str, float]]:
    """(fault, tests, what is wrong with the result or nothing, seconds) of every fault and test."""
    plug, unchanged = work / "plug", work / "unchanged"
    plug.mkdir()
    (plug / "sitecustomize.py").write_text(PLUG, encoding="utf-8")
    copy_program(unchanged)
    tests = list(dict.fromkeys(test for fault in faults for test in fault.caught_by))
    files = sorted({file_of(test) for file in HERE.glob("*.patch") for test in read(file).caught_by})
    for fault in faults:
        apply(fault, Path(shutil.copytree(unchanged, work / fault.file.stem)))
    pool = ThreadPoolExecutor(AT_ONCE)
    try:
        before = dict(zip(tests, pool.map(lambda test: pytest(test, unchanged, plug), tests)))
        tried = [(fault, test) for fault in faults for test in (files if fault.part == "import" else fault.caught_by)]
        outcomes = pool.map(lambda one: pytest(one[1], work / one[0].file.stem, plug), tried)
        for (fault, test), outcome in zip(tried, outcomes):
            problem = "" if outcome.caught(fault.part) else str(outcome)
            if test in before and not before[test].passed:
                problem = f"fails without the fault, too: {before[test]}"
            yield fault, test, problem, outcome.seconds
    finally:  # also where this process was stopped: each pytest has a session of its own, with what its tests have started
        pool.shutdown(wait=False, cancel_futures=True)
        for process in list(_running):
            os.killpg(process.pid, signal.SIGKILL)


def main(wanted: list[str]) -> int:
    started, missed = time.monotonic(), 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        faults = [fault for fault in map(read, sorted(HERE.glob("*.patch")))
                  if not wanted or fault.file.name.partition("-")[0] in wanted]
        unknown = set(wanted) - {fault.file.name.partition("-")[0] for fault in faults}
        if unknown:
            raise Wrong(f"no fault {', '.join(sorted(unknown))}: numbers are those of the files in {HERE}")
        with tempfile.TemporaryDirectory(prefix="faults-") as work:
            print("| fault | part | what is wrong | tests | caught | s |\n| --- | --- | --- | --- | --- | --- |")
            for fault, test, problem, seconds in run(faults, Path(work)):
                missed += bool(problem)
                print(f"| {fault.file.stem} | {fault.part} | {fault.what} | `{test}` | "
                      f"{problem and 'NO: ' + problem or 'yes'} | {seconds:.0f} |", flush=True)
    except Wrong as error:
        print(f"faults: {error}", file=sys.stderr)
        return 1
    print(f"\n{len(faults)} faults, {missed} not caught, {time.monotonic() - started:.0f} s", flush=True)
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
