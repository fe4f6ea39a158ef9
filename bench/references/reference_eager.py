"""The published D-OPSD step (arXiv 2605.05204 and its released code), written out plainly on diffusers + PEFT.

Test oracle and benchmark peer. It shares nothing with `dopsd_fast`: it counts in sigma (1 = noise, 0 = image) as the diffusers
schedulers do, takes the losses as differences of predictions (velocity, clean latent, next state) instead of one weighted
formula, keeps the graphs of all K student forwards alive, relies on gradient checkpointing for memory, and runs the encoders
anew in every step. The released code trains LoRA only; `adapter=None` extends the same step to full fine-tuning with a second
model as teacher.

`STRONGER` makes it faster without any kernel of its own: the peers R2 to R4 of the benchmark.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.references.real_rope import use_real_rope

ZIMAGE_TARGETS = ("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0",
                  "feed_forward.w1", "feed_forward.w2", "feed_forward.w3")

STRONGER: dict[str, dict[str, Any]] = {
    "R1": {},
    "R2": {},
    "R3": {"compile_blocks": "inductor"},
    "R4": {"compile_blocks": "inductor", "real_rope": True, "backward": "per_state", "gradient_checkpointing": False},
}
"""Options of `ReferenceStep` for each peer. R1, the published step, is called with `step_from_inputs`, the others with
`step` and conditions computed once. R4 holds one graph at a time, so it needs no checkpointing either."""


@dataclass
class Condition:
    """Conditioning of one sample: text features `[L, D]` and, for FLUX.2, reference latents, each `[C, h, w]`."""

    text: Tensor
    references: list[Tensor] = field(default_factory=list)


@dataclass
class Adapter:
    """LoRA of the released code: gaussian A, zero B."""

    rank: int = 64
    alpha: float = 128
    targets: Sequence[str] = ZIMAGE_TARGETS


@dataclass
class StepResult:
    """`losses[k]` is the unweighted-by-K loss of state k, `loss` their mean, `states` x_0 ... x_K."""

    loss: float
    losses: list[float]
    states: list[Tensor]
    grad_norm: float = float("nan")


def scheduler_sigmas(scheduler, num_states: int, image_tokens: int = 0) -> list[float]:
    """sigma_0 ... sigma_K = 0 of a diffusers flow-matching scheduler; `image_tokens` is for dynamic shifting."""
    from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

    mu = compute_empirical_mu(image_tokens, num_states) if scheduler.config.use_dynamic_shifting else None
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1.0 / num_states, num_states), mu=mu)
    return scheduler.sigmas.double().tolist()


def predict_noise_direction(model: Any, x: Tensor, sigma: float, conditions: Sequence[Condition]) -> Tensor:
    """dx/dsigma = noise - image, `[B, C, h, w]`, as the model's own diffusers pipeline computes it without guidance."""
    if type(model).__name__.startswith("ZImage"):
        time = torch.full((len(x),), 1.0 - sigma, dtype=x.dtype, device=x.device)
        frames = list(x.to(model.dtype).unsqueeze(2).unbind(0))
        out = model(frames, time, [c.text.to(model.dtype) for c in conditions], return_dict=False)[0]
        return -torch.stack([o.to(x.dtype) for o in out]).squeeze(2)

    from diffusers import Flux2KleinPipeline as Klein

    tokens = Klein._pack_latents(x)
    sequence, ids = [tokens], [Klein._prepare_latent_ids(x)]
    if conditions[0].references:
        count = len(conditions[0].references)
        sequence += [Klein._pack_latents(torch.stack([c.references[i] for c in conditions])) for i in range(count)]
        reference_ids = Klein._prepare_image_ids([r[None] for r in conditions[0].references])
        ids.append(reference_ids.expand(len(x), -1, -1))
    text = torch.stack([c.text for c in conditions]).to(model.dtype)
    out = model(
        hidden_states=torch.cat(sequence, dim=1).to(model.dtype), encoder_hidden_states=text, guidance=None,
        timestep=torch.full((len(x),), sigma, dtype=x.dtype, device=x.device), return_dict=False,
        txt_ids=Klein._prepare_text_ids(text).to(x.device), img_ids=torch.cat(ids, dim=1).to(x.device),
    )[0]
    return out[:, : tokens.shape[1]].to(x.dtype).transpose(1, 2).reshape(x.shape)


def add_teacher(model: Any, adapter: Adapter | None) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """(teacher, trainable, teacher's weights): gives `model` a teacher that equals it. It is a second model, or with `adapter`
    None beside the adapters "teacher" and "student" of PEFT, the student's active. Weights are by their names in the model."""
    if adapter is None:
        teacher = copy.deepcopy(model).requires_grad_(False)
        model.requires_grad_(True)
        weights = dict(teacher.named_parameters())
        trainable = dict(model.named_parameters())
        return teacher, trainable, {name: weights[name] for name in trainable}
    from peft import LoraConfig

    model.requires_grad_(False)
    for name in ("teacher", "student"):
        config = LoraConfig(r=adapter.rank, lora_alpha=adapter.alpha, init_lora_weights="gaussian",  # type: ignore[arg-type]
                            target_modules=list(adapter.targets))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT warns of a second adapter: it is meant
            model.add_adapter(config, adapter_name=name)
    parameters = dict(model.named_parameters())
    trainable = {name: p for name, p in parameters.items() if ".student." in name}
    weights = {name: parameters[name.replace(".student.", ".teacher.")] for name in trainable}
    with torch.no_grad():
        for name, parameter in trainable.items():  # PEFT draws each adapter on its own
            weights[name].copy_(parameter)
    model.set_adapter("student")
    return None, trainable, weights


