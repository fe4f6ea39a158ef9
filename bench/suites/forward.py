"""Suite `forward`: both velocities at one state, without gradient: a trajectory of K = 1 from x_0 = noise to x_1 = x_0 + v_s.

    ours        the pair forward: student and teacher packed into one
    two_calls   the same kernels, the teacher and then the student, each by itself
    diffusers   diffusers' own forward twice, as its pipeline calls it
    compiled    the same, its blocks compiled, with RoPE in real numbers (R4)

All begin at the conditions, so that captions are refined in every measurement; along a trajectory ours does that once. Rows of
a case, "lora" or "full" with what differs from the standard configuration ("@batch1", for models as wide as the published ones
"@512px@batch4"):

    each            seconds_forward, states_per_second
    each            final_state_relative_error: of x_1; loss_relative_error: of the mean of (v_s - v_t)^2; as in suite rollout
    CASE/VARIANT    ours: speedup_forward, the variant's seconds over ours, round by round
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from bench.results import Options, Row
from bench.suites.measurement import cells
from bench.suites.rollout import Ours, Outcome, Peer, Rollout
from bench.suites.workload import Cell, Workload
from dopsd_fast.pair.student_teacher import STUDENT, TEACHER


def measure(options: Options) -> Iterator[Row]:
    for kind in options.kinds:
        for cell in cells(options, [Cell(pixels=512, batch=4)], [Cell(batch=1)]):
            yield from Forward(kind, options, cell, [name for name in VARIANTS if name != "ours"]).rows()


class TwoCalls(Ours):
    @torch.no_grad()
    def rollout(self) -> Outcome:
        work = self.work
        time = work.noise.new_zeros(work.batch)
        v_t, v_s = (self.pair.sampler(branch, work.contexts(conditions), work.noise.shape)(work.noise, time)
                    for branch, conditions in ((TEACHER, work.teacher), (STUDENT, work.student)))
        return work.noise + v_s, torch.nn.functional.mse_loss(v_s, v_t).item()


VARIANTS: dict[str, Callable[[str, Workload], Any]] = {
    "ours": Ours, "two_calls": TwoCalls, "diffusers": partial(Peer, "R2"), "compiled": partial(Peer, "R4"),
}


class Forward(Rollout):
    suite, seconds, ratio = "forward", "seconds_forward", "speedup_forward"

    def workload(self) -> Workload:
        work = super().workload()
        work.states, work.grid = 1, [0.0, 1.0]
        return work

    def make(self, name: str) -> Any:
        return VARIANTS[name](self.kind, self.work)
