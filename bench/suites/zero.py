"""Suite `zero`: what ranks send each other in a training step, and how long it takes, arrangement by arrangement.

The cases are ARRANGEMENTS: `ours` by ZeRO's stage, 3 where it is not said, and by how that gathers: gather=sweep for full,
which also recomputes activations, gather=step for full/resident and lora; .../offload has optimizer and average in CPU memory.
`plain` is references/plain_zero.py, the arrangement that one would write first. Every arrangement steps on the same noise and
contexts (K = 4 states, at most two pictures a rank); its first loss, which depends on no update and on no adapter, since their
B is zero, must be that of plain's full. Other numbers of ranks than 2 are in the case's name, as full@4_ranks.

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
    peak_bytes                of a rank's GPU: the most that is allocated

Counts are of every step from the second on, and must not differ between them. Arrangements cannot share a process group, so
there is no interleaving: each runs in processes of its own, one after the other. On CPU the ranks are processes with one
thread each that talk by gloo through memory and share the cores: seconds say what an arrangement computes and how many calls
it makes, not what its bytes cost between machines. On several GPUs: one rank each, NCCL. On one: one rank, and no collective
exists.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import takewhile
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import multiprocessing
from torch.multiprocessing.spawn import ProcessException, start_processes

from bench.clock import summary, synchronize
from bench.live import say, tick
from bench.models import Model
from bench.processes import free_port, rank_environment
from bench.references.plain_zero import LIKE_A_LARGE_MODEL, PlainZero
from bench.references.reference_eager import Adapter, Condition
from bench.results import Options, Row, failed
from bench.suites.collectives import Collectives
from bench.suites.workload import OurStep, Workload, settings_of
from dopsd_fast.distributed.process_group import init_distributed
from dopsd_fast.distributed.registry import make_engine
from dopsd_fast.errors import UserError
from dopsd_fast.method.registry import make_objective
from dopsd_fast.run.console import quiet_libraries
from dopsd_fast.settings.deepspeed_dict import deepspeed_config

COUNTS = {"gathers_per_step": "", "gathers_of_one_weight_per_step": "", "gathers_for_average_per_step": "",
          "gathered_bytes_per_step": "B", "reduced_bytes_per_step": "B", "collectives_per_step": ""}
"""Metric -> unit."""
LOSS = "first_loss_relative_error"
SAME_LOSS = {"fp32": 1e-3, "bf16": 0.1}
"""Largest relative difference of the first loss from plain's that is rounding and no other work."""
STATES = 4
LEARNING_RATE = 1e-4
TOLD, LOOKING = "bench zero ", 0.5
"""How a rank's line begins that says how far it is, as "variant|step|seconds left"; seconds between two looks at it."""
PATIENCE = timedelta(minutes=5)
"""How long a rank waits in a collective for the others."""
PRELOAD = ["deepspeed", "peft", "diffusers.models.transformers.transformer_z_image", "bench.suites.zero"]


@dataclass(frozen=True)
class Arrangement:
    case: str
    kind: str = "full"
    stage: int = 3
    gather: str = "step"
    offload: bool = False
    plain: bool = False
    """The peer's; the other fields but `kind` do not matter."""

    @property
    def variant(self) -> str:
        return "plain" if self.plain else "ours"


PLAIN = Arrangement("full", plain=True)
TOUR = (PLAIN, Arrangement("full", gather="sweep"), Arrangement("full/resident"), Arrangement("lora", "lora"))
ARRANGEMENTS = (
    *TOUR,
    Arrangement("full/unit", gather="unit"),
    *(Arrangement(f"full/stage{stage}", stage=stage) for stage in (0, 1, 2)),
    Arrangement("full/offload", gather="sweep", offload=True),
    Arrangement("full/resident/offload", offload=True),
    Arrangement("full/stage2/offload", stage=2, offload=True),
    Arrangement("lora", "lora", plain=True),
    Arrangement("lora/unit", "lora", gather="unit"),
    *(Arrangement(f"lora/stage{stage}", "lora", stage) for stage in (0, 2)),
)
"""The first is the one that all others are compared with."""


def measure(options: Options) -> Iterator[Row]:
    """Rows as they are found, arrangement by arrangement."""
    model = Model(options.model, options.device)  # refuses here what every rank would refuse
    available = torch.cuda.device_count() if options.device.type == "cuda" else 0
    if max(options.ranks, default=0) > available > 0:
        raise UserError(f"zero: --ranks {max(options.ranks)} on {available} GPU(s): use --ranks {available}, or --device cpu")
    made = [one for one in (TOUR if options.tour else ARRANGEMENTS) if one == PLAIN or one.kind in options.kinds]
    for world in options.ranks or (available or 2,):
        suffix = model.suffix + ("" if world == 2 else f"@{world}_ranks")
        counted = 0 if world == 1 else 1 if options.quick or options.tour else 2
        jobs = [Job(world, [one], options.model, counted, options.repeats(usual=6, tour=2, quick=1)) for one in made]
        plain: dict[str, Any] = {}
        for one, found in zip(made, launch(str(options.device), jobs)):
            try:
                if isinstance(found, RankFailed):
                    raise found
                plain = found[0] if one == PLAIN else plain
                yield from rows_of(one, one.case + suffix, found[0], plain)
            except RankFailed as error:
                for metric, unit in (("gathers_per_step", ""), ("seconds_per_step", "s")):
                    yield failed("zero", one.case + suffix, one.variant, metric, unit, str(error))


