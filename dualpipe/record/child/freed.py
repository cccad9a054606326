"""The tensors to which the program has given a smaller storage, as Megatron does to free an output that it has sent."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor

from .log import call_path
from .marks import NONE, Key, Marks, Table, key_of
from .regions import weak_storage


class _Loss(NamedTuple):
    tensor: weakref.ref[Tensor]
    place: str
    marks: Marks


class Freed:
    """Where each such tensor has lost its storage, and the marks that it had."""

    def __init__(self, table: Table) -> None:
        self._table = table
        self._losses: dict[int, _Loss] = {}  # by the id of the tensor
        self._memory: dict[Key, tuple[Any, _Loss]] = {}  # by the memory that it has now, with its storage (weak)

    def replaced(self, tensor: Tensor, value: Any) -> None:
        """The program is about to give a tensor the storage of another one."""
        if isinstance(value, Tensor) and value.numel() < tensor.numel():
            self._losses = {number: each for number, each in self._losses.items() if each.tensor() is not None}
            self._losses[id(tensor)] = loss = _Loss(weakref.ref(tensor), call_path(), self._table.get(tensor))
            if (key := key_of(value)) is not None:
                self._memory = {at: each for at, each in self._memory.items() if not each[0].expired()}
                self._memory[key] = weak_storage(value), loss

    def passes_on(self, tensor: Tensor, value: Any) -> None:
        """The program uses a tensor as what it has received, although it gives it another storage before that."""
        if isinstance(value, Tensor):
            self._table.put(value, self._table.get(value) | self._table.get(tensor))

    def at(self, tensors: Iterable[Any]) -> str:
        """Where the first of the tensors that has lost its storage has lost it; empty if none has."""
        return next((found.place for tensor in tensors if (found := self._find(tensor)) is not None), "")

    def held(self, tensor: Tensor) -> Marks:
        """The marks that a tensor had before it lost its storage, if it has none now."""
        found = self._find(tensor)
        return NONE if found is None or self._table.get(tensor) else found.marks

    def _find(self, tensor: Any) -> _Loss | None:
        found = self._losses.get(id(tensor))
        if found is not None and found.tensor() is tensor:
            return found
        key = key_of(tensor) if isinstance(tensor, Tensor) else None  # as that of ``tensor.detach()``
        storage, loss = self._memory.get(key, (None, None)) if key is not None else (None, None)
        return loss if storage is not None and not storage.expired() else None
