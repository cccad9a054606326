"""Deadlock for Z3: times at which ranks reach their slots, with each time after those that it waits for.

Matching is static, the k-th send of an ordered pair with its k-th receive.  So a run that completes is a set of times
in which each step is after what it waits for.  Such times exist exactly if no wait leads back to itself, whatever the
durations.  ``proofs.models`` defines what waits for what.  There is one variable for the time at which each message
slot is posted and, if computes overlap with messages, one for the end of each compute and of each message slot.  With
a communicator for each ordered pair of ranks each message has its own two times::

    blocking, eager     posted(slot) -> posted(next slot)       posted(partner) -> posted(next slot)
    all                 posted(the k-th collective of another member) -> the end of a member's k-th collective
    stream              done(compute) -> posted(slot) -> completed(slot) -> posted(next slot)
                        completed(slot) -> done(compute that needs it)     posted(partner) -> completed(slot)
    edge                done(compute) -> started(message) -> completed(message) -> started(next message of its pair)
                        completed(message) -> done(compute that needs it)  started(partner) -> completed(message)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

from dualpipe.schedule import COLLECTIVES, COMPUTE, MESSAGES, SENDS, Op, Placed, Schedule, Slot
from proofs.difference import Link, Problem
from proofs.models import Model

AFTER = Link("rank {0} reaches slot {2} after slot {1}")
WHERE = "{0.op} in slot {0.slot} of rank {0.rank}"
HOLDS_UP = "{0.op} in slot {0.slot} of rank {0.rank} ends after rank {1.rank} reaches {1.op} in slot {1.slot}"


@dataclass
class Times:
    """The variables: when messages are posted and completed, and when each rank reaches its end.

    A message is given by rank, slot and position; in a model in which all messages of a slot are posted and end
    together, the position is 0.
    """

    model: Model
    posted: dict[tuple[int, int, int], int] = field(default_factory=dict)
    completed: dict[tuple[int, int, int], int] = field(default_factory=dict)
    end: list[int] = field(default_factory=list)

    def at(self, placed: Placed) -> tuple[int, int, int]:
        """The key of a message or a collective."""
        by_itself = self.model.edges and placed.op.kind in MESSAGES
        return placed.rank, placed.slot, placed.position if by_itself else 0


def deadlock(schedule: Schedule, model: Model) -> Problem:
    """Times exist for all steps: every rank reaches its end and every message is received."""
    problem = Problem(f"deadlock, {model}")
    times = Times(model)
    for rank in range(schedule.ranks):
        if model.edges:
            _pair_by_pair(problem, times, schedule, rank)
        else:
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
    rows: dict[tuple[int | None, int], list[Placed]] = defaultdict(list)
    for placed in schedule:
        if placed.op.kind in COLLECTIVES:
            rows[placed.op.peer, placed.rank].append(placed)
    for number, ranks in enumerate(schedule.groups):
        yield [rows[number, rank] for rank in ranks]


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
    reached = times.posted[times.at(partner)]
    problem.later(reached, times.completed[times.at(placed)], HOLDS_UP, placed, partner)


def _never_ends(problem: Problem, times: Times, never: int, placed: Placed) -> None:
    end = times.end[placed.rank]
    problem.later(never, end, WHERE + " has no partner, so the rank never ends", placed, gap=0)
    problem.later(end, never, "rank {0.rank} reaches its end", placed)


def _one_by_one(problem: Problem, times: Times, schedule: Schedule, rank: int) -> None:
    """The times of a rank that waits for each message slot: it has completed when the rank reaches the next one."""
    previous = None
    for number, slot in enumerate(schedule.programs[rank]):
        if slot[0].kind in COMPUTE:
            continue
        time = times.posted[rank, number, 0] = problem.variable(f"r{rank}s{number} posted")
        if previous is not None:
            times.completed[rank, previous, 0] = time
            _after(problem, times.posted[rank, previous, 0], time, rank, previous, number)
        previous = number
    end = problem.variable(f"r{rank} end")
    times.end.append(end)
    if previous is not None:
        times.completed[rank, previous, 0] = end
        text = "rank {0} reaches its end after slot {1}"
        problem.later(times.posted[rank, previous, 0], end, text, rank, previous)


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
                problem.later(times.completed[rank, bringer, 0], start, text, rank, number, bringer)
            compute = number, start
            continue
        if message is not None:
            _after(problem, message[1], start, rank, message[0], number)
        completed = problem.variable(f"r{rank}s{number} completed")
        problem.later(start, completed, "slot {1} of rank {0} ends after it is posted", rank, number)
        times.posted[rank, number, 0], times.completed[rank, number, 0] = start, completed
        message = number, completed
        for op in slot:
            brings.setdefault(op.bare, number)
    end = problem.variable(f"r{rank} end")
    times.end.append(end)
    for last in (compute, message):
        if last is not None:
            problem.later(last[1], end, "rank {0} reaches its end after slot {1}", rank, last[0])


def _pair_by_pair(problem: Problem, times: Times, schedule: Schedule, rank: int) -> None:
    """The times of a rank that computes while the messages of each pair, one after the other, wait for their partners.

    A collective is reached when every message before it has completed, and what is behind it only when it has.
    """
    last: dict[object, tuple[Placed, int]] = {}  # by what it is: "compute", "collective", or the pair of a message
    brings: dict[Op, tuple[Placed, int]] = {}
    text = "{1.op} in slot {1.slot} of rank {1.rank} starts after {0.op} in slot {0.slot} ends"
    for number, slot in enumerate(schedule.programs[rank]):
        for position, op in enumerate(slot):
            placed = Placed(rank, number, position, op)
            if op.kind in COLLECTIVES and position:
                continue  # the collectives of a slot are reached together
            start = problem.variable(f"{op} r{rank}s{number}.{position}")
            pair = schedule.peer(op), op.kind in SENDS
            if op.kind in COMPUTE:
                before = [last.get("compute"), *(brings.get(need) for need in schedule.needs(op))]
            elif op.kind in MESSAGES:
                before = [last.get("compute"), last.get("collective"), last.get(pair)]
            else:
                before = list(last.values())
            for earlier in filter(None, before):
                problem.later(earlier[1], start, text, earlier[0], placed)
            if op.kind in COMPUTE:
                last["compute"] = placed, start
                continue
            end = problem.variable(f"{op} r{rank}s{number}.{position} completed")
            problem.later(start, end, WHERE + " ends after it starts", placed)
            times.posted[times.at(placed)], times.completed[times.at(placed)] = start, end
            last["collective" if op.kind in COLLECTIVES else pair] = placed, end
            brings.setdefault(op.bare, (placed, end))
    end = problem.variable(f"r{rank} end")
    times.end.append(end)
    for placed, time in last.values():
        problem.later(time, end, "rank {0.rank} reaches its end after {0.op} in slot {0.slot}", placed)


def _bringers(schedule: Schedule, slot: Slot, brings: dict[Op, int]) -> set[int]:
    return {brings[need] for op in slot for need in schedule.needs(op) if need in brings}


def _after(problem: Problem, before: int, after: int, rank: int, previous: int, number: int) -> None:
    problem.later(before, after, AFTER, rank, previous, number)