@torch.no_grad()
def predict_teacher(model: Any, teacher: Any, x: Tensor, sigma: float, conditions: Sequence[Condition]) -> Tensor:
    """The teacher's dx/dsigma: of a model of its own, or where `teacher` is None of the student's under the other adapter."""
    if teacher is not None:
        return predict_noise_direction(teacher, x, sigma, conditions)
    model.set_adapter("teacher")
    prediction = predict_noise_direction(model, x, sigma, conditions)
    model.set_adapter("student")
    return prediction


class ReferenceStep:
    """Student, teacher, AdamW and EMA of one published training run.

    `model` is a diffusers transformer (it is changed in place). `sigmas`: sigma_0 = 1 ... sigma_K = 0. `weight`: `v` compares
    velocities (paper), `x1` predicted clean latents (released code), `mu` next states (PE-OPSD). `ema_dtype=None` averages in
    the teacher's own dtype, as released. Not published, same mathematics: `backward="per_state"` back-propagates each state's
    loss at once, `compile_blocks` compiles the transformer's blocks with that torch.compile backend, `real_rope` rotates
    without complex numbers (Z-Image only).
    """

    def __init__(
        self, model: Any, sigmas: Sequence[float], *, weight: str = "x1", adapter: Adapter | None = None,
        learning_rate: float = 1e-4, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0,
        grad_clip: float = 1.0, ema_decay: float = 0.9999, ema_dtype: torch.dtype | None = torch.float32,
        gradient_checkpointing: bool = True, encoders: ReferenceEncoders | None = None,
        backward: Literal["k_graphs", "per_state"] = "k_graphs", compile_blocks: str | None = None, real_rope: bool = False,
    ) -> None:
        if real_rope:
            use_real_rope(model)
        self.model, self.sigmas, self.encoders = model, list(sigmas), encoders
        self.weight, self.per_state = weight, backward == "per_state"
        self.grad_clip, self.ema_decay = grad_clip, ema_decay
        self.teacher, self.trainable, self.teacher_weights = add_teacher(model, adapter)
        if gradient_checkpointing:
            model.enable_gradient_checkpointing()
        if compile_blocks:
            for transformer in filter(None, (self.model, self.teacher)):
                transformer.compile_repeated_blocks(dynamic=False, backend=compile_blocks)
        self.ema = {name: p.detach().to(ema_dtype or p.dtype, copy=True) for name, p in self.teacher_weights.items()}
        self.optimizer = torch.optim.AdamW(self.trainable.values(), learning_rate, betas, eps, weight_decay)

    @torch.no_grad()
    def copy_student_to_teacher(self) -> None:
        for name, parameter in self.trainable.items():
            self.teacher_weights[name].copy_(parameter)

    def student_prediction(self, x: Tensor, sigma: float, conditions: Sequence[Condition]) -> Tensor:
        return predict_noise_direction(self.model, x, sigma, conditions)

    def teacher_prediction(self, x: Tensor, sigma: float, conditions: Sequence[Condition]) -> Tensor:
        return predict_teacher(self.model, self.teacher, x, sigma, conditions)

    def backward(self, noise: Tensor, student: Sequence[Condition], teacher: Sequence[Condition]) -> StepResult:
        """Forward K states, keep all their graphs, back-propagate once; gradients add up in `.grad`."""
        x = noise
        states, losses = [x], []
        count = len(self.sigmas) - 1
        for sigma, sigma_next in zip(self.sigmas[:-1], self.sigmas[1:], strict=True):
            prediction = self.student_prediction(x, sigma, student)
            target = self.teacher_prediction(x, sigma, teacher)
            if self.weight == "v":
                losses.append(F.mse_loss(prediction, target))
            elif self.weight == "x1":
                losses.append(F.mse_loss(x - sigma * prediction, x - sigma * target))
            elif self.weight == "mu":
                step = sigma_next - sigma
                losses.append(F.mse_loss(x + step * prediction, x + step * target))
            else:
                raise ValueError(f"weight {self.weight!r} is none of 'v', 'x1', 'mu'")
            x = (x + (sigma_next - sigma) * prediction).detach()
            states.append(x)
            if self.per_state:
                (losses[-1] / count).backward()
                losses[-1] = losses[-1].detach()
        loss = torch.stack(losses).mean()
        if not self.per_state:
            loss.backward()
        return StepResult(loss.item(), [value.item() for value in losses], states)

    def step(self, noise: Tensor, student: Sequence[Condition], teacher: Sequence[Condition]) -> StepResult:
        """One whole training step: gradients, clipping, AdamW, EMA."""
        self.optimizer.zero_grad(set_to_none=True)
        result = self.backward(noise, student, teacher)
        norm = torch.nn.utils.clip_grad_norm_(list(self.trainable.values()), self.grad_clip)
        self.optimizer.step()
        self.update_teacher()
        result.grad_norm = norm.item()
        return result

    def step_from_inputs(self, noise: Tensor, prompts: Sequence[str], images: Sequence) -> StepResult:
        """`step` from raw prompts and PIL images; the encoders run first, as they do in every published step."""
        if self.encoders is None:
            raise ValueError("ReferenceStep: raw prompts and images need `encoders`")
        return self.step(noise, self.encoders.student(prompts), self.encoders.teacher(prompts, images))

    @torch.no_grad()
    def update_teacher(self) -> None:
        """ema = decay * ema + (1 - decay) * student, in the EMA's dtype; the teacher's weights become that average."""
        for name, average in self.ema.items():
            average.mul_(self.ema_decay).add_(self.trainable[name].to(average.dtype), alpha=1.0 - self.ema_decay)
            self.teacher_weights[name].copy_(average)

    def gradients(self) -> dict[str, Tensor]:
        """The gradient of every trainable tensor by its name in the model (zeros where none arrived)."""
        return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in self.trainable.items()}