def rows_of(one: Arrangement, case: str, result: Mapping[str, Any], plain: Mapping[str, Any]) -> Iterator[Row]:
    """`plain`: the result of PLAIN; empty: it failed. RankFailed: the first loss is another than plain's, and so the work."""
    if plain and not one.plain:
        loss, true = result["first_loss"], plain["first_loss"]
        if not abs(loss / true - 1) <= SAME_LOSS[plain["precision"]]:
            raise RankFailed(f"other work than plain's: a first loss of {loss:.6g}, plain {true:.6g}")
        yield Row("zero", case, "ours", LOSS, abs(loss / true - 1), "", note="against plain")
    elif not one.plain:
        yield failed("zero", case, "ours", LOSS, "", "plain, to compare with, failed")
    for metric, unit in COUNTS.items():
        values = [step[metric] for step in result["steps"] if metric in step]
        note = f"differs from step to step: {values}" if len(set(values)) > 1 else ""
        if values:
            yield Row("zero", case, one.variant, metric, sum(values) / len(values), unit, note=note)
    for metric, unit in (("seconds_per_step", "s"), ("peak_bytes", "B")):
        if result[metric]:
            yield Row("zero", case, one.variant, metric, unit=unit, **summary(result[metric]))


# ---- what a rank steps ------------------------------------------------------------------------------------------------


class Batch:
    """What every arrangement steps on, as `Workload` has it; noise and contexts are a rank's own. `batch`: pictures a rank, no
    more than two."""

    states = STATES
    contexts = Workload.contexts

    def __init__(self, model: Model, rank: int) -> None:
        self.model, self.family, standard = model, model.family, model.standard
        self.batch = min(2, standard.batch)
        self.grid = model.grid(STATES, standard.pixels)
        end = (rank + 1) * self.batch
        self.noise = model.noise(end, standard.pixels)[-self.batch :]
        self.student, self.teacher = (
            [Condition(text) for text in model.features(end, tokens, seed)[-self.batch :]]
            for seed, tokens in enumerate((standard.text_tokens, standard.teacher_tokens), 1)
        )


class Ours(OurStep):
    """Pair, objective and engine as the trainer runs them over ranks; the adapters as PEFT draws them, B zero."""

    def __init__(self, one: Arrangement, batch: Batch) -> None:
        zero: dict[str, Any] = dict(LIKE_A_LARGE_MODEL) if one.stage == 3 else {}
        if one.offload:
            zero["offload_optimizer"] = {"device": "cpu"}
        self.work = batch  # type: ignore[assignment]
        settings = settings_of(
            one.kind, batch,
            train={"learning_rate": LEARNING_RATE, "activations": "recompute" if one.gather == "sweep" else "keep"},
            deepspeed={"stage": one.stage, "gather": one.gather if one.stage == 3 else "auto",
                       "config": {"zero_optimization": zero} if zero else {}},
        )
        self.pair = batch.model.pair(settings)
        self.objective = make_objective(settings.method)
        s = settings
        self.engine = make_engine(self.pair, s.train, s.teacher, s.deepspeed, deepspeed_config(s))

    def weights(self) -> Iterator[tuple[str | None, Any]]:
        """(stock name, parameter) of student and teacher; None for an adapter's."""
        for branch in filter(None, (self.pair.student, self.pair.teacher)):
            for name, parameter in branch.named_parameters():
                yield None if ".lora_" in name else name.replace(".base_layer.", "."), parameter

    def step(self) -> float:  # type: ignore[override]
        self.backward()
        self.engine.step(LEARNING_RATE)
        return self.report.loss

    def counted(self) -> dict[str, float]:
        with Collectives(self.weights()) as counted:
            self.step()
        return counted.counts()


class Plain:
    def __init__(self, one: Arrangement, batch: Batch) -> None:
        standard = batch.model.standard
        adapter = Adapter(standard.rank, standard.alpha) if one.kind == "lora" else None
        sigmas = [1.0 - t for t in batch.grid]
        self.peer = PlainZero(batch.model.transformer(), sigmas, batch_size=batch.batch, adapter=adapter,
                              learning_rate=LEARNING_RATE)
        self.inputs = batch.noise, batch.student, batch.teacher
        self.close = self.peer.close

    def step(self) -> float:
        return self.peer.step(*self.inputs)

    def counted(self) -> dict[str, float]:
        weights = list(self.peer.weights())
        with Collectives(weights) as main:
            self.peer.backward(*self.inputs)
        with Collectives(weights) as average:
            self.peer.update_teacher()
        step, more = main.counts(), average.counts()
        for name in ("gathered_bytes_per_step", "reduced_bytes_per_step", "collectives_per_step"):
            step[name] += more[name]
        return step | {"gathers_for_average_per_step": more["gathers_per_step"]}


