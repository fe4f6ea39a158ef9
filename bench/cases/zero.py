"""Suite `zero`: what ranks send each other in a training step, and how long it takes, arrangement by arrangement.

Cases, of `ours`:   full            ZeRO-3, gather=sweep, activations=recompute
                    full/resident   ZeRO-3, gather=step
                    full/unit       ZeRO-3, gather=unit
                    full/stage0 ... full/stage2, and .../offload: optimizer and average in CPU memory
                    lora            ZeRO-3, gather=step; lora/unit, lora/stage0, lora/stage2 as above
`plain` is peers/plain_zero.py, the arrangement that one would write first; its gathers are shown in each case that it is
compared with. Every arrangement steps on the same noise and contexts (K = 4 states, at most two pictures a rank); its first
loss, which depends on no update and on no random adapter, must be plain's. Other numbers of ranks than 2 are in the case's
name, as full@4_ranks. The tour measures full, full/resident, lora and plain's full.

    gathers_per_step          whole-model gathers: sum over the gathers of (elements of the distinct weight names in it) /
                              (elements of the model). One that holds student and teacher of a block counts the block once.
                              ZeRO-1 and 2 gather student and teacher after the update. Plain's without its average's, which
                              are gathers_for_average_per_step
    gathers_of_one_weight_per_step  of the weight that is gathered most often, as blocks are: what is not in a block, and is
                              gathered less by plain, is much of a small model and nothing of a large one
    gathered_bytes_per_step   of parameters: the bytes of the whole, as it lies on each rank afterwards
    reduced_bytes_per_step    of gradients and norms: the bytes of the whole, before it is scattered
    collectives_per_step      calls, of whatever kind, the average's too, as are its bytes
    seconds_per_step          the slowest rank's
    first_loss_relative_error against plain's
    peak_bytes                growth of a rank's memory from before the model is loaded (resident set; on a GPU, allocated)

Counts are of every step from the second on, and must not differ between them. Arrangements cannot share a process group, so
there is no interleaving: in each round every arrangement runs in fresh processes, one after the other. On CPU the ranks are
processes with one thread each that talk by gloo through memory and share the cores: seconds say what an arrangement computes
and how many calls it makes, not what its bytes cost between machines; and a small model's peak is mostly the libraries'.
On several GPUs: one rank each, NCCL. On one: one rank, and no collective exists.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.arrangements import Arrangement, arrangements
from bench.clock import summary
from bench.forks import apart, fork, free_port, last_error, rank_environment, wait
from bench.models import Model
from bench.results import Options, Row, failed
from bench.show import step, tell_parent
from dopsd_fast.errors import UserError

COUNTS = {"gathers_per_step": "", "gathers_of_one_weight_per_step": "", "gathers_for_average_per_step": "",
          "gathered_bytes_per_step": "B", "reduced_bytes_per_step": "B", "collectives_per_step": ""}  # fmt: skip
"""Metric -> unit."""
SAME_LOSS = {"fp32": 1e-3, "bf16": 0.1}
"""Largest relative difference of the first loss from plain's that is rounding and no other work."""
PRELOAD = ("deepspeed", "peft", "diffusers.models.transformers.transformer_z_image", "dopsd_fast.distributed.zero_engine",
           "bench.arrangements")  # fmt: skip
SECONDS = 1200
"""Time that one arrangement's ranks have."""


def run(options: Options) -> list[Row]:
    model = Model(options.model, options.device)  # refuses here what every rank would refuse
    available = torch.cuda.device_count() if options.device.type == "cuda" else 0
    if max(options.ranks, default=0) > available > 0:
        raise UserError(f"zero: --ranks {max(options.ranks)} on {available} GPU(s): use --ranks {available}, or --device cpu")
    rows = []
    for world in options.ranks or (available or 2,):
        if world == 1:
            print("zero: one rank: no collective exists; what is gathered and reduced is not shown", file=sys.stderr)
        rows += measure(options, model.suffix, world)
    return rows