class ReferenceEncoders:
    """Z-Image's encoders: Qwen3 for the student, Qwen3-VL with Qwen3's language weights for the teacher.

    `folder`: a diffusers Z-Image pipeline; `vlm_folder`: Qwen3-VL with tokenizer and image processor (default `<folder>/vlm`).
    `max_pixels`: most pixels of a picture that the teacher is shown, larger ones are scaled down; 0: as the image processor
    has it.
    """

    def __init__(self, folder: Path, vlm_folder: Path | None = None, *, device: Any = "cpu",
                 dtype: torch.dtype = torch.float32, max_pixels: int = 0) -> None:
        from diffusers import ZImagePipeline
        from transformers import AutoTokenizer, Qwen2VLImageProcessorPil, Qwen3VLForConditionalGeneration

        vlm_folder = vlm_folder or Path(folder) / "vlm"
        self.device = torch.device(device)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*torch_dtype", FutureWarning)  # the one name that every diffusers knows
            self.pipeline = ZImagePipeline.from_pretrained(folder, transformer=None, vae=None, torch_dtype=dtype)
        self.pipeline.to(device)
        self.tokenizer = AutoTokenizer.from_pretrained(vlm_folder)
        # By its name: AutoImageProcessor wants torchvision up to transformers 5.17, whatever backend it is asked for.
        self.image_processor = Qwen2VLImageProcessorPil.from_pretrained(vlm_folder)
        usual = self.image_processor.size
        self.size = {"shortest_edge": usual["shortest_edge"], "longest_edge": max_pixels or usual["longest_edge"]}
        self.vlm = Qwen3VLForConditionalGeneration.from_pretrained(vlm_folder, dtype=dtype).eval().to(device)
        self.vlm.model.language_model.load_state_dict(self.pipeline.text_encoder.state_dict(), strict=True)

    @torch.no_grad()
    def student(self, prompts: Sequence[str], max_tokens: int = 512) -> list[Condition]:
        """Text only: what `ZImagePipeline` itself conditions on."""
        features, _ = self.pipeline.encode_prompt(
            list(prompts), device=self.device, do_classifier_free_guidance=False, max_sequence_length=max_tokens
        )
        return [Condition(f) for f in features]

    @torch.no_grad()
    def teacher(self, prompts: Sequence[str], images: Sequence, max_tokens: int = 1024) -> list[Condition]:
        """Image, then text, in one user turn; the features of all tokens."""
        conditions = []
        for prompt, image in zip(prompts, images, strict=True):
            pixels = self.image_processor(images=[image], size=self.size, return_tensors="pt").to(self.device)
            count = int(pixels["image_grid_thw"].prod()) // self.image_processor.merge_size**2
            turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}
            text = self.tokenizer.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)
            text = text.replace("<|image_pad|>", "<|image_pad|>" * count, 1)
            ids = self.tokenizer(text, return_tensors="pt").input_ids[:, :max_tokens].to(self.device)
            conditions.append(vision_features(self.vlm, ids, pixels["pixel_values"], pixels["image_grid_thw"]))
        return conditions


def vision_features(vlm: Any, ids: Tensor, pixels: Tensor, grid: Tensor) -> Condition:
    """The VLM's features before its last layer, `[L, D]`, of one sequence `ids` `[1, L]` with one picture."""
    out = vlm(
        input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=(ids == vlm.config.image_token_id).int(),
        pixel_values=pixels.to(vlm.dtype), image_grid_thw=grid, output_hidden_states=True,
    )
    return Condition(out.hidden_states[-2][0])
