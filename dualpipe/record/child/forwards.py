"""The forwards of one rank by number: which of them belong together as one forward, and which modules they called."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from .marks import Key, key_of
from .regions import weak_storage


class Forwards:
    """A disjoint-set forest of forwards.  If a forward turns out to be part of another, it gets the other's number."""

    def __init__(self) -> None:
        self._same: list[int] = []  # forward -> the one that it is a part of
        self._began: list[int] = []  # forward -> the uninterrupted period of compute in which it began
        self._modules: list[set[int]] = []  # forward -> the modules that were called for it
        self._posts: list[set[int]] = []  # forward -> the posts of messages whose tensors it takes
        self._after: list[set[int]] = []  # forward -> the earlier forwards whose detached outputs it takes
        self._period = 0
        self.backward_began: set[int] = set()
        self._in_graph: set[int] = set()  # forwards with an output in an autograd graph

    def __len__(self) -> int:
        """How many have begun."""
        return len(self._same)

    def all_ran_backward(self, first: int) -> bool:
        """Whether the backward of every forward from number ``first`` on has begun that has a graph."""
        began = {self.find(forward) for forward in self.backward_began}
        return all(self.find(f) in began for f in range(first, len(self)) if self.find(f) in self._in_graph)

    def interrupt(self) -> None:
        """A message or a backward ends the period of compute."""
        self._period += 1

    def open(self) -> int:
        """Add a forward; returns its number."""
        number = len(self._same)
        self._same.append(number)
        self._began.append(self._period)
        self._modules.append(set())
        self._posts.append(set())
        self._after.append(set())
        return number

    def find(self, forward: int) -> int:
        while self._same[forward] != forward:
            forward = self._same[forward]
        return forward

    def called(self, forward: int, module: int) -> None:
        self._modules[forward].add(module)

    def takes(self, forward: int, post: int) -> None:
        """The forward takes a tensor that was received by a post: a call that posted one or several messages."""
        self._posts[forward].add(post)

    def follows(self, forward: int, earlier: int) -> None:
        """The forward takes a leaf that was detached from the output of an earlier one."""
        self._after[forward].add(earlier)

    def put_in_graph(self, forward: int) -> None:
        self._in_graph.add(forward)

    def is_in_graph(self, forward: int) -> bool:
        """Whether the forward's output is in an autograd graph, which then shows what was made from it."""
        return forward in self._in_graph

    def calls_one_of(self, forward: int, modules: Collection[int]) -> bool:
        return not self._modules[forward].isdisjoint(modules)

    def modules(self, forward: int) -> Collection[int]:
        return self._modules[forward]

    def join(self, forwards: set[int]) -> Iterator[tuple[int, int]]:
        """Join forwards that began in the current period and now feed one computation; yields pairs (whole, part).

        Two calls of one module are not joined, because they are two microbatches, unless their messages were posted
        together.  A forward is not joined with one that it follows, because they are two stages.
        """
        if len(forwards) > 1 and all(self._began[f] == self._period and f not in self.backward_began for f in forwards):
            first, *others = sorted(forwards)
            if any(self._are_apart(one, other) for one, other in combinations(sorted(forwards), 2)):
                return
            for other in others:
                self._same[other] = first
                self._modules[first] |= self._modules[other]
                self._posts[first] |= self._posts[other]
                self._after[first] |= self._after[other]
                if other in self._in_graph:
                    self._in_graph.add(first)
                yield first, other

    def _are_apart(self, one: int, other: int) -> bool:
        if self._comes_after(one, other) or self._comes_after(other, one):
            return True
        return self._posts[one].isdisjoint(self._posts[other]) and self.calls_one_of(one, self._modules[other])

    def _comes_after(self, forward: int, earlier: int) -> bool:
        """Whether a forward follows an earlier one, directly or through others."""
        pending, seen = [forward], set()
        while pending:
            for before in map(self.find, self._after[pending.pop()]):
                if before == earlier:
                    return True
                if before not in seen:
                    seen.add(before)
                    pending.append(before)
        return False


class Trials:
    """Forwards that ran without gradients, by their module and the memory of their inputs."""

    def __init__(self) -> None:
        self._kept: dict[tuple[int, tuple[Key | None, ...]], tuple[list[Any], int]] = {}

    def earlier(self, module: int, inputs: Sequence[Tensor], forward: int) -> int | None:
        """The forward without gradients that this one repeats, if any.  If this one has no gradients, it is kept."""
        call = module, tuple(map(key_of, inputs))
        if torch.is_grad_enabled():
            storages, earlier = self._kept.pop(call, ([], None))
            return None if any(storage.expired() for storage in storages) else earlier
        if all(call[1]):  # while the weak references live, no other storage gets the same key
            self._kept[call] = [weak_storage(tensor) for tensor in inputs], forward
        return None
