"""Deadlock for Z3: times at which ranks reach their slots, and how each is held up by the others.

Matching is static, the k-th send of an ordered pair with its k-th receive, so a run that completes is a set of times
with each step after what it waits for.  Times exist exactly where no wait leads back to itself, whatever the
durations.  ``proofs.models`` says what waits for what; there is one integer for each message slot being posted
(and, where computes go on meanwhile, for each compute's end and each message slot's end)::

    blocking, eager     posted(slot) -> posted(next slot)       posted(partner) -> posted(next slot)
    stream              over(compute) -> posted(slot) -> over(slot) -> posted(next slot)
                        over(slot) -> over(compute that needs it)        posted(partner) -> over(slot)
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from dualpipe.schedule import COMPUTE, SENDS, Op, Placed, Schedule, Slot
from proofs.difference import Link, Problem
from proofs.models import Model

AFTER = Link("rank {0} reaches slot {2} after slot {1}")
HOLDS_UP = "{0.op} in slot {0.slot} of rank {0.rank} ends after rank {1.rank} reaches {1.op} in slot {1.slot}"


@dataclass
class Times:
    """The variables: when each message slot is posted and when it is over, and the end of each rank's last slot."""

    posted: dict[tuple[int, int], int] = field(default_factory=dict)
    over: dict[tuple[int, int], int] = field(default_factory=dict)
    end: list[int] = field(default_factory=list)


def deadlock(schedule: Schedule, model: Model) -> Problem:
    """All times exist: every rank reaches its end and every message is received."""
    problem = Problem(f"deadlock, {model}")
    times = Times()
    for rank in range(schedule.ranks):
        (_overlapping if model.overlaps else _one_by_one)(problem, times, schedule, rank)
    never = problem.variable("never")
    sends, receives = _channels(schedule)
    for pair in sorted(sends.keys() | receives.keys()):
        _meet(problem, times, model, sends[pair], receives[pair])
        for alone in sends[pair][len(receives[pair]) :] + receives[pair][len(sends[pair]) :]:
            _ends_never(problem, times, never, alone)
    return problem


def _channels(schedule: Schedule) -> tuple[dict[str, list[Placed]], dict[str, list[Placed]]]:
    """The sends and the receives of each ordered pair.  A message that joins no two ranks is a pair of its own."""
    sends: dict[str, list[Placed]] = defaultdict(list)
    receives: dict[str, list[Placed]] = defaultdict(list)
    for placed in schedule:
        op, rank = placed.op, placed.rank
        if op.kind in COMPUTE:
            continue
        peer = schedule.peer(op)
        lost = peer is None or peer == rank or peer < 0 or peer >= schedule.ranks
        side = sends if op.kind in SENDS else receives
        ends = f"{rank}-{peer}" if op.kind in SENDS else f"{peer}-{rank}"
        side[f"lost {rank} {placed.slot} {placed.position}" if lost else ends].append(placed)
    return sends, receives


def _meet(problem: Problem, times: Times, model: Model, sends: list[Placed], receives: list[Placed]) -> None:
    for nth, (send, receive) in enumerate(zip(sends, receives, strict=False)):
        _holds_up(problem, times, send, receive)
        if nth >= model.capacity:
            _holds_up(problem, times, receives[nth - model.capacity], send)
    for nth in range(len(receives), min(len(sends), len(receives) + model.capacity)):
        if nth >= model.capacity:  # a send without a receive still needs a place in the buffer
            _holds_up(problem, times, receives[nth - model.capacity], sends[nth])


def _holds_up(problem: Problem, times: Times, partner: Placed, placed: Placed) -> None:
    reached = times.posted[partner.rank, partner.slot]
    problem.later(reached, times.over[placed.rank, placed.slot], HOLDS_UP, placed, partner)


def _ends_never(problem: Problem, times: Times, never: int, placed: Placed) -> None:
    end = times.end[placed.rank]
    where = "{0.op} in slot {0.slot} of rank {0.rank}"
    problem.later(never, end, where + " has no partner, so the rank never ends", placed, gap=0)
    problem.later(end, never, "rank {0.rank} reaches its end", placed)


def _one_by_one(problem: Problem, times: Times, schedule: Schedule, rank: int) -> None:
    """A rank that waits for each message slot: it is over when the next one is reached."""
    previous = None
    for number, slot in enumerate(schedule.programs[rank]):
        if slot[0].kind in COMPUTE:
            continue
        time = times.posted[rank, number] = problem.variable(f"r{rank}s{number} posted")
        if previous is not None:
            times.over[rank, previous] = time
            _after(problem, times.posted[rank, previous], time, rank, previous, number)
        previous = number
    end = problem.variable(f"r{rank} end")
    times.end.append(end)
    if previous is not None:
        times.over[rank, previous] = end
        text = "rank {0} reaches its end after slot {1}"
        problem.later(times.posted[rank, previous], end, text, rank, previous)


def _overlapping(problem: Problem, times: Times, schedule: Schedule, rank: int) -> None:
    """A rank whose computes go on while message slots, one after the other, wait for their partners."""
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
                problem.later(times.over[rank, bringer], start, text, rank, number, bringer)
            compute = number, start
            continue
        if message is not None:
            _after(problem, message[1], start, rank, message[0], number)
        over = problem.variable(f"r{rank}s{number} over")
        problem.later(start, over, "slot {1} of rank {0} ends after it is posted", rank, number)
        times.posted[rank, number], times.over[rank, number] = start, over
        message = number, over
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
