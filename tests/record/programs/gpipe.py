"""GPipe with blocking send and recv: all forwards, then all backwards.  Usage: gpipe.py MICROBATCHES STEPS.

The weight gradients are deferred to the end: each is computed separately from the graph that the backward for the input
retained.
"""

import os
import sys

import torch
import torch.distributed as dist
from torch import nn

MICROBATCHES, STEPS = int(sys.argv[1]), int(sys.argv[2])
SHAPE = (2, 4)


def main():
    dist.init_process_group("nccl", device_id=torch.device("cuda", int(os.environ["LOCAL_RANK"])))
    rank, ranks = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", torch.cuda.current_device())
    stage = nn.Linear(4, 4, bias=False).to(device)
    optimizer = torch.optim.AdamW(stage.parameters())
    weight = stage.weight
    for _ in range(STEPS):
        kept = []
        for _ in range(MICROBATCHES):
            x = torch.randn(SHAPE, device=device)
            if rank:
                dist.recv(x, src=rank - 1)
            x.requires_grad_()
            y = stage(x)
            kept.append((x, y))
            if rank < ranks - 1:
                dist.send(y, dst=rank + 1)
        later = []
        for x, y in kept:
            if rank == ranks - 1:
                output, gradient = y.square().sum(), None
            else:
                output, gradient = y, torch.empty_like(y)
                dist.recv(gradient, src=rank + 1)
            (dx,) = torch.autograd.grad(output, x, gradient, retain_graph=True)
            later.append((output, gradient))
            if rank:
                dist.send(dx, dst=rank - 1)
        for output, gradient in later:
            (dw,) = torch.autograd.grad(output, weight, gradient)
            weight.grad = dw if weight.grad is None else weight.grad + dw
        torch.nn.utils.clip_grad_norm_(stage.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
