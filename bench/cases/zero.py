"""Suite `zero`: what ranks send each other in a training step, and how long it takes, arrangement by arrangement.

Cases, of `ours`:   full            ZeRO-3, gather=sweep, activations=recompute
                    full/resident   ZeRO-3, gather=step
                    full/unit       ZeRO-3, gather=unit
                    full/stage0 ... full/stage2, and .../offload: optimizer and average in CPU memory
                    lora            ZeRO-3, gather=step; lora/unit, lora/stage0, lora/stage2 as above
`plain` is peers/plain_zero.py, the arrangement that one would write first; its gathers are shown in each case that it is
compared with. Every arrangement steps on the same noise and contexts (K = 4 states), and its first loss must be plain's.

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
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from bench.cases.collectives import Collectives
from bench.peers.plain_zero import LIKE_A_LARGE_MODEL, PlainZero
from bench.peers.reference_eager import Adapter, Condition
from bench.results import ROOT, Options, Row, summary, synchronize
from dopsd_fast.errors import UserError
from dopsd_fast.settings import Settings

STATES, BATCH, PIXELS = 4, 2, 32
TEXT_TOKENS, TEACHER_TOKENS = 20, 80
SEED = 0
COUNTS = {"gathers_per_step": "", "gathers_of_one_weight_per_step": "", "gathers_for_average_per_step": "",
          "gathered_bytes_per_step": "B", "reduced_bytes_per_step": "B", "collectives_per_step": ""}  # fmt: skip
"""Metric -> unit."""
PRELOAD = ("deepspeed", "peft", "diffusers.models.transformers.transformer_z_image", "dopsd_fast.sharding")


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


def arrangements(kind: str) -> list[Arrangement]:
    made = [Arrangement(kind, kind, gather="sweep" if kind == "full" else "step"), Arrangement(kind, kind, plain=True)]
    made.append(Arrangement(f"{kind}/unit", kind, gather="unit"))
    if kind == "lora":
        return [*made, Arrangement("lora/stage0", kind, 0), Arrangement("lora/stage2", kind, 2)]
    made.append(Arrangement("full/resident"))
    made += [Arrangement(f"full/stage{stage}", kind, stage) for stage in (0, 1, 2)]
    made += [replace(one, case=f"{one.case}/offload", offload=True) for one in made
             if not one.plain and one.case in ("full", "full/resident", "full/stage2")]  # fmt: skip
    return made


def run(options: Options, ranks: tuple[int, ...] = ()) -> list[Row]:
    """`ranks`: how many, one or several numbers; by default 2 on CPU, one a GPU."""
    available = torch.cuda.device_count() if options.device.type == "cuda" else 0
    if max(ranks, default=0) > available > 0:
        raise UserError(f"zero: --ranks {max(ranks)} on {available} GPU(s): use --ranks {available}, or --device cpu")
    rows = []
    for world in ranks or (available or 2,):
        if world == 1:
            print("zero: one rank: no collective exists; what is gathered and reduced is not shown", file=sys.stderr)
        rows += measure(options, world)
    return rows


def measure(options: Options, world: int) -> list[Row]:
    made = [one for kind in options.kinds for one in arrangements(kind)]
    rounds = options.rounds or (1 if options.quick else 2)
    jobs = [Job(world, [one], 2 if number == 0 else 0, 1 if options.quick else 3) for number in range(rounds) for one in made]
    found: dict[Arrangement, list[dict[str, Any]]] = {one: [] for one in made}
    for job, (result,) in zip(jobs, launch(options.model, str(options.device), jobs)):
        found[job.arrangements[0]].append(result)
    for kind in options.kinds:
        compare({one.case: results[0] for one, results in found.items() if one.kind == kind and not one.plain},
                next(results[0] for one, results in found.items() if one.kind == kind and one.plain))  # fmt: skip
    suffix = "" if options.model == Settings().model.folder else f"@{options.model.name}"
    suffix += "" if world == 2 else f"@{world}_ranks"
    rows = [row for one, results in found.items() for row in tabulate(one, suffix, results, world)]
    if world > 1 and "full" in options.kinds:
        wanted = ("full" + suffix, "plain", "gathers_per_step")
        plain = next(row for row in rows if (row.case, row.variant, row.metric) == wanted)
        rows.append(replace(plain, case=f"full/resident{suffix}"))
    return rows


def compare(ours: dict[str, dict[str, Any]], plain: dict[str, Any]) -> None:
    """The first loss depends on no update and on no random adapter: the same work gives the same number."""
    for case, result in ours.items():
        difference = abs(result["first_loss"] / plain["first_loss"] - 1)
        if difference > (1e-3 if plain["precision"] == "float32" else 0.1):
            raise RuntimeError(f"zero: {case} has a first loss of {result['first_loss']}, plain of {plain['first_loss']}")


def tabulate(one: Arrangement, suffix: str, results: list[dict[str, Any]], world: int) -> list[Row]:
    case, rows = one.case + suffix, []
    if world > 1:
        for metric, unit in COUNTS.items():
            values = [step[metric] for step in results[0]["steps"] if metric in step]
            if len(set(values)) > 1:
                print(f"zero: {case}, {one.variant}: {metric} differs from step to step: {values}", file=sys.stderr)
            if values:
                rows.append(Row("zero", case, one.variant, metric, sum(values) / len(values), unit))
    for metric, unit in (("seconds_per_step", "s"), ("peak_bytes", "B")):
        values = [value for result in results for value in result[metric]]
        rows.append(Row("zero", case, one.variant, metric, unit=unit, **summary(values)))
    return rows


# ---- one arrangement on one rank -------------------------------------------------------------------------------------


class Batch:
    """What every arrangement steps on; noise and contexts are a rank's own."""

    def __init__(self, model: Path, rank: int, device: torch.device, dtype: torch.dtype) -> None:
        from dopsd_fast.families import open_family

        self.family = open_family(model, Settings().conditioning)
        if self.family.name != "zimage":
            raise UserError(f"zero: {model} is {self.family.name}, the published step is written for zimage pipelines")
        shape = self.family.latent_shape(PIXELS, PIXELS)
        self.grid = self.family.train_grid(STATES, 0.0, shape)
        width = self.family.transformer_config["cap_feat_dim"]
        draw = torch.Generator().manual_seed(SEED + rank)
        self.noise = torch.randn((BATCH, *shape), generator=draw).to(device)
        self.student, self.teacher = (
            [torch.randn(tokens, width, generator=draw).to(device, dtype) for _ in range(BATCH)]
            for tokens in (TEXT_TOKENS, TEACHER_TOKENS)
        )


