"""Full or LoRA fine-tuning under ZeRO-3 as one would write it first: diffusers' student and teacher in one wrapper, given to
`deepspeed.initialize` as they are, with torch's AdamW. The step is the published one (reference_eager.py): gradient
checkpointing, the graphs of K states, one backward.

DeepSpeed's defaults hold but for three settings that are 0, so that a small model behaves as a large one does: by default
parameters under 100,000 elements are never sharded (persistence_threshold), blocks are gathered ahead until 10^9 elements are
whole (max_live_parameters), and what is used again within 10^9 elements stays (max_reuse_distance): of 6 B parameters a sixth,
of a small model all, so that it would never be sharded. Defaults scaled to the embedded model's size give the same counts.

A block is gathered for the student's forward, for the teacher's, to compute it again and for its backward: 4 K times a step
(DeepSpeed keeps a frozen one, of LoRA, between the last two: 3 K). What is not checkpointed, embedders and the last layer, is
gathered for the forwards, 2 K times, and a few more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.references.reference_eager import Adapter, Condition, add_teacher, predict_noise_direction, predict_teacher

EMA_DECAY = 0.9999
LIKE_A_LARGE_MODEL = dict.fromkeys(
    ("stage3_param_persistence_threshold", "stage3_max_live_parameters", "stage3_max_reuse_distance"), 0
)


class Both(nn.Module):
    """Student and teacher at one state: two transformers, or one with two adapters (`teacher` None)."""

    def __init__(self, student: Any, teacher: Any) -> None:
        super().__init__()
        self.student, self.teacher = student, teacher

    def forward(self, x: Tensor, sigma: float, student: Sequence[Condition],
                teacher: Sequence[Condition]) -> tuple[Tensor, Tensor]:
        prediction = predict_noise_direction(self.student, x, sigma, student)
        return prediction, predict_teacher(self.student, self.teacher, x, sigma, teacher)


class PlainZero:
    """`model`: a diffusers transformer, changed in place. `sigmas`: sigma_0 = 1 ... sigma_K = 0. There is a process group."""

    def __init__(self, model: Any, sigmas: Sequence[float], *, batch_size: int, adapter: Adapter | None = None,
                 learning_rate: float = 1e-4) -> None:
        import deepspeed

        self.sigmas = list(sigmas)
        teacher, students, teachers = add_teacher(model, adapter)
        self.trained = list(zip(students.values(), teachers.values()))
        model.enable_gradient_checkpointing()
        self.both = Both(model, teacher)
        config = {
            "train_micro_batch_size_per_gpu": batch_size,
            "gradient_clipping": 1.0,
            "bf16": {"enabled": next(model.parameters()).dtype == torch.bfloat16},
            "steps_per_print": 1 << 62,
            "zero_optimization": {"stage": 3, **LIKE_A_LARGE_MODEL},
        }
        optimizer = torch.optim.AdamW([student for student, _ in self.trained], lr=learning_rate, weight_decay=0.0)
        self.engine = deepspeed.initialize(model=self.both, optimizer=optimizer, config=config)[0]

    def weights(self) -> Iterator[tuple[str | None, Any]]:
        """(stock name, parameter) of student and teacher; None for an adapter's."""
        for name, parameter in self.both.named_parameters():
            yield None if ".lora_" in name else name.partition(".")[2].replace(".base_layer.", "."), parameter

    def backward(self, noise: Tensor, student: Sequence[Condition], teacher: Sequence[Condition]) -> float:
        """K forwards of each branch, one backward, AdamW; the loss."""
        x, losses = noise, []
        for sigma, sigma_next in zip(self.sigmas[:-1], self.sigmas[1:], strict=True):
            prediction, target = self.engine(x, sigma, student, teacher)
            losses.append(F.mse_loss(prediction, target))
            x = (x + (sigma_next - sigma) * prediction).detach()
        loss = torch.stack(losses).mean()
        self.engine.backward(loss)
        self.engine.step()
        return float(loss)

    @torch.no_grad()
    def update_teacher(self) -> None:
        """teacher = decay * teacher + (1 - decay) * student, in the weights' dtype: gathers each pair of tensors, and rank 0's
        result is sent to all, as ZeRO-3 wants a change to be made."""
        import deepspeed

        for student, teacher in self.trained:
            with deepspeed.zero.GatheredParameters([student, teacher], modifier_rank=0):
                teacher.lerp_(student, 1 - EMA_DECAY)

    def step(self, noise: Tensor, student: Sequence[Condition], teacher: Sequence[Condition]) -> float:
        loss = self.backward(noise, student, teacher)
        self.update_teacher()
        return loss

    def close(self) -> None:
        self.engine.destroy()
