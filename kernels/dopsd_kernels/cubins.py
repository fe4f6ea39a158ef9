"""Compiles the Triton kernels for GPUs that are not there, and reads what they take: registers, spills, shared memory.

`python -m dopsd_kernels.cubins [--targets 80 90 ...] [--only TEXT] [--sass] [--json]` compiles every COMPILE_CASES of the
package for every target and prints the table; exit status 1 if one does not compile or spills. Needs no GPU, but a
process without TRITON_INTERPRET. Spills are the local memory that the assembler laid out (STACK, LOCAL of cuobjdump);
with `--sass` also the loads from and stores to it in the machine code (LDL, STL), which takes four times as long.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

TARGETS = (80, 89, 90, 100, 120)
"""Compute capabilities, as 10 * major + minor: A100, Ada, Hopper, Blackwell for servers, Blackwell for desktops."""

SHARED_LIMIT = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
"""KiB of shared memory that a block can have; CUDA C++ programming guide, technical specifications."""


@dataclass(frozen=True)
class CompileCase:
    """One kernel at one shipped configuration.

    `signature`: argument -> Triton type ("*bf16", "*fp32", "*i32", "i32", "fp32", ...), in the kernel's order, without
    the constexprs; `constexprs`: argument -> value. `least`: lowest compute capability that it is for.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3
    least: int = 80


@dataclass(frozen=True)
class Resources:
    """What one kernel takes on one target: registers a thread, bytes of shared memory a block, bytes of local memory a
    thread, machine instructions that touch local memory (0 where not read). `error`: why there is no cubin, else empty."""

    module: str
    name: str
    target: int
    warps: int
    registers: int = 0
    shared: int = 0
    local: int = 0
    local_instructions: int = 0
    error: str = ""

    @property
    def spills(self) -> bool:
        return bool(self.local or self.local_instructions)


def all_cases() -> list[tuple[str, CompileCase]]:
    """(module, case) of every op of the package, in order. Raises ValueError if two cases have one name."""
    import dopsd_kernels

    found: list[tuple[str, CompileCase]] = []
    for info in pkgutil.iter_modules(dopsd_kernels.__path__):
        if info.name.startswith("_"):
            continue
        module = importlib.import_module(f"dopsd_kernels.{info.name}")
        found += [(info.name, case) for case in getattr(module, "COMPILE_CASES", ())]
    names = [case.name for _, case in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"cubins: two compile cases are called {twice[0]!r}; give each its own name")
    return found


