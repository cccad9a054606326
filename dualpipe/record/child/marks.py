"""Marks on tensors, which show where a tensor comes from.

A mark is a letter and a number: ``("F", 3)`` made by forward 3 of this rank, ``("B", 3)`` made by its backward,
``("M", 7)`` received by message 7, ``("C", 3)`` computed from a leaf that was detached from the output of forward 3.
Marks are kept by storage and offset, so a view, a detached alias and ``.data`` of a tensor have the same marks, and two
chunks of one tensor do not.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

Mark = tuple[str, int]
Marks = frozenset[Mark]
Key = tuple[int, int]
NONE: Marks = frozenset()


def key_of(tensor: Tensor) -> Key | None:
    """The storage and offset of a tensor, or ``None`` if it has no storage (fake tensors and wrappers raise)."""
    try:
        return tensor.untyped_storage()._cdata, int(tensor.storage_offset())
    except (RuntimeError, NotImplementedError):  # of a tensor without storage
        return None


def weak_storage(tensor: Tensor) -> Any:
    """A weak reference to a tensor's storage.  While it exists, no other storage gets the same number."""
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call] # torch's own


class Table:
    """The marks of every live tensor."""

    def __init__(self) -> None:
        self._entries: dict[Key, tuple[Any, Marks]] = {}
        self._sweep_at = 4096

    def get(self, tensor: Tensor) -> Marks:
        key = key_of(tensor)
        entry = self._entries.get(key) if key else None
        return NONE if entry is None or entry[0].expired() else entry[1]

    def put(self, tensor: Tensor, marks: Marks) -> None:
        key = key_of(tensor)
        if key is None:
            return
        if not marks:
            self._entries.pop(key, None)
            return
        self._entries[key] = (weak_storage(tensor), marks)
        if len(self._entries) > self._sweep_at:
            for old, entry in list(
                self._entries.items()
            ):  # a copy, as other threads that post messages put entries too
                if entry[0].expired() and self._entries.get(old) is entry:
                    del self._entries[old]
            self._sweep_at = max(4096, 2 * len(self._entries))
