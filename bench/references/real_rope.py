"""Z-Image's rotary embedding in real numbers, for diffusers' own model: what `torch.compile` can fuse.

diffusers multiplies complex numbers, for which inductor generates no code; the rotation is the same:
(a, b) -> (a cos - b sin, a sin + b cos) on interleaved pairs, in fp32 (float64 for float64 input).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


class RealAngles:
    """diffusers' RopeEmbedder with its complex result `[T, Dh/2]` as reals `[T, Dh/2, 2]` = (cos, sin)."""

    def __init__(self, embedder: Any) -> None:
        self.embedder = embedder

    def __call__(self, ids: Tensor) -> Tensor:
        return torch.view_as_real(self.embedder(ids))


class RealRopeProcessor:
    """diffusers' ZSingleStreamAttnProcessor without complex numbers and without the choice of an attention backend."""

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None,
                 attention_mask: Tensor | None = None, freqs_cis: Tensor | None = None) -> Tensor:
        """`hidden_states` `[B, L, D]`, `attention_mask` `[B, L]` or None, `freqs_cis` `[B, L, Dh/2, 2]` -> `[B, L, D]`."""
        q, k, v = (to(hidden_states).unflatten(-1, (attn.heads, -1)) for to in (attn.to_q, attn.to_k, attn.to_v))
        if attn.norm_q is not None:
            q, k = attn.norm_q(q), attn.norm_k(k)
        if freqs_cis is not None:
            q, k = rotate(q, freqs_cis), rotate(k, freqs_cis)
        mask = None if attention_mask is None else attention_mask[:, None, None, :]
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=mask)
        return attn.to_out[0](out.transpose(1, 2).flatten(2, 3))


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """x `[B, L, H, Dh]` rotated pairwise by angles `[B, L, Dh/2, 2]`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    a, b = x.to(wide).unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = angles.unsqueeze(2).unbind(-1)
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2).type_as(x)


def use_real_rope(model: Any) -> None:
    """Changes a diffusers ZImageTransformer2DModel in place; its numbers stay the same but for rounding."""
    model.rope_embedder = RealAngles(model.rope_embedder)
    for module in model.modules():
        if type(getattr(module, "processor", None)).__name__ == "ZSingleStreamAttnProcessor":
            module.processor = RealRopeProcessor()
