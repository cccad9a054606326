"""A right GPipe on two ranks, whose parts a test replaces to plant a fault or to be right in another way."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

SHAPE = (2, 4)
WIDTH = SHAPE[1]


def run_from(loss: Tensor, kept: list) -> None:
    loss.backward()


def backward_from(y: Tensor, gradient: Tensor) -> None:
    y.backward(gradient)


def step(stage: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.step()


@dataclass
class GPipe:
    """``loss_of`` makes a loss of the output and the number of microbatches, ``lose`` runs from it and may collect it.

    ``feed`` runs from the output of rank 0 with the gradient that it received, ``finish`` ends the training step.
    """

    microbatches: int = 3
    loss_of: Callable[[Tensor, int], Tensor] = lambda y, count: nn.functional.mse_loss(y, torch.ones_like(y)) / count
    lose: Callable[[Tensor, list], None] = run_from
    feed: Callable[[Tensor, Tensor], None] = backward_from
    finish: Callable[[nn.Module, torch.optim.Optimizer], None] = step
    last: Callable[[], nn.Module] = lambda: nn.Linear(WIDTH, WIDTH)
    """Makes the stage of rank 1."""
    frozen: bool = False
    """Whether rank 0 trains nothing and receives no gradient."""

    def __call__(self, rank: int) -> None:
        torch.manual_seed(rank)
        stage = self.last() if rank else nn.Linear(WIDTH, WIDTH).requires_grad_(not self.frozen)
        optimizer = torch.optim.SGD(stage.parameters(), lr=0.1)
        self.train(rank, stage)
        self.finish(stage, optimizer)

    def train(self, rank: int, stage: nn.Module) -> None:
        """All forwards, then all backwards."""
        alive, kept = [], []
        for _ in range(self.microbatches):
            x = torch.randn(SHAPE)
            if rank:
                dist.recv(x, 0)
                x.requires_grad_(not self.frozen)
            y = stage(x)
            if rank == 0:
                dist.send(y.detach(), 1)
            alive.append((x, y))
        for x, y in alive:
            if rank:
                self.lose(self.loss_of(y, self.microbatches), kept)
            if self.frozen:
                continue
            if rank:
                dist.send(x.grad, 0)
            else:
                gradient = torch.empty(SHAPE)
                dist.recv(gradient, 1)
                self.feed(y, gradient)
