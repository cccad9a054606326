"""A program for DeepSeek's package, in the shape of its example.  Usage: deepseek.py RANKS MICROBATCHES ..."""

import os
import socket
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import dualpipe
from dualpipe import DualPipe, set_p2p_tensor_dtype, set_p2p_tensor_shapes
from dualpipe.utils import WeightGradStore, run_backward

HIDDEN, BATCH = 8, 2


class LinearFunc(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors

        def add_weight_gradient():
            found = gradient.T @ x
            if weight.grad is None:
                weight.grad = found
            else:
                weight.grad += found

        if WeightGradStore.enabled:
            WeightGradStore.put(add_weight_gradient)
        else:
            add_weight_gradient()
        return gradient @ weight, None


class Linear(nn.Linear):
    def forward(self, x):
        return LinearFunc.apply(x, self.weight)


class Stage(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = Linear(HIDDEN, HIDDEN, bias=False)
        self.second = Linear(HIDDEN, HIDDEN, bias=False)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))

    @classmethod
    def overlaped_forward_backward(cls, module0, inputs0, criterion0, labels0, module1, loss1, outputs1, output_grads1):
        outputs0 = module0(*inputs0)
        outputs0 = [outputs0] if isinstance(outputs0, torch.Tensor) else outputs0
        loss0 = criterion0(*outputs0, *labels0) if criterion0 is not None else None
        if loss1 is not None:
            loss1.backward()
            loss1.detach_()
        else:
            run_backward(outputs1, output_grads1)
        return outputs0, loss0


def criterion(output, target):
    return (output - target).square().mean()


def train(rank, ranks, sizes):
    print(f"rank {rank} runs {Path(dualpipe.__file__).resolve().parent}")
    torch.cuda.set_device(rank)
    torch.set_default_device(f"cuda:{rank}")
    dist.init_process_group("nccl", init_method="env://", world_size=ranks, rank=rank)
    torch.manual_seed(0)
    reference = Stage()
    criterion(reference(torch.randn(BATCH, HIDDEN)), torch.zeros(BATCH, HIDDEN)).backward()
    pair = nn.ModuleList([Stage(), Stage()])
    set_p2p_tensor_shapes([(BATCH, HIDDEN)])
    set_p2p_tensor_dtype(torch.float32)
    pipe = DualPipe(tuple(pair))
    optimizer = torch.optim.SGD(pair.parameters(), lr=0.1)
    for microbatches in sizes:
        ends = rank in (0, ranks - 1)
        rows = BATCH * microbatches // 2
        x, labels = (torch.randn(rows, HIDDEN), [torch.randn(rows, HIDDEN)]) if ends else (None, [])
        pipe.step(x, num_chunks=microbatches, criterion=criterion if ends else None, labels=labels)
        optimizer.step()
    dist.destroy_process_group()


def spawned(local_rank, ranks, sizes, port):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    train(local_rank, ranks, sizes)


if __name__ == "__main__":
    ranks, *sizes = map(int, sys.argv[1:])
    if "RANK" in os.environ:
        train(int(os.environ["RANK"]), ranks, sizes)
    else:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        torch.multiprocessing.spawn(spawned, (ranks, sizes, port), ranks)
