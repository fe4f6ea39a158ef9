"""One Z-Image block for student and teacher at once, as one autograd node, which keeps less for backward than autograd would.

    r1 = x + tanh(gate_before) * RMSNorm(h) * w_before            the residual sum of the block before
    z1 = RMSNorm(r1) * w1 * (1 + scale_attention)
    q, k, v = z1 Wq^T, z1 Wk^T, z1 Wv^T;  q, k = rope(RMSNorm(q) * wq), rope(RMSNorm(k) * wk)
    a = attention(q, k, v) Wo^T
    r2 = r1 + tanh(gate_attention) * RMSNorm(a) * w2
    z2 = RMSNorm(r2) * w3 * (1 + scale_feed_forward)
    h' = (silu(z2 W1^T) * (z2 W3^T)) W2^T

A block does not add its own last residual: it hands (r2, h', gate_feed_forward) to the next block, where they are x, h and
gate_before. So each residual sum, its norms and the next modulation take one pass over memory. Blocks without modulation (the
context refiner) have gates of 1 and scales of 0. The numbers are those of diffusers' `ZImageTransformerBlock`.

Shapes: T tokens of all sequences, packed without padding between sequences; S sequences; D width. Tokens are `[T, D]`.

For backward the student keeps 13.3 values a token and channel: r1, h, q, k, v, the output of attention, a, r2 and the two
halves of the feed-forward layer. The backward kernels compute the values in between again. The teacher has no backward and
keeps nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dopsd_fast.pair.linears import accumulate, pair_linear_bwd, pair_linear_through, project, weight_gradients
from dopsd_fast.pair.matrices import Matrix, matrix, split
from dopsd_fast.pair.units import BlockCall, Packed
from dopsd_kernels import attention, gated_residual_norm, qk_norm_rope, rmsnorm_modulate, swiglu
from dopsd_kernels.backend import direct

attention_fwd, attention_bwd = direct(attention.attention_fwd), direct(attention.attention_bwd)
gated_residual_norm_fwd = direct(gated_residual_norm.gated_residual_norm_fwd)
gated_residual_norm_bwd = direct(gated_residual_norm.gated_residual_norm_bwd)
qk_norm_rope_fwd, qk_norm_rope_bwd = direct(qk_norm_rope.qk_norm_rope_fwd), direct(qk_norm_rope.qk_norm_rope_bwd)
rmsnorm_modulate_fwd = direct(rmsnorm_modulate.rmsnorm_modulate_fwd)
rmsnorm_modulate_bwd = direct(rmsnorm_modulate.rmsnorm_modulate_bwd)
swiglu_fwd, swiglu_bwd = direct(swiglu.swiglu_fwd), direct(swiglu.swiglu_bwd)

NORMS = ("before", "attention_norm1", "norm_q", "norm_k", "attention_norm2", "ffn_norm1")
GROUPS = {"qkv": ("to_q", "to_k", "to_v"), "out": ("to_out",), "up": ("w1", "w3"), "down": ("w2",)}
"""The linear layers of a block in groups that share an input, in the order in which the block uses them."""


@dataclass
class Weights:
    """One branch's parameters of one block: the norms' weights by the names in NORMS, and the matrices by the names in GROUPS.
    A norm is None where the block has none: the first block has none before it, and a model may have no q and k norms."""

    norms: dict[str, Tensor | None]
    groups: dict[str, list[Matrix]]

    @staticmethod
    def of(block: Any, before: Any, adapter: str) -> Weights:
        attention, forward = block.attention, block.feed_forward
        norms = {
            "before": before,
            "attention_norm1": block.attention_norm1,
            "norm_q": attention.norm_q,
            "norm_k": attention.norm_k,
            "attention_norm2": block.attention_norm2,
            "ffn_norm1": block.ffn_norm1,
        }
        linears = {
            "qkv": (attention.to_q, attention.to_k, attention.to_v),
            "out": (attention.to_out[0],),
            "up": (forward.w1, forward.w3),
            "down": (forward.w2,),
        }
        return Weights(
            {name: None if norm is None else norm.weight for name, norm in norms.items()},
            {group: [matrix(linear, adapter) for linear in members] for group, members in linears.items()},
        )

    def flat(self) -> list[Tensor | None]:
        """Lists the norms' weights, then W, A and B of each matrix, as autograd takes them."""
        return [*self.norms.values(), *(tensor for group in self.groups.values() for m in group for tensor in m.parts)]

    def rebuilt(self, flat: Sequence[Tensor | None]) -> Weights:
        """Returns the same structure with other values, given in the order of `flat`."""
        values = iter(flat)
        norms = {name: next(values) for name in self.norms}
        groups: dict[str, list[Matrix]] = {}
        for name, group in self.groups.items():
            groups[name] = [Matrix(next(values), next(values), next(values), m.scale) for m in group]  # type: ignore[arg-type]
        return Weights(norms, groups)


