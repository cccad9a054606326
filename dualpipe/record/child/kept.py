"""What is kept of the parameters of a training step: weights before and after it, and gradients before it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from .masters import Masters
from .regions import copied
from .replay import copy_of, gradient_of


class Kept:
    """The parameters that a rank's modules have used, numbered in the order of use.

    Attributes
    ----------
    named:
        The parameters with their names, by number.
    weights:
        By number, the value before the step.
    before:
        By number, the gradient before the step, where there was one.
    changed:
        By number, the value after the step; ``None`` until ``step_ends``.
    later:
        The numbers of the parameters whose gradients the program has changed after it had clipped them.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Forget everything: another step begins."""
        self.named: list[tuple[str, nn.Parameter]] = []
        self.weights: dict[int, Tensor] = {}
        self.before: dict[int, Tensor] = {}
        self.changed: dict[int, Tensor] | None = None
        self.later: list[int] = []
        self._clipped: dict[int, Tensor | None] = {}  # the gradients after the last clipping
        self._numbers: dict[int, int] = {}  # id of a parameter -> its number
        self._trained: set[int] = set()  # the parameters with which a module has computed with gradients
        self._reached: set[int] = set()  # the parameters of modules for which the engine has run

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [parameter for _, parameter in self.named]

    def module_runs(self, module: nn.Module) -> list[str]:
        """A module is about to compute: keep its weights, and return the names of those that the step has changed.

        They are kept as they are when it first computes with gradients, after any evaluation.
        """
        changed = []
        for name, parameter in module.named_parameters():
            if id(parameter) not in self._numbers:
                self._numbers[id(parameter)] = len(self.named)
                self.named.append((name, parameter))
            number = self._numbers[id(parameter)]
            if number not in self._trained:
                self.weights[number] = copied(parameter)
                if torch.is_grad_enabled():
                    self._trained.add(number)
            if not torch.equal(self.weights[number], parameter.detach()):
                changed.append(name)
        return changed

    def engine_runs(self, module: nn.Module) -> None:
        """The engine runs for a module: keep its gradients of before that.  A program may reset them late."""
        for parameter in module.parameters():
            number = self._numbers.get(id(parameter))  # none of what has taken a parameter's place, as in fully_shard
            if number is not None and number not in self._reached:
                self._reached.add(number)
                before = copy_of(gradient_of(parameter))
                if before is not None and bool(before.any()):
                    self.before[number] = before

    def gradients(self, masters: Masters) -> dict[str, Any]:
        """A copy of each gradient as it is now (``final``), by number.

        ``own`` are those that the program keeps in its own tensors; ``elsewhere`` those that no optimizer takes from
        such a tensor, each with the line that made it.
        """
        own, elsewhere = masters.gradients([p for p in self.parameters if getattr(p, "main_grad", None) is None])
        final = {n: copy_of(own.get(id(p), gradient_of(p))) for n, p in enumerate(self.parameters)}
        return {
            "final": final,
            "own": [n for n, p in enumerate(self.parameters) if id(p) in own],
            "elsewhere": {n: elsewhere[id(p)] for n, p in enumerate(self.parameters) if id(p) in elsewhere},
        }

    def clipped(self, masters: Masters) -> None:
        """The program has clipped gradients: keep them."""
        self._clipped = self.gradients(masters)["final"]

    def steps(self, masters: Masters) -> None:
        """An optimizer is about to make a step: note which gradients have changed since they were clipped."""
        if self._clipped and self.changed is None:
            now = self.gradients(masters)["final"]
            self.later = [number for number, kept in self._clipped.items() if not _same(kept, now[number])]
            self._clipped = {}

    def step_ends(self) -> None:
        """Keep the weights that the optimizers have changed, the first time that this is called."""
        if self.changed is None:
            with _disable_current_modes():
                self.changed = {n: copied(parameter) for n, parameter in enumerate(self.parameters)}


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other or (one is not None and other is not None and torch.equal(one, other))
