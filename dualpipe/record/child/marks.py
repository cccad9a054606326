"""Marks on tensors, which show where a tensor comes from.

A mark is a letter and a number: ``("F", 3)`` made by forward 3 of this rank, ``("B", 3)`` made by its backward,
``("M", 7)`` received by message 7, ``("C", 3)`` computed from a leaf that was detached from the output of forward 3.
Marks are kept by memory, so a view, a detached alias and ``.data`` of a tensor have the same marks, and two chunks of
one tensor do not.
"""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

from torch import Tensor

from .regions import Region, region_of, weak_storage

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


class _Painted(NamedTuple):
    """What has marks in one storage: regions in the order in which they got them, so that a later one hides others."""

    storage: Any
    regions: tuple[tuple[Region, Marks], ...]


class Table:
    """The marks of every live tensor, by the memory that it has.

    A tensor has the marks of all memory that it shares.  So a whole buffer has those of what was received into its
    parts, and a part of it has none of those of another part.
    """

    def __init__(self) -> None:
        self._entries: dict[int, _Painted] = {}
        self._sweep_at = 4096
        self._lock = threading.Lock()  # other threads that post messages mark tensors too

    def get(self, tensor: Tensor) -> Marks:
        region = region_of(tensor)
        entry = self._entries.get(region.storage) if region else None
        if region is None or entry is None or entry.storage.expired():
            return NONE
        found = NONE
        for painted, marks in reversed(entry.regions):
            if painted.overlaps(region):
                found |= marks
                if painted.covers(region):
                    break
        return found

    def put(self, tensor: Tensor, marks: Marks) -> None:
        region = region_of(tensor)
        if region is None or region.start == region.end:
            return
        with self._lock:
            entry = self._entries.get(region.storage)
            before = () if entry is None or entry.storage.expired() else entry.regions
            kept = tuple(each for each in before if not region.covers(each[0]))
            if marks or any(each.overlaps(region) for each, _ in kept):
                kept = (*kept, (region, marks))
            if not kept:
                self._entries.pop(region.storage, None)
                return
            self._entries[region.storage] = _Painted(weak_storage(tensor), kept)
            if len(self._entries) > self._sweep_at:
                self._entries = {number: each for number, each in self._entries.items() if not each.storage.expired()}
                self._sweep_at = max(4096, 2 * len(self._entries))
