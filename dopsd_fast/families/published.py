"""The published architectures, for what needs no file of the model."""

from __future__ import annotations

from typing import Any

# ---- the model ---------------------------------------------------------------------------------------------------------

PUBLISHED: dict[str, dict[str, Any]] = {
    "zimage": dict(title="Z-Image", transformer={}, latent_channels=16),
    "flux2_klein": dict(
        title="FLUX.2-klein-4B", latent_channels=32,
        transformer=dict(num_layers=5, num_single_layers=20, num_attention_heads=24, joint_attention_dim=7680,
                         guidance_embeds=False),
    ),
}  # fmt: skip
"""Where they differ from diffusers' defaults. Both have a VAE that halves the sides three times."""


def published_family(name: str, conditioning: Any) -> Any:
    """The family `name` with its published architecture, for what needs no file of the model."""
    from dopsd_fast.families.registry import FAMILIES

    known = PUBLISHED[name]
    family: Any = object.__new__(FAMILIES[name])
    family.path, family.conditioning, family.context = None, conditioning, FAMILIES[name].contexts[0]
    family.transformer_config = known["transformer"]
    family.vae_config = {"block_out_channels": [0] * 4, "latent_channels": known["latent_channels"]}
    return family
