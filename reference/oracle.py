"""The oracle: stock modules and stock autograd in one process, without any schedule.

Floating-point addition is not associative, so the result depends on the order in which gradients are summed.  The order
is fixed here: within a lane by microbatch, then lane by lane.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add

from torch import Tensor, nn
from torch.optim import Optimizer

from reference.data import Batch, Steps

Criterion = Callable[[Tensor, Tensor], Tensor]
"""``(output of the last stage, targets) -> scalar loss``, already scaled so that a step's losses add up to its mean."""

OptimizerFactory = Callable[[Iterable[nn.Parameter]], Optimizer]
Tensors = Mapping[str, Tensor]
"""Tensors by the name of a parameter within its stage.  A parameter without a gradient is absent."""


@dataclass(frozen=True)
class StepTruth:
    """One training step.  Every tensor is a detached copy on the CPU, in the parameter's own shape and dtype.

    ``losses[lane][mb]``, ``lane_gradients[lane][stage][name]``, ``gradients[stage][name]`` (the sum over the lanes, as
    the optimizer gets it) and ``weights[stage][name]`` after the optimizer step.
    """

    losses: tuple[tuple[Tensor, ...], ...]
    lane_gradients: tuple[tuple[Tensors, ...], ...]
    gradients: tuple[Tensors, ...]
    weights: tuple[Tensors, ...]


def train(
    stages: Sequence[nn.Module], steps: Steps, criterion: Criterion, optimizer: OptimizerFactory
) -> Iterator[StepTruth]:
    """Train a copy of ``stages`` on ``steps`` (step, lane, microbatch); yields the result of each step.

    The modules passed in are not changed.  They must be deterministic: no dropout, one thread.
    """
    stages = copy.deepcopy(list(stages))
    stepper = optimizer([parameter for stage in stages for parameter in stage.parameters()])
    for lanes in steps:
        losses, lane_gradients = [], []
        for batches in lanes:
            stepper.zero_grad(set_to_none=True)
            losses.append(tuple(_accumulate(stages, batch, criterion) for batch in batches))
            lane_gradients.append(tuple(gradients_of(stage) for stage in stages))
        gradients = tuple(map(sum_of_lanes, zip(*lane_gradients, strict=True)))
        for stage, summed in zip(stages, gradients, strict=True):
            set_gradients(stage, summed)
        stepper.step()
        weights = tuple(weights_of(stage) for stage in stages)
        yield StepTruth(tuple(losses), tuple(lane_gradients), gradients, weights)


def _accumulate(stages: Sequence[nn.Module], batch: Batch, criterion: Criterion) -> Tensor:
    """Add one microbatch's gradients to those of the stages; returns its loss."""
    x = batch.tokens
    for stage in stages:
        x = stage(x)
    loss = criterion(x, batch.targets)
    loss.backward()  # type: ignore[no-untyped-call]  # torch annotates Tensor.backward only in part
    return snapshot(loss)


def snapshot(tensor: Tensor) -> Tensor:
    """A detached copy on the CPU."""
    return tensor.detach().to("cpu", copy=True)


def gradients_of(module: nn.Module) -> Tensors:
    """The gradients of the module's parameters; a parameter without one is left out."""
    return {name: snapshot(p.grad) for name, p in module.named_parameters() if p.grad is not None}


def weights_of(module: nn.Module) -> Tensors:
    """The values of the module's parameters."""
    return {name: snapshot(p) for name, p in module.named_parameters()}


def sum_of_lanes(lanes: Sequence[Tensors]) -> Tensors:
    """``lanes[0] + lanes[1] + ...`` for each name, over the lanes that have a gradient of it."""
    names = dict.fromkeys(name for lane in lanes for name in lane)
    return {name: reduce(add, (lane[name] for lane in lanes if name in lane)) for name in names}


def set_gradients(module: nn.Module, gradients: Tensors) -> None:
    """Set the gradient of each parameter to a copy, and to ``None`` if it is not in ``gradients``."""
    for name, parameter in module.named_parameters():
        found = gradients.get(name)
        parameter.grad = None if found is None else found.to(parameter.device, copy=True)