def cubin(case: CompileCase, target: int) -> tuple[bytes, int]:
    """(machine code, bytes of shared memory). Pointers and strides are multiples of 16, as at the shipped sizes; a
    launch with others makes Triton compile another variant."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as compile_kernel

    names = case.kernel.arg_names
    missing = [name for name in names if name not in case.signature and name not in case.constexprs]
    if missing:
        raise ValueError(f"cubins: case {case.name!r} says nothing about argument {missing[0]!r} of its kernel")
    signature = {name: "constexpr" if name in case.constexprs else case.signature[name] for name in names}
    aligned = [
        (i,)
        for i, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or (kind in ("i32", "i64") and "stride" in name)
    ]
    source = ASTSource(
        case.kernel, signature, dict(case.constexprs), {index: [["tt.divisibility", 16]] for index in aligned}
    )
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    compiled = compile_kernel(source, target=GPUTarget("cuda", target, 32), options=options)
    return compiled.asm["cubin"], compiled.metadata.shared


def resources(module: str, case: CompileCase, target: int, sass: bool = False) -> Resources:
    """Compiles and reads; a failure is in `error`. `sass`: count `local_instructions` too."""
    what = dict(module=module, name=case.name, target=target, warps=case.num_warps)
    try:
        code, shared = cubin(case, target)
        usage = _cuobjdump(code, "--dump-resource-usage")
        assembly = _cuobjdump(code, "--dump-sass") if sass else ""
    except Exception as error:  # whatever the compiler says belongs into the table
        return Resources(**what, error=" ".join(f"{type(error).__name__}: {error}".split())[:300])  # type: ignore[arg-type]
    limit = 1024 * SHARED_LIMIT.get(target, 99)
    if shared > limit:
        return Resources(**what, shared=shared, error=f"{shared} bytes of shared memory, the GPU has {limit}")  # type: ignore[arg-type]
    numbers = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", usage)}
    if "REG" not in numbers or "STACK" not in numbers:
        return Resources(**what, error="cuobjdump printed no resource usage")  # type: ignore[arg-type]
    return Resources(
        **what,  # type: ignore[arg-type]
        registers=numbers["REG"],
        shared=max(shared, numbers.get("SHARED", 0)),
        local=numbers["STACK"] + numbers.get("LOCAL", 0),
        local_instructions=len(re.findall(r"\b(?:LDL|STL)\b", assembly)),
    )


def _cuobjdump(code: bytes, flag: str) -> str:
    """cuobjdump and nvdisasm are in Triton's own wheel."""
    import triton

    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "kernel.cubin"
        file.write_bytes(code)
        environment = {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ.get('PATH', '')}"}
        command = [str(folder / "cuobjdump"), flag, str(file)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(f"{Path(command[0]).name} {flag}: {done.stderr.strip() or done.returncode}")
    return done.stdout


def wanted(targets: Iterable[int] = TARGETS, only: str = "") -> list[tuple[str, CompileCase, int]]:
    """(module, case, target) of everything there is to compile."""
    cases = [(module, case) for module, case in all_cases() if only in f"{module} {case.name}"]
    return [(module, case, target) for target in targets for module, case in cases if target >= case.least]


def _compile_number(number: int, targets: tuple[int, ...], only: str, sass: bool) -> Resources:
    return resources(*wanted(targets, only)[number], sass)


def compile_all(
    targets: Sequence[int] = TARGETS, only: str = "", workers: int = 1, sass: bool = False
) -> list[Resources]:
    """Every case for every target that it is for. RuntimeError under TRITON_INTERPRET: there the kernels are Python."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("cubins: TRITON_INTERPRET=1 leaves nothing to compile; run `python -m dopsd_kernels.cubins`")
    jobs = wanted(targets, only)
    if workers <= 1:
        return [resources(*job, sass) for job in jobs]
    with ProcessPoolExecutor(workers) as pool:  # kernels do not pickle: a worker finds its job by number
        count = len(jobs)
        arguments = ([value] * count for value in (tuple(targets), only, sass))
        return list(pool.map(_compile_number, range(count), *arguments))


def in_own_process(targets: Sequence[int] = TARGETS, only: str = "", workers: int = 1) -> list[Resources]:
    """`compile_all` in a process without TRITON_INTERPRET, for callers that may have it set."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "dopsd_kernels.cubins", "--json", "--workers", str(workers), "--only", only]
    command += ["--targets", *map(str, targets)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    try:
        return [Resources(**row) for row in json.loads(done.stdout)]
    except ValueError:
        raise RuntimeError(f"cubins: the compiling process failed: {done.stderr.strip()[-2000:]}") from None


def table(rows: Sequence[Resources]) -> str:
    """One line a case; a column a target: registers / shared memory in KiB, and SPILLS or the error."""
    targets = sorted({row.target for row in rows})
    cells = {(row.module, row.name, row.target): _cell(row) for row in rows}
    names = list(dict.fromkeys((row.module, row.name, row.warps) for row in rows))
    lines = [["module", "case", "warps", *(f"sm_{target}" for target in targets)]]
    for module, name, warps in names:
        lines.append([module, name, str(warps), *(cells.get((module, name, target), "-") for target in targets)])
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


def _cell(row: Resources) -> str:
    if row.error:
        return "ERROR"
    spills = f" SPILLS {row.local}B, {row.local_instructions} instructions" if row.spills else ""
    return f"{row.registers} / {row.shared / 1024:.3g}K{spills}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m dopsd_kernels.cubins", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--targets", type=int, nargs="+", default=list(TARGETS), help="compute capabilities, such as 90")
    parser.add_argument("--only", default="", help="cases whose module and name contain this")
    parser.add_argument("--workers", type=int, default=1, help="processes that compile")
    parser.add_argument("--sass", action="store_true", help="count the instructions on local memory too")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    options = parser.parse_args(arguments)
    os.environ["DOPSD_TRITON"] = "1"  # read when the first kernel's module is imported
    rows = compile_all(options.targets, options.only, options.workers, options.sass)
    if options.json:
        print(json.dumps([asdict(row) for row in rows]))
    else:
        print("registers a thread / shared memory a block\n" + table(rows))
    bad = [row for row in rows if row.error or row.spills]
    for row in bad:
        print(f"{row.module}: {row.name} on sm_{row.target}: {row.error or 'spills'}", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
