"""Simulates collectives: the k-th collectives of all members of a group are one operation.

Each rank has one stream for collectives.  A collective begins when all members have posted it and have ended their
earlier ones, and takes its cost.  The collectives of one slot run at the same time.  Computes go on meanwhile::

    rank 0   0US> posted 0 |             | 0F0> waits for it
    rank 1   busy          | posted 3    | 1F0>
                           3    cost    ends on both
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from dualpipe.schedule import Kind, Op, Placed, Schedule
from dualpipe.timeline.timeline import Collective, Costs


@dataclass
class Joint:
    """A collective of some members: what each has posted, when its stream was free for that, and when all ended."""

    members: frozenset[int]
    posted: dict[int, Placed] = field(default_factory=dict)
    ready: dict[int, float] = field(default_factory=dict)
    ended: float | None = None

    @property
    def missing(self) -> int | None:
        """The first member that has not posted it."""
        return min(self.members - self.posted.keys(), default=None)


@dataclass
class _Stream:
    """The collectives of one rank."""

    last: list[tuple[Placed, Joint]] = field(default_factory=list)  # of the last slot of collectives
    of_op: dict[Op, tuple[Placed, Joint]] = field(default_factory=dict)
    count: defaultdict[int, int] = field(default_factory=lambda: defaultdict(int))  # posted in each group


def awaited(op: Op) -> tuple[Op, Op]:
    """The collectives that a compute waits for, if its rank posts them before it: the unshard of its stage, and the
    all-to-all of its microbatch there.
    """
    return Op(Kind.US, op.lane, op.stage, 0), Op(Kind.AA, op.lane, op.stage, op.mb)


class Joining:
    """The collectives of a run so far."""

    def __init__(self, schedule: Schedule, costs: Costs) -> None:
        self._groups = schedule.groups
        self._costs = costs
        self._streams = [_Stream() for _ in schedule.programs]
        self._of_group: defaultdict[int, list[Joint]] = defaultdict(list)
        self._every: list[Joint] = []

    def pending(self, rank: int) -> tuple[Placed, Joint] | None:
        """A collective of the rank's last slot of them that has not ended."""
        return next((each for each in self._streams[rank].last if each[1].ended is None), None)

    def free(self, rank: int) -> float:
        """The time at which the stream is free; nothing is ``pending``."""
        return max((joint.ended or 0.0 for _, joint in self._streams[rank].last), default=0.0)

    def post(self, rank: int, slot: Sequence[Placed], clock: float) -> list[int]:
        """Post a slot while nothing is ``pending``; returns the other members of what has ended by that."""
        stream, ready = self._streams[rank], max(clock, self.free(rank))
        stream.last = [(at, self._joint(rank, at.op)) for at in slot]
        woken: set[int] = set()
        for at, joint in stream.last:
            stream.of_op[at.op.bare] = at, joint
            joint.posted[rank], joint.ready[rank] = at, ready
            if joint.missing is None:
                cost = max(self._costs.collective(posted.op) for posted in joint.posted.values())
                joint.ended = max(joint.ready.values()) + cost
                woken |= joint.members - {rank}
        return sorted(woken)

    def before(self, rank: int, op: Op) -> list[tuple[Placed, Joint]]:
        """The last of each collective that a compute waits for."""
        of_op = self._streams[rank].of_op
        return [of_op[need] for need in awaited(op) if need in of_op]

    def stuck(self) -> list[tuple[Placed, int | None]]:
        """What was posted and has not ended, with a member that is missing."""
        return [(at, joint.missing) for joint in self._every if joint.ended is None for at in joint.posted.values()]

    def ended(self) -> tuple[Collective, ...]:
        """Every collective that has ended, once for each member."""
        return tuple(
            Collective(at, joint.ready[rank], max(joint.ready.values()), joint.ended)
            for joint in self._every
            if joint.ended is not None
            for rank, at in joint.posted.items()
        )

    def _joint(self, rank: int, op: Op) -> Joint:
        """The collective that the rank's next one in this group is; by itself if nobody else takes part."""
        members = frozenset(self._groups[op.peer]) if op.peer is not None else frozenset()
        if rank not in members or op.peer is None:
            self._every.append(Joint(frozenset({rank})))
            return self._every[-1]
        row, count = self._of_group[op.peer], self._streams[rank].count
        if count[op.peer] == len(row):
            row.append(Joint(members))
            self._every.append(row[-1])
        count[op.peer] += 1
        return row[count[op.peer] - 1]