class Ours:
    """Pair, objective and engine as the trainer runs them."""

    def __init__(self, one: Arrangement, model: Path, batch: Batch, precision: str) -> None:
        from dopsd_fast.objective import make_objective
        from dopsd_fast.sharding import Engine
        from dopsd_fast.teacher import build_pair

        zero: dict[str, Any] = dict(LIKE_A_LARGE_MODEL) if one.stage == 3 else {}
        if one.offload:
            zero["offload_optimizer"] = {"device": "cpu"}
        settings = Settings.model_validate({
            "model": {"path": str(model)},
            "train": {"batch_size": BATCH, "learning_rate": 1e-4, "precision": precision,
                      "activations": "recompute" if one.gather == "sweep" else "keep"},
            "method": {"num_states": STATES},
            "adapter": {"kind": one.kind, "rank": 16, "alpha": 32.0},
            "deepspeed": {"stage": one.stage, "gather": one.gather if one.stage == 3 else "auto",
                          "config": {"zero_optimization": zero} if zero else {}},
        })  # fmt: skip
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
        self.batch = batch
        self.pair = build_pair(batch.family, settings, dtype).to(batch.noise.device)
        self.objective = make_objective(settings)
        self.engine = Engine(self.pair, settings)

    def weights(self) -> Iterator[tuple[str | None, Any]]:
        """(stock name, parameter) of student and teacher; None for an adapter's."""
        for branch in filter(None, (self.pair.student, self.pair.teacher)):
            for name, parameter in branch.named_parameters():
                yield None if ".lora_" in name else name.replace(".base_layer.", "."), parameter

    def step(self) -> float:
        from dopsd_fast.objective import StepInputs

        batch = self.batch
        student, teacher = ([{"text": text} for text in texts] for texts in (batch.student, batch.teacher))
        with self.engine.accumulating():
            forward = self.pair.open(batch.family, student, teacher, batch.noise.shape)
            inputs = StepInputs(noise=batch.noise, grid=batch.grid, forward=forward)
            report = self.objective.accumulate(inputs, self.engine.backward)
        self.engine.step(1e-4)
        return report.loss

    def counted(self) -> dict[str, float]:
        with Collectives(self.weights()) as counted:
            self.step()
        return counts(counted)

    def close(self) -> None:
        self.engine.close()


