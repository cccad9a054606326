"""Deadlock for Z3: times at which ranks reach their slots, with each time after those that it waits for.

Matching is static, the k-th send of an ordered pair with its k-th receive.  So a run that completes is a set of times
in which each step is after what it waits for.  Such times exist exactly if no wait leads back to itself, whatever the
durations.  ``proofs.models`` defines what waits for what.  There is one variable for the time at which each message
slot is posted (and, where computes overlap with messages, for the end of each compute and of each message slot)::

    blocking, eager     posted(slot) -> posted(next slot)       posted(partner) -> posted(next slot)
    all                 posted(the k-th collective of another member) -> the end of a member's k-th collective
    stream              done(compute) -> posted(slot) -> completed(slot) -> posted(next slot)
                        completed(slot) -> done(compute that needs it)     posted(partner) -> completed(slot)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

from dualpipe.schedule import COLLECTIVES, COMPUTE, MESSAGES, SENDS, Op, Placed, Schedule, Slot
from proofs.difference import Link, Problem
from proofs.models import Model

AFTER = Link("rank {0} reaches slot {2} after slot {1}")
HOLDS_UP = "{0.op} in slot {0.slot} of rank {0.rank} ends after rank {1.rank} reaches {1.op} in slot {1.slot}"


@dataclass
class Times:
    """The variables: when each message slot is posted and completed, and when each rank reaches its end."""

    posted: dict[tuple[int, int], int] = field(default_factory=dict)
    completed: dict[tuple[int, int], int] = field(default_factory=dict)
    end: list[int] = field(default_factory=list)


def deadlock(schedule: Schedule, model: Model) -> Problem:
    """Times exist for all steps: every rank reaches its end and every message is received."""
    problem = Problem(f"deadlock, {model}")
    times = Times()
    for rank in range(schedule.ranks):
        (_overlapping if model.overlaps else _one_by_one)(problem, times, schedule, rank)
    never = problem.variable("never")
    sends, receives = _channels(schedule)
    for pair in sorted(sends.keys() | receives.keys()):
        _match(problem, times, model, sends[pair], receives[pair])
        for unmatched in sends[pair][len(receives[pair]) :] + receives[pair][len(sends[pair]) :]:
            _never_ends(problem, times, never, unmatched)
    for members in _members(schedule):
        _gather(problem, times, never, members)
    return problem


def _members(schedule: Schedule) -> Iterator[list[list[Placed]]]:
    """For each group the collectives of each of its members."""
    for number, ranks in enumerate(schedule.groups):
        yield [[placed for placed in schedule if placed.rank == rank and _is_of(placed.op, number)] for rank in ranks]


def _is_of(op: Op, group: int) -> bool:
    return op.kind in COLLECTIVES and op.peer == group


def _gather(problem: Problem, times: Times, never: int, members: list[list[Placed]]) -> None:
    """A member's k-th collective ends after every member has reached its k-th one, and never without one of them."""
    for row in members:
        for nth, placed in enumerate(row):
            for other in members:
                if nth >= len(other):
                    _never_ends(problem, times, never, placed)
                    break
                if other is not row:
                    _holds_up(problem, times, other[nth], placed)


def _channels(schedule: Schedule) -> tuple[dict[str, list[Placed]], dict[str, list[Placed]]]:
    """The sends and the receives of each ordered pair.  A message that joins no two ranks has a pair to itself."""
    sends: dict[str, list[Placed]] = defaultdict(list)
    receives: dict[str, list[Placed]] = defaultdict(list)
    for placed in schedule:
        op, rank = placed.op, placed.rank
        if op.kind not in MESSAGES:
            continue
        peer = schedule.peer(op)
        lost = peer is None or peer == rank or peer < 0 or peer >= schedule.ranks
        side = sends if op.kind in SENDS else receives
        ends = f"{rank}-{peer}" if op.kind in SENDS else f"{peer}-{rank}"
        side[f"lost {rank} {placed.slot} {placed.position}" if lost else ends].append(placed)
    return sends, receives


