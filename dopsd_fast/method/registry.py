"""The objective that the settings name."""

from __future__ import annotations

from dopsd_fast.method.baselines import PSO, SFT
from dopsd_fast.method.dopsd import DOPSD
from dopsd_fast.method.objective import Objective
from dopsd_fast.settings.schema import MethodSettings


def make_objective(method: MethodSettings) -> Objective:
    """The objective of `method.name`."""
    if method.name == "dopsd":
        return DOPSD(method.weight, method.states, method.backward)
    if method.name == "sft":
        return SFT(method.targets)
    if method.name == "pso":
        return PSO(method.beta, method.pairs)
    raise ValueError(f"method.name: {method.name!r} is none of 'dopsd', 'sft', 'pso'")
