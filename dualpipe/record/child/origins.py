"""Where tensors come from: what their marks mean, and which forward takes them.

A message, and the output of a forward that the program detaches, belong to the first forward that reads them.  From
then on what is computed from them is of that forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from .forwards import Forwards
from .marks import NONE, Mark, Marks, Table, key_of
from .parameters import Parameters
from .runs import Runs


def marks(letter: str, numbers: Iterable[int]) -> Marks:
    return frozenset((letter, number) for number in numbers)


def _is_leaf(tensor: Tensor) -> bool:
    """Whether autograd begins at a tensor or at the one that it is a view of."""
    base = tensor if tensor._base is None else tensor._base
    return any(each.is_leaf and each.requires_grad for each in (tensor, base))


class Origins:
    """The marks of one rank's tensors, and the forwards that take its messages and its detached outputs."""

    def __init__(
        self, write: Callable[..., None], table: Table, forwards: Forwards, parameters: Parameters, runs: Runs
    ) -> None:
        self._write = write
        self._table, self._forwards, self._parameters, self._runs = table, forwards, parameters, runs
        self.input_of: dict[int, int] = {}  # message -> the forward that takes its tensor
        self.following: dict[int, int] = {}  # forward -> the one on this rank that takes its detached output
        self._returned_by: dict[int, int] = {}  # message -> the last forward that has returned its tensor as it is
        self._post_of: dict[int, int] = {}  # message -> the number of its post, in which others may have been

    def posted(self, messages: Iterable[int], post: int) -> None:
        """Messages have been posted together."""
        self._post_of |= dict.fromkeys(messages, post)

    def forwards_of(self, tensor: Tensor) -> set[int]:
        """The forwards that a tensor was computed by or from."""
        return {self._forwards.find(number) for letter, number in self._table.get(tensor) if letter == "F"}

    def carried_by(self, tensor: Tensor) -> Marks:
        """The marks that one tensor passes on to results."""
        found = self._table.get(tensor)
        if found and _is_leaf(tensor):
            return frozenset(("C" if letter == "F" else letter, number) for letter, number in found)
        return found

    def carried(self, inputs: Iterable[Tensor]) -> Marks:
        """The marks of all inputs but parameters and their gradients, which forwards share."""
        carried = [
            (tensor, self.carried_by(tensor))
            for tensor in inputs
            if tensor not in self._parameters and self._parameters.with_gradient_at(key_of(tensor)) is None
        ]
        found = frozenset(mark for _, held in carried for mark in held)
        if len(found) > 1 and not any(letter == "B" for letter, _ in found):
            self.join(
                {
                    self._forwards.find(number)
                    for tensor, held in carried
                    for letter, number in held
                    if letter == "F" and self.is_joined_by_graph(tensor, number)
                }
            )
        return found

    def is_joined_by_graph(self, tensor: Tensor, forward: int) -> bool:
        """Whether a computation on a tensor belongs to the forward that made the tensor.

        The autograd graph shows this.  If the forward has no graph (frozen, or without gradients), it always belongs.
        """
        within = tensor.requires_grad and torch.is_grad_enabled()
        return within or not self._forwards.is_in_graph(self._forwards.find(forward))

    def join(self, forwards: set[int]) -> set[int]:
        """Join forwards that turned out to be one, if they can be."""
        for first, part in list(self._forwards.join(forwards)):
            self._write("join", forward=first, part=part)
        return {self._forwards.find(f) for f in forwards}

    def take(self, forward: int, messages: Iterable[int], detached_from: Iterable[int]) -> tuple[list[int], list[int]]:
        """Assign to a forward the messages, and the forwards its leaves are detached from, that had no taker yet."""
        fresh = sorted(m for m in messages if m not in self.input_of)
        after = sorted(c for c in detached_from if c not in self.following and c != forward)
        self.input_of |= dict.fromkeys(fresh, forward)
        self.following |= dict.fromkeys(after, forward)
        for earlier in after:
            self._forwards.follows(forward, earlier)
        for message in fresh:
            self._forwards.takes(forward, self._post_of[message])
        return fresh, after

    def content(self, tensor: Tensor, lost: Marks = NONE) -> Sequence[Mark]:
        """What a sent tensor holds, or has ``lost``.  One computed from a leaf belongs to the forward that took it."""
        return sorted(set(map(self._content, self._table.get(tensor) or lost)))

    def _content(self, mark: Mark) -> Mark:
        letter, number = mark
        if letter == "M" and number in self._runs.gradient_of:  # an input that was returned as it is passes it on
            return "B", self._forwards.find(self._runs.gradient_of[number])
        if letter == "M" and number in self._returned_by:
            return "F", self._forwards.find(self._returned_by[number])
        if letter in "MU":
            return mark
        if letter == "C":
            letter, number = "F", self.following.get(number, number)
        return letter, self._forwards.find(number)

    def received(self, tensor: Tensor) -> list[int]:
        """The messages that a tensor was received by."""
        return sorted(number for letter, number in self._table.get(tensor) if letter == "M")

    def returned(self, forward: int, tensors: Iterable[Tensor]) -> None:
        """A forward returns these tensors.  One that it has received, and returns as it is, is its output too."""
        for tensor in tensors:
            self._returned_by |= dict.fromkeys(self.received(tensor), forward)

    def owners(self, found: Marks, holders: set[int] | None) -> set[int]:
        """The forwards of the marks among those of ``holders``: by gradients if possible, else by activations.

        A gradient is also that of the output of the stage before, if that is on this rank too.
        """
        by_letter: dict[str, set[int]] = {"B": set(), "F": set()}
        for letter, number in found:
            if letter == "M":
                if number in self._runs.gradient_of:
                    by_letter["B"].add(self._forwards.find(self._runs.gradient_of[number]))
                elif number in self.input_of:
                    by_letter["F"].add(self._forwards.find(self.input_of[number]))
            elif letter == "C":
                by_letter["F"].add(self._forwards.find(self.following.get(number, number)))
            elif letter in by_letter:
                by_letter[letter].add(self._forwards.find(number))
        gradients = by_letter["B"]
        before = {
            self._forwards.find(one) for one, later in self.following.items() if self._forwards.find(later) in gradients
        }
        for forwards in (gradients, before, by_letter["F"]):
            kept = {f for f in forwards if holders is None or self._forwards.calls_one_of(f, holders)}
            if kept:
                return kept
        return set()

    def put(self, tensor: Tensor, found: Marks = NONE) -> None:
        """The tensor has these marks from now on."""
        self._table.put(tensor, found)
