"""What suite `zero` measures: the arrangements of a training step over ranks, and one of them on one rank."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bench.clock import synchronize
from bench.models import Model
from bench.references.plain_zero import LIKE_A_LARGE_MODEL, PlainZero
from bench.references.reference_eager import Adapter, Condition
from bench.suites.collectives import Collectives
from bench.suites.workload import OurStep, Workload, settings_of
from dopsd_fast.distributed.registry import make_engine
from dopsd_fast.method.registry import make_objective
from dopsd_fast.settings.deepspeed_dict import deepspeed_config

STATES = 4
SEED = 0
LEARNING_RATE = 1e-4


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


def arrangements(kind: str, standard: bool = False) -> list[Arrangement]:
    """`standard`: those that are named in README; the plain one of LoRA takes longest of all, and is not among them."""
    made = [Arrangement(kind, kind, gather="sweep" if kind == "full" else "step"), Arrangement(kind, kind, plain=True)]
    if standard:
        return [*made, Arrangement("full/resident")] if kind == "full" else made[:1]
    made.append(Arrangement(f"{kind}/unit", kind, gather="unit"))
    if kind == "lora":
        return [*made, Arrangement("lora/stage0", kind, 0), Arrangement("lora/stage2", kind, 2)]
    made.append(Arrangement("full/resident"))
    made += [Arrangement(f"full/stage{stage}", kind, stage) for stage in (0, 1, 2)]
    made += [replace(one, case=f"{one.case}/offload", offload=True) for one in made
             if not one.plain and one.case in ("full", "full/resident", "full/stage2")]
    return made


class Batch:
    """What every arrangement steps on, as `Workload` has it; noise and contexts are a rank's own. `batch`: pictures a rank, no
    more than two."""

    states = STATES
    contexts = Workload.contexts

    def __init__(self, model: Model, rank: int) -> None:
        self.model, self.family, standard = model, model.family, model.standard
        self.batch = min(2, standard.batch)
        self.grid = model.grid(STATES, standard.pixels)
        shape, width = self.family.latent_shape(standard.pixels, standard.pixels), model.config["cap_feat_dim"]
        draw = torch.Generator().manual_seed(SEED + rank)
        self.noise = torch.randn((self.batch, *shape), generator=draw).to(model.device)
        self.student, self.teacher = (
            [Condition(torch.randn(tokens, width, generator=draw).to(model.device, model.dtype)) for _ in range(self.batch)]
            for tokens in (standard.text_tokens, standard.teacher_tokens)
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
        self.engine = make_engine(self.pair, settings.train, settings.teacher, settings.deepspeed, deepspeed_config(settings))

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
        return counts(counted)


class Plain:
    def __init__(self, one: Arrangement, batch: Batch) -> None:
        standard = batch.model.standard
        adapter = Adapter(standard.rank, standard.alpha) if one.kind == "lora" else None
        sigmas = [1.0 - t for t in batch.grid]
        self.peer = PlainZero(batch.model.transformer(), sigmas, batch_size=batch.batch, adapter=adapter,
                              learning_rate=LEARNING_RATE)
        self.inputs = batch.noise, batch.student, batch.teacher

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


def examine(one: Arrangement, model: Model, rank: int, counted: int, timed: int) -> dict[str, Any]:
    """Builds the arrangement on this rank and steps it: once, `counted` times under the counter, `timed` times under the clock;
    the first step under the clock is at least the third."""
    batch, device = Batch(model, rank), model.device
    memory = Memory(device)
    torch.manual_seed(SEED)
    program = (Plain if one.plain else Ours)(one, batch)
    first_loss = program.step()
    steps = [program.counted() for _ in range(counted)]
    if timed and not counted:
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
              "precision": model.precision}
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
