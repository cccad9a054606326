"""What a lineage is made of: chunks of the model, and the world coordinates of a forward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dualpipe.record.events import MessageId, Owner
from dualpipe.schedule import Lane

Chunk = tuple[int, int]
"""A rank, and the number that it gave to a module."""


@dataclass(frozen=True)
class Name:
    """Which forward it is, in world coordinates."""

    lane: Lane
    stage: int
    mb: int


@dataclass(frozen=True)
class Lineage:
    """The lanes, the name of every forward that belongs to one, what forwards got besides, and what is told with care.

    ``data`` are the receives whose tensors forwards take though no stage made them: inputs, labels, masks.
    """

    routes: Mapping[Lane, tuple[int, ...]]
    names: Mapping[Owner, Name]
    data: frozenset[MessageId]
    notes: tuple[str, ...]
