"""GPipe on two ranks, which most tests record, and its expected schedule."""

import torch
import torch.distributed as dist

from dualpipe.schedule import show_slot

SHAPE = (2, 4)


def receive(peer: int) -> torch.Tensor:
    buffer = torch.empty(SHAPE)
    dist.recv(buffer, peer)
    return buffer


def train(rank: int, stage, microbatches: int = 2, send=dist.send, take=receive) -> None:
    """GPipe on two ranks, microbatch by microbatch; ``stage`` is called like a module, ``take`` receives its input."""
    for _ in range(microbatches):
        if rank == 0:
            y = stage(torch.randn(SHAPE))
            send(y.detach(), 1)
            y.backward(receive(1))
        else:
            x = take(0).requires_grad_()
            stage(x).square().sum().backward()
            send(x.grad, 0)


def text(recording, rank: int) -> str:
    return " ".join(map(show_slot, recording.schedule.programs[rank]))


PLAIN = (
    "0F0> 0SF0>@1 0RB0>@1 0B0>+0W0> 0F1> 0SF1>@1 0RB1>@1 0B1>+0W1>",
    "1RF0>@0 1F0> 1B0>+1W0> 1SB0>@0 1RF1>@0 1F1> 1B1>+1W1> 1SB1>@0",
)


def assert_plain(recording) -> None:
    assert (text(recording, 0), text(recording, 1)) == PLAIN
