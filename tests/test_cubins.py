"""Every Triton kernel, compiled for GPUs that are not here: no error, no spill, none forgotten."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dopsd_kernels import cubins
from dopsd_kernels.cubins import TARGETS, Resources

PACKAGE = Path(cubins.__file__).parent


@pytest.fixture(scope="module")
def compiled() -> list[Resources]:
    return cubins.in_own_process(workers=min(2, os.cpu_count() or 1))


def test_every_case_compiles_for_every_target(compiled):
    wrong = [f"{row.module}: {row.name} on sm_{row.target}: {row.error}" for row in compiled if row.error]
    assert wrong == []
    expected = {(module, case.name, target) for module, case, target in cubins.wanted()}
    assert {(row.module, row.name, row.target) for row in compiled} == expected
    assert {row.target for row in compiled} == set(TARGETS)
    assert all(row.registers > 0 for row in compiled)


def test_nothing_spills(compiled):
    assert [f"{row.module}: {row.name} on sm_{row.target}: {row.local} bytes" for row in compiled if row.spills] == []


def test_table_names_every_case(compiled):
    lines = cubins.table(compiled).splitlines()
    assert lines[0].split() == ["module", "case", "warps", *(f"sm_{target}" for target in sorted(TARGETS))]
    assert len(lines) == 1 + len({(row.module, row.name) for row in compiled})


def launched_kernels() -> set[str]:
    """Names of the kernels given to `launch` anywhere in the package."""
    found = set()
    for file in PACKAGE.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "launch" and node.args:
                found.add(ast.unparse(node.args[0]))
    return found


def jit_functions() -> set[str]:
    found = set()
    for file in PACKAGE.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef) and any(ast.unparse(d).startswith("triton.jit") for d in node.decorator_list):
                found.add(node.name)
    return found


def test_every_launched_kernel_has_a_case():
    cases = {getattr(case.kernel, "fn", case.kernel).__name__ for _, case in cubins.all_cases()}
    launched = launched_kernels()
    assert launched, "no launches found"
    by_name = {name.split(".")[-1] for name in launched} & jit_functions()
    assert by_name - cases == set()


KERNELS = """
import triton
import triton.language as tl
from dopsd_kernels.cubins import CompileCase, resources


@triton.jit
def spilling(x, y, N: tl.constexpr):
    i = tl.arange(0, N)
    a = tl.load(x + i)
    b = tl.load(x + N + i)
    m = tl.max(a * b, 0)
    tl.store(y + i, a / m)
    tl.store(y + N + i, b - m)


@triton.jit
def wrong(x, y, N: tl.constexpr):
    tl.store(y + tl.arange(0, N), x.nothing)


for kernel, n in ((spilling, 128), (spilling, 4096), (wrong, 128)):
    case = CompileCase(kernel.__name__, kernel, {"x": "*fp32", "y": "*fp32"}, {"N": n}, num_warps=1)
    row = resources("here", case, 90, sass=True)
    print(row.spills, row.local > 0, row.local_instructions > 0, bool(row.error))
"""


def test_spills_and_errors_are_seen(tmp_path):
    """Both readings of a kernel that must spill, of one that must not, and one that does not compile."""
    (tmp_path / "kernels_here.py").write_text(KERNELS)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(tmp_path / "kernels_here.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.split("\n")[:3] == ["False False False False", "True True True False", "False False False True"]


def test_interpreted_kernels_are_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="leaves nothing to compile"):
        cubins.compile_all()


def test_too_much_shared_memory_is_an_error(monkeypatch):
    monkeypatch.setattr(cubins, "cubin", lambda case, target: (b"", 200 * 1024))
    monkeypatch.setattr(cubins, "_cuobjdump", lambda code, flag: "REG:1 STACK:0 SHARED:0 LOCAL:0")
    case = cubins.all_cases()[0][1]
    assert "shared memory" in cubins.resources("here", case, 120).error
    assert not cubins.resources("here", case, 90).error
