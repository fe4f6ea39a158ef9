"""Suite `cubins`: registers, shared memory and spills of every Triton kernel, compiled for GPUs that are not here."""

from __future__ import annotations

from collections.abc import Iterator

from bench.results import Options, Row
from dopsd_kernels.cubins import TARGETS, in_own_process, table


def measure(options: Options) -> Iterator[Row]:
    """Case: module, kernel and configuration; the metrics name the target. Prints the whole table."""
    found = in_own_process(targets=(90,) if options.quick else TARGETS, workers=1 if options.quick else options.threads)
    print("registers a thread / shared memory a block\n" + table(found))
    for one in found:
        case, target = f"{one.module}: {one.name}", f"sm_{one.target}"
        if one.error:
            print(f"{case} on {target}: {one.error}")
        yield Row("cubins", case, "ours", f"registers_{target}", float(one.registers), "")
        yield Row("cubins", case, "ours", f"shared_{target}", float(one.shared), "B")
        yield Row("cubins", case, "ours", f"spilled_{target}", float(one.local), "B")
