"""What one rank does for one microbatch: ``Op``, and the slots and places that ops are in.

An op is named in *world coordinates*: stage, microbatch and lane mean the same thing on every rank::

    lane >   rank 0 -> rank 1 -> rank 2 -> rank 3      0F5>  stage 0 runs the forward of microbatch 5
    lane <   rank 3 -> rank 2 -> rank 1 -> rank 0      0F5<  the same layers, the other way round
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from itertools import pairwise
from typing import NamedTuple

from dualpipe.errors import RuleError


class Kind(StrEnum):
    """What an op does.  B is the backward for the input and W the one for the weights, as in the zero-bubble paper.

    The last five are collectives of a stage: all-to-all (of experts), all-reduce (of anything else than the stage's own
    gradients), unshard and reshard (of weights), and the reduction of gradients.
    """

    F = "F"
    B = "B"
    W = "W"
    SF = "SF"
    RF = "RF"
    SB = "SB"
    RB = "RB"
    AA = "AA"
    AR = "AR"
    US = "US"
    RS = "RS"
    RG = "RG"

    __hash__ = str.__hash__


class Lane(StrEnum):
    """The direction in which a microbatch travels."""

    UP = ">"
    DOWN = "<"

    __hash__ = str.__hash__


F, B, W, SF, RF, SB, RB, *_ = Kind
UP, DOWN = Lane
COMPUTE = frozenset({F, B, W})
SENDS = frozenset({SF, SB})
RECEIVES = frozenset({RF, RB})
MESSAGES = SENDS | RECEIVES
COLLECTIVES = frozenset({Kind.AA, Kind.AR, Kind.US, Kind.RS, Kind.RG})
"""What the members of a group do together; all but ``RS``, with which a rank drops weights by itself."""
WHOLE = COLLECTIVES - {Kind.AA}
"""The kinds of ops that concern a whole stage and no single microbatch: their ``mb`` is 0."""

LARGEST = 999_999_999
"""The largest number in an op or a route; it fits into 32 bits."""


class ScheduleError(RuleError):
    """A value that cannot be a schedule."""


class Chunk(NamedTuple):
    """A stage of one lane: the model chunk that a rank holds.  The chunks of one stage are its replicas."""

    lane: Lane
    stage: int

    def __str__(self) -> str:
        return f"stage {self.stage} of lane {self.lane}"


class Task(NamedTuple):
    """A microbatch at a chunk: what F, B and W of the same name work on."""

    lane: Lane
    stage: int
    mb: int

    @property
    def chunk(self) -> Chunk:
        """The chunk that it runs on."""
        return Chunk(self.lane, self.stage)

    def __str__(self) -> str:
        return f"microbatch {self.mb} at stage {self.stage} of lane {self.lane}"


class Op(NamedTuple):
    """One thing that one rank does for one microbatch: ``Op(F, UP, stage=2, mb=3)``, printed ``2F3>``.

    For a message, ``peer`` is the rank at the other end if a file names it, else ``None``: the lane then determines the
    rank (see ``Schedule.peer``).  For a collective, it is the number of the group, or ``None`` if that is unknown.
    """

    kind: Kind
    lane: Lane
    stage: int
    mb: int
    peer: int | None = None

    def __str__(self) -> str:
        peer = "" if self.peer is None else f"@{self.peer}"
        mb = "" if self.kind in WHOLE else self.mb
        return f"{self.stage}{self.kind}{mb}{self.lane}{peer}"

    @property
    def bare(self) -> Op:
        """The op without its peer, as ``needs`` returns it."""
        return self if self.peer is None else Op(self.kind, self.lane, self.stage, self.mb)

    @property
    def chunk(self) -> Chunk:
        """The chunk that it belongs to; for a message, the one that sends or receives."""
        return Chunk(self.lane, self.stage)

    @property
    def task(self) -> Task:
        """The task that it belongs to."""
        return Task(self.lane, self.stage, self.mb)


Slot = tuple[Op, ...]
Program = tuple[Slot, ...]


def show_slot(slot: Slot) -> str:
    """The text of a slot: its ops joined by ``+``."""
    return "+".join(map(str, slot))


def full_backwards(slot: Iterable[Op]) -> frozenset[Task]:
    """The tasks whose backward is full: the slot has their B and, after it, their W.

    Anywhere else the backward is split, and W is deferred.
    """
    begun: set[Task] = set()
    full: set[Task] = set()
    for op in slot:
        if op.kind is B:
            begun.add(op.task)
        elif op.kind is W and op.task in begun:
            full.add(op.task)
    return frozenset(full)


def overlapped_pairs(slot: Iterable[Op]) -> tuple[tuple[Op, Op], ...]:
    """The F&B pairs of a slot: an F and, right after it, a B of another chunk.

    Neither needs the other, and the slot posts nothing between them, so they may run at once.
    """
    return tuple((f, b) for f, b in pairwise(slot) if f.kind is F and b.kind is B and f.chunk != b.chunk)


class Placed(NamedTuple):
    """An op with its place: rank, number of the slot within the rank, position within the slot."""

    rank: int
    slot: int
    position: int
    op: Op
