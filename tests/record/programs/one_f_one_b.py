"""A hand-written 1F1B over all ranks with isend, irecv and batches.  Usage: one_f_one_b.py MICROBATCHES [FAULT].

An ordinary program for GPUs and NCCL without any recorder.  In the steady state an activation is sent and the gradient
in the opposite direction is received in one batch.

Faults: ``wait first`` waits for the activation first; ``one by one`` posts the two without a batch; ``swapped`` sends
rank 0's first two activations in the wrong order; ``mute`` does not send rank 1's last gradient, and ``deaf`` does not
receive it.
"""

import os
import sys

import torch
import torch.distributed as dist
from torch import nn

MICROBATCHES, FAULT = int(sys.argv[1]), " ".join(sys.argv[2:])
SHAPE = (2, 4)
rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
torch.cuda.set_device(rank)
dist.init_process_group("nccl")
torch.manual_seed(rank)
stage = nn.Sequential(nn.Linear(4, 4), nn.Tanh()).cuda()
optimizer = torch.optim.SGD(stage.parameters(), lr=0.1)
data = torch.randn(MICROBATCHES, *SHAPE, device=f"cuda:{rank}")
alive, sent = [], []


def receive(peer):
    buffer = torch.empty(SHAPE, device="cuda")
    dist.irecv(buffer, peer).wait()
    return buffer


def exchange(output, peer):
    gradient = torch.empty(SHAPE, device="cuda")
    if FAULT in ("wait first", "one by one"):
        works = [dist.isend(output, peer)]
        if FAULT == "wait first":
            works.pop().wait()
        works.append(dist.irecv(gradient, peer))
    else:
        works = dist.batch_isend_irecv([dist.P2POp(dist.isend, output, peer), dist.P2POp(dist.irecv, gradient, peer)])
    for work in works:
        work.wait()
    return gradient


def forward(number):
    x = receive(rank - 1).requires_grad_() if rank else data[number]
    y = stage(x)
    alive.append((x, y))
    return y


def backward(gradient):
    x, y = alive.pop(0)
    if rank == ranks - 1:
        (y - 1).square().mean().backward()
    else:
        y.backward(gradient)
    if rank and not (FAULT == "mute" and rank == 1 and len(sent) == MICROBATCHES - 1):
        sent.append(dist.isend(x.grad, rank - 1).wait())


warm = min(ranks - 1 - rank, MICROBATCHES)
outputs = [forward(number) for number in range(warm)] if FAULT == "swapped" and rank == 0 else []
for number in range(warm):
    y = outputs[[1, 0, *range(2, warm)][number]] if outputs else forward(number)
    dist.isend(y.detach(), rank + 1).wait()
for number in range(warm, MICROBATCHES):
    y = forward(number)
    if rank == ranks - 1:
        backward(None)
    else:
        backward(exchange(y.detach(), rank + 1))
for number in range(warm):
    deaf = FAULT == "deaf" and rank == 0 and number == warm - 1
    backward(torch.ones(SHAPE) if deaf else receive(rank + 1))
optimizer.step()
torch.cuda.synchronize()
dist.destroy_process_group()
