"""The libraries behind dopsd_kernels.attention, each as one forward and one backward call.

    forward(q, k, v, starts, longest) -> (out, lse)
    backward(dout, q, k, v, out, lse, starts, longest) -> (dq, dk, dv)

`starts` None: a dense batch `[B, L, H, Dh]`, `longest` = L. Else packed `[T, H, Dh]` with `starts` `[S + 1]` int32
(flash-attn's cu_seqlens). No dropout, no mask, scale 1 / sqrt(Dh). `lse` may have any shape: backward gets it flat.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)
aten = torch.ops.aten


@dataclass(frozen=True)
class Library:
    """`packed`: takes `starts`. `least`, `most`: compute capability as 10 * major + minor; None for the CPU."""

    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    packed: bool = False
    least: int | None = None
    most: int = 10**6
    module: str | None = None
    widest: int = 256


@functools.cache
def _module(name: str) -> Any:
    """The module, or None with one line in the log if it is installed but broken."""
    try:
        if importlib.util.find_spec(name) is None:
            return None
        return importlib.import_module(name)
    except ModuleNotFoundError:  # its parent package is not installed
        return None
    except Exception as error:
        logger.warning("attention: %s is installed but does not load (%s); another backend is used", name, error)
        return None


def usable(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether the backend runs on this device with this dtype and head dimension."""
    library = BACKENDS[name]
    if name == "math":
        return True
    if name == "cpu_flash":
        return device.type == "cpu" and dtype in (torch.float32, torch.float16, torch.bfloat16)
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16) or not torch.cuda.is_available():
        return False
    major, minor = torch.cuda.get_device_capability(device)
    fits = library.least is not None and library.least <= 10 * major + minor <= library.most
    if not fits or head_dim % 8 or head_dim > library.widest or (torch.version.hip and library.module is None):
        return False
    return library.module is None or _module(library.module) is not None


def math_forward(q: Tensor, k: Tensor, v: Tensor, starts: None, longest: int) -> tuple[Tensor, Tensor]:
    """P = exp(q k^T / sqrt(Dh) - lse), out = P v; fp32 for half dtypes. Holds `[B, H, L, L]`."""
    wide_q, wide_k, wide_v = _wide(q, k, v)
    scores = wide_q @ wide_k.mT * q.shape[-1] ** -0.5
    lse = scores.logsumexp(-1, keepdim=True)
    out = (scores - lse).exp_() @ wide_v
    return out.transpose(1, 2).to(q.dtype), lse


def math_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, starts: None, longest: int
) -> tuple[Tensor, Tensor, Tensor]:
    """dv = P^T dout;  dS = P * (dout v^T - rowsum(dout * out));  dq = dS k / sqrt(Dh);  dk = dS^T q / sqrt(Dh)."""
    scale = q.shape[-1] ** -0.5
    wide_q, wide_k, wide_v, wide_dout, wide_out = _wide(q, k, v, dout, out)
    p = (wide_q @ wide_k.mT * scale).sub_(lse.view(*wide_q.shape[:3], 1)).exp_()
    dv = p.mT @ wide_dout
    ds = p * (wide_dout @ wide_v.mT - (wide_dout * wide_out).sum(-1, keepdim=True)) * scale
    dq, dk, dv = ((x.transpose(1, 2).to(q.dtype)) for x in (ds @ wide_k, ds.mT @ wide_q, dv))
    return dq, dk, dv


def _wide(*tensors: Tensor) -> tuple[Tensor, ...]:
    """`[B, L, H, Dh]` -> `[B, H, L, Dh]`, at least fp32."""
    return tuple(x.transpose(1, 2).to(torch.promote_types(x.dtype, torch.float32)) for x in tensors)


def _heads_first(*tensors: Tensor) -> list[Tensor]:
    return [x.transpose(1, 2) for x in tensors]


def cpu_flash_forward(q: Tensor, k: Tensor, v: Tensor, starts: None, longest: int) -> tuple[Tensor, Tensor]:
    """torch's blocked kernel for the CPU: twice as fast as batched products at `[8, 96, 4, 36]`. Its lse is `[B, L, H]`
    in memory."""
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(*_heads_first(q, k, v))
    return out.transpose(1, 2), lse.transpose(1, 2)


def cpu_flash_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, starts: None, longest: int
) -> tuple[Tensor, Tensor, Tensor]:
    lse = lse.view(q.shape[:3]).transpose(1, 2)
    grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *_heads_first(dout, q, k, v, out), lse, 0.0, False
    )
    dq, dk, dv = _heads_first(*grads)
    return dq, dk, dv


def flash_forward(q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None, longest: int) -> tuple[Tensor, Tensor]:
    """The flash kernel inside torch; with `starts` it is what torch.nn.attention.varlen runs."""
    out = aten._flash_attention_forward(q, k, v, starts, starts, longest, longest, 0.0, False, False)
    return out[0], out[1]


def flash_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, starts: Tensor | None, longest: int
) -> tuple[Tensor, Tensor, Tensor]:
    random_state = torch.empty(2, dtype=torch.uint64, device=q.device)  # unread: no dropout
    unused = torch.empty(0, device=q.device)
    return aten._flash_attention_backward(
        dout, q, k, v, out, _shaped(lse, q, starts), starts, starts, longest, longest, 0.0, False, random_state, unused
    )