def measure(options: Options, suffix: str, world: int) -> list[Row]:
    made = [one for kind in options.kinds for one in arrangements(kind, options.tour)]
    if not any(one.plain for one in made):
        made += [Arrangement(kind, kind, plain=True) for kind in options.kinds]
    rounds = options.repeats(usual=2, tour=1, quick=1)
    counted, timed = (1, 1) if options.quick else (1, 2) if options.tour else (2, 3)
    jobs = [Job(world, [one], options.model, counted if number == 0 else 0, timed) for number in range(rounds) for one in made]
    found: dict[Arrangement, list[dict[str, Any]]] = {one: [] for one in made}
    broken: dict[Arrangement, str] = {}
    for job, result in zip(jobs, launch(str(options.device), jobs)):
        (one,) = job.arrangements
        if isinstance(result, RankFailed):
            broken[one] = str(result)
        else:
            found[one] += result
    suffix += "" if world == 2 else f"@{world}_ranks"
    rows = []
    for one, results in found.items():
        loss = None if one.plain else same_loss(one, suffix, found, broken)
        if one in broken:
            for metric, unit in (("gathers_per_step", ""), ("seconds_per_step", "s"))[world == 1 :]:
                rows.append(failed("zero", one.case + suffix, one.variant, metric, unit, broken[one]))
        else:
            rows += tabulate(one, suffix, results, world)
        if loss is not None:
            rows.append(loss)
    plain = next((row for row in rows if row.key == ("zero", f"full{suffix}", "plain", "gathers_per_step")), None)
    return rows if plain is None else [*rows, replace(plain, case=f"full/resident{suffix}")]


def same_loss(
    one: Arrangement, suffix: str, found: dict[Arrangement, list[dict[str, Any]]], broken: dict[Arrangement, str]
) -> Row:
    """Its first loss against that of plain, of its own kind if that was measured: adapters add nothing yet. Another loss is
    other work: it is entered in `broken`."""
    row = Row("zero", one.case + suffix, "ours", "first_loss_relative_error", 0.0, "")
    plains = [other for other in found if other.plain and other not in broken]
    if one in broken or not plains:
        return failed(*row.key, "", broken.get(one, "plain, to compare with, failed"))
    plain = found[max(plains, key=lambda other: other.kind == one.kind)][0]
    mine = found[one][0]
    difference = abs(mine["first_loss"] / plain["first_loss"] - 1)
    if not difference <= SAME_LOSS[plain["precision"]]:
        broken[one] = f"other work than plain's: a first loss of {mine['first_loss']:.6g}, plain {plain['first_loss']:.6g}"
        return failed(*row.key, "", broken[one])
    return replace(row, value=difference, note="against plain")


def tabulate(one: Arrangement, suffix: str, results: list[dict[str, Any]], world: int) -> list[Row]:
    case, rows = one.case + suffix, []
    if world > 1:
        for metric, unit in COUNTS.items():
            values = [step[metric] for step in results[0]["steps"] if metric in step]
            note = f"differs from step to step: {values}" if len(set(values)) > 1 else ""
            if values:
                rows.append(Row("zero", case, one.variant, metric, sum(values) / len(values), unit, note=note))
    for metric, unit in (("seconds_per_step", "s"), ("peak_bytes", "B")):
        measured = [value for result in results for value in result[metric]]
        rows.append(Row("zero", case, one.variant, metric, unit=unit, **summary(measured)))
    return rows


# ---- ranks -----------------------------------------------------------------------------------------------------------


class RankFailed(RuntimeError):
    """A job that did not come to its end: the last error of a rank, one line."""


@dataclass(frozen=True)
class Job:
    """Arrangements that one group of `world` processes goes through: see `arrangements.examine`. `model`: as on the command
    line. `call`: what each rank calls for each of them, as "module:function"."""

    world: int
    arrangements: list[Arrangement]
    model: str
    counted: int
    timed: int
    call: str = "bench.arrangements:examine"

    def __str__(self) -> str:
        return f"{', '.join(f'{one.case} {one.variant}' for one in self.arrangements)}, {self.world} ranks"


