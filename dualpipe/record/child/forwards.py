"""The forwards of one rank, by number: which are one after all, and which modules and parameters are theirs."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from .tags import Key, key_of, weak_storage

Version = tuple[Key | None, int] | None
"""Where a gradient is and how often it was written to; ``None`` where there is none."""


class Forwards:
    """A disjoint-set forest of forwards.  One that is found to be a part of another gives up its number."""

    def __init__(self) -> None:
        self._same: list[int] = []  # forward -> the one that it is a part of
        self._began: list[int] = []  # forward -> the stretch of uninterrupted compute in which it began
        self._modules: list[set[int]] = []  # forward -> the modules that were called for it
        self._batches: list[set[int]] = []  # forward -> the batches of messages that it takes tensors of
        self._stretch = 0
        self.behind: set[int] = set()  # those whose backward has begun
        self._in_graph: set[int] = set()  # those of which an output is in an autograd graph

    def interrupt(self) -> None:
        """A message or a backward ends the stretch of compute."""
        self._stretch += 1

    def open(self) -> int:
        """A new forward."""
        number = len(self._same)
        self._same.append(number)
        self._began.append(self._stretch)
        self._modules.append(set())
        self._batches.append(set())
        return number

    def find(self, forward: int) -> int:
        while self._same[forward] != forward:
            forward = self._same[forward]
        return forward

    def called(self, forward: int, module: int) -> None:
        self._modules[forward].add(module)

    def takes(self, forward: int, batch: int) -> None:
        """The forward takes a tensor of a batch of messages."""
        self._batches[forward].add(batch)

    def put_in_graph(self, forward: int) -> None:
        self._in_graph.add(forward)

    def is_in_graph(self, forward: int) -> bool:
        """Whether autograd knows what the forward made, so that its graph says what was made from it."""
        return forward in self._in_graph

    def calls_one_of(self, forward: int, modules: Collection[int]) -> bool:
        return not self._modules[forward].isdisjoint(modules)

    def modules(self, forward: int) -> Collection[int]:
        return self._modules[forward]

    def join(self, forwards: set[int]) -> Iterator[tuple[int, int]]:
        """Forwards that began in this very stretch and now meet become one; pairs of the one and a part of it.

        Not so where two are calls of one module on messages of different batches: those are two microbatches.
        """
        if len(forwards) > 1 and all(self._began[f] == self._stretch and f not in self.behind for f in forwards):
            first, *others = sorted(forwards)
            if any(self._are_apart(one, other) for one, other in combinations(sorted(forwards), 2)):
                return
            for other in others:
                self._same[other] = first
                self._modules[first] |= self._modules[other]
                self._batches[first] |= self._batches[other]
                if other in self._in_graph:
                    self._in_graph.add(first)
                yield first, other

    def _are_apart(self, one: int, other: int) -> bool:
        batches = self._batches[one], self._batches[other]
        return all(batches) and batches[0].isdisjoint(batches[1]) and self.calls_one_of(one, self._modules[other])


class Trials:
    """Forwards that ran without gradients, by the module and the places of its inputs in memory."""

    def __init__(self) -> None:
        self._kept: dict[tuple[int, tuple[Key | None, ...]], tuple[Any, int]] = {}

    def earlier(self, module: int, inputs: Sequence[Tensor], forward: int) -> int | None:
        """A forward without gradients that this one may do again; one that has none itself is kept."""
        what = module, tuple(map(key_of, inputs))
        if torch.is_grad_enabled():
            storage, earlier = self._kept.pop(what, (None, None))
            return None if storage is None or storage.expired() else earlier
        if what[1][0] is not None:
            self._kept[what] = weak_storage(inputs[0]), forward
        return None


class Parameters:
    """The modules that were called, by number, their parameters, and where those keep their gradients."""

    def __init__(self) -> None:
        self._modules: dict[int, tuple[nn.Module, int]] = {}  # id -> module, kept alive, and its number
        self._parameters: dict[int, tuple[nn.Parameter, set[int]]] = {}  # id -> parameter and the modules that hold it
        self._gradients: dict[Key, tuple[Any, int]] = {}  # where a gradient is -> its storage, weakly, and whose it is

    def number(self, module: nn.Module) -> tuple[int, list[int] | None]:
        """The number of a module, and the numbers of what it holds where the module is new."""
        known = self._modules.get(id(module))
        if known is not None:
            return known[1], None
        number = len(self._modules)
        self._modules[id(module)] = (module, number)
        held = [self.number(child)[0] for child in module.modules() if child is not module]
        for parameter in module.parameters():
            self._parameters.setdefault(id(parameter), (parameter, set()))[1].add(number)
            self.note_gradient(parameter)
        return number, held

    def __contains__(self, parameter: object) -> bool:
        return id(parameter) in self._parameters

    def trainable(self, modules: Collection[int]) -> bool:
        """Whether any of the modules holds a parameter that wants a gradient."""
        return any(p.requires_grad and not held.isdisjoint(modules) for p, held in self._parameters.values())

    def holders(self, parameter: int) -> set[int]:
        return self._parameters[parameter][1]

    def note_gradient(self, parameter: Tensor) -> None:
        """Remember where the gradient of a parameter is; Megatron keeps its own in ``main_grad``."""
        for gradient in (parameter.grad, getattr(parameter, "main_grad", None)):
            if isinstance(gradient, Tensor) and (key := key_of(gradient)):
                self._gradients[key] = (weak_storage(gradient), id(parameter))

    def with_gradient_at(self, key: Key | None) -> int | None:
        """The id of the parameter whose gradient is there."""
        entry = self._gradients.get(key) if key else None
        if entry is None or key is None:
            return None
        if entry[0].expired():
            del self._gradients[key]
            return None
        return entry[1]

    def versions(self) -> dict[int, Version]:
        """What changes when a gradient is made or added to."""
        return {
            key: None if (gradient := parameter.grad) is None else (key_of(gradient), gradient._version)
            for key, (parameter, _) in self._parameters.items()
        }

    def changed(self, before: dict[int, Version]) -> list[set[int]]:
        """For every parameter whose gradient is another one than before, the modules that hold it."""
        after = self.versions()
        found = [key for key in after if after[key] != before.get(key)]
        for key in found:
            self.note_gradient(self._parameters[key][0])
        return [self.holders(key) for key in found]