class Modulation(NamedTuple):
    """Scales and gates, each `[S, D]`, before `1 +` and `tanh` are applied. All are None in a block without modulation."""

    scale_attention: Tensor | None
    gate_attention: Tensor | None
    scale_feed_forward: Tensor | None


class Side(NamedTuple):
    """One branch's input to a block: tokens x, h `[T, D]`, the gate `[S, D]` of h, and the branch's modulation, token layout
    and parameters. In the first block of a stack h and gate are None."""

    x: Tensor
    h: Tensor | None
    gate: Tensor | None
    modulation: Modulation
    packed: Packed
    weights: Weights


class Kept(NamedTuple):
    """The student's values that backward reads besides x and h. `rstd_...` are the norms' statistics, `gu` the two halves of
    the feed-forward layer side by side, `xa_...` the products x A^T of the adapters, which are empty without adapters."""

    r1: Tensor
    rstd_h: Tensor
    rstd_1: Tensor
    qkv: Tensor
    xa_qkv: Tensor
    attended: Tensor
    lse: Tensor
    xa_out: Tensor
    a: Tensor
    r2: Tensor
    rstd_a: Tensor
    rstd_2: Tensor
    gu: Tensor
    xa_up: Tensor
    xa_down: Tensor


def _enter(side: Side, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns r1, z1, and the statistics of the two norms, of h and of r1."""
    w, index = side.weights.norms, side.packed.sequences.row_sequence
    if side.h is None:
        z, rstd = rmsnorm_modulate_fwd(side.x, w["attention_norm1"], side.modulation.scale_attention, index, eps)
        return side.x, z, rstd.new_empty(0), rstd
    return gated_residual_norm_fwd(
        side.x, side.h, w["before"], side.gate, w["attention_norm1"], side.modulation.scale_attention, index, eps
    )


def _rotate(qkv: Tensor, side: Side, call: BlockCall) -> tuple[Tensor, Tensor, Tensor]:
    """Returns q, k (normalised and rotated) and v, each `[T, heads, head_dim]`, from the three projections side by side."""
    w, packed = side.weights.norms, side.packed
    q, k = qk_norm_rope_fwd(qkv, w["norm_q"], w["norm_k"], packed.cos, packed.sin, call.heads, call.qk_eps)
    width = qkv.shape[1] // 3
    return q, k, qkv[:, 2 * width :].view(len(qkv), call.heads, width // call.heads)


def _attend(qkv: Tensor, side: Side, call: BlockCall) -> tuple[Tensor, Tensor]:
    q, k, v = _rotate(qkv, side, call)
    sequences = side.packed.sequences
    out, lse = attention_fwd(q, k, v, sequences.starts, list(sequences.lengths), call.attention)
    return out.flatten(1), lse


def _leave(side: Side, r1: Tensor, a: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns r2, z2, and the statistics of the two norms, of a and of r2."""
    w, index = side.weights.norms, side.packed.sequences.row_sequence
    return gated_residual_norm_fwd(
        r1, a, w["attention_norm2"], side.modulation.gate_attention, w["ffn_norm1"],
        side.modulation.scale_feed_forward, index, eps,
    )


def _forward(call: BlockCall, s: Side, t: Side | None) -> tuple[Kept, Tensor, Tensor | None, Tensor | None]:
    """Runs the block of student `s` and teacher `t` and returns (the student's kept values, its h', the teacher's r2 and h').
    Each projection multiplies both branches' rows in one launch. The `del`s free the teacher's tensors as early as possible."""
    teacher_groups: dict[str, list[Matrix]] = t.weights.groups if t is not None else dict.fromkeys(GROUPS, [])
    r1, z, rstd_h, rstd_1 = _enter(s, call.eps)
    r1_t, z_t = _enter(t, call.eps)[:2] if t is not None else (None, None)
    qkv, qkv_t, xa_qkv = project(z, z_t, s.weights.groups["qkv"], teacher_groups["qkv"], call.fp8)
    attended, lse = _attend(qkv, s, call)
    attended_t = _attend(qkv_t, t, call)[0] if t is not None else None
    del z, z_t, qkv_t
    a, a_t, xa_out = project(attended, attended_t, s.weights.groups["out"], teacher_groups["out"], call.fp8)
    del attended_t
    r2, z, rstd_a, rstd_2 = _leave(s, r1, a, call.eps)
    r2_t, z_t = _leave(t, r1_t, a_t, call.eps)[:2] if t is not None and r1_t is not None else (None, None)
    del r1_t, a_t
    gu, gu_t, xa_up = project(z, z_t, s.weights.groups["up"], teacher_groups["up"], call.fp8)
    del z, z_t
    product_t = swiglu_fwd(gu_t) if t is not None else None
    del gu_t
    h, h_t, xa_down = project(swiglu_fwd(gu), product_t, s.weights.groups["down"], teacher_groups["down"], call.fp8)
    kept = Kept(r1, rstd_h, rstd_1, qkv, xa_qkv, attended, lse, xa_out, a, r2, rstd_a, rstd_2, gu, xa_up, xa_down)
    return kept, h, r2_t, h_t if t is not None else None


class BlockFunction(torch.autograd.Function):
    """The block as an autograd node: (student's x, h, gate and modulation, teacher, student's parameters) -> (r2, h', the
    teacher's r2, the teacher's h').

    Autograd does not look into `weights` and `teacher`, so the student's parameters come a second time as `*parameters`, in the
    order of `Weights.flat`, to receive their gradients. Backward reads the parameters through `weights` and does not save their
    values, because ZeRO-3 may release the values after forward and gathers them again before backward."""

    @staticmethod
    def forward(ctx: Any, call: BlockCall, weights: Weights, teacher: Side | None, x: Tensor, h: Tensor | None,
                gate: Tensor | None, scale_attention: Tensor | None, gate_attention: Tensor | None,
                scale_feed_forward: Tensor | None, *parameters: Tensor | None) -> tuple[Tensor | None, ...]:
        modulation = Modulation(scale_attention, gate_attention, scale_feed_forward)
        side = Side(x, h, gate, modulation, call.packed, weights)
        kept, h_next, r2_t, h_t = _forward(call, side, teacher)
        if any(ctx.needs_input_grad):
            ctx.call, ctx.weights = call, weights
            inputs = (x, h, gate, *modulation)
            ctx.dtypes = [None if i is None else i.grad_dtype if i.is_leaf and i.grad_dtype else i.dtype for i in inputs]
            stays: tuple[Tensor | None, ...] = tuple(kept)
            if call.activations == "recompute":
                stays = (None,) * len(kept)
            elif call.activations == "selective":
                stays = tuple(kept._replace(gu=None, xa_up=None, xa_down=None))  # type: ignore[arg-type]
            ctx.save_for_backward(x, h, gate, *modulation, *stays)
        ctx.set_materialize_grads(False)
        if r2_t is not None and h_t is not None:
            ctx.mark_non_differentiable(r2_t, h_t)
        return kept.r2, h_next, r2_t, h_t

    @staticmethod
    def backward(ctx: Any, dr2: Tensor | None, dh_next: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        call: BlockCall = ctx.call
        x, h, gate, *rest = ctx.saved_tensors
        side = Side(x, h, gate, Modulation(*rest[:3]), call.packed, ctx.weights)
        kept = _restored(call, side, rest[3:])
        needs = dict(zip(("x", "h", "gate", *Modulation._fields), ctx.needs_input_grad[3:9]))
        wanted = ctx.needs_input_grad[9:]
        return None, None, None, *_backward(call, side, kept, dr2, dh_next, needs, wanted, ctx.dtypes)


def _restored(call: BlockCall, side: Side, saved: Sequence[Tensor | None]) -> Kept:
    """Returns all values that backward reads. Those that `call.activations` did not save are computed again."""
    if call.activations == "recompute":
        return _forward(call, side, None)[0]
    kept = Kept(*saved)  # type: ignore[arg-type]
    if call.activations == "selective":
        w, index = side.weights.norms, call.packed.sequences.row_sequence
        scale = side.modulation.scale_feed_forward
        z, _ = rmsnorm_modulate_fwd(kept.r2, w["ffn_norm1"], scale, index, call.eps)
        gu, _, xa_up = project(z, None, side.weights.groups["up"], (), call.fp8)
        down = side.weights.groups["down"]
        xa_down = gu.new_empty(0)
        if any(m.a.numel() for m in down):
            product = swiglu_fwd(gu)
            xa_down = torch.cat([product @ m.a.t() for m in down if m.a.numel()], dim=1)
        kept = kept._replace(gu=gu, xa_up=xa_up, xa_down=xa_down)
    return kept


def _backward(
    call: BlockCall, side: Side, kept: Kept, dr2: Tensor | None, dh: Tensor | None, needs: dict[str, bool],
    wanted: Sequence[bool], dtypes: Sequence[torch.dtype | None],
) -> tuple[Tensor | None, ...]:
    """Returns the gradients of (x, h, gate, and the modulation's three tensors), cast to `dtypes`, then those of the parameters
    in the order of `Weights.flat`. A gradient that is not wanted, or that went into `call.sums`, is None.

    needs: whether each of the first six is wanted. wanted: the same of the parameters."""
    weights, sequences = side.weights, call.packed.sequences
    index, chunks = sequences.row_sequence, sequences.chunks
    flags = weights.rebuilt(wanted)  # type: ignore[arg-type]
    norm_grads: dict[str, Tensor | None] = dict.fromkeys(NORMS)
    norm_wanted = any(bool(flag) for flag in flags.norms.values())
    modulated = any(needs[name] for name in ("gate", *Modulation._fields))
    group_grads: dict[str, list[Tensor | None]] = {}
    if dh is None:
        dh = torch.zeros_like(kept.r2)

    def into(group: str, dy: list[Tensor], like: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the gradient of the group's input, and q, the gradient of the adapters' x A^T. The input itself is computed
        only later; `like` stands for its shape."""
        w, a, b, scales = split(weights.groups[group])
        q = pair_linear_through(dy, b, scales) if a else like.new_empty(0)
        return pair_linear_bwd(dy, like, w, a, b, scales, like, True, False, False, False, q if a else None)[0], q

    def onto(group: str, dy: list[Tensor], x: Tensor, xa: Tensor, q: Tensor) -> None:
        """Computes the gradients of the group's matrices, or adds them to `call.sums`. x: the group's input."""
        members, wanted = weights.groups[group], flags.groups[group]
        if call.sums is None:
            group_grads[group] = weight_gradients(members, wanted, dy, x, xa, q)
            return
        group_grads[group] = [None] * (3 * len(members))
        accumulate(call.sums, members, dy, x, xa, q)

    half = kept.gu.shape[1] // 2
    ds, q = into("down", [dh], kept.gu[:, :half])
    dgu, product = swiglu_bwd(ds, kept.gu, True)
    del ds
    onto("down", [dh], product, kept.xa_down, q)
    del product
    dup = [dgu[:, :half], dgu[:, half:]]
    dz, q = into("up", dup, kept.r2)
    dr1, da, norm2, dgate_attention, ffn1, dscale_forward, z = gated_residual_norm_bwd(
        dr2, dz, kept.a, kept.r2, weights.norms["attention_norm2"], side.modulation.gate_attention,
        weights.norms["ffn_norm1"], side.modulation.scale_feed_forward, kept.rstd_a, kept.rstd_2, index, chunks,
        norm_wanted, modulated, True,
    )
    norm_grads |= {"attention_norm2": norm2, "ffn_norm1": ffn1}
    onto("up", dup, z, kept.xa_up, q)
    del dgu, dup, dz, z

    dattended, q = into("out", [da], kept.attended)
    onto("out", [da], kept.attended, kept.xa_out, q)
    del da
    query, key, value = _rotate(kept.qkv, side, call)
    dq, dk, dv = attention_bwd(
        dattended.view_as(query), query, key, value, kept.attended.view_as(query), kept.lse, sequences.starts,
        list(sequences.lengths), call.attention,
    )
    del query, key, value, dattended
    dqk, norm_grads["norm_q"], norm_grads["norm_k"] = qk_norm_rope_bwd(
        dq, dk, kept.qkv, weights.norms["norm_q"], weights.norms["norm_k"], call.packed.cos, call.packed.sin,
        call.heads, call.qk_eps, norm_wanted,
    )
    del dq, dk
    width = dqk.shape[1] // 2
    dqkv = [dqk[:, :width], dqk[:, width:], dv.flatten(1)]
    dz, q = into("qkv", dqkv, kept.r1)
    scale = side.modulation.scale_attention
    dh_before: Tensor | None = None
    dgate: Tensor | None = None
    if side.h is None:
        dx, norm1, dscale, z = rmsnorm_modulate_bwd(
            dz, side.x, weights.norms["attention_norm1"], scale, kept.rstd_1, index, chunks, norm_wanted, modulated, True
        )
        dx = dx.add_(dr1)
    else:
        dx, dh_before, norm_grads["before"], dgate, norm1, dscale, z = gated_residual_norm_bwd(
            dr1, dz, side.h, kept.r1, weights.norms["before"], side.gate, weights.norms["attention_norm1"], scale,
            kept.rstd_h, kept.rstd_1, index, chunks, norm_wanted, modulated, True,
        )
    norm_grads["attention_norm1"] = norm1
    onto("qkv", dqkv, z, kept.xa_qkv, q)

    def cast(grad: Tensor | None, dtype: torch.dtype | None, wish: bool) -> Tensor | None:
        return grad.to(dtype) if wish and grad is not None and dtype is not None else None

    inputs = (dx, dh_before, dgate, dscale, dgate_attention, dscale_forward)
    if call.sums is not None:
        given = ((weights.norms[name], norm_grads[name]) for name in NORMS)
        call.sums.add([(w, grad) for w, grad in given if w is not None and grad is not None and w in call.sums])
        norm_grads = dict.fromkeys(NORMS)
    norm_dtypes = {name: None if weight is None else weight.dtype for name, weight in weights.norms.items()}
    norms = [cast(norm_grads[name], norm_dtypes[name], bool(flags.norms[name])) for name in NORMS]
    return (
        *(cast(grad, dtype, wish) for grad, dtype, wish in zip(inputs, dtypes, needs.values())),
        *norms,
        *(grad for group in GROUPS for grad in group_grads[group]),
    )