class Plain:
    def __init__(self, one: Arrangement, model: Path, batch: Batch, precision: str) -> None:
        transformer = batch.family.load_transformer({"fp32": torch.float32, "bf16": torch.bfloat16}[precision])
        adapter = Adapter(16, 32.0) if one.kind == "lora" else None
        sigmas = [1.0 - t for t in batch.grid]
        self.peer = PlainZero(transformer.to(batch.noise.device), sigmas, batch_size=BATCH, adapter=adapter)
        self.inputs = (batch.noise, [Condition(text) for text in batch.student], [Condition(text) for text in batch.teacher])

    def step(self) -> float:
        return self.peer.step(*self.inputs)

    def counted(self) -> dict[str, float]:
        weights = list(self.peer.weights())
        with Collectives(weights) as main:
            self.peer.backward(*self.inputs)
        with Collectives(weights) as average:
            self.peer.update_teacher()
        whole = counts(main)
        for name, value in counts(average).items():
            if name == "gathers_per_step":
                whole["gathers_for_average_per_step"] = value
            elif name != "gathers_of_one_weight_per_step":
                whole[name] += value
        return whole

    def close(self) -> None:
        self.peer.close()


def counts(counted: Collectives) -> dict[str, float]:
    return {
        "gathers_per_step": counted.gathers,
        "gathers_of_one_weight_per_step": max(counted.times.values(), default=0),
        "gathered_bytes_per_step": counted.gathered_bytes,
        "reduced_bytes_per_step": counted.reduced_bytes,
        "collectives_per_step": len(counted.log),
    }


def examine(one: Arrangement, model: Path, device: torch.device, rank: int, counted: int, timed: int) -> dict[str, Any]:
    """Builds the arrangement on this rank and steps it."""
    precision = "bf16" if device.type == "cuda" else "fp32"
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    batch = Batch(model, rank, device, dtype)
    memory = Memory(device)
    torch.manual_seed(SEED)
    program = (Plain if one.plain else Ours)(one, model, batch, precision)
    first_loss = program.step()
    steps = [program.counted() for _ in range(counted)]
    if timed:
        program.step()
    seconds = []
    for _ in range(timed):
        torch.distributed.barrier()
        synchronize(device)
        started = time.perf_counter()
        program.step()
        synchronize(device)
        seconds.append(time.perf_counter() - started)
    result = {"first_loss": first_loss, "steps": steps, "seconds_per_step": seconds, "peak_bytes": [memory.growth()],
              "precision": str(dtype).removeprefix("torch.")}  # fmt: skip
    program.close()
    return result