def _match(problem: Problem, times: Times, model: Model, sends: list[Placed], receives: list[Placed]) -> None:
    for nth, (send, receive) in enumerate(zip(sends, receives, strict=False)):
        _holds_up(problem, times, send, receive)
        if nth >= model.capacity:
            _holds_up(problem, times, receives[nth - model.capacity], send)
    for nth in range(len(receives), min(len(sends), len(receives) + model.capacity)):
        if nth >= model.capacity:  # a send without a receive still needs room in the buffer
            _holds_up(problem, times, receives[nth - model.capacity], sends[nth])


def _holds_up(problem: Problem, times: Times, partner: Placed, placed: Placed) -> None:
    reached = times.posted[partner.rank, partner.slot]
    problem.later(reached, times.completed[placed.rank, placed.slot], HOLDS_UP, placed, partner)


def _never_ends(problem: Problem, times: Times, never: int, placed: Placed) -> None:
    end = times.end[placed.rank]
    where = "{0.op} in slot {0.slot} of rank {0.rank}"
    problem.later(never, end, where + " has no partner, so the rank never ends", placed, gap=0)
    problem.later(end, never, "rank {0.rank} reaches its end", placed)


def _one_by_one(problem: Problem, times: Times, schedule: Schedule, rank: int) -> None:
    """The times of a rank that waits for each message slot: it has completed when the rank reaches the next one."""
    previous = None
    for number, slot in enumerate(schedule.programs[rank]):
        if slot[0].kind in COMPUTE:
            continue
        time = times.posted[rank, number] = problem.variable(f"r{rank}s{number} posted")
        if previous is not None:
            times.completed[rank, previous] = time
            _after(problem, times.posted[rank, previous], time, rank, previous, number)
        previous = number
    end = problem.variable(f"r{rank} end")
    times.end.append(end)
    if previous is not None:
        times.completed[rank, previous] = end
        text = "rank {0} reaches its end after slot {1}"
        problem.later(times.posted[rank, previous], end, text, rank, previous)


def _overlapping(problem: Problem, times: Times, schedule: Schedule, rank: int) -> None:
    """The times of a rank that computes while its message slots, one after the other, wait for their partners."""
    compute: tuple[int, int] | None = None
    message: tuple[int, int] | None = None
    brings: dict[Op, int] = {}
    for number, slot in enumerate(schedule.programs[rank]):
        computes = slot[0].kind in COMPUTE
        start = problem.variable(f"r{rank}s{number} {'computed' if computes else 'posted'}")
        if compute is not None:
            _after(problem, compute[1], start, rank, compute[0], number)
        if computes:
            for bringer in sorted(_bringers(schedule, slot, brings)):
                text = "slot {1} of rank {0} computes with what slot {2} brings"
                problem.later(times.completed[rank, bringer], start, text, rank, number, bringer)
            compute = number, start
            continue
        if message is not None:
            _after(problem, message[1], start, rank, message[0], number)
        completed = problem.variable(f"r{rank}s{number} completed")
        problem.later(start, completed, "slot {1} of rank {0} ends after it is posted", rank, number)
        times.posted[rank, number], times.completed[rank, number] = start, completed
        message = number, completed
        for op in slot:
            brings.setdefault(op.bare, number)
    end = problem.variable(f"r{rank} end")
    times.end.append(end)
    for last in (compute, message):
        if last is not None:
            problem.later(last[1], end, "rank {0} reaches its end after slot {1}", rank, last[0])


def _bringers(schedule: Schedule, slot: Slot, brings: dict[Op, int]) -> set[int]:
    return {brings[need] for op in slot for need in schedule.needs(op) if need in brings}


def _after(problem: Problem, before: int, after: int, rank: int, previous: int, number: int) -> None:
    problem.later(before, after, AFTER, rank, previous, number)
