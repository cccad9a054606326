"""A schedule as numbers, which plain search reads: every check is a loop over arrays of integers.

An op of a rank is a pair: a *key*, which is its kind, lane and stage in one number, and its microbatch.  A finding
names an op with its place, which ``placed`` makes from the number of the op within its rank.  Z3 gets its facts from
the schedule itself (``proofs.smt``), so a fault here makes the two methods disagree.
"""

from __future__ import annotations

import weakref
from array import array
from bisect import bisect_right
from collections.abc import Iterator
from functools import cached_property
from typing import Any, NamedTuple

from dualpipe.schedule import COMPUTE, MESSAGES, RECEIVES, SENDS, Chunk, Kind, Op, Placed, Schedule

KINDS = tuple(Kind)
WIDTH = len(KINDS)
"""Keys of one chunk: its number times ``WIDTH``, plus the number of the kind."""
F, B, W = (KINDS.index(kind) for kind in (Kind.F, Kind.B, Kind.W))
IS_COMPUTE = tuple(kind in COMPUTE for kind in KINDS)
IS_MESSAGE = tuple(kind in MESSAGES for kind in KINDS)
IS_SEND = tuple(kind in SENDS for kind in KINDS)
IS_RECEIVE = tuple(kind in RECEIVES for kind in KINDS)

_MOST_HELD = 40_000_000
"""The most ops whose rows are held, at about six bytes each; those of further ranks are made again for each check."""


class Row(NamedTuple):
    """The ops of one rank, in program order.

    ``ends[s]`` is one more than the number of the last op of slot s.  ``peers`` has the ops that name a peer or, of a
    collective, a group.
    """

    keys: array[int]
    mbs: array[int]
    ends: array[int]
    peers: dict[int, int]

    def slots(self) -> Iterator[tuple[int, int]]:
        """For each slot the number of its first op, and one more than that of its last."""
        start = 0
        for end in self.ends:
            yield start, end
            start = end


class Table:
    """The rows of a schedule's ranks, and what its routes give for each key."""

    def __init__(self, schedule: Schedule) -> None:
        self.ranks = schedule.ranks
        self.routes = schedule.routes
        self.groups = schedule.groups
        self._schedule = weakref.ref(schedule)
        self.chunks = [Chunk(lane, stage) for lane, route in self.routes.items() for stage in range(len(route))]
        self._first = {lane: self.chunks.index(Chunk(lane, 0)) for lane in self.routes}
        self.holder = [self.routes[lane][stage] for lane, stage in self.chunks]
        self.derived: dict[str, Any] = {}
        """What several checks derive from it and keep."""
        self._held: dict[int, Row] = {}
        self._count = 0

    @property
    def schedule(self) -> Schedule:
        """The schedule, which the caller of a check holds."""
        schedule = self._schedule()
        assert schedule is not None
        return schedule

    def row(self, rank: int) -> Row:
        """The ops of a rank."""
        row = self._held.get(rank)
        if row is None:
            row = self._made(rank)
            if self._count + len(row.keys) <= _MOST_HELD:
                self._count += len(row.keys)
                self._held[rank] = row
        return row

    def rows(self) -> Iterator[tuple[int, Row]]:
        """Every rank with its ops."""
        return ((rank, self.row(rank)) for rank in range(self.ranks))

    def _made(self, rank: int) -> Row:
        keys: list[int] = []
        mbs: list[int] = []
        ends: list[int] = []
        peers: dict[int, int] = {}
        numbers = {kind: number for number, kind in enumerate(KINDS)}
        firsts = {lane: first * WIDTH for lane, first in self._first.items()}
        key, mb_of, end = keys.append, mbs.append, ends.append
        for slot in self.schedule.programs[rank]:
            for kind, lane, stage, mb, peer in slot:
                if peer is not None:
                    peers[len(keys)] = peer
                key(firsts[lane] + stage * WIDTH + numbers[kind])
                mb_of(mb)
            end(len(keys))
        return Row(_compact(keys), _compact(mbs), _compact(ends), peers)

    def key(self, op: Op) -> int:
        """The key of an op."""
        return (self._first[op.lane] + op.stage) * WIDTH + KINDS.index(op.kind)

    def op(self, key: int, mb: int, peer: int | None = None) -> Op:
        """The op of a key and a microbatch."""
        lane, stage = self.chunks[key // WIDTH]
        return Op(KINDS[key % WIDTH], lane, stage, mb, peer)

    def placed(self, rank: int, number: int) -> Placed:
        """The op of this number of a rank, with its place."""
        row = self.row(rank)
        slot = bisect_right(row.ends, number)
        first = row.ends[slot - 1] if slot else 0
        return Placed(rank, slot, number - first, self.op(row.keys[number], row.mbs[number], row.peers.get(number)))

    @cached_property
    def size(self) -> int:
        """The number of ops and chunks."""
        return len(self.chunks) + sum(len(row.keys) for _, row in self.rows())

    @cached_property
    def needs(self) -> list[tuple[int, ...]]:
        """For each key the keys of the ops that its op needs, all of the same microbatch."""
        return [tuple(map(self.key, self.routes.needs(self.op(key, 0)))) for key in range(len(self.chunks) * WIDTH)]

    @cached_property
    def held_by(self) -> list[list[int]]:
        """For each rank the chunks that it holds."""
        held: list[list[int]] = [[] for _ in range(self.ranks)]
        for chunk, rank in enumerate(self.holder):
            held[rank].append(chunk)
        return held

    @cached_property
    def receives(self) -> list[tuple[int, ...]]:
        """For each key the receives among what its op needs."""
        return [tuple(need for need in needs if IS_RECEIVE[need % WIDTH]) for needs in self.needs]

    @cached_property
    def microbatches(self) -> list[int]:
        """For each chunk how many microbatches the ops of its lane name: one more than the largest number."""
        largest = [-1] * len(self.chunks)
        for _, row in self.rows():
            for key, mb in zip(row.keys, row.mbs, strict=True):
                if mb > largest[key // WIDTH]:
                    largest[key // WIDTH] = mb
        by_lane = {
            lane: max(largest[first : first + len(self.routes[lane])]) + 1 for lane, first in self._first.items()
        }
        return [by_lane[lane] for lane, _ in self.chunks]

    def neighbour(self, key: int) -> int | None:
        """The rank that a message's partner stage is on."""
        return self.routes.neighbour(self.op(key, 0))


def _compact(numbers: list[int]) -> array[int]:
    """Numbers from 0 on in an array: of two bytes each if all fit, else of four."""
    return array("H" if max(numbers, default=0) < 1 << 16 else "i", numbers)


_kept: list[tuple[weakref.ref[Schedule], Table]] = []


def table_of(schedule: Schedule) -> Table:
    """The table of a schedule.  That of the last schedule is kept, since every check of it needs the table."""
    if not _kept or _kept[0][0]() is not schedule:
        _kept[:] = [(weakref.ref(schedule), Table(schedule))]
    return _kept[0][1]
