"""Tensors that come from outside of torch's operators: from NumPy, a list, a pickled object, a collective.

An activation may leave torch (``numpy()``, ``tolist()``, ``item()``, pickling) and come back as another tensor, without
an operator between the two.  One that comes back with the same values, or in the same memory, gets the marks of the one
that left.  Of any other one it is noted that its origin is unknown: it gets a mark ``("U", number of the arrival)``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from .marks import Marks
from .origins import Origins
from .patches import Patches
from .regions import weak_storage

_MAKERS = ("from_numpy", "tensor", "as_tensor", "asarray", "frombuffer", "from_dlpack")
_MOST_ITEMS = 65536
"""So many numbers that left one by one are kept."""


class Arrivals:
    """What has left torch on one rank, and what has come from outside."""

    def __init__(self, write: Callable[..., None], origins: Origins) -> None:
        self._write, self._origins = write, origins
        self._by_values: dict[int, Marks] = {}
        self._by_memory: dict[int, tuple[Any, Marks]] = {}  # address -> the storage (weak), and the marks
        self._items: dict[float, Marks] = {}
        self._left = False
        self._count = 0
        self._busy = False

    def watch(self, patches: Patches) -> None:
        """Watch the ways out of torch and into it, until ``patches.undo()``."""
        for name in ("numpy", "tolist", "item", "__reduce_ex__", "__dlpack__"):
            patches.put(Tensor, name, self._leaving(name, getattr(Tensor, name)))
        for name in _MAKERS:
            patches.put(torch, name, self._entering(getattr(torch, name)))
        rebuild = torch._utils._rebuild_tensor_v2
        patches.put(torch._utils, "_rebuild_tensor_v2", self._entering(rebuild, is_object=True))

    def by_collective(self, collective: int) -> int:
        """Number the arrival of a tensor by a collective."""
        return self._number("collective", collective)

    def _number(self, how: str, collective: int | None = None) -> int:
        number, self._count = self._count, self._count + 1
        self._write("arrived", arrival=number, how=how, collective=collective)
        return number

    def _leaving(self, name: str, original: Any) -> Any:
        @functools.wraps(original)
        def leave(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            result = original(tensor, *args, **kwargs)
            if not self._busy and tensor.is_floating_point() and (found := self._origins.carried_by(tensor)):
                self._leave(tensor, name, found)
            return result

        return leave

    def _leave(self, tensor: Tensor, name: str, found: Marks) -> None:
        if tensor.numel() == 1:
            if len(self._items) < _MOST_ITEMS:
                self._items[self._values(tensor)[0]] = found
            return
        if not self._left or name == "__reduce_ex__":
            self._write("left", how="pickle" if name == "__reduce_ex__" else name)
        self._left = True
        self._by_values[hash(tuple(self._values(tensor)))] = found
        self._by_memory[tensor.data_ptr()] = weak_storage(tensor), found

    def _entering(self, original: Any, is_object: bool = False) -> Any:
        @functools.wraps(original)
        def enter(*args: Any, **kwargs: Any) -> Any:
            made = original(*args, **kwargs)
            known = any(made is argument for argument in args)
            if isinstance(made, Tensor) and not known and not self._busy and made.is_floating_point():
                self._enter(made, is_object)
            return made

        return enter

    def _enter(self, tensor: Tensor, is_object: bool) -> None:
        if tensor.is_meta or self._origins.carried_by(tensor) or not (self._left or self._items or is_object):
            return
        storage, found = self._by_memory.get(tensor.data_ptr(), (None, None))
        if found is None or storage is None or storage.expired():
            values = self._values(tensor)
            found = self._by_values.get(hash(tuple(values)))
            if found is None and values and all(value in self._items for value in values):
                found = frozenset(mark for value in values for mark in self._items[value])
        if found is None and tensor.numel() > 1 and (self._left or is_object):
            found = frozenset({("U", self._number("object" if is_object else "outside"))})
        if found is not None:
            self._origins.put(tensor, found)

    def _values(self, tensor: Tensor) -> list[float]:
        self._busy = True
        try:
            with _disable_current_modes():
                flat: list[float] = tensor.detach().double().reshape(-1).tolist()
                return flat
        finally:
            self._busy = False
