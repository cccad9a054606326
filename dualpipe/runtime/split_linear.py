"""Finds the linear layers of a stage, and splits those that compute as ``nn.Linear`` does.

``dualpipe.runtime.split_stage`` explains the split.
"""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dualpipe.runtime.split_stage import Layer, SplitStage
from dualpipe.runtime.weightgrad import DeferredGradients, training

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _StockLinear:
    """A use of ``nn.Linear``: PyTorch's own products on the same two-dimensional views, so the bits agree."""

    name: str
    weight: Tensor
    bias: Tensor | None
    trained: tuple[Tensor, ...]

    def unfit(self, x: Tensor) -> str | None:
        if functional.linear is not torch._C._nn.linear or _function_modes():
            return "torch.nn.functional.linear is replaced or intercepted"
        if not self.weight.numel():
            return "its weight is empty"
        if x.dim() < 2 or not x.is_contiguous() or not self.weight.is_contiguous():  # PyTorch takes other products
            return "its input or weight is not contiguous, or the input has no batch dimension"
        return None

    def output(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight, self.bias)

    def input_gradient(self, x: Tensor, dy: Tensor, weight: Tensor) -> Tensor:
        dx = _rows(dy).mm(weight)
        return dx if x.dim() == 2 else dx.view(x.shape)

    def weight_gradients(self, x: Tensor, dy: Tensor) -> Sequence[Tensor]:
        x, dy = _rows(x), _rows(dy)
        return [dy.t().mm(x) if parameter is self.weight else dy.sum(0) for parameter in self.trained]


def _rows(tensor: Tensor) -> Tensor:
    """``[..., n]`` as ``[rows, n]``."""
    return tensor if tensor.dim() == 2 else tensor.reshape(-1, tensor.shape[-1])


def _function_modes() -> bool:
    """Whether a mode watches functions of torch, other than the one that ``torch.set_default_device`` enters."""
    count = torch._C._len_torch_function_stack()
    if not count:
        return False
    modes = [torch._C._get_function_stack_at(number) for number in range(count)]
    return any(not isinstance(mode, torch.utils._device.DeviceContext) for mode in modes)


def _forward(layer: Layer, stage: SplitStage, input: Tensor) -> Tensor:
    """Replaces ``nn.Linear.forward`` while a stage runs."""
    module: Any = layer.module
    weight, bias = module.weight, module.bias  # read once: a parametrized layer computes them at each access
    stock = partial(functional.linear, input, weight, bias)
    return (
        stock()
        if torch.compiler.is_compiling()
        else stage.apply(_StockLinear(layer.name, weight, bias, training(weight, bias)), input, stock, layer.within)
    )


def linear_layer(name: str, module: nn.Module) -> Layer | None:
    """The ``Layer`` of a module whose forward is that of ``nn.Linear``, else ``None``."""
    stock = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    return Layer(name or type(module).__name__, module, "forward", _forward) if stock else None


def find_layers(
    module: nn.Module, store: DeferredGradients, name: str, layer_of: Callable[[str, nn.Module], Layer | None]
) -> SplitStage:
    """The stage ``module`` with its layers that can be split: those for which ``layer_of`` returns a ``Layer``.

    Other kinds of layers that have a weight matrix are named in the log.
    """
    layers: list[Layer] = []
    others: Counter[str] = Counter()
    for path, part, within in _parts(module):
        layer = layer_of(path, part)
        if layer is not None:
            layers.append(replace(layer, within=within))
        elif _compiled(part) or any(p.requires_grad and p.dim() > 1 for p in part.parameters(recurse=False)):
            others[f"{type(part).__name__}{', compiled' if _compiled(part) else ''}"] += 1
    if others:
        kinds = ", ".join(f"{kind} ({count})" for kind, count in sorted(others.items()))
        logger.info("dualpipe: %s: the weight gradients of these layers are computed in B, not in W: %s", name, kinds)
    return SplitStage(name, layers, store)


def split_linears(module: nn.Module, store: DeferredGradients, name: str = "the stage") -> SplitStage:
    """The stage ``module`` with its ``nn.Linear`` layers.

    A subclass with its own ``forward`` is not split, nor is anything compiled by ``torch.compile``.
    """
    return find_layers(module, store, name, linear_layer)


def _parts(module: nn.Module) -> Iterator[tuple[str, nn.Module, tuple[nn.Module, ...]]]:
    """Each module once: its name, itself, and the modules that contain it.  A compiled module is not entered."""
    todo: list[tuple[str, nn.Module, tuple[nn.Module, ...]]] = [("", module, (module,))]
    seen = {module}
    while todo:
        name, part, within = todo.pop()
        yield name, part, within
        if not _compiled(part):
            inner = [(n, child) for n, child in part.named_children() if child not in seen]
            seen.update(child for _, child in inner)
            todo += [(f"{name}.{n}" if name else n, child, (*within, child)) for n, child in reversed(inner)]


def _compiled(module: nn.Module) -> bool:
    dynamo = sys.modules.get("torch._dynamo")  # loaded only if something is compiled; importing it takes seconds
    return module._compiled_call_impl is not None or bool(dynamo and isinstance(module, dynamo.OptimizedModule))
