"""What the program does to gradients of parameters outside of the engine: it adds, sets, scales or replaces them."""

from __future__ import annotations

from collections.abc import Callable, Collection

from torch import Tensor

from .applied import Kind
from .attempts import Attempts
from .log import call_path
from .marks import NONE, Marks, Table, key_of
from .origins import Origins
from .owed import Owed
from .parameters import Parameters


class Gradients:
    """Turns changes of gradients into events: ``weights`` for what a forward adds, ``changed`` for anything else."""

    def __init__(
        self,
        write: Callable[..., None],
        table: Table,
        parameters: Parameters,
        origins: Origins,
        owed: Owed,
        attempts: Attempts,
    ) -> None:
        self._write, self._table, self._parameters, self._origins = write, table, parameters, origins
        self._owed, self._attempts = owed, attempts

    def changed(self, kind: Kind) -> None:
        """The program has changed a gradient in place; what only adds to it is no change."""
        if kind.name.startswith("_amp_foreach"):  # it looks for infinite values as well
            self._attempts.look()
        elif kind.zeroes:
            self._attempts.reset()
        if not kind.adds:
            self._write("changed", name=kind.name, at=call_path())

    def read(self, made: Tensor, inputs: Collection[Tensor]) -> None:
        """An operator has made a tensor, or written to one that is no gradient, perhaps from gradients."""
        if any(self._parameters.with_gradient_at(key_of(tensor)) is not None for tensor in inputs):
            self._attempts.copy(made)

    def assigned(self, parameter: Tensor, gradient: Tensor | None, running: bool) -> None:
        """The program has set ``parameter.grad``, perhaps while the engine is running."""
        if parameter not in self._parameters:
            return
        if gradient is None:
            self._attempts.reset()
            return
        if self._parameters.with_gradient_at(key_of(gradient)) == id(parameter):
            return  # the second half of `p.grad += g`
        found = self._table.get(gradient)
        self._parameters.note_gradient(parameter)
        if running:
            self._parameters.add_to(id(parameter))
        else:
            self.add([id(parameter)], found)

    def set_main_grad(self, parameter: Tensor) -> None:
        """The program has set ``parameter.main_grad``, perhaps to a tensor in which it has a gradient already."""
        kept: Tensor | None = getattr(parameter, "main_grad", None)
        found = NONE if kept is None or self._parameters.with_gradient_at(key_of(kept)) else self._table.get(kept)
        self.note_replaced("found replaced")
        self._parameters.note_gradient(parameter)
        self.note_replaced("replaced")
        if found:
            self.add([id(parameter)], found)

    def add(self, parameters: Collection[int], found: Marks) -> None:
        """Something with these marks has been added to the gradients of parameters."""
        self.note_replaced("found replaced")
        holders = {holder for parameter in parameters for holder in self._parameters.holders(parameter)}
        forwards = self._origins.owners(found, holders)
        if forwards:
            self._write("weights", forwards=sorted(forwards), run=None)
            self._owed.pay(forwards, parameters)

    def note_replaced(self, how: str) -> None:
        """Note that gradients have become other tensors: ``replaced`` here, or ``found replaced`` by something else."""
        if self._parameters.replaced:
            self._write("changed", name=how, at=call_path())
            self._parameters.replaced.clear()
