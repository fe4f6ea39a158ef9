"""What a run is made of, for those who help the trainer: pictures, report, export."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from dopsd_fast.conditioning.contexts import Contexts
from dopsd_fast.data.records import Dataset
from dopsd_fast.distributed.consensus import Consensus
from dopsd_fast.distributed.engine import Engine
from dopsd_fast.families.base import Family
from dopsd_fast.memory.planner import Plan
from dopsd_fast.method.objective import Objective
from dopsd_fast.pair.student_teacher import Pair
from dopsd_fast.settings.schema import Settings


@dataclass(frozen=True)
class RunParts:
    """Built once, before the first step, and never changed.

    variants: what makes the model another than the deployed one, where `model.allow` lets it in. coverage: kind of matrix ->
    (adapted, there), empty without an adapter. parameters: of the transformer, without adapters. first: steps that were done
    when this process started. say: prints on rank 0."""

    settings: Settings
    folder: Path
    rank: int
    world: int
    device: torch.device
    dtype: torch.dtype
    consensus: Consensus
    family: Family
    variants: list[str]
    coverage: dict[str, tuple[int, int]]
    data: Dataset
    batches_per_epoch: int
    global_batch: int
    objective: Objective
    plan: Plan
    contexts: Contexts
    pair: Pair
    parameters: int
    engine: Engine
    first: int
    say: Callable[[str], None]
