"""The engine that the settings ask for."""

from __future__ import annotations

from dopsd_fast.distributed.engine import Engine
from dopsd_fast.distributed.plain_engine import PlainEngine
from dopsd_fast.distributed.process_group import init_distributed
from dopsd_fast.distributed.zero_engine import ZeroEngine
from dopsd_fast.pair.student_teacher import Pair
from dopsd_fast.settings.deepspeed_dict import deepspeed_config
from dopsd_fast.settings.schema import Settings


def make_engine(pair: Pair, settings: Settings) -> Engine:
    """The engine of `deepspeed.stage`, on the process group of this process. Every rank calls it. Raises UserError for a
    `deepspeed.config` that contradicts another setting, or that DeepSpeed refuses."""
    ranks, config = init_distributed(), deepspeed_config(settings)
    if settings.deepspeed.stage == 0:
        return PlainEngine(pair, settings.train, settings.teacher, ranks)
    return ZeroEngine(pair, settings.train, settings.teacher, settings.deepspeed, config, ranks)
