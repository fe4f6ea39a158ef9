"""What is trained: the methods of the paper's table, its ablations, and the low-rank customisation."""

from __future__ import annotations

import math
from dataclasses import dataclass

OURS, START = "dopsd", "start"
DOMAINS = ("target", "original")
MANY = 32
"""Function evaluations of a picture whose time does not matter."""
STEP_OF_RATES = (1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
"""A search of learning rates goes on along these while the best is at an end of what was tried."""
LORA = ("adapter.kind=lora",)


@dataclass(frozen=True)
class Arm:
    """One line of a table. `words`: its settings, over those that all arms share. `rate_of`: the arm whose learning rate it
    takes; its own name: it is searched. `trained_by`: the trainer, or the published step in plain PyTorch. `data`: "all"
    records, or "few": the images of the customisation. `curve`: pictures are drawn from every checkpoint. `seeds`: at most;
    None: what the budget has."""

    name: str
    says: str
    words: tuple[str, ...] = ()
    rate_of: str = ""
    trained_by: str = "trainer"
    data: str = "all"
    curve: bool = True
    seeds: int | None = None

    @property
    def rate_from(self) -> str:
        return self.rate_of or self.name

    @property
    def lora(self) -> bool:
        return "adapter.kind=lora" in self.words


SFT = ("method.name=sft",)
PSO = ("method.name=pso", "teacher.kind=frozen")
MAIN = (
    Arm("sft", "SFT", SFT),
    Arm("sft_lora", "SFT + LoRA", (*SFT, *LORA)),
    Arm("pso", "PSO", PSO),
    Arm(OURS, "D-OPSD"),
    Arm("dopsd_eager", "D-OPSD, eager reference", rate_of=OURS, trained_by="eager"),
    Arm("live_teacher", "D-OPSD, live teacher", ("teacher.kind=student",), OURS),
)
QUICK = tuple(arm for arm in MAIN if arm.name in ("sft", OURS, "live_teacher"))
ABLATIONS = (
    Arm("frozen_teacher", "teacher frozen", ("teacher.kind=frozen",), OURS),
    Arm("off_policy", "off-policy states", ("method.states=off_policy",), OURS),
    Arm("sft_on_teacher_samples", "SFT on teacher samples", (*SFT, "method.targets=teacher", "teacher.kind=frozen")),
    Arm("custom_sft", "4 images, LoRA: SFT", (*SFT, *LORA), data="few", curve=False, seeds=2),
    Arm("custom_pso", "4 images, LoRA: PSO", (*PSO, *LORA), data="few", curve=False, seeds=2),
    Arm("custom_dopsd", "4 images, LoRA: D-OPSD", LORA, data="few", curve=False, seeds=2),
    Arm("ema_0.99", "EMA 0.99", ("teacher.ema_decay=0.99",), OURS, seeds=2),
    Arm("ema_0.999", "EMA 0.999", ("teacher.ema_decay=0.999",), OURS, seeds=2),
    Arm("ema_bf16", "EMA 0.9999 in bf16", ("teacher.ema_dtype=bf16",), OURS, curve=False, seeds=2),
    Arm("weight_x1", "weight x1", ("method.weight=x1",), OURS, curve=False, seeds=2),
    Arm("weight_mu", "weight mu", ("method.weight=mu",), OURS, curve=False, seeds=2),
    Arm("states_2", "K = 2", ("method.num_states=2",), OURS, curve=False, seeds=2),
    Arm("states_8", "K = 8", ("method.num_states=8",), OURS, curve=False, seeds=2),
)
BEFORE = Arm(START, "start")
"""The pipeline as it is: nothing is trained."""
NAMES = {arm.name: arm.says for arm in (BEFORE, *MAIN, *ABLATIONS)}


@dataclass(frozen=True)
class Budget:
    """What every arm gets. `search`: learning rates are searched, else known. Captions of each domain: `captions`, that the
    final pictures are drawn for; `validation`, that rates are chosen by; `curve`, the first of those, at each of `points`."""

    steps: int
    seeds: int
    search: bool
    captions: int
    validation: int
    curve: int
    points: int

    def seeds_of(self, arm: Arm) -> range:
        return range(min(self.seeds, arm.seeds or self.seeds))


FULL = Budget(steps=128, seeds=3, search=True, captions=64, validation=64, curve=32, points=8)
BRIEF = Budget(steps=80, seeds=2, search=False, captions=48, validation=32, curve=32, points=4)


def ranked(scores: dict[float, float]) -> list[float]:
    """The rates of finite scores, that of the best (lowest) first."""
    return sorted((rate for rate in scores if math.isfinite(scores[rate])), key=lambda rate: scores[rate])


def next_rate(scores: dict[float, float]) -> float | None:
    """What a search tries next: beyond the end where the best score is; None when it lies inside, or nothing is left."""
    best = next(iter(ranked(scores)), None)
    if best is None or min(scores) < best < max(scores):
        return None
    place = min(range(len(STEP_OF_RATES)), key=lambda i: abs(STEP_OF_RATES[i] / best - 1))
    place += 1 if best == max(scores) else -1
    return STEP_OF_RATES[place] if 0 <= place < len(STEP_OF_RATES) else None
