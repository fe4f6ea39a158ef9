"""The published architectures, for what needs no file of the model."""

from __future__ import annotations

from typing import Any

from dopsd_fast.families.base import Family
from dopsd_fast.families.registry import family_class
from dopsd_fast.settings.schema import ConditioningSettings

PUBLISHED: dict[str, dict[str, Any]] = {
    "zimage": dict(title="Z-Image", transformer={}, latent_channels=16),
    "flux2_klein": dict(
        title="FLUX.2-klein-4B", latent_channels=32,
        transformer=dict(num_layers=5, num_single_layers=20, num_attention_heads=24, joint_attention_dim=7680,
                         guidance_embeds=False),
    ),
}
"""Where they differ from diffusers' defaults. Both have a VAE that halves the sides three times."""


def published_family(name: str, conditioning: ConditioningSettings) -> Family:
    """The family `name` with its published architecture, for what needs no file of the model."""
    known, kind = PUBLISHED[name], family_class(name)
    family: Any = object.__new__(kind)  # without a folder there is nothing to open
    family.path, family.conditioning, family.context = None, conditioning, kind.contexts[0]
    family.transformer_config = known["transformer"]
    family.vae_config = {"block_out_channels": [0] * 4, "latent_channels": known["latent_channels"]}
    return family
