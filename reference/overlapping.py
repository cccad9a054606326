"""A stage whose class runs an F and a B at once, for verifications of overlapped F&B pairs."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn


class Overlapping(nn.Sequential):
    """The layers of a stage; the B of a pair runs between two layers of the F, so that they really interleave."""

    @classmethod
    def of(cls, stage: nn.Module) -> Overlapping:
        """The same layers, parameters and names."""
        return cls(OrderedDict(cast("dict[str, nn.Module]", stage._modules)))

    @classmethod
    def overlapped_forward_backward(
        cls,
        module0: nn.Module,
        inputs0: Sequence[Tensor],
        criterion0: Callable[..., Tensor] | None,
        labels0: Sequence[Tensor],
        module1: nn.Module,
        loss1: Tensor | None,
        outputs1: Sequence[Tensor],
        output_grads1: Sequence[Tensor],
    ) -> tuple[list[Any], Tensor | None]:
        layers = list(module0.children())
        (x,) = inputs0
        for layer in layers[: len(layers) // 2]:
            x = layer(x)
        if loss1 is not None:
            loss1.backward()  # type: ignore[no-untyped-call]
        else:
            torch.autograd.backward(list(outputs1), list(output_grads1))
        for layer in layers[len(layers) // 2 :]:
            x = layer(x)
        return [x], None if criterion0 is None else criterion0(x, *labels0)
