"""The memory of tensors: which of them have elements in common, and which hold all of another's."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef


def weak_storage(tensor: Tensor) -> Any:
    """A weak reference to a tensor's storage.  While it exists, no other storage gets the same number."""
    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call] # torch's own


def is_readable(tensor: Tensor) -> bool:
    """Whether a tensor's memory is there; a program may have freed it by ``resize_(0)`` of the storage."""
    region = region_of(tensor)
    return region is None or region.start == region.end or region.end <= tensor.untyped_storage().nbytes()


def copied(tensor: Tensor) -> Tensor:
    """A copy without a graph; an empty tensor if the memory is freed."""
    return tensor.detach().clone() if is_readable(tensor) else torch.empty(0, dtype=tensor.dtype)


class Region(NamedTuple):
    """The elements of a tensor in its storage, in bytes.

    ``start`` is the first byte and ``end`` the one after the last.  ``steps`` are the strides and sizes of the
    dimensions if there are gaps between the elements, the largest stride first; there are none in a dense region.
    """

    storage: int
    start: int
    end: int
    steps: tuple[tuple[int, int], ...] = ()

    def overlaps(self, other: Region) -> bool:
        """Whether the two have a byte in common; two regions with gaps that do not line up count as overlapping."""
        if self.storage != other.storage or self.start >= other.end or other.start >= self.end:
            return False
        if not (self.steps or other.steps):
            return True
        ranges = _side_by_side(self, other)
        return ranges is None or all(a < d and c < b for (a, b), (c, d) in ranges)

    def covers(self, other: Region) -> bool:
        """Whether this one certainly has every byte of the other."""
        if self.storage != other.storage or self.start > other.start or other.end > self.end:
            return False
        if not self.steps:
            return True
        ranges = _side_by_side(self, other)
        return ranges is not None and all(a <= c and d <= b for (a, b), (c, d) in ranges)


def region_of(tensor: Tensor) -> Region | None:
    """The memory of a tensor, or ``None`` if it has no storage (fake tensors and wrappers raise)."""
    try:
        size, count = tensor.element_size(), tensor.numel()
        storage, start = tensor.untyped_storage()._cdata, int(tensor.storage_offset()) * size
        if tensor.is_contiguous() or not count:
            return Region(storage, start, start + count * size)
        dims = {
            (step * size, many) for step, many in zip(tensor.stride(), tensor.shape, strict=True) if many > 1 and step
        }
        steps = (*sorted(dims, reverse=True), (1, size))
        end = start + 1 + sum(step * (many - 1) for step, many in steps)
        dense = all(outer == inner * many for (outer, _), (inner, many) in pairwise(steps))
        return Region(storage, start, end, () if dense else steps)
    except (RuntimeError, NotImplementedError):  # of a tensor without storage
        return None


Ranges = list[tuple[int, int]]


def _side_by_side(one: Region, other: Region) -> list[tuple[tuple[int, int], tuple[int, int]]] | None:
    """The indices of two regions along the same strides, dimension by dimension; ``None`` if they do not line up."""
    strides = sorted({stride for stride, _ in (*one.steps, *other.steps)}, reverse=True)
    if any(outer % inner for outer, inner in pairwise(strides)):
        return None
    origin = one.start if one.steps else other.start
    ranges, others = _ranges(one, strides, origin), _ranges(other, strides, origin)
    return None if ranges is None or others is None else list(zip(ranges, others, strict=True))


def _ranges(region: Region, strides: Sequence[int], origin: int) -> Ranges | None:
    """The indices of a region along these strides, the largest first, or ``None`` if it wraps around in one."""
    first, last = _indices(region.start - origin, strides), _indices(region.end - 1 - origin, strides)
    sizes = [outer // inner for outer, inner in pairwise(strides)]  # of all dimensions but the first
    if not region.steps:
        differs = next((at for at, (a, b) in enumerate(zip(first, last, strict=True)) if a != b), len(strides))
        inner = zip(first[differs + 1 :], last[differs + 1 :], sizes[differs:], strict=True)
        return None if any((a, b) != (0, size - 1) for a, b, size in inner) else _closed(first, last)
    counts = dict(region.steps)
    ends = [index + counts.get(stride, 1) for index, stride in zip(first, strides, strict=True)]
    return (
        None
        if any(end > size for end, size in zip(ends[1:], sizes, strict=True))
        else list(zip(first, ends, strict=True))
    )


def _closed(first: Sequence[int], last: Sequence[int]) -> Ranges:
    return [(a, b + 1) for a, b in zip(first, last, strict=True)]


def _indices(offset: int, strides: Sequence[int]) -> list[int]:
    found = []
    for stride in strides:
        index, offset = divmod(offset, stride)
        found.append(index)
    return found
