"""Names that settings use for things that are built elsewhere. They are strings, so that reading the settings imports no model:
the class is imported by its name when a family is opened (families.registry)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FamilyChoice = Literal["auto", "zimage", "flux2_klein"]
ContextChoice = Literal["auto", "vlm", "edit"]
VariantChoice = Literal["base", "kv", "guidance", "size", "shift"]


@dataclass(frozen=True)
class FamilyNames:
    """module, name: where the family's class is. pipelines: diffusers' pipeline classes that a folder of the family may name
    in model_index.json, the ordinary one first; the others are variants that `model.allow` can let in. context: how its teacher
    sees the target image."""

    module: str
    name: str
    pipelines: tuple[str, ...]
    context: ContextChoice


FAMILIES: dict[str, FamilyNames] = {
    "zimage": FamilyNames("dopsd_fast.families.zimage.family", "ZImage", ("ZImagePipeline",), "vlm"),
    "flux2_klein": FamilyNames(
        "dopsd_fast.families.flux2.family", "Flux2Klein", ("Flux2KleinPipeline", "Flux2KleinKVPipeline"), "edit"
    ),
}
"""The values of model.family."""
