"""The ranks of a run: joining the others, and small agreements among them."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from datetime import timedelta

import torch


@dataclass(frozen=True)
class Ranks:
    """This process among the others. Every method is a collective call: all ranks make it. One rank needs no process group."""

    rank: int
    world: int
    local_rank: int
    device: torch.device

    def any(self, flag: bool) -> bool:
        """True on every rank when `flag` is true on at least one."""
        return any(self.gather_int(int(flag)))

    def gather_int(self, value: int) -> list[int]:
        """`value` of every rank, in rank order."""
        if self.world == 1:
            return [value]
        mine = torch.tensor([value], dtype=torch.int64, device=self.device)
        everyone = [torch.empty_like(mine) for _ in range(self.world)]
        torch.distributed.all_gather(everyone, mine)
        return [int(one) for one in everyone]

    def mean(self, values: list[float]) -> list[float]:
        """The mean over ranks of each value, in float64."""
        if self.world == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(total)
        return (total / self.world).tolist()


def init_distributed(timeout: timedelta = timedelta(hours=1)) -> Ranks:
    """Joins the process group that the launcher's environment (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_*) describes, or
    starts a group of one. A second call only reports."""
    if "RANK" not in os.environ:
        # Port 0: the store listens on one that is free at that moment.
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    os.environ.setdefault("LOCAL_RANK", "0")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it found nothing better
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")  # DeepSpeed's collectives
    accelerator = get_accelerator()
    if accelerator.device_name() == "cpu":
        # Would be compiled with g++ at the first start; only DeepSpeed's inference uses it.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    local_rank = int(os.environ["LOCAL_RANK"])
    accelerator.set_device(local_rank)
    deepspeed.init_distributed(timeout=timeout, verbose=False)
    world = torch.distributed.get_world_size()
    device = torch.device(accelerator.device_name(local_rank))
    return Ranks(torch.distributed.get_rank(), world, local_rank, device)
