"""Simulates a schedule: with the costs of its ops it gives a timeline.

Messages carry no tag: the k-th send of one rank to another matches the k-th receive that the other posts from it,
also where the two name different messages.
"""

from __future__ import annotations

from collections import defaultdict, deque
from dataclasses import dataclass, field
from typing import NamedTuple

from dualpipe.schedule import COLLECTIVES, COMPUTE, SENDS, Op, Placed, Schedule, ScheduleError, Slot
from dualpipe.timeline.joining import Joining
from dualpipe.timeline.timeline import CostError, Costs, Message, Span, Timeline

__all__ = ["CostError", "Costs", "Message", "Span", "Stuck", "Timeline", "Wait", "simulate"]

_MOST_SHOWN = 8
"""The most waits that an error lists."""


class Wait(NamedTuple):
    """A rank that is blocked: the op at which it is blocked, and the op that this one needs.

    A message that is never matched needs itself, from ``peer``; so does a collective that ``peer`` never joins.
    """

    at: Placed
    need: Op
    peer: int | None

    def __str__(self) -> str:
        rank, slot, _, op = self.at
        place = f"rank {rank} in slot {slot}"
        if self.need.kind in COLLECTIVES:
            return f"{place} waits for rank {self.peer} to join {self.need}"
        if op != self.need:
            return f"{place} cannot begin {op}: {self.need} has not run before it"
        if self.peer is None:
            return f"{place} waits for the partner of {op}, and there is no rank at the other end"
        return f"{place} waits for rank {self.peer} to post the partner of {op}"


class Stuck(ScheduleError):  # noqa: N818 - the field says that a pipeline is stuck
    """A schedule that cannot finish.  ``waits`` has the blocked ranks, ``reached`` the timeline until then."""

    def __init__(self, waits: tuple[Wait, ...], reached: Timeline) -> None:
        self.waits, self.reached = waits, reached
        more = [f"and {len(waits) - _MOST_SHOWN} more wait"] if len(waits) > _MOST_SHOWN else []
        super().__init__(
            "every rank must reach its end and every message must have a partner",
            ", ".join([*map(str, waits[:_MOST_SHOWN]), *more]),
            "run `dualpipe prove` on the schedule for the reason",
        )


def simulate(
    schedule: Schedule, costs: Costs | None = None, *, blocking: bool = False, eager: bool = False
) -> Timeline:
    """Run the schedule on ideal ranks and links.

    Every rank runs its slots in order.  A message slot posts its messages and ends; a message completes
    ``latency`` after both sides have posted it, and a compute waits for the receives that it needs.  With ``blocking``
    a message slot ends only when all its messages have completed, as after ``batch_isend_irecv`` and ``wait``.  With
    ``eager`` the latency begins when the send is posted, whether or not its receive has been posted.

    A slot of collectives posts them and ends.  They begin when all members have posted theirs, on one stream for each
    rank: the rank posts its next messages and collectives when they have ended.  A compute waits for the unshard of its
    stage and the all-to-alls of its microbatch there that are posted before it.  With ``blocking`` a slot of
    collectives ends only when they have.

    Raises
    ------
    Stuck
        If a rank cannot reach its end: an op runs before what it needs on its own rank, or a message or collective
        (needed or not) is never matched.
    CostError
        If costs are given for single stages, and not for each stage of the schedule.
    """
    costs = Costs() if costs is None else costs
    if costs.stages and len(costs.stages) != schedule.stages:
        raise CostError(
            "costs of single stages are given for each stage",
            f"got {len(costs.stages)} for {schedule.stages} stages",
            "give one for each",
        )
    return _Run(schedule, costs, blocking, eager).finish()


@dataclass
class _Posted:
    """One side of a message; ``completed`` once the other side is posted too."""

    at: Placed
    peer: int | None
    time: float
    completed: float | None = None

    def wait(self) -> Wait:
        return Wait(self.at, self.at.op, self.peer)


@dataclass
class _Rank:
    """The progress of a rank."""

    clock: float = 0.0
    spans: list[Span] = field(default_factory=list)
    done: set[Op] = field(default_factory=set)
    posted: dict[Op, _Posted] = field(default_factory=dict)
    waited: list[_Posted] = field(default_factory=list)  # the messages of the slot that has not ended
    joins: bool = False  # whether it has posted the collectives of the slot that has not ended
    wait: Wait | None = None

    def end_slot(self, ops: Slot, start: float, end: float) -> None:
        self.spans.append(Span(len(self.spans), ops, start, end))
        self.clock = end


@dataclass
class _Channel:
    """What one rank sends to one other, in the order in which each side was posted."""

    sends: list[_Posted] = field(default_factory=list)
    receives: list[_Posted] = field(default_factory=list)


