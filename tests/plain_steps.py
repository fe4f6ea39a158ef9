"""The steps of `tests/ranks.py` without DeepSpeed, in one process, and how far other arrangements may be from them."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import torch
from torch import nn

from tests import ranks
from tests.tiny import shared

CLIP = 0.05
EPS = 1e-3  # AdamW's: bounds by lr / EPS what a rounding error of a gradient does to a weight
LR = 1e-2


@functools.cache
def plain(adapter: str, precision: str, teacher: str = "ema", model: str = "") -> SimpleNamespace:
    """torch's AdamW on fp32 masters, one average in float64: losses, norms before clipping, and after every step the students
    and teachers by name."""
    case = dict(stage=0, adapter=adapter, precision=precision, teacher=teacher, grad_clip=CLIP)
    if model:
        case["model"] = str(shared(model))
    settings = ranks.make_settings(case, 1)
    family, pair = ranks.make_pair(case, settings)
    trained = pair.trained()
    masters = [nn.Parameter(t.student.detach().float()) for t in trained]
    averages = [master.detach().double() for master in masters]
    optimizer = torch.optim.AdamW(masters, lr=LR, eps=EPS, weight_decay=0.01, betas=(0.9, 0.999))
    start = {t.name: master.detach().clone() for t, master in zip(trained, masters)}
    report = SimpleNamespace(start=start, losses=[], norms=[], students=[], teachers=[])
    for step in range(ranks.STEPS):
        for master in masters:
            master.grad = torch.zeros_like(master)

        def backward(loss: torch.Tensor) -> None:
            loss.backward()
            for t, master in zip(trained, masters):
                if t.student.grad is not None:  # a part of the model may have a backward of its own
                    master.grad += t.student.grad.float()
                t.student.grad = None

        report.losses.append(ranks.accumulate(backward, pair, family, settings, 0, 1, step))
        report.norms.append(float(nn.utils.clip_grad_norm_(masters, CLIP)))
        optimizer.step()
        with torch.no_grad():
            for i, (t, master) in enumerate(zip(trained, masters)):
                averages[i] = 0.9 * averages[i] + 0.1 * master.double()
                t.student.copy_(master)
                if teacher == "ema":
                    t.teacher.copy_(averages[i])
        report.students.append({t.name: m.detach().clone() for t, m in zip(trained, masters)})
        report.teachers.append({t.name: a.clone() for t, a in zip(trained, averages)})
    return report


def tolerance(precision: str, step: int) -> float:
    """Of a weight after `step` + 1 updates.

    A clipped gradient is at most CLIP; sums over another order (a rank's share, a bucket) differ by a few units in
    the last place of the compute dtype, taken as 16. AdamW turns an error d of a gradient into at most 2 * lr / eps * d
    of the weight at each later step: the moments' weights sum to 1 and |m| / (sqrt(v) + eps) has slope <= 1 / eps in
    both. Errors feed back through the next gradients; a factor of 4 a step leaves room for that.
    """
    unit = 2.0**-24 if precision == "fp32" else 2.0**-9
    return _weights(16 * unit, step)


ROUNDING = 2.0**-16
"""Relative error of an fp32 gradient, of its norm or of a loss: sums of up to n = 2^17 terms (every number of the tiny model,
once in the norm), each rounded by 2^-25 on average, err by about sqrt(n) 2^-25 = 2^-16.5 in an unlucky order."""


def distance(step: int) -> float:
    """Of all fp32 weights together, as one vector, after `step` + 1 updates: `tolerance`'s rule with `ROUNDING`, which holds
    for the norm of the error vector as for one of its elements."""
    return _weights(ROUNDING, step)


def _weights(relative: float, step: int) -> float:
    return sum(2 * LR / EPS * relative * CLIP * 4.0**n for n in range(step + 1))
