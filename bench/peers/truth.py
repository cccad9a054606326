"""What a step must give: the losses and gradients of a plain loop over all microbatches."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from peers.executors import Case

Gradients = list[tuple[tuple[int, str], torch.Tensor | None]]
Result = tuple[dict[int, torch.Tensor], Gradients]
"""Losses by microbatch, and gradients by the layer's number in the model and the parameter's name."""


def result_of(modules: Iterable[nn.Sequential], losses: Mapping[int, torch.Tensor]) -> Result:
    """What this rank has after a step; a layer with two replicas may be in it twice."""
    found = [((layer.number, name), p.grad) for module in modules for layer in module for name, p in named(layer)]
    return {mb: loss.detach() for mb, loss in losses.items()}, found


def named(layer: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return list(layer.named_parameters(recurse=False))


def truth(case: Case, layers: int) -> Result:
    """The result of a plain loop on the whole model, which has so many layers."""
    at_once = (lambda closure: False) if case.defers else None
    model = nn.Sequential(*(layer for number in range(layers) for layer in case.stage(number, layers, at_once)))
    losses = {}
    for mb, (x, label) in enumerate(zip(*(part.split(case.shape[0]) for part in case.data()), strict=True)):
        losses[mb] = case.criterion(model(x), label)
        losses[mb].backward()
    return result_of([model], losses)


def check(name: str, ranks: Sequence[Result], wanted: Result) -> None:
    """Raises ``RuntimeError`` unless losses and gradients are those of the plain loop, up to the order of addition."""
    losses = {mb: loss for found, _ in ranks for mb, loss in found.items()}
    gradients: dict[tuple[int, str], torch.Tensor] = {}
    for _, found in ranks:
        for key, gradient in found:
            gradients[key] = gradients[key] + gradient if key in gradients else gradient
    true_losses, true_gradients = wanted[0], dict(wanted[1])
    same = losses.keys() == true_losses.keys() and gradients.keys() == true_gradients.keys()
    same = same and all(torch.allclose(losses[mb], loss, rtol=1e-5) for mb, loss in true_losses.items())
    if not same or any(
        not torch.allclose(gradients[key], gradient, rtol=1e-4, atol=1e-6) for key, gradient in true_gradients.items()
    ):
        raise RuntimeError(f"{name} has other losses or gradients than the plain loop")