class _Run:
    """The state of a run.  A rank advances until it waits; a message that completes wakes the two ranks."""

    def __init__(self, schedule: Schedule, costs: Costs, blocking: bool, eager: bool) -> None:
        self.schedule, self.costs, self.blocking, self.eager = schedule, costs, blocking, eager
        self.ranks = [_Rank() for _ in schedule.programs]
        self.channels: defaultdict[tuple[int, int], _Channel] = defaultdict(_Channel)
        self.sides: list[_Posted] = []
        self.messages: list[Message] = []
        self.joining = Joining(schedule, costs)
        self.awake = deque(range(schedule.ranks))

    def finish(self) -> Timeline:
        while self.awake:
            self.advance(self.awake.popleft())
        waits = [state.wait for state in self.ranks if state.wait is not None]
        listed = {wait.at for wait in waits}
        waits += [side.wait() for side in self.sides if side.completed is None and side.at not in listed]
        blocked = {wait.at.rank for wait in waits}
        waits += [Wait(at, at.op, peer) for at, peer in self.joining.stuck() if at.rank not in blocked]
        spans = tuple(tuple(state.spans) for state in self.ranks)
        timeline = Timeline(self.schedule, self.costs, spans, tuple(self.messages), self.joining.ended())
        if waits:
            raise Stuck(tuple(sorted(waits, key=lambda wait: wait.at)), timeline)
        return timeline

    def advance(self, rank: int) -> None:
        state, program = self.ranks[rank], self.schedule.programs[rank]
        state.wait = None
        while state.wait is None and len(state.spans) < len(program):
            slot = program[len(state.spans)]
            kind = slot[0].kind
            step = self.compute if kind in COMPUTE else self.join if kind in COLLECTIVES else self.communicate
            state.wait = step(state, [Placed(rank, len(state.spans), position, op) for position, op in enumerate(slot)])

    def compute(self, state: _Rank, slot: list[Placed]) -> Wait | None:
        """Run a compute slot, or return what it waits for."""
        ops = tuple(placed.op for placed in slot)
        start = state.clock
        for at in slot:
            for need in self.schedule.needs(at.op):
                if need in state.done or need in ops[: at.position]:
                    continue
                side = state.posted.get(need)
                if side is None:
                    return Wait(at, need, None)
                if side.completed is None:
                    return side.wait()
                start = max(start, side.completed)
            for collective, joint in self.joining.before(at.rank, at.op):
                if joint.ended is None:
                    return Wait(at, collective.op, joint.missing)
                start = max(start, joint.ended)
        state.end_slot(ops, start, start + self.costs.slot(ops))
        state.done.update(ops)
        return None

    def communicate(self, state: _Rank, slot: list[Placed]) -> Wait | None:
        """Post the messages of a slot; in the blocking model, also wait for them."""
        if not state.waited:
            if (earlier := self.earlier(slot[0])) is not None:
                return earlier
            for at in slot:
                missing = [need for need in self.schedule.needs(at.op) if need not in state.done]
                if missing and at.op.kind in SENDS:
                    return Wait(at, missing[0], None)
            state.waited = [self.post(state, at) for at in slot]
        ends = [side.completed for side in state.waited if side.completed is not None]
        if self.blocking and len(ends) < len(slot):
            return next(side.wait() for side in state.waited if side.completed is None)
        state.waited = []
        state.end_slot(tuple(at.op for at in slot), state.clock, max(ends) if self.blocking else state.clock)
        return None

    def join(self, state: _Rank, slot: list[Placed]) -> Wait | None:
        """Post the collectives of a slot; in the blocking model, also wait for them."""
        rank = slot[0].rank
        if not state.joins:
            if (earlier := self.earlier(slot[0])) is not None:
                return earlier
            self.awake.extend(self.joining.post(rank, slot, state.clock))
            state.joins = True
        if self.blocking and (pending := self.joining.pending(rank)) is not None:
            return Wait(pending[0], pending[0].op, pending[1].missing)
        state.joins = False
        end = self.joining.free(rank) if self.blocking else state.clock
        state.end_slot(tuple(at.op for at in slot), state.clock, max(end, state.clock))
        return None

    def earlier(self, at: Placed) -> Wait | None:
        """The wait of a message or collective for an earlier collective of its rank."""
        pending = self.joining.pending(at.rank)
        return None if pending is None else Wait(at, pending[0].op, pending[1].missing)

    def post(self, state: _Rank, at: Placed) -> _Posted:
        """Post one side of a message, and complete the message if that was the second."""
        named = self.schedule.peer(at.op)
        peer = named if named is not None and named < self.schedule.ranks else None
        side = _Posted(at, peer, max(state.clock, self.joining.free(at.rank)))
        self.sides.append(side)
        state.posted.setdefault(at.op.bare, side)
        if peer is None:
            return side
        sending = at.op.kind in SENDS
        channel = self.channels[(at.rank, peer) if sending else (peer, at.rank)]
        mine, theirs = (channel.sends, channel.receives) if sending else (channel.receives, channel.sends)
        mine.append(side)
        if len(mine) <= len(theirs):
            self.complete(*((side, theirs[len(mine) - 1]) if sending else (theirs[len(mine) - 1], side)))
            self.awake.append(peer)
        return side

    def complete(self, send: _Posted, receive: _Posted) -> None:
        departs = send.time if self.eager else max(send.time, receive.time)
        completed = max(departs + self.costs.latency, receive.time)
        send.completed = receive.completed = completed
        self.messages.append(Message(send.at, receive.at, send.time, receive.time, completed))
