"""One replica of a stage.  Its F, B and W are three separate uses of stock autograd.

::

    F   run the stage with the weights of its linear layers detached; save each linear layer's input
    B   plain backward: the gradient of the input, and those of norms and embeddings; save the gradient of each linear
        layer's output, and free everything else
    W   run each saved call again, F.linear(input, weight, bias), and take autograd's gradient of weight and bias

The split of B and W is that of the zero-bubble paper (arXiv 2401.10241).  Linear layers are those whose class is
exactly ``nn.Linear``, called as modules; the gradient of every other parameter is complete after B.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple

import torch
import torch.nn.functional as functional
from torch import Tensor, nn
from torch.func import functional_call

from dualpipe.schedule import Task
from reference.fault import SetupError
from reference.ledger import Account, Holder
from reference.oracle import Criterion


class Call(NamedTuple):
    """A call of a linear layer, saved for W: its input, the gradient of its output, and their accounting."""

    linear: nn.Linear
    x: Tensor
    gradient: Tensor
    holders: tuple[Holder, ...]


@dataclass
class Activation:
    """What a microbatch keeps: from F to B the ends of its graph, and from B to W its calls in the order of B."""

    x: Tensor | None
    y: Tensor | None = None
    calls: list[Call] = field(default_factory=list)


class Replica:
    """A stage with the microbatches that are live in it.

    ``criterion`` is for the last stage, whose F ends with the loss; ``account``, if given, measures live activations.

    Raises ``SetupError`` if a linear layer shares a parameter with a layer of another kind, because the gradient of
    such a parameter is complete neither after B nor after W.
    """

    def __init__(self, module: nn.Module, criterion: Criterion | None = None, account: Account | None = None) -> None:
        self.module, self.criterion, self.account = module, criterion, account
        self._live: dict[Task, Activation] = {}
        linears = [layer for layer in module.modules() if type(layer) is nn.Linear]
        # During F the layers' attributes are the detached weights, so W's parameters are looked up beforehand.
        self._parameters = {linear: (linear.weight, linear.bias) for linear in linears}
        weights = {p for pair in self._parameters.values() for p in pair if p is not None}
        _check_apart(module, weights)
        detached = {p: p.detach() for p in weights}
        named = module.named_parameters(remove_duplicate=False)
        self._arguments: dict[str, Tensor] = {name: detached.get(p, p) for name, p in named}
        held = chain(module.parameters(), module.buffers())
        self._owned = frozenset(tensor.untyped_storage().data_ptr() for tensor in held)
        self._now: tuple[Task, Activation] | None = None
        for linear in linears:
            linear.register_forward_hook(self._save_call)

    def forward(self, task: Task, x: Tensor, targets: Tensor | None = None) -> Tensor:
        """Run F; returns its output, detached: the stage's activation, or the loss if there is a criterion.

        ``x`` is the previous stage's activation, whose gradient B will compute, or the data in stage 0.
        """
        leaf = x if task.stage == 0 else x.detach().requires_grad_()
        activation = self._live[task] = Activation(leaf)
        self._now = task, activation
        with self.account.saving(task, self._owned) if self.account else nullcontext():
            y: Tensor = functional_call(self.module, self._arguments, (leaf,), tie_weights=False)
            if self.criterion is not None:
                assert targets is not None
                y = self.criterion(y, targets)
        self._now, activation.y = None, y
        return y.detach()

    def backward(self, task: Task, gradient: Tensor | None) -> Tensor | None:
        """Run B from the output's gradient (``None`` for the loss); returns the input's gradient, none in stage 0."""
        activation = self._live[task]
        x, y = activation.x, activation.y
        assert x is not None
        assert y is not None
        activation.x = activation.y = None
        if y.requires_grad:
            torch.autograd.backward(y, gradient)
        if task.stage == 0:
            return None
        return torch.zeros_like(x) if x.grad is None else x.grad

    def weight(self, task: Task, *, again: bool) -> None:
        """Run W: add to the gradients of the linear layers.  The saved calls are kept only if W will run ``again``."""
        totals: dict[Tensor, Tensor] = {}
        for parameter, gradient in self._gradients(self._live[task].calls):
            # A layer called twice: like autograd, first sum over its uses in the order of the backward.
            totals[parameter] = totals[parameter] + gradient if parameter in totals else gradient
        for parameter, total in totals.items():
            parameter.grad = total if parameter.grad is None else parameter.grad.add_(total)
        if not again:
            del self._live[task]

    def clear(self) -> None:
        """Free every live microbatch, at the end of a step."""
        self._live.clear()

    def _save_call(self, linear: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        assert isinstance(linear, nn.Linear)
        assert self._now is not None
        task, activation = self._now
        x = args[0].detach()
        holder = self._hold(task, x)
        # With detached weights and plain data as input the output is a constant to autograd; make it a leaf.
        y = output if output.requires_grad else output.detach().requires_grad_()

        def save(gradient: Tensor) -> None:
            activation.calls.append(Call(linear, x, gradient, holder + self._hold(task, gradient)))

        y.register_hook(save)  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        return y

    def _hold(self, task: Task, tensor: Tensor) -> tuple[Holder, ...]:
        return (Holder(self.account, task, tensor),) if self.account else ()

    def _gradients(self, calls: Sequence[Call]) -> Iterator[tuple[Tensor, Tensor]]:
        """The gradients of each trained weight and bias, from separate graphs in one run of autograd."""
        outputs, seeds = [], []
        trained: list[tuple[Tensor, Tensor]] = []
        for linear, x, gradient, _ in calls:
            pair = self._parameters[linear]
            weight, bias = (None if p is None else p.detach().requires_grad_(p.requires_grad) for p in pair)
            assert weight is not None
            own = [(p, leaf) for p, leaf in zip(pair, (weight, bias), strict=True) if p is not None and p.requires_grad]
            if own:
                outputs.append(functional.linear(x, weight, bias))
                seeds.append(gradient)
                trained.extend(own)
        if trained:
            found = torch.autograd.grad(outputs, [leaf for _, leaf in trained], seeds)
            yield from zip((p for p, _ in trained), found, strict=True)


def _check_apart(module: nn.Module, weights: Set[Tensor]) -> None:
    for name, layer in module.named_modules():
        for own, parameter in layer.named_parameters(recurse=False):
            if parameter in weights and type(layer) is not nn.Linear:
                raise SetupError(
                    "a linear layer may share its parameters only with linear layers of its stage",
                    f"{name}.{own} of a {type(layer).__name__} is also a linear layer's",
                    "untie them",
                )