class Memory:
    """Growth of this process's memory to its highest point since now."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        gc.collect()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device)
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the highest point is forgotten
            self.before = self._status("VmRSS")

    def growth(self) -> float:
        if self.device.type == "cuda":
            return float(torch.cuda.max_memory_allocated(self.device) - self.before)
        return float(self._status("VmHWM") - self.before)

    def _status(self, name: str) -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
        return int(line.split()[1]) * 1024


# ---- ranks -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """Arrangements that one group of `world` processes goes through: of each, a first step, `counted` steps, then, if there
    are any, one more before `timed` steps. `call`: what each rank calls for each of them, as "module:function"."""

    world: int
    arrangements: list[Arrangement]
    counted: int
    timed: int
    call: str = "bench.cases.zero:examine"


def launch(model: Path, device: str, jobs: list[Job]) -> list[list[dict[str, Any]]]:
    """For each job, the results of its arrangements (see `examine`), of all ranks as one."""
    with tempfile.TemporaryDirectory(prefix="bench-zero-") as name:
        folder = Path(name)
        work = {"model": str(model), "device": device, "jobs": [asdict(job) for job in jobs]}
        (folder / "work.json").write_text(json.dumps(work))
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0", "TOKENIZERS_PARALLELISM": "false"}
        if device == "cpu":
            environment["DS_ACCELERATOR"] = "cpu"
        command = [sys.executable, "-c", "import sys; from bench.cases import zero; sys.exit(zero.lead(sys.argv[1]))", name]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"zero: {done.stderr[-4000:]}")
        return [_merged([json.loads(file.read_text()) for file in sorted(folder.glob(f"{number}-*.json"))])
                for number in range(len(jobs))]  # fmt: skip


def _merged(ranks: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Counts must agree; of seconds and bytes the largest; of the loss the mean."""
    merged = []
    for results in zip(*ranks, strict=True):
        if any(result["steps"] != results[0]["steps"] for result in results):
            raise RuntimeError(f"zero: ranks counted different things: {[result['steps'] for result in results]}")
        whole = dict(results[0])
        for name in ("seconds_per_step", "peak_bytes"):
            whole[name] = [max(values) for values in zip(*(result[name] for result in results))]
        whole["first_loss"] = sum(result["first_loss"] for result in results) / len(results)
        merged.append(whole)
    return merged


def lead(folder: str) -> int:
    """Loads the libraries once; each job's ranks are forks of this process, on GPUs processes of their own."""
    work = json.loads((Path(folder) / "work.json").read_text())
    fork = work["device"] == "cpu"
    if fork:
        torch.set_num_threads(1)
        for name in PRELOAD:
            importlib.import_module(name)
        gc.freeze()
    for number, job in enumerate(work["jobs"]):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        ranks = {}
        for rank in range(job["world"]):
            environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job["world"], "MASTER_ADDR": "127.0.0.1",
                           "MASTER_PORT": port}  # fmt: skip
            ranks[_start(folder, number, {key: str(value) for key, value in environment.items()}, fork)] = rank
        while ranks:
            pid, status = os.wait()
            rank = ranks.pop(pid)
            if status:
                for other in ranks:
                    os.kill(other, signal.SIGKILL)
                said = (Path(folder) / f"{number}-{rank}.log").read_text()
                cases, code = ", ".join(one["case"] for one in job["arrangements"]), os.waitstatus_to_exitcode(status)
                print(f"rank {rank} of {cases} ended with {code}:\n{said[-3000:]}", file=sys.stderr)
                return 1
    return 0


def _start(folder: str, number: int, environment: dict[str, str], fork: bool) -> int:
    log = Path(folder) / f"{number}-{environment['RANK']}.log"
    if not fork:
        command = [sys.executable, "-c", "import sys; from bench.cases import zero; zero.rank(sys.argv[1], int(sys.argv[2]))",
                   folder, str(number)]  # fmt: skip
        with log.open("w") as out:
            return subprocess.Popen(command, env=os.environ | environment, stdout=out, stderr=out).pid
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.environ.update(environment)
        rank(folder, number)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def rank(folder: str, number: int) -> None:
    """This process as a rank of job `number`."""
    from dopsd_fast.sharding import init_distributed
    from dopsd_fast.telemetry import quiet_libraries

    quiet_libraries()
    work = json.loads((Path(folder) / "work.json").read_text())
    job = work["jobs"][number]
    ranks = init_distributed(timedelta(minutes=5))
    module, _, function = job["call"].partition(":")
    call = getattr(importlib.import_module(module), function)
    results = [
        call(Arrangement(**one), Path(work["model"]), ranks.device, ranks.rank, job["counted"], job["timed"])
        for one in job["arrangements"]
    ]
    part = Path(folder) / f"{number}-{ranks.rank}.json"
    part.write_text(json.dumps(results))
    torch.distributed.destroy_process_group()
