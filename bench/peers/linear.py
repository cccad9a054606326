"""A model that computes nearly nothing: each stage is a linear layer of 16 by 16."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

from peers.executors import Defer

WIDTH, BATCH = 16, 4


class Stock(nn.Linear):
    """``nn.Linear`` with its number in the model."""

    def __init__(self, number: int) -> None:
        super().__init__(WIDTH, WIDTH)
        random = torch.Generator().manual_seed(number)
        with torch.no_grad():
            self.weight.copy_(torch.randn(WIDTH, WIDTH, generator=random) / WIDTH**0.5)
            self.bias.copy_(torch.randn(WIDTH, generator=random))
        self.number = number


class Deferring(Stock):
    """A layer that gives its weight gradients to ``defer``."""

    def __init__(self, number: int, defer: Defer) -> None:
        super().__init__(number)
        self.defer = defer

    def forward(self, x):
        return DeferringLinear.apply(x, self.weight, self.bias, self)


class DeferringLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, layer):
        ctx.save_for_backward(x, weight)
        ctx.layer = layer
        return functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, gradient):
        (x, weight), layer = ctx.saved_tensors, ctx.layer

        def weight_gradient():
            for parameter, found in ((layer.weight, gradient.t().mm(x)), (layer.bias, gradient.sum(0))):
                parameter.grad = found if parameter.grad is None else parameter.grad.add_(found)

        if not layer.defer(weight_gradient):
            weight_gradient()
        return gradient.mm(weight), None, None, None


@dataclass(frozen=True)
class LinearCase:
    """A ``peers.executors.Case``."""

    ranks: int
    microbatches: int

    shape = (BATCH, WIDTH)
    defers = False

    def stage(self, number: int, stages: int, defer: Defer | None) -> nn.Sequential:
        return nn.Sequential(Stock(number) if defer is None else Deferring(number, defer))

    def data(self) -> tuple[torch.Tensor, torch.Tensor]:
        random = torch.Generator().manual_seed(1)
        return tuple(torch.randn(self.microbatches * BATCH, WIDTH, generator=random) for _ in range(2))

    def criterion(self, output, label):
        return functional.mse_loss(output, label)