def examine(one: Arrangement, model: Model, rank: int, counted: int, timed: int) -> dict[str, Any]:
    """Builds the arrangement on this rank and steps it: once, `counted` times under the counter, `timed` times under the
    clock."""
    torch.manual_seed(0)
    program = (Plain if one.plain else Ours)(one, Batch(model, rank))
    whole, began = 1 + counted + timed, time.monotonic()

    def tell(done: int) -> None:
        left = (time.monotonic() - began) / done * (whole - done)
        print(f"{TOLD}{one.variant}|step {done} of {whole}|{left}", flush=True)

    first_loss = program.step()
    tell(1)
    steps = []
    for number in range(counted):
        steps.append(program.counted())
        tell(2 + number)
    seconds = []
    for number in range(timed):
        torch.distributed.barrier()
        synchronize(model.device)
        started = time.perf_counter()
        program.step()
        synchronize(model.device)
        seconds.append(time.perf_counter() - started)
        tell(2 + counted + number)
    peak = [torch.cuda.max_memory_allocated()] if model.device.type == "cuda" else []
    program.close()
    return {"first_loss": first_loss, "steps": steps, "seconds_per_step": seconds, "peak_bytes": peak,
            "precision": model.precision}


# ---- ranks -----------------------------------------------------------------------------------------------------------


class RankFailed(RuntimeError):
    """A job that did not come to its end: the last error of a rank, one line."""


@dataclass(frozen=True)
class Job:
    """Arrangements that one group of `world` processes goes through. `model`: as on the command line. `call`: what each rank
    calls for each of them."""

    world: int
    arrangements: Sequence[Arrangement]
    model: str
    counted: int
    timed: int
    call: Callable[[Arrangement, Model, int, int, int], dict[str, Any]] = examine


def launch(device: str, jobs: Sequence[Job]) -> Iterator[list[dict[str, Any]] | RankFailed]:
    """For each job, as soon as it has ended, the results of its arrangements, of all ranks as one. On a CPU the ranks are forks
    of a process that has the libraries loaded; CUDA does not survive a fork."""
    environment = {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0", "TOKENIZERS_PARALLELISM": "false"}
    environment |= {"DS_ACCELERATOR": "cpu"} if device == "cpu" else {}
    multiprocessing.set_forkserver_preload(PRELOAD)
    for job in jobs:
        say(f"zero: {', '.join(one.case + ', plain' * one.plain for one in job.arrangements)}, {job.world} ranks")
        with tempfile.TemporaryDirectory(prefix="bench-zero-") as folder, mock.patch.dict(os.environ, environment):
            try:
                ranks = start_processes(  # daemons, so that they end with this process
                    rank, (job, folder, free_port()), job.world, join=False, daemon=True,
                    start_method="forkserver" if device == "cpu" else "spawn")
                while not ranks.join(LOOKING):
                    pass_on(Path(folder) / "0.log")
            except ProcessException as error:
                lines = takewhile(lambda line: not line.startswith(" "), reversed(str(error).strip().splitlines()))
                found: Any = RankFailed(f"rank {error.error_index}: {' '.join([*lines][::-1])}")
            else:
                found = json.loads((Path(folder) / "found.json").read_text())
        yield found


def pass_on(log: Path) -> None:
    """The last that a rank told of itself."""
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    told = [line.removeprefix(TOLD) for line in lines if line.startswith(TOLD) and line.count("|") == 2]
    if told:
        variant, done, left = told[-1].split("|")
        tick(variant, done, float(left))


def rank(index: int, job: Job, folder: str, port: int) -> None:
    """This process as a rank of `job`."""
    log = os.open(Path(folder) / f"{index}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)  # what libraries print is not for the terminal
    os.dup2(log, 2)
    os.environ.update(rank_environment(index, job.world, port))
    quiet_libraries()
    torch.set_num_threads(1)
    model = Model(job.model, init_distributed(PATIENCE).device)
    results = [job.call(one, model, index, job.counted, job.timed) for one in job.arrangements]
    everyone: list[Any] = [None] * job.world
    torch.distributed.all_gather_object(everyone, results)
    if index == 0:
        (Path(folder) / "found.json").write_text(json.dumps([as_one(several) for several in zip(*everyone)]))
    torch.distributed.destroy_process_group()


def as_one(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of all ranks: counts must agree; of seconds and bytes the largest; of the loss the mean."""
    if any(result["steps"] != results[0]["steps"] for result in results):
        raise RankFailed(f"ranks counted different things: {[result['steps'] for result in results]}")
    slowest = {name: [max(values) for values in zip(*(result[name] for result in results))]
               for name in ("seconds_per_step", "peak_bytes")}
    return results[0] | slowest | {"first_loss": sum(result["first_loss"] for result in results) / len(results)}
