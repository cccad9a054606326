"""GPipe on two ranks that multiprocessing forks, each with a data loader that forks too.  Usage: forks.py [FAULT].

The names of torch.distributed are bound before a process group exists.  Faults: ``error`` raises at the end; ``hang``
waits for one message too many.
"""

import sys
import tempfile
from multiprocessing import get_context

import torch
import torch._dynamo  # once here and not in each rank: it takes seconds
import torch.distributed as dist
from torch import nn
from torch.distributed import P2POp, batch_isend_irecv, irecv, isend
from torch.utils.data import DataLoader

FAULT = " ".join(sys.argv[1:])
SHAPE = (2, 4)


def exchange(call, tensor, peer):
    for work in batch_isend_irecv([P2POp(call, tensor, peer)]):
        work.wait()
    return tensor


class Rows(torch.utils.data.Dataset):
    def __init__(self):
        self.prepare = nn.Linear(4, 4)

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return self.prepare(torch.ones(4)).detach()


def train(rank, store):
    dist.init_process_group("nccl", init_method=f"file://{store}", rank=rank, world_size=2)
    stage = nn.Linear(4, 4)
    for x in DataLoader(Rows(), batch_size=2, num_workers=1):
        if rank == 0:
            y = stage(x)
            exchange(isend, y.detach(), 1)
            y.backward(exchange(irecv, torch.empty(SHAPE), 1))
        else:
            x = exchange(irecv, torch.empty(SHAPE), 0).requires_grad_()
            stage(x).sum().backward()
            exchange(isend, x.grad, 0)
    dist.barrier()
    if FAULT == "error":
        raise LookupError("at the end")
    if FAULT == "hang":
        exchange(irecv, torch.empty(SHAPE), 1 - rank)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        ranks = [get_context("fork").Process(target=train, args=(rank, f"{scratch}/store")) for rank in range(2)]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()
    sys.exit(max(rank.exitcode for rank in ranks))
