"""The Z-Image pair forward: it runs student and teacher at one state side by side through the same kernels.

Tokens are packed item after item, without padding between items; an item is its image tokens, then its caption tokens. As in
the original model, each of the two is padded to a multiple of 32 with learned pad tokens. The refined captions and the rotary
tables do not change along a trajectory and are computed once, by `prepare` and `layout`. The velocities are those of
diffusers' `ZImageTransformer2DModel`, whose modules hold the weights.

Each class before ZImagePair is a unit that ZeRO-3 gathers as a whole (`gather_units`), student and teacher together.

Shapes: B items, C channels, h x w latent, N image tokens of an item without padding, Np with padding, T tokens of all items,
S sequences (one an item), D width, E width of a time's embedding, F features of a text token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from dopsd_fast.conditioning.context import Context
from dopsd_fast.families.zimage.block import BlockFunction, Modulation, Side, Weights
from dopsd_fast.pair.frozen_fp8 import FrozenFp8
from dopsd_fast.pair.gradient_sums import GradientSums
from dopsd_fast.pair.tape import Tape
from dopsd_fast.pair.units import BlockCall, Branch, Layout, Packed, Unit, apply
from dopsd_kernels import native_ops
from dopsd_kernels.attention import choose_attention
from dopsd_kernels.backend import choose
from dopsd_kernels.gated_residual_norm import gated_residual_norm
from dopsd_kernels.layernorm_modulate import layernorm_modulate
from dopsd_kernels.sequences import Sequences

PAD_MULTIPLE = 32  # diffusers' SEQ_MULTI_OF
FINAL_EPS = 1e-6
QK_EPS = 1e-5  # diffusers fixes it, whatever norm_eps is


class Entry(Unit):
    """Embeds latents as image tokens, and times as the input of the modulation layers."""

    def forward(self, x: Tensor, t: Tensor, branches: Sequence[Branch], t_scale: float) -> tuple[Tensor | None, ...]:
        """Returns for each branch the tokens `[B * Np, D]` of x `[B, C, h, w]` and the embedding c `[B, E]` of t `[B]`. Where
        the second branch would compute the same as the first, because it uses the same modules, it gets None."""
        out: list[Tensor | None] = []
        patches = patchify(x)
        for i, branch in enumerate(branches):
            with torch.set_grad_enabled(torch.is_grad_enabled() and i == 0):
                same = [bool(i) and self.shared(branches[0], branch, name) for name in ("embedder", "pad", "time")]
                out.append(None if same[0] and same[1] else self._tokens(branch, patches))
                out.append(None if same[2] else self._time(branch, t * t_scale, patches.dtype))
        return tuple(out)

    def _tokens(self, branch: Branch, patches: Tensor) -> Tensor:
        tokens, pad = self.apply_part(branch, "embedder", patches), self.part(branch, "pad")
        missing = -tokens.shape[1] % PAD_MULTIPLE
        if missing or (pad.requires_grad and torch.is_grad_enabled()):  # then all ranks have a gradient, if only zeros
            tokens = torch.cat([tokens, pad.to(tokens.dtype).expand(len(tokens), missing, -1)], dim=1)
        return tokens.flatten(0, 1)

    def _time(self, branch: Branch, t: Tensor, dtype: torch.dtype) -> Tensor:
        time = self.part(branch, "time")
        frequencies = time.timestep_embedding(t, time.frequency_embedding_size).to(dtype)
        return apply(time.mlp, frequencies, self.adapters[branch])


class Captions(Unit):
    """Embeds text features as caption tokens."""

    def forward(self, branch: Branch, features: Tensor, lengths: Sequence[int]) -> Tensor:
        """Returns the caption tokens `[sum of padded lengths, D]` of features `[sum of lengths, F]`."""
        tokens = self.apply_part(branch, "embedder", features)
        pad = self.part(branch, "pad").to(tokens.dtype)
        pieces = []
        for one in tokens.split(list(lengths)):
            pieces += [one, pad.expand(-len(one) % PAD_MULTIPLE, -1)]
        return torch.cat(pieces)


class Block(Unit):
    """Runs one transformer block of each branch. It also holds the last norm of the block before, whose residual sum the block
    adds first (see block.py)."""

    def forward(self, x: Tensor, h: Tensor | None, gate: Tensor | None, c: Tensor | None,
                x_t: Tensor | None = None, h_t: Tensor | None = None, gate_t: Tensor | None = None,
                c_t: Tensor | None = None, *, call: BlockCall, branches: Sequence[Branch]) -> tuple[Tensor | None, ...]:
        """Returns (r2, h', gate_feed_forward) of the first branch, then of the second (see block.py). Where c is None, the
        block is not modulated; where c_t is None, the second branch's time embedding is c."""
        first = branches[0]
        weights, modulation, gate_next = self._branch(first, c, call.sums)
        teacher = gate_next_t = None
        if len(branches) > 1:
            assert x_t is not None and call.teacher is not None
            with torch.no_grad():
                if c is not None and c_t is None and self.shared(first, branches[1], "modulation"):
                    modulation_t = Modulation(*(None if m is None else m.detach() for m in modulation))
                    gate_next_t = None if gate_next is None else gate_next.detach()
                    weights_t = self.weights_of(branches[1])
                else:
                    weights_t, modulation_t, gate_next_t = self._branch(branches[1], c if c_t is None else c_t, None)
            teacher = Side(x_t, h_t, gate_t, modulation_t, call.teacher, weights_t)
        r2, h2, r2_t, h2_t = BlockFunction.apply(call, weights, teacher, x, h, gate, *modulation, *weights.flat())
        return r2, h2, gate_next, r2_t, h2_t, gate_next_t

    def weights_of(self, branch: Branch) -> Weights:
        before = self.part(branch, "before") if "before" in self.names else None
        return Weights.of(self.part(branch, "block"), before, self.adapters[branch])

    def summed_modulation(self, branch: Branch) -> Any:
        """Returns the modulation layer if it trains as a plain linear layer, without an adapter, else None. Only then can
        `GradientSums.modulations` compute its gradient."""
        parts = list(self.part(branch, "modulation")) if "modulation" in self.names else []
        plain = len(parts) == 1 and not hasattr(parts[0], "lora_A") and parts[0].weight.requires_grad
        return parts[0] if plain else None

    def _branch(
        self, branch: Branch, c: Tensor | None, sums: GradientSums | None
    ) -> tuple[Weights, Modulation, Tensor | None]:
        weights = self.weights_of(branch)
        if c is None:
            return weights, Modulation(None, None, None), None
        linear = self.summed_modulation(branch) if sums is not None else None
        if sums is not None and linear is not None:
            values = sums.modulations.apply(linear, c)
        else:
            values = self.apply_part(branch, "modulation", c).unflatten(1, (4, -1)).unbind(1)
        scale_attention, gate_attention, scale_forward, gate_forward = values
        return weights, Modulation(scale_attention, gate_attention, scale_forward), gate_forward


class Close(Unit):
    """Adds the residual that the last block of a stack did not add itself (see block.py)."""

    def forward(self, branch: Branch, x: Tensor, h: Tensor, gate: Tensor | None, sequences: Sequences, eps: float) -> Tensor:
        return gated_residual_norm(x, h, self.part(branch, "before").weight, gate, None, None, sequences, eps)[0]


class Exit(Unit):
    """Maps image tokens to velocities."""

    def forward(self, branch: Branch, x: Tensor, h: Tensor | None, gate: Tensor | None, c: Tensor, sequences: Sequences,
                eps: float) -> Tensor:
        """Returns the velocities `[B * N, 4 C]`, one 2x2 patch a token, of the image tokens x, h `[B * N, D]` without
        padding."""
        if h is not None:
            x = gated_residual_norm(x, h, self.part(branch, "before").weight, gate, None, None, sequences, eps)[0]
        final = self.part(branch, "final")
        scale = apply(final.adaLN_modulation, c, self.adapters[branch])
        return apply(final.linear, layernorm_modulate(x, scale, None, sequences, FINAL_EPS), self.adapters[branch])


class ZImagePair(nn.Module):
    """The pair forward of Z-Image (see `pair.contract`).

    modules: each branch's ZImageTransformer2DModel; for LoRA the same one twice. adapters: the name of each branch's adapter.
    activations: see `pair.units.ACTIVATIONS`. attention: see `dopsd_kernels.attention`. fp8: see `pair.frozen_fp8`, or "off".
    check_tokens: raises UserError for a number of caption tokens that the rotary tables cannot take."""

    def __init__(self, modules: dict[Branch, Any], adapters: dict[Branch, str], activations: str = "keep",
                 attention: str = "auto", fp8: str = "off",
                 check_tokens: Callable[[int], None] = lambda tokens: None) -> None:
        super().__init__()
        model = next(iter(modules.values()))
        self.config, self.embed_positions = model.config, model.rope_embedder
        self.activations, self.attention, self._check_tokens = activations, attention, check_tokens
        self.hooked = False
        self.fp8 = FrozenFp8(fp8) if fp8 != "off" else None
        key = f"{model.all_patch_size[0]}-{model.all_f_patch_size[0]}"

        def unit(kind: Callable[..., Any], **find: Callable[[Any], Any]) -> Any:
            return kind(adapters, **{name: {b: get(m) for b, m in modules.items()} for name, get in find.items()})

        def stack(name: str) -> nn.ModuleList:
            blocks = []
            for i, block in enumerate(getattr(model, name)):
                parts = {"block": attrgetter(f"{name}.{i}")}
                if i:
                    parts["before"] = attrgetter(f"{name}.{i - 1}.ffn_norm2")
                if block.modulation:
                    parts["modulation"] = attrgetter(f"{name}.{i}.adaLN_modulation")
                blocks.append(unit(Block, **parts))
            return nn.ModuleList(blocks)

        self.entry = unit(Entry, embedder=lambda m: m.all_x_embedder[key], pad=lambda m: m.x_pad_token,
                          time=lambda m: m.t_embedder)
        self.captions = unit(Captions, embedder=lambda m: m.cap_embedder, pad=lambda m: m.cap_pad_token)
        self.noise_refiner, self.context_refiner = stack("noise_refiner"), stack("context_refiner")
        self.layers = stack("layers")
        self.noise_close = unit(Close, before=lambda m: m.noise_refiner[-1].ffn_norm2 if len(m.noise_refiner) else None)
        self.context_close = unit(Close, before=lambda m: m.context_refiner[-1].ffn_norm2 if len(m.context_refiner) else None)
        if self.fp8 is not None:
            for branch in list(modules) if fp8 == "frozen" else list(modules)[1:]:
                for block in (*self.noise_refiner, *self.context_refiner, *self.layers):
                    groups = block.weights_of(branch).groups.values()
                    self.fp8.check(m.weight for members in groups for m in members)
        self.exit = unit(Exit, before=lambda m: m.layers[-1].ffn_norm2, final=lambda m: m.all_final_layer[key])

    def describe(self) -> dict[str, Any]:
        parameter = next(self.layers.parameters())
        head_dim = self.config.dim // self.config.n_heads
        found = [choose_attention(parameter.device, parameter.dtype, head_dim, equal) for equal in (True, False)]
        attention = self.attention if self.attention != "auto" else " or ".join(dict.fromkeys(found))
        return {"activations": self.activations, "attention": attention, "fp8": self.fp8.which if self.fp8 else "off",
                "ops": choose(parameter, native=native_ops.usable(parameter))}

    def summed_parameters(self, branch: Branch) -> list[Tensor]:
        """Lists the parameters whose gradients `forward` can put into `sums`: those of the blocks."""
        found: dict[int, Tensor] = {}
        for block in (*self.noise_refiner, *self.layers):
            linear = block.summed_modulation(branch)
            flat = [*block.weights_of(branch).flat(), *(linear.parameters() if linear is not None else ())]
            found |= {id(parameter): parameter for parameter in flat if isinstance(parameter, nn.Parameter)}
        return list(found.values())

    def gather_units(self) -> tuple[type[nn.Module], ...]:
        """Names the classes of the units that ZeRO-3 gathers as a whole. It must, because the functions inside read the
        parameters of submodules without calling these, so that no hook on a submodule would gather them."""
        return Entry, Captions, Block, Close, Exit

    def state_path(self) -> list[nn.Module]:
        """Lists the units that a state goes through before `exit`, in order."""
        return [self.entry, *self.noise_refiner, self.noise_close, *self.layers]

    def prepare_path(self) -> list[nn.Module]:
        """Lists the units that `prepare` goes through, in order."""
        return [self.captions, *self.context_refiner, self.context_close]

    # ---- once per step -----------------------------------------------------------------------------------------------

    def prepare(self, branches: Sequence[Branch], contexts: Sequence[Sequence[Context]], layouts: Sequence[Layout],
                    dtype: torch.dtype) -> list[Tensor]:
        """Returns the refined caption tokens of each branch. They depend on neither the time nor the latents, so one
        computation serves all states of a trajectory."""
        out: list[Tensor] = []
        for i, (branch, ours, layout) in enumerate(zip(branches, contexts, layouts)):
            with torch.set_grad_enabled(torch.is_grad_enabled() and i == 0):
                device = layout.joint.cos.device
                features = torch.cat([context["text"].to(device, dtype) for context in ours])
                tokens = self.captions(branch, self._traced(features), [len(context["text"]) for context in ours])
                out += self._stack(self.context_refiner, self.context_close, [branch], [tokens], [None], [layout.caption])
        return out

    def layout(self, contexts: Sequence[Context], height: int, width: int, device: torch.device) -> Layout:
        """Returns where the tokens of one branch lie, and their rotary angles, for latents of height x width."""
        rows, columns = height // 2, width // 2
        tokens = rows * columns
        padded = tokens + -tokens % PAD_MULTIPLE
        grid = torch.zeros(padded, 3, dtype=torch.int64)
        grid[:tokens, 1:] = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).view(-1, 2)
        image, caption, joint = [], [], []
        for context in contexts:
            self._check_tokens(len(context["text"]))
            length = len(context["text"]) + -len(context["text"]) % PAD_MULTIPLE
            positions = torch.zeros(length, 3, dtype=torch.int64)
            positions[:, 0] = torch.arange(1, length + 1)
            mine = grid.clone()
            mine[:tokens, 0] = length + 1
            image.append(mine)
            caption.append(positions)
            joint.append(torch.cat([mine, positions]))
        return Layout(
            self._packed(image, device), self._packed(caption, device), self._packed(joint, device),
            Sequences([tokens] * len(contexts), device), tokens,
        )

    def _packed(self, positions: list[Tensor], device: torch.device) -> Packed:
        rotation = self.embed_positions(torch.cat(positions).to(device))
        return Packed(Sequences([len(p) for p in positions], device), rotation.real.contiguous(), rotation.imag.contiguous())

    # ---- once per state ----------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, t: Tensor, branches: Sequence[Branch], captions: Sequence[Tensor], layouts: Sequence[Layout],
                sums: GradientSums | None = None, tape: Tape | None = None) -> tuple[Tensor, ...]:
        """Returns v `[B, C, h, w]` of each branch at x `[B, C, h, w]` (in the model's dtype) and t `[B]`. Only the first branch
        carries gradient.

        captions: from `prepare`. layouts: from `layout`. sums: takes the gradients of the blocks' parameters. tape: cuts the
        graph after each unit of `state_path` and keeps the pieces, so that the graph of the result covers `exit` alone."""
        entered = self.entry(self._traced(x), t.float(), branches, self.config.t_scale)
        tokens = [entered[0] if one is None else one for one in entered[0::2]]
        times = list(entered[1::2])
        if tape is not None:
            tokens[0], times[0] = tape.cut(self.entry, tokens[0]), tape.cut(self.entry, times[0])
        if sums is not None and times[0].requires_grad:
            times[0] = sums.modulations.time(times[0])
        packed = [one.image for one in layouts]
        images = self._stack(self.noise_refiner, self.noise_close, branches, tokens, times, packed, sums, tape)
        joint = [self._join(*parts) for parts in zip(images, captions, layouts)]
        state = self._blocks(self.layers, branches, joint, times, [one.joint for one in layouts], sums, tape)
        velocities = []
        for i, (branch, layout, c) in enumerate(zip(branches, layouts, times)):
            with torch.set_grad_enabled(torch.is_grad_enabled() and i == 0):
                ours, h, gate = state[3 * i : 3 * i + 3]
                image, h = _image_rows(ours, layout), None if h is None else _image_rows(h, layout)
                out = self.exit(branch, image, h, gate, times[0] if c is None else c, layout.final, self.config.norm_eps)
                velocities.append(unpatchify(out, x.shape))
        return tuple(velocities)

    def _blocks(self, blocks: nn.ModuleList, branches: Sequence[Branch], tokens: Sequence[Tensor],
                times: Sequence[Tensor | None], packed: Sequence[Packed], sums: GradientSums | None,
                tape: Tape | None) -> list[Any]:
        """Runs a stack of blocks and returns (x, h, gate) of each branch. Where the stack is empty, h and gate are None."""
        call = BlockCall(packed[0], packed[1] if len(packed) > 1 else None, self.config.n_heads, self.config.norm_eps,
                    QK_EPS, self.activations, self.attention, sums, self.fp8)
        state: list[Any] = [self._traced(tokens[0]), None, None]
        if len(branches) > 1:
            state += [tokens[1], None, None]
        for block in blocks:
            arguments = []
            for i, c in enumerate(times):
                arguments += [*state[3 * i : 3 * i + 3], c]
            state = list(block(*arguments, call=call, branches=branches))[: 3 * len(branches)]
            if tape is not None:
                state[:3] = [tape.cut(block, one) for one in state[:3]]
        return state

    def _traced(self, x: Tensor) -> Tensor:
        """Returns `x`, and makes it require gradient under gather=unit: DeepSpeed's hooks learn that a unit's backward is over
        from the gradient of its input, so that the input must have one."""
        if self.hooked and torch.is_grad_enabled() and not x.requires_grad:
            return x.detach().requires_grad_()
        return x

    def _stack(self, blocks: nn.ModuleList, close: Close, branches: Sequence[Branch], tokens: Sequence[Tensor],
               times: Sequence[Tensor | None], packed: Sequence[Packed],
               sums: GradientSums | None = None, tape: Tape | None = None) -> list[Tensor]:
        """Runs a stack of blocks and adds its last residual; returns the tokens of each branch."""
        state = self._blocks(blocks, branches, tokens, times, packed, sums, tape)
        if not len(blocks):
            return list(tokens)
        out = []
        for i, branch in enumerate(branches):
            with torch.set_grad_enabled(torch.is_grad_enabled() and i == 0):
                out.append(close(branch, *state[3 * i : 3 * i + 3], packed[i].sequences, self.config.norm_eps))
        if tape is not None:
            out[0] = tape.cut(close, out[0])
        return out

    def _join(self, images: Tensor, captions: Tensor, layout: Layout) -> Tensor:
        """Packs the tokens item after item, each item's image tokens before its caption tokens."""
        lengths = layout.image.sequences.lengths, layout.caption.sequences.lengths
        parts = zip(images.split(list(lengths[0])), captions.split(list(lengths[1])))
        return torch.cat([part for item in parts for part in item])


def patchify(x: Tensor) -> Tensor:
    """Cuts `[B, C, h, w]` into 2x2 patches `[B, h/2 * w/2, 4 C]`, channels last."""
    b, c, h, w = x.shape
    return x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 3, 5, 1).reshape(b, h * w // 4, 4 * c)


def unpatchify(tokens: Tensor, shape: torch.Size) -> Tensor:
    """Puts patches `[B * N, 4 C]` together to `shape` = `[B, C, h, w]`. It is the inverse of `patchify`."""
    b, c, h, w = shape
    return tokens.view(b, h // 2, w // 2, 2, 2, c).permute(0, 5, 1, 3, 2, 4).reshape(b, c, h, w)


def _image_rows(tokens: Tensor, layout: Layout) -> Tensor:
    """Picks the image tokens without padding `[B * N, D]` from the joint tokens `[T, D]`."""
    pieces = tokens.split(list(layout.joint.sequences.lengths))
    return torch.cat([piece[: layout.tokens] for piece in pieces])
