"""Trains with one of torch's own schedules.  Usage: torch_schedule.py DualPipeV MICROBATCHES [residual]."""

import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage, schedules

HIDDEN = 8


class Stage(nn.Module):
    """A small network, whose input may be added to what it returns."""

    def __init__(self, residual):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, HIDDEN))
        self.residual = residual

    def forward(self, x):
        return x + self.inner(x) if self.residual else self.inner(x)


name, microbatches = sys.argv[1], int(sys.argv[2])
kind = getattr(schedules, f"Schedule{name}")
dist.init_process_group("gloo")
rank, ranks = dist.get_rank(), dist.get_world_size()
torch.manual_seed(rank)
several = issubclass(kind, schedules.PipelineScheduleMulti)
v = name in ("DualPipeV", "ZBVZeroBubble")
numbers = (rank, 2 * ranks - 1 - rank if v else ranks + rank)[: 1 + several]
modules = [Stage(sys.argv[3:] == ["residual"]) for _ in numbers]
stages = [
    PipelineStage(module, number, len(numbers) * ranks, torch.device("cpu"))
    for module, number in zip(modules, numbers, strict=True)
]
schedule = kind(stages if several else stages[0], microbatches, loss_fn=nn.MSELoss())
data = [torch.randn(2 * microbatches, HIDDEN)] if 0 in numbers else []
target = torch.randn(2 * microbatches, HIDDEN) if len(numbers) * ranks - 1 in numbers else None
schedule.step(*data, **({} if target is None else {"target": target}))
dist.destroy_process_group()
