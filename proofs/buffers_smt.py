"""The check ``buffers`` for Z3: times of the events of each rank, and which must be before which.

Each event is later than the one written before it.  For every post of a message, what touches its memory later must be
later than the wait that belongs to that post.  For every ``keep`` the writes after it must be later than its ``drop``,
if the memory is used again at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

from dualpipe.schedule import RECEIVES, Placed, Schedule
from dualpipe.schedule.observed import Event, What
from proofs.difference import Link, Problem

AFTER = Link("rank {0} has event {1} and event {2} behind it")


def buffers(schedule: Schedule) -> Problem:
    problem = Problem("buffers")
    for rank, events in enumerate(schedule.observed.events):
        times = [problem.variable(f"r{rank}e{number}") for number in range(len(events))]
        for number, (one, other) in enumerate(pairwise(times)):
            problem.later(one, other, AFTER, rank, number, number + 1)
        never = problem.variable(f"r{rank} never")
        if times:
            problem.later(times[-1], never, "rank {0} has no such event", rank)
        for ends, touches in (*_flights(events), *_uses(events)):
            until = never if ends is None else times[ends]
            for touch in touches:
                event = events[touch]
                text = "rank {0}: {1} of the memory of {2.op} in slot {2.slot}, event {3}, is allowed after {4}"
                end = "its wait, which is missing" if ends is None else f"event {ends}"
                problem.later(until, times[touch], text, rank, event.what, event.message, touch, end)
    return problem


def _by_message(events: Sequence[Event]) -> Iterator[list[int]]:
    """For every message the numbers of its events."""
    rows: dict[Placed, list[int]] = {}
    for number, event in enumerate(events):
        rows.setdefault(event.message, []).append(number)
    yield from rows.values()


def _flights(events: Sequence[Event]) -> Iterator[tuple[int | None, list[int]]]:
    """For every post its wait, or ``None``, and the later events that must not be before the wait."""
    for own in _by_message(events):
        posts, waits = ([n for n in own if events[n].what is what] for what in (What.POST, What.WAIT))
        harmful = {What.WRITE, What.FREE, *([What.READ] if events[own[0]].message.op.kind in RECEIVES else [])}
        for post in posts:
            wait = next((n for n in waits if n > post), None)  # the earliest that no earlier post has taken
            waits = [n for n in waits if n != wait]
            yield wait, [n for n in own if n > post and events[n].what in harmful]


def _uses(events: Sequence[Event]) -> Iterator[tuple[int, list[int]]]:
    """For every ``keep`` with a ``drop`` that one, and the writes after the ``keep``."""
    for own in _by_message(events):
        writes = [n for n in own if events[n].what is What.WRITE]
        drops = [n for n in own if events[n].what is What.DROP]
        for keep in (n for n in own if events[n].what is What.KEEP):
            drop = next((n for n in drops if n > keep and events[n].by == events[keep].by), None)
            if drop is not None:
                yield drop, [n for n in writes if n > keep]
