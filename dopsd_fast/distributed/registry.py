"""The engine that the settings ask for."""

from __future__ import annotations

from typing import Any

from dopsd_fast.distributed.engine import Engine
from dopsd_fast.distributed.plain_engine import PlainEngine
from dopsd_fast.distributed.process_group import init_distributed
from dopsd_fast.distributed.zero_engine import ZeroEngine
from dopsd_fast.pair.student_teacher import Pair
from dopsd_fast.settings.schema import DeepSpeedSettings, TeacherSettings, TrainSettings


def make_engine(
    pair: Pair, train: TrainSettings, teacher: TeacherSettings, deepspeed: DeepSpeedSettings, config: dict[str, Any]
) -> Engine:
    """The engine of `deepspeed.stage`, on the process group of this process. Every rank calls it. `config`: what DeepSpeed is
    told (`settings.deepspeed_dict.deepspeed_config`); stage 0 does without. Raises UserError where DeepSpeed refuses it."""
    ranks = init_distributed()
    if deepspeed.stage == 0:
        return PlainEngine(pair, train, teacher, ranks)
    return ZeroEngine(pair, train, teacher, deepspeed, config, ranks)
