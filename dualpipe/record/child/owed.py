"""The weight gradients that a backward leaves out: the program may compute them later, or never.

A custom function may hide a weight from autograd, or return no gradient for it, and put the work into a store.  So that
a backward ran does not show that its weight gradients were computed: every parameter that the forward reads is *owed* a
gradient until it gets one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from functools import partial
from typing import Any

from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.utils._python_dispatch import _disable_current_modes

from .forwards import Forwards
from .parameters import Parameters


class Owed:
    """The parameters of one rank whose gradients are outstanding, by forward.

    An event ``owed`` has a forward, and for each parameter its number, its name and how its backward left it out:
    ``none`` if the engine reached the parameter without a gradient, ``unseen`` if it did not reach the parameter, and
    ``zero`` if the gradient was zero, which may stand for one that is computed later (``all zero`` if all gradients of
    the forward were).  An event ``paid`` has a forward and the numbers of parameters that got their gradients later.
    An event ``fed`` has those that the forward read and the engine did not reach, but that got gradients while it ran.
    """

    def __init__(self, write: Callable[..., None], forwards: Forwards, parameters: Parameters) -> None:
        self._write, self._forwards, self._parameters = write, forwards, parameters
        self._read: dict[int, set[int]] = {}  # forward -> ids of the parameters that its operators have read
        self._outstanding: dict[int, set[int]] = {}  # forward -> ids of parameters
        self._without: set[int] = set()  # ids of the parameters that the current run reached without a gradient
        self._zero: set[int] = set()  # ids of those that it reached with a gradient of zeros
        self._reached: set[int] = set()  # ids of those that it reached with a gradient
        self._from_zeros = False  # whether the gradients that the run begins with are zeros
        self._hooks: list[tuple[Any, Any]] = []  # nodes that accumulate gradients, kept alive, and their hooks

    def read(self, forward: int, tensors: Iterable[Tensor]) -> None:
        """An operator in the call of a module has read these."""
        found = {id(tensor) for tensor in tensors if tensor in self._parameters and tensor.requires_grad}
        if found:
            self._read.setdefault(forward, set()).update(found)

    def begin(self, gradients: Iterable[Any]) -> None:
        """The engine is about to run from outputs with these gradients: watch what it brings to every parameter."""
        self.end()
        given = [gradient for gradient in gradients if isinstance(gradient, Tensor)]
        with _disable_current_modes():
            self._from_zeros = bool(given) and not any(bool(gradient.any()) for gradient in given)
        self._without.clear()
        self._zero.clear()
        self._reached.clear()
        with _disable_current_modes():
            for parameter in self._parameters.leaves():
                node = get_gradient_edge(parameter).node
                self._hooks.append((node, node.register_prehook(partial(self._reach, parameter))))

    def _reach(self, parameter: Tensor, gradients: tuple[Tensor | None, ...]) -> None:
        gradient = gradients[0]
        if gradient is None or getattr(parameter, "grad_added_to_main_grad", False):  # then it is a dummy
            self._without.add(id(parameter))
            return
        self._reached.add(id(parameter))
        with _disable_current_modes():
            if not self._from_zeros and not gradient.any():
                self._zero.add(id(parameter))
        self._parameters.add_to(id(parameter))

    def end(self) -> None:
        """The engine has run: stop watching."""
        while self._hooks:
            self._hooks.pop()[1].remove()

    def settle(self, forwards: Iterable[int], added: Collection[int]) -> None:
        """The run was the backward of these forwards and brought gradients to the parameters ``added``."""
        for forward in forwards:
            own = {p for p in self._without - set(added) if self._is_of(forward, p)}
            how = dict.fromkeys(own, "none")
            fed = {p for p in added if self._is_of(forward, p)}
            how |= dict.fromkeys(fed & self._zero, "zero" if fed - self._zero else "all zero")
            read = {p for number in self._same(self._read, forward) for p in self._read.pop(number)}
            how |= dict.fromkeys(read - set(added) - self._without, "unseen")
            if how:
                self._outstanding.setdefault(forward, set()).update(how)
                numbered = [(*self._parameters.numbered(p), how[p]) for p in how]
                self._write("owed", forward=forward, parameters=sorted(numbered))
            if hidden := (read & set(added)) - self._reached:
                numbers = sorted(self._parameters.numbered(p)[0] for p in hidden)
                self._write("fed", forward=forward, parameters=numbers)

    def pay(self, forwards: Iterable[int], added: Collection[int]) -> None:
        """The parameters ``added`` have got gradients for these forwards."""
        for forward in sorted(forwards):
            for number in self._same(self._outstanding, forward):
                paid = self._outstanding[number] & set(added)
                self._outstanding[number] -= paid
                if paid:
                    numbered = sorted(self._parameters.numbered(p)[0] for p in paid)
                    self._write("paid", forward=forward, parameters=numbered)

    def _is_of(self, forward: int, parameter: int) -> bool:
        return self._forwards.calls_one_of(forward, self._parameters.holders(parameter))

    def _same(self, known: Iterable[int], forward: int) -> list[int]:
        """The numbers among those known that the forward has had, before others were found to be parts of it."""
        return [number for number in known if self._forwards.find(number) == forward]
