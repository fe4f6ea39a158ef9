"""A small network that reads a picture: its object's attributes, its style's parameters, and features to compare by."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dopsd_fast.nano import world


class Judge(nn.Module):
    """Pictures [N, 3, 32, 32] in -1..1 -> logits per attribute, cell logits [N, 4], tints [N, 6] and features [N, 96]."""

    def __init__(self, width: int = 32):
        super().__init__()
        sizes = (3, width, width * 2, width * 3, width * 3)
        self.body = nn.Sequential(
            *(
                layer
                for i, (a, b) in enumerate(zip(sizes, sizes[1:], strict=False))
                for layer in (nn.Conv2d(a, b, 3, 2 if i else 1, 1), nn.GroupNorm(8, b), nn.SiLU())
            )
        )
        self.heads = nn.ModuleDict(
            {name: nn.Linear(width * 3 * 16, len(names)) for name, names in world.ATTRIBUTES.items()}
        )
        self.heads["cell"] = nn.Linear(width * 3, len(world.CELLS))
        self.heads["tints"] = nn.Linear(width * 3, 6)

    def forward(self, pictures: Tensor) -> dict[str, Tensor]:
        grid = self.body(pictures)
        features, flat = grid.mean((2, 3)), grid.flatten(1)
        out = {name: head(flat if name in world.ATTRIBUTES else features) for name, head in self.heads.items()}
        return {**out, "features": features}


def targets(scenes: list[world.Scene]) -> dict[str, Tensor]:
    """Class indexes per attribute and `cell`; `tints` [N, 6], the darker tint first."""
    out = {name: torch.tensor([scene.attribute(name) for scene in scenes]) for name in world.ATTRIBUTES}
    out["cell"] = torch.tensor([scene.style.cell for scene in scenes])
    tints = [sorted(scene.style.tints, key=sum) for scene in scenes]
    out["tints"] = torch.tensor(np.asarray(tints, np.float32)).flatten(1)
    return out


def loss(readings: dict[str, Tensor], wanted: dict[str, Tensor]) -> Tensor:
    """Sum of cross entropies over attributes and cell, plus 10 x the mean squared error of the tints."""
    total = 10 * F.mse_loss(readings["tints"], wanted["tints"])
    for name in (*world.ATTRIBUTES, "cell"):
        total = total + F.cross_entropy(readings[name], wanted[name])
    return total


@torch.no_grad()
def accuracy(judge: Judge, pictures: Tensor, scenes: list[world.Scene]) -> dict[str, float]:
    """Share of pictures [N, 3, 32, 32] whose reading equals the caption, per attribute."""
    readings, wanted = judge(pictures), targets(scenes)
    return {name: (readings[name].argmax(1) == wanted[name]).float().mean().item() for name in world.ATTRIBUTES}
