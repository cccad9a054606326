"""What the program does to gradients of parameters outside of the engine: it adds, sets, scales or replaces them."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .log import call_path
from .marks import Marks, Table, key_of
from .origins import Origins
from .owed import Owed
from .parameters import Parameters

_ADDS = frozenset({"add_", "copy_", "sub_", "_foreach_add_", "addcmul_"})


class Gradients:
    """Turns changes of gradients into events: ``weights`` for what a forward adds, ``changed`` for anything else."""

    def __init__(
        self, write: Callable[..., None], table: Table, parameters: Parameters, origins: Origins, owed: Owed
    ) -> None:
        self._write, self._table, self._parameters, self._origins = write, table, parameters, origins
        self._owed = owed

    def changed(self, name: str) -> None:
        """The program has changed a gradient in place; what only adds to it is no change."""
        if name not in _ADDS:
            self._write("changed", name=name, at=call_path())

    def assigned(self, parameter: Tensor, gradient: Tensor | None, running: bool) -> None:
        """The program has set ``parameter.grad``, perhaps while the engine is running."""
        if gradient is None or parameter not in self._parameters:
            return
        if self._parameters.with_gradient_at(key_of(gradient)) == id(parameter):
            return  # the second half of `p.grad += g`
        found = self._table.get(gradient)
        self._parameters.note_gradient(parameter)
        if running:
            self._parameters.add_to(id(parameter))
        else:
            self.add(id(parameter), found)

    def add(self, parameter: int, found: Marks) -> None:
        """Something with these marks has been added to a gradient."""
        self.note_replaced("found replaced")
        forwards = self._origins.owners(found, self._parameters.holders(parameter))
        if forwards:
            self._write("weights", forwards=sorted(forwards), run=None)
            self._owed.pay(forwards, {parameter})

    def note_replaced(self, how: str) -> None:
        """Note that gradients have become other tensors: ``replaced`` here, or ``found replaced`` by something else."""
        if self._parameters.replaced:
            self._write("changed", name=how, at=call_path())
            self._parameters.replaced.clear()
