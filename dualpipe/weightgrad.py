"""Splits the backward of linear layers into B (input gradient) and W (weight gradient).

While a microbatch's forward runs under ``WeightGradStore.splitting(key)``, a prepared linear layer computes with an
autograd Function that takes the layer as a plain object: autograd never sees its weight, so the backward yields the
input gradient alone and leaves the weight gradient in the store, to be computed at W.  Outside ``splitting`` the
layer is the stock one, and its backward is whole.

Until W each linear layer's input and output gradient stay allocated.  LayerNorm, embedding and every other
parameter get their gradient in B.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

Closure = Callable[[], None]


class WeightGradError(RuntimeError):
    """A weight gradient is asked for that does not wait, or still waits when none may."""


class WeightGradStore:
    """The weight gradients of one rank that wait for their W, by microbatch.

    A key is any hashable name of a microbatch at a stage.  There is no global state: whoever runs a pipeline owns
    its store.
    """

    def __init__(self) -> None:
        self._waiting: dict[Hashable, list[Closure]] = {}
        self.key: Hashable | None = None

    @contextmanager
    def splitting(self, key: Hashable) -> Iterator[None]:
        """Within it, prepared layers leave their weight gradients to ``run(key)``."""
        outer, self.key = self.key, key
        try:
            yield
        finally:
            self.key = outer

    def put(self, key: Hashable, closure: Closure) -> None:
        """Keep a weight gradient's computation until ``run(key)``."""
        self._waiting.setdefault(key, []).append(closure)

    def run(self, key: Hashable) -> None:
        """Compute what waits under ``key``, in the order in which the backward left it.

        Raises ``WeightGradError`` when nothing was left: no B has run, or W has run already.
        """
        closures = self._waiting.pop(key, None)
        if closures is None:
            raise WeightGradError(f"no weight gradient waits for {key}: its B has not run, or its W already has")
        for closure in closures:
            closure()

    def open(self, key: Hashable) -> None:
        """Declare that the B of ``key`` has run, also when it left nothing (a stage without linear layers)."""
        self._waiting.setdefault(key, [])

    def clear(self) -> None:
        """Drop what waits: the step that left it failed, and the next one's keys are the same."""
        self._waiting.clear()

    def require_empty(self) -> None:
        """Raise ``WeightGradError`` naming every key whose W never came."""
        if self._waiting:
            keys = ", ".join(map(str, self._waiting))
            raise WeightGradError(f"the step ended and these weight gradients were never computed: {keys}")


class _SplitLinear(torch.autograd.Function):
    """``y = x W^T + b`` whose backward returns dx and leaves dW = dy^T x and db = sum of dy to the store.

    The products are those of PyTorch's own linear layer, on the same two-dimensional views, so the bits agree.
    ``anchor`` is an empty tensor that requires grad: without it autograd would skip a layer whose input needs none.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, anchor: Tensor, linear: nn.Linear, store: WeightGradStore, key: Hashable
    ) -> Tensor:
        ctx.save_for_backward(x)
        ctx.linear, ctx.store, ctx.key = linear, store, key
        return functional.linear(x, linear.weight, linear.bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        (x,) = ctx.saved_tensors
        weight = ctx.linear.weight
        dy = gradients[0].reshape(-1, weight.shape[0])
        x2 = x.detach().reshape(-1, weight.shape[1])
        ctx.store.put(ctx.key, lambda linear=ctx.linear: _accumulate(linear, x2, dy))
        dx = dy.mm(weight).view(x.shape) if ctx.needs_input_grad[0] else None
        return dx, None, None, None, None


def _accumulate(linear: nn.Linear, x: Tensor, dy: Tensor) -> None:
    """Add the layer's weight and bias gradients by autograd's own accumulation, so hooks on the parameters fire.

    ``x``: [tokens, in], ``dy``: [tokens, out].
    """
    leaves: list[Tensor] = []
    gradients: list[Tensor] = []
    if linear.weight.requires_grad:
        leaves.append(linear.weight)
        gradients.append(dy.t().mm(x))
    if linear.bias is not None and linear.bias.requires_grad:
        leaves.append(linear.bias)
        gradients.append(dy.sum(0))
    torch.autograd.backward(leaves, gradients)


def _forward(self: nn.Linear, x: Tensor) -> Tensor:
    """What a prepared layer runs instead of ``nn.Linear.forward``."""
    store: WeightGradStore = self.weight_grad_store  # type: ignore[assignment] # set by split_linears
    trains = self.weight.requires_grad or (self.bias is not None and self.bias.requires_grad)
    if store.key is None or not trains or not torch.is_grad_enabled():
        return nn.Linear.forward(self, x)
    if torch.is_autocast_enabled(x.device.type):
        raise WeightGradError("the B/W split runs in the parameters' own dtype: got autocast; cast the model instead")
    anchor = x.new_empty(0, requires_grad=True)
    result: Tensor = _SplitLinear.apply(x, anchor, self, store, store.key)  # type: ignore[no-untyped-call]
    return result


def split_linears(module: nn.Module, store: WeightGradStore) -> int:
    """Prepare every linear layer of ``module`` to leave its weight gradient to ``store``; returns how many there are.

    A subclass with a ``forward`` of its own is left whole.  Preparing twice changes only the store.
    """
    layers = [m for m in module.modules() if isinstance(m, nn.Linear) and type(m).forward is nn.Linear.forward]
    for layer in layers:
        layer.weight_grad_store = store  # type: ignore[assignment] # a plain attribute, not a parameter
        layer.forward = MethodType(_forward, layer)  # type: ignore[method-assign] # this instance alone
    return len(layers)
