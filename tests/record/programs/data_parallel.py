"""GPipe on two ranks, twice: two data-parallel replicas on four ranks.  Usage: data_parallel.py [FAULT].

Ranks 0 and 2 run one pipeline, ranks 1 and 3 the other one.  With ``swapped`` rank 1 sends its activations in the wrong
order.  The gradients of the replicas are summed, and all ranks get the loss of rank 3.
"""

import sys

import torch
import torch.distributed as dist
from torch import nn

SHAPE = (2, 4)
dist.init_process_group("nccl")
rank = dist.get_rank()
torch.cuda.set_device(rank)
stage, peer = nn.Linear(4, 4).cuda(), (rank + 2) % 4
replicas = [dist.new_group([first, first + 1]) for first in (0, 2)][rank // 2]
kept = []


def receive():
    buffer = torch.empty(SHAPE, device="cuda")
    dist.recv(buffer, peer)
    return buffer


if rank < 2:
    outputs = [stage(torch.randn(SHAPE, device="cuda")) for _ in range(2)]
    for y in reversed(outputs) if sys.argv[1:] == ["swapped"] and rank == 1 else outputs:
        dist.send(y.detach(), peer)
    for y in outputs:
        y.backward(receive())
else:
    for _ in range(2):
        x = receive().requires_grad_()
        loss = stage(x).square().sum()
        loss.backward()
        kept.append(x)
    for x in kept:
        dist.send(x.grad, peer)
for weight in stage.parameters():
    dist.all_reduce(weight.grad, group=replicas)
if rank == 3:
    for other in range(3):
        dist.send(loss.detach(), other)
else:
    dist.recv(torch.empty((), device="cuda"), 3)
dist.destroy_process_group()
