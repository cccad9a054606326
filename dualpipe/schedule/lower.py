"""Adds messages to an order of computes that has none: 1F1B from a paper, a table from another framework.

A greedy lowering, which sends each result at once and receives what the next compute needs, deadlocks on real tables.
Here computes and messages are put in *one* total order, by the earliest time at which each can happen.  A message
happens when its producer ends, before any compute that starts then.  The program of a rank is its part of that order::

    order    0F0>   0SF0> 1RF0>   0F1>   1F0>   0SF1> 1RF1>   1F1>
    rank 0   0F0>   0SF0>         0F1>          0SF1>
    rank 1                1RF0>          1F0>         1RF1>   1F1>

A message is one event, at one place of the order for both sides.  So the k-th send matches the k-th receive, and the
first event that has not happened never waits for a later one: there is no deadlock, even where every message slot
blocks.  Joining neighbouring message slots only posts messages earlier; both properties remain.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from dualpipe.schedule import COMPUTE, RECEIVES, Op, Placed, Schedule, ScheduleError, Slot

_MOST_SHOWN = 8
"""The most ranks that an error lists."""


class Blocked(NamedTuple):
    """A compute that can never run, and the compute that it needs."""

    at: Placed
    need: Op


class OrderError(ScheduleError):
    """An order of computes that messages cannot be added to.  ``at`` is the first op at fault.

    Where computes wait for each other, or for one that no rank runs, ``blocked`` has the op at which each rank stops.
    """

    def __init__(self, rule: str, got: str, fix: str, at: Placed, blocked: tuple[Blocked, ...] = ()) -> None:
        self.at, self.blocked = at, blocked
        super().__init__(rule, got, fix)


def lower(schedule: Schedule) -> Schedule:
    """The schedule with the messages that its computes need; slots of several computes are kept.

    Parameters
    ----------
    schedule:
        Computes only, each once and on the rank that holds its stage.  It may be incomplete: a message is added
        for each compute that needs one.

    Raises
    ------
    OrderError
        If the order already has messages, runs a compute twice or on a rank that does not hold its stage, or cannot
        be run because computes wait for each other, or for one that no rank runs.
    """
    homes = _homes(schedule)
    starts = _earliest_starts(schedule, homes)
    programs: list[list[Slot]] = [[] for _ in schedule.programs]
    for event in sorted(_events(schedule, homes, starts), key=lambda event: event.key):
        for rank, slot in event.parts:
            _append(programs[rank], slot)
    return replace(schedule, programs=tuple(map(tuple, programs)))


class _Event(NamedTuple):
    """A compute slot of one rank, or a message: what its sender and its receiver do.

    ``key`` is unique and orders the events: time, messages before computes, rank, position in the producer's slot.
    """

    key: tuple[int, bool, int, int]
    parts: tuple[tuple[int, Slot], ...]


def _events(schedule: Schedule, homes: dict[Op, Placed], starts: list[list[int]]) -> Iterator[_Event]:
    for rank, program in enumerate(schedule.programs):
        for start, slot in zip(starts[rank], program, strict=True):
            yield _Event((start, True, rank, 0), ((rank, slot),))
            for op in slot:
                for receive in schedule.needs(op):
                    if receive.kind not in RECEIVES:
                        continue
                    send, producer = _origin(schedule, receive)
                    made = homes[producer]
                    end = starts[made.rank][made.slot] + len(schedule.programs[made.rank][made.slot])
                    yield _Event((end, False, made.rank, made.position), ((made.rank, (send,)), (rank, (receive,))))


def _append(program: list[Slot], slot: Slot) -> None:
    """Add a slot, joining a message slot to the one before it."""
    if program and slot[0].kind not in COMPUTE and program[-1][0].kind not in COMPUTE:
        program[-1] += slot
    else:
        program.append(slot)


def _origin(schedule: Schedule, receive: Op) -> tuple[Op, Op]:
    """The send that a receive needs, and the compute that the send needs."""
    (send,) = schedule.needs(receive)
    (producer,) = schedule.needs(send)
    return send, producer


def _computes_before(schedule: Schedule, op: Op) -> Iterator[Op]:
    """The computes that must have completed before a compute, those across a message included."""
    for need in schedule.needs(op):
        yield _origin(schedule, need)[1] if need.kind in RECEIVES else need


def _homes(schedule: Schedule) -> dict[Op, Placed]:
    """The place of each compute.  Raises ``OrderError`` for a message, a repeated compute, or one on the wrong rank."""
    homes: dict[Op, Placed] = {}
    for placed in schedule:
        rank, slot, _, op = placed
        if op.kind not in COMPUTE:
            raise OrderError(
                "messages are added to an order that has none",
                f"slot {slot} of rank {rank} has {op}",
                "remove the messages, or use the schedule as it is",
                placed,
            )
        if rank != schedule.rank_of(op):
            raise OrderError(
                "a compute runs on the rank that holds its stage",
                f"rank {rank} runs {op}, and stage {op.stage} of lane {op.lane} is on rank {schedule.rank_of(op)}",
                "move the op or correct the lane",
                placed,
            )
        if op in homes:
            raise OrderError("a compute runs once", f"rank {rank} runs {op} twice", "remove one", placed)
        homes[op] = placed
    return homes


def _earliest_starts(schedule: Schedule, homes: dict[Op, Placed]) -> list[list[int]]:
    """For each rank the earliest starts of its slots, where a compute takes 1 and a slot the sum of its computes."""
    starts: list[list[int]] = [[] for _ in schedule.programs]
    clocks = [0] * schedule.ranks
    completed: dict[Op, int] = {}
    sleeping: dict[Op, list[int]] = {}
    blocked: dict[int, Blocked] = {}
    ready = deque(range(schedule.ranks))
    while ready:
        rank = ready.popleft()
        blocked.pop(rank, None)
        program = schedule.programs[rank]
        for number in range(len(starts[rank]), len(program)):
            slot = program[number]
            needs = list(_needs_of_slot(schedule, slot))
            missing = next(((position, need) for position, need in needs if need not in completed), None)
            if missing is not None:
                position, need = missing
                blocked[rank] = Blocked(Placed(rank, number, position, slot[position]), need)
                sleeping.setdefault(need, []).append(rank)
                break
            start = max([clocks[rank], *(completed[need] for _, need in needs)])
            starts[rank].append(start)
            clocks[rank] = start + len(slot)
            for op in slot:
                completed[op] = clocks[rank]
                ready.extend(sleeping.pop(op, ()))
    if blocked:
        raise _impossible(tuple(blocked[rank] for rank in sorted(blocked)), homes)
    return starts


def _needs_of_slot(schedule: Schedule, slot: Slot) -> Iterator[tuple[int, Op]]:
    """The computes outside a slot that it waits for, each with the position of the op that needs it."""
    for position, op in enumerate(slot):
        for need in _computes_before(schedule, op):
            if need not in slot[:position]:
                yield position, need


def _impossible(blocked: tuple[Blocked, ...], homes: dict[Op, Placed]) -> OrderError:
    stops = [_stop(at, homes.get(need), need) for at, need in blocked[:_MOST_SHOWN]]
    if len(blocked) > _MOST_SHOWN:
        stops.append(f"and so do {len(blocked) - _MOST_SHOWN} more ranks")
    return OrderError(
        "every compute runs after what it needs, on this rank or another",
        ", ".join(stops),
        "run what is needed earlier",
        blocked[0].at,
        blocked,
    )


def _stop(at: Placed, home: Placed | None, need: Op) -> str:
    if home is None:
        where = "which no rank runs"
    elif home.rank == at.rank:
        where = f"which it runs later, in slot {home.slot}"
    else:
        where = f"which is in slot {home.slot} of rank {home.rank}"
    return f"rank {at.rank} stops in slot {at.slot}: {at.op} needs {need}, {where}"
