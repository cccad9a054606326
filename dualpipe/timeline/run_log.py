"""A run of a schedule, simulated or measured: its work, its waits and its messages, op by op.

::

    rank 0   work 0F0> 0..1   work 0F1> 1..2                     message 0SF0> posted 1, completed 1
    rank 1   idle 0..1 for 1RF0>   work 1F0> 1..2                        1RF0> posted 0, completed 1
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from dualpipe.schedule import COMPUTE, RECEIVES, Op, Placed, Schedule
from dualpipe.timeline.chart import divide
from dualpipe.timeline.joining import awaited
from dualpipe.timeline.timeline import Collective, Message, Span, Timeline


class Work(NamedTuple):
    """A compute op from start to end.  ``note`` explains times that mislead."""

    at: Placed
    start: float
    end: float
    note: str = ""


class Idle(NamedTuple):
    """An interval in which a rank does not compute, and the receive or collective for which it waits, if any."""

    rank: int
    start: float
    end: float
    need: Op | None


@dataclass(frozen=True)
class RunLog:
    """A run of a schedule.  Times are in any one unit; every op of the schedule occurs once.

    Attributes
    ----------
    work:
        The compute ops, rank by rank, in order.
    idle:
        When ranks waited.
    messages:
        Each with its send and its receive, when they were posted, and when the message completed.
    collectives:
        Each once for every member; none of a run that leaves them out.
    """

    name: str
    schedule: Schedule
    work: tuple[Work, ...]
    idle: tuple[Idle, ...]
    messages: tuple[Message, ...]
    collectives: tuple[Collective, ...] = ()


def simulated(timeline: Timeline, name: str = "simulated") -> RunLog:
    """The run log of a timeline.  The time of a slot with several computes is divided among them by cost."""
    work: list[Work] = []
    idle: list[Idle] = []
    completed = {message.receive.op.bare: message.completed for message in timeline.messages}
    for rank, spans in enumerate(timeline.spans):
        ended = {(each.at.op.bare, each.ended) for each in timeline.collectives if each.at.rank == rank}
        computes = [span for span in spans if span.ops[0].kind in COMPUTE]
        for span in computes:
            work += [Work(*cell) for cell in divide(rank, span, timeline.costs)]
        start, end = Span(-1, (), 0.0, 0.0), Span(-1, (), timeline.makespan, timeline.makespan)
        for before, after in pairwise([start, *computes, end]):
            if after.start > before.end:
                idle.append(Idle(rank, before.end, after.start, _last_need(timeline.schedule, after, completed, ended)))
    return RunLog(name, timeline.schedule, tuple(work), tuple(idle), timeline.messages, timeline.collectives)


def _last_need(
    schedule: Schedule, span: Span, completed: dict[Op, float], ended: Collection[tuple[Op, float]]
) -> Op | None:
    """The receive that completed, or the collective that ended, when the slot began."""
    needs: Iterator[Op] = (need for op in span.ops for need in schedule.needs(op) if need.kind in RECEIVES)
    found = next((need for need in needs if completed.get(need) == span.start), None)
    return found or next((need for op in span.ops for need in awaited(op) if (need, span.start) in ended), None)
