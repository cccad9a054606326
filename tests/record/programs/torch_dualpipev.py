"""Trains with torch's own ScheduleDualPipeV.  Usage: torch_dualpipev.py MICROBATCHES."""

import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.pipelining import PipelineStage, ScheduleDualPipeV

HIDDEN = 8
microbatches = int(sys.argv[1])
dist.init_process_group("gloo")
rank, ranks = dist.get_rank(), dist.get_world_size()
torch.manual_seed(rank)
numbers = (rank, 2 * ranks - 1 - rank)
modules = [nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, HIDDEN)) for _ in numbers]
stages = [
    PipelineStage(module, number, 2 * ranks, torch.device("cpu"))
    for module, number in zip(modules, numbers, strict=True)
]
schedule = ScheduleDualPipeV(stages, microbatches, loss_fn=nn.MSELoss())
if rank == 0:
    schedule.step(torch.randn(2 * microbatches, HIDDEN), target=torch.randn(2 * microbatches, HIDDEN))
else:
    schedule.step()
dist.destroy_process_group()
