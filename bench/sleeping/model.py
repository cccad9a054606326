"""A model whose layers sleep: F, B and W of a share take their time, and compute nearly nothing."""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

WIDTH, BATCH, PARTS = 8, 2, 2  # PARTS: layers of a share


@dataclass(frozen=True)
class Case:
    """Seconds of F, B and W of a share, and of the delay of a message; a ``peers.executors.Case``."""

    ranks: int
    microbatches: int
    F: float
    B: float
    W: float
    delay: float

    shape = (BATCH, WIDTH)
    defers = True

    @property
    def work(self) -> float:
        return self.microbatches * (self.F + self.B + self.W)

    def stage(self, number: int, stages: int, defer) -> nn.Sequential:
        """Stage ``number`` of so many, of a model with ``PARTS`` layers for each rank."""
        layers = PARTS * self.ranks // stages
        return nn.Sequential(*(Layer(number * layers + part, self, defer) for part in range(layers)))

    def data(self) -> tuple[torch.Tensor, torch.Tensor]:
        random = torch.Generator().manual_seed(1)
        return tuple(torch.randn(self.microbatches * BATCH, WIDTH, generator=random) for _ in range(2))

    def criterion(self, output, label):
        return (output - label).square().mean()


SLEPT: Counter[str] = Counter()


def pause(kind: str, case: Case) -> None:
    SLEPT[kind] += 1
    time.sleep(getattr(case, kind) / PARTS)


class SleepyLinear(torch.autograd.Function):
    """``x @ weight.T`` that takes its time; ``layer.defer`` gets the weight gradient, and says whether it kept it."""

    @staticmethod
    def forward(ctx, x, weight, layer):
        ctx.save_for_backward(x, weight)
        ctx.layer = layer
        pause("F", layer.case)
        return torch.tanh(x) @ weight.T

    @staticmethod
    def backward(ctx, gradient):
        (x, weight), layer = ctx.saved_tensors, ctx.layer
        pause("B", layer.case)

        def weight_gradient():
            pause("W", layer.case)
            found = gradient.T @ torch.tanh(x)
            layer.weight.grad = found if layer.weight.grad is None else layer.weight.grad + found

        if not layer.defer(weight_gradient):
            weight_gradient()
        return (gradient @ weight) * (1 - torch.tanh(x) ** 2), None, None


class Layer(nn.Module):
    def __init__(self, number: int, case: Case, defer: Callable[[Callable[[], None]], bool]) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(number)
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH, generator=random) / WIDTH**0.5)
        self.number, self.case, self.defer = number, case, defer

    def forward(self, x):
        return SleepyLinear.apply(x, self.weight, self)
