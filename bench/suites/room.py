"""What of a training step fits a GPU, by arithmetic: what is measured in turns, and how deep a model is trained in full.

Bytes, bf16, P parameters of the transformer and T trained ones, teacher, moments and gradients included:

              LoRA                 full        activations: values a token, channel and block
    ours      2 P + 24 T           24 P        14 (keep), 9 (selective), 1 (recompute)
    the same, masters=low_bits     20 P
    R1 to R3  2 P + 14 T           14 P        K (checkpoints of K graphs) and one block's
    R4                                         35 (LoRA), 45 (full): one graph at a time, not checkpointed; eager's count
    exact     4 P + 24 T           16 P        2, and twice one block's: fp32, checkpointed, one graph at a time

R1 also holds both encoders, 17 GB. What follows for Z-Image (P = 6.15 G; LoRA: T = .16 G) at 1024^2, batch 1, in GB:

    LoRA   80 GB: ours (16 + 15) in turns with one peer at a time (R1 31 + 6, R2 and R3 14 + 6, R4 14 + 37)
           141 GB: the same
    full   80 GB: 24 P = 148 do not fit: ours (70 + 7) and the peers (R1 58 + 3, R4 41 + 21) train 12 of the 30 layers, one
           after the other: "full@12layers"
           141 GB: ours with masters=low_bits (123 + 15), R1 (103 + 6), R4 (86 + 48), all 30 layers, one after the other

What fits by this count and does not on the machine is a row of status "failed". A CPU's memory is taken to suffice.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from bench.suites.workload import Workload

USABLE = 0.92
"""Of the device's memory: the rest is the CUDA context and what fragmentation costs."""
ENCODERS = 2 * (4_022_000_000 + 4_438_000_000)
"""Bytes of R1's encoders beside a model as wide as the published ones."""
KEPT = {"keep": 14, "selective": 9, "recompute": 1}
EAGER = {"lora": 35, "full": 45}
DEPTHS = (24, 20, 16, 12, 10, 8, 6, 4, 2)


class Room:
    """Of one configuration. layers: the depth that it is measured at, None for the model's own; masters: how ours keeps its."""

    def __init__(self, kind: str, work: Workload, peers: Sequence[str]) -> None:
        self.kind, self.work, self.peers = kind, work, list(peers)
        self.cuda = work.model.device.type == "cuda"
        self.bytes = USABLE * self._total() if self.cuda else float("inf")
        self.layers, self.masters = work.cell.layers, "fp32"
        config = work.model.config
        if not self.cuda or kind != "full":
            return
        depths: list[int | None] = [self.layers]
        if self.layers is None and work.model.random:
            depths += [depth for depth in DEPTHS if depth < config["n_layers"]]
        for depth in depths:
            for masters in ("fp32", "low_bits") if depth == self.layers else ("fp32",):
                if self.ours_held(depth, masters) + KEPT["keep"] * self.values(depth) <= self.bytes:
                    self.layers, self.masters = depth, masters
                    return

    def _total(self) -> int:
        return torch.cuda.get_device_properties(self.work.model.device).total_memory

    # ---- bytes -------------------------------------------------------------------------------------------------------

    def parameters(self, depth: int | None) -> int:
        """Of the transformer with `depth` layers."""
        config = self.work.model.config
        if depth is None or depth == config["n_layers"]:
            return self.work.parameters
        whole = self.work.family.meta_transformer()
        layer = sum(p.numel() for p in whole.layers[0].parameters())  # type: ignore[union-attr, index]
        return self.work.parameters - (config["n_layers"] - depth) * layer

    def values(self, depth: int | None = None, blocks: int | None = None) -> float:
        """Bytes of one bf16 value a token and channel in every block of the student."""
        config, work = self.work.model.config, self.work
        side = work.pixels // work.family.pixel_multiple
        tokens = work.batch * (side**2 + work.model.standard.text_tokens)
        found = blocks if blocks is not None else (depth or config["n_layers"]) + config["n_refiner_layers"]
        return 2.0 * tokens * config["dim"] * found

    def ours_held(self, depth: int | None, masters: str) -> float:
        full = 20 if masters == "low_bits" else 24
        if self.kind == "full":
            return full * self.parameters(depth)
        return 2 * self.parameters(depth) + 24 * self.trained

    def peer_held(self, name: str) -> float:
        held = 14 * self.work.parameters if self.kind == "full" else 2 * self.work.parameters + 14 * self.trained
        return held + (self.encoders if name == "R1" else 0)

    def peer_activations(self, name: str) -> float:
        if name == "R4":
            return EAGER[self.kind] * self.values()
        return self.work.states * self.values() + EAGER[self.kind] * self.values(blocks=1)

    @property
    def encoders(self) -> int:
        from bench.models import WIDE

        return ENCODERS if self.work.model.config["dim"] >= WIDE else 0

    @cached_property
    def trained(self) -> int:
        return self.work.trained("lora")

    # ---- what fits ---------------------------------------------------------------------------------------------------

    @property
    def ours_activations(self) -> float:
        return KEPT[self.work.cell.activations] * self.values()

    @property
    def all_together(self) -> bool:
        held = self.ours_held(self.layers, self.masters) + sum(map(self.peer_held, self.peers))
        most = max([self.ours_activations, *map(self.peer_activations, self.peers)])
        return held + most <= self.bytes

    def beside_ours(self, name: str) -> bool:
        held = self.ours_held(self.layers, self.masters) + self.peer_held(name)
        return held + max(self.ours_activations, self.peer_activations(name)) <= self.bytes

    @property
    def exact_fits(self) -> bool:
        full = self.kind == "full"
        held = 16 * self.work.parameters if full else 4 * self.work.parameters + 24 * self.trained
        return held + 2 * (self.values() + 2 * EAGER[self.kind] * self.values(blocks=1)) <= self.bytes
