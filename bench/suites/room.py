"""What of a training step fits a GPU: what is measured in turns, and how deep a model is trained in full.

Ours is what dopsd_fast.plan says, activations kept. A peer in bf16 holds 2 bytes a parameter and 14 a trained one, R1 both
encoders too; for a time it has the inputs of all blocks for each of K graphs and one block's values, R4 the values of all
blocks; of two, each takes its step while the other waits. What does not fit after all is a row of status "failed". A CPU's
memory is taken to suffice.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from bench.models import WIDE
from bench.suites.workload import settings_of
from dopsd_fast.conditioning.context import Shapes
from dopsd_fast.memory.ledger import Machine
from dopsd_fast.memory.planner import make_plan

ENCODERS = 2 * (4_022_000_000 + 4_438_000_000)  # bytes of R1's encoders beside a model as wide as the published ones
EAGER = {"lora": 35, "full": 45}  # values a token and channel that an eager block keeps for its backward pass


class Room:
    """Of one configuration. layers: the depth that it is measured at, None for the model's own; masters: how ours keeps its.
    Sizes are the bytes that a step holds, and those that it takes beside them for a time."""

    def __init__(self, kind: str, work: Any) -> None:
        self.kind, self.work, self.config = kind, work, work.model.config
        self.layers, self.masters, self.bytes, self.ours = work.cell.layers, "fp32", float("inf"), (0.0, 0.0)
        if work.model.device.type == "cuda":
            self.bytes = 0.92 * torch.cuda.get_device_properties(work.model.device).total_memory  # 0.08 for fragmentation
            whole, free = self.config["n_layers"], kind == "full" and self.layers is None and work.model.random
            tries = [(whole, "fp32"), *([(whole, "low_bits")] if kind == "full" else [])]
            tries += [(depth, "fp32") for depth in range(whole - 2, 0, -2) if free]
            depth, self.masters = next((one for one in tries if sum(self.planned(*one)) <= self.bytes), tries[0])
            self.layers, self.ours = self.layers if depth == whole else depth, self.planned(depth, self.masters)

    def planned(self, layers: int, masters: str) -> tuple[float, float]:
        """Of ours. It follows from 2 layers and all: the plan is convex in the depth, so what lies between is not more."""
        work, width, ends = self.work, self.config["cap_feat_dim"], []
        texts = [{"text": (tokens, width)} for tokens in (work.model.standard.text_tokens, work.model.standard.teacher_tokens)]
        shapes = Shapes(work.family.latent_shape(work.pixels, work.pixels), *texts)
        settings, family = settings_of(self.kind, work, train={"masters": masters}), copy.copy(work.family)
        for depth in (2, whole := self.config["n_layers"]):
            family.transformer_config = family.transformer_config | {"n_layers": depth}
            plan = make_plan(settings, Machine(1, 1, None, None, "cuda"), family, shapes)
            held = sum(plan.worst.device[name] for name in ("weights", "masters", "moments", "EMA", "CUDA context"))
            ends.append((held, plan.device_peak - held))
        held, taken = (a + (b - a) * (layers - 2) / max(whole - 2, 1) for a, b in zip(*ends))
        return held, taken

    def peer(self, name: str) -> tuple[float, float]:
        work, config = self.work, self.config
        encoders = ENCODERS if name == "R1" and config["dim"] >= WIDE else 0
        held = 14.0 * work.trained(self.kind) + (2 * work.parameters if self.kind == "lora" else 0) + encoders
        tokens = work.batch * ((work.pixels // work.family.pixel_multiple) ** 2 + work.model.standard.text_tokens)
        blocks = config["n_layers"] + config["n_refiner_layers"]
        values = EAGER[self.kind] * blocks if name == "R4" else work.states * blocks + EAGER[self.kind]
        return held, 2.0 * tokens * config["dim"] * values

    def beside_ours(self, name: str) -> bool:
        held, taken = zip(self.ours, self.peer(name))
        return sum(held) + max(taken) <= self.bytes