def launch(device: str, jobs: Sequence[Job]) -> list[list[dict[str, Any]] | RankFailed]:
    """For each job, the results of its arrangements (see `examine`), of all ranks as one."""
    with tempfile.TemporaryDirectory(prefix="bench-zero-") as name:
        folder = Path(name)
        work = {"device": device, "jobs": [asdict(job) | {"said": str(job)} for job in jobs]}
        (folder / "work.json").write_text(json.dumps(work))
        environment = {"DS_ACCELERATOR": "cpu"} if device == "cpu" else {}
        lost = apart("bench.cases.zero:lead", [name], folder / "log", environment)
        return [_result(folder, number, job.world, lost) for number, job in enumerate(jobs)]


def _result(folder: Path, number: int, world: int, lost: str) -> list[dict[str, Any]] | RankFailed:
    """Counts must agree; of seconds and bytes the largest; of the loss the mean."""
    error = folder / f"{number}.error"
    files = [folder / f"{number}-{rank}.json" for rank in range(world)]
    if error.exists() or not all(file.exists() for file in files):
        return RankFailed(error.read_text() if error.exists() else lost or last_error(folder / "log"))
    merged = []
    for results in zip(*(json.loads(file.read_text()) for file in files), strict=True):
        if any(result["steps"] != results[0]["steps"] for result in results):
            return RankFailed(f"ranks counted different things: {[result['steps'] for result in results]}")
        whole = dict(results[0])
        for name in ("seconds_per_step", "peak_bytes"):
            whole[name] = [max(values) for values in zip(*(result[name] for result in results))]
        whole["first_loss"] = sum(result["first_loss"] for result in results) / len(results)
        merged.append(whole)
    return merged


def lead(folder: str) -> None:
    """Loads the libraries once; each job's ranks are forks of this process, on GPUs processes of their own. A job that fails is
    noted, and the next one begins."""
    tell_parent()
    work = json.loads((Path(folder) / "work.json").read_text())
    forks = work["device"] == "cpu"
    if forks:
        torch.set_num_threads(1)
        for name in PRELOAD:
            importlib.import_module(name)
        gc.freeze()
    for number, job in enumerate(work["jobs"]):
        step(job["said"])
        port, pids, logs = free_port(), [], []
        for rank_number in range(job["world"]):
            environment = rank_environment(rank_number, job["world"], port)
            logs.append(Path(folder) / f"{number}-{rank_number}.log")
            started = fork if forks else _spawn
            pids.append(started(partial(rank, folder, number), environment, logs[-1]))
        codes = wait(pids, SECONDS)
        if any(codes):
            first = next((i for i, code in enumerate(codes) if code > 0), codes.index(min(codes)))
            said = f"rank {first} ended with {codes[first]}: {last_error(logs[first])}"
            (Path(folder) / f"{number}.error").write_text(said)


def _spawn(call: partial[None], environment: dict[str, str], log: Path) -> int:
    """As `fork`, in a process of its own: CUDA does not survive a fork."""
    program = f"from bench.cases import zero; zero.{call.func.__name__}(*{call.args!r})"
    output = [(os.POSIX_SPAWN_OPEN, 1, str(log), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), (os.POSIX_SPAWN_DUP2, 1, 2)]
    return os.posix_spawn(sys.executable, [sys.executable, "-c", program], os.environ | environment, file_actions=output)


def rank(folder: str, number: int) -> None:
    """This process as a rank of job `number`."""
    from dopsd_fast.distributed.process_group import init_distributed
    from dopsd_fast.run.console import quiet_libraries

    quiet_libraries()
    job = json.loads((Path(folder) / "work.json").read_text())["jobs"][number]
    ranks = init_distributed(timedelta(minutes=5))
    module, _, function = job["call"].partition(":")
    call = getattr(importlib.import_module(module), function)
    model = Model(job["model"], ranks.device)
    results = [call(Arrangement(**one), model, ranks.rank, job["counted"], job["timed"]) for one in job["arrangements"]]
    (Path(folder) / f"{number}-{ranks.rank}.json").write_text(json.dumps(results))
    torch.distributed.destroy_process_group()