def cudnn_forward(q: Tensor, k: Tensor, v: Tensor, starts: None, longest: int) -> tuple[Tensor, Tensor]:
    """cuDNN's fused attention. It cannot train on sequences of one token: those go to torch's flash kernel."""
    if longest == 1:
        return flash_forward(q, k, v, None, longest)
    out = aten._scaled_dot_product_cudnn_attention(*_heads_first(q, k, v), None, True)
    return out[0].transpose(1, 2), out[1]


def cudnn_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, starts: None, longest: int
) -> tuple[Tensor, Tensor, Tensor]:
    if longest == 1:
        return flash_backward(dout, q, k, v, out, lse, None, longest)
    seed = torch.empty((), dtype=torch.int64, device=q.device)  # unread: no dropout
    tensors = _heads_first(dout, q, k, v, out)
    lse = _shaped(lse, q, None).unsqueeze(-1)
    grads = aten._scaled_dot_product_cudnn_attention_backward(
        *tensors, lse, seed, seed, None, None, None, longest, longest, 0.0, False
    )
    dq, dk, dv = _heads_first(*grads)
    return dq, dk, dv


def _shaped(lse: Tensor, q: Tensor, starts: Tensor | None) -> Tensor:
    """flash's own shapes: `[H, T]` packed, `[B, H, L]` dense."""
    return lse.view(q.shape[1], q.shape[0]) if starts is not None else lse.view(q.shape[0], q.shape[2], q.shape[1])


FLASH_ATTN_2 = "flash_attn.flash_attn_interface"
FLASH_ATTN_3 = "flash_attn_interface"
FLASH_ATTN_4 = "flash_attn.cute.interface"


def flash_attn_2_forward(q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None, longest: int) -> tuple[Tensor, Tensor]:
    """The flash-attn package from 2.7 on."""
    options: dict[str, Any] = dict(dropout_p=0.0, softmax_scale=q.shape[-1] ** -0.5, causal=False)
    options |= dict(window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False)
    library = _module(FLASH_ATTN_2)
    if starts is None:
        out = library._flash_attn_forward(q, k, v, **options)
    else:
        out = library._flash_attn_varlen_forward(q, k, v, starts, starts, longest, longest, **options)
    return out[0], out[1]


def flash_attn_2_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, starts: Tensor | None, longest: int
) -> tuple[Tensor, Tensor, Tensor]:
    options: dict[str, Any] = dict(dropout_p=0.0, softmax_scale=q.shape[-1] ** -0.5, causal=False)
    options |= dict(window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None)
    options["deterministic"] = torch.are_deterministic_algorithms_enabled()
    library, lse, (dq, dk, dv) = _module(FLASH_ATTN_2), _shaped(lse, q, starts), _gradients(q, k, v)
    if starts is None:
        library._flash_attn_backward(dout, q, k, v, out, lse, dq, dk, dv, **options)
    else:
        library._flash_attn_varlen_backward(
            dout, q, k, v, out, lse, dq, dk, dv, starts, starts, longest, longest, **options
        )
    return dq, dk, dv


def flash_attn_3_forward(q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None, longest: int) -> tuple[Tensor, Tensor]:
    out = _module(FLASH_ATTN_3)._flash_attn_forward(
        q, k, v, softmax_scale=q.shape[-1] ** -0.5, causal=False, **_packing(starts, longest)
    )
    return out[0], out[1]


def flash_attn_3_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, starts: Tensor | None, longest: int
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = _gradients(q, k, v)
    _module(FLASH_ATTN_3)._flash_attn_backward(
        dout, q, k, v, out, _shaped(lse, q, starts), dq=dq, dk=dk, dv=dv, softmax_scale=q.shape[-1] ** -0.5,
        deterministic=torch.are_deterministic_algorithms_enabled(), **_packing(starts, longest),
    )
    return dq, dk, dv


def flash_attn_4_forward(q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None, longest: int) -> tuple[Tensor, Tensor]:
    packing = {} if starts is None else dict(cu_seqlens_q=starts, cu_seqlens_k=starts)
    out = _module(FLASH_ATTN_4)._flash_attn_fwd(q, k, v, return_lse=True, **packing)
    return out[0], out[1]


def flash_attn_4_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, starts: Tensor | None, longest: int
) -> tuple[Tensor, Tensor, Tensor]:
    packing = {} if starts is None else dict(cu_seqlens_q=starts, cu_seqlens_k=starts)
    grads = _module(FLASH_ATTN_4)._flash_attn_bwd(q, k, v, out, dout, _shaped(lse, q, starts), **packing)
    return grads[0], grads[1], grads[2]


def _packing(starts: Tensor | None, longest: int) -> dict[str, Any]:
    if starts is None:
        return {}
    return dict(cu_seqlens_q=starts, cu_seqlens_k=starts, max_seqlen_q=longest, max_seqlen_k=longest)


def _gradients(*tensors: Tensor) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in tensors]


BACKENDS: dict[str, Library] = {
    "flash_attn_4": Library(flash_attn_4_forward, flash_attn_4_backward, True, 90, 109, FLASH_ATTN_4, 128),
    "flash_attn_3": Library(flash_attn_3_forward, flash_attn_3_backward, True, 90, 90, FLASH_ATTN_3),
    "flash_attn_2": Library(flash_attn_2_forward, flash_attn_2_backward, True, 80, module=FLASH_ATTN_2),
    "cudnn": Library(cudnn_forward, cudnn_backward, False, 90, widest=128),
    "flash": Library(flash_forward, flash_backward, False, 80),
    "varlen": Library(flash_forward, flash_backward, True, 80),
    "cpu_flash": Library(cpu_flash_forward, cpu_flash_backward),
    "math": Library(math_forward, math_backward),
}
