"""The smallest beginning of a schedule in which a fault still shows."""

from __future__ import annotations

from collections.abc import Iterable

from dualpipe.schedule import Placed, Schedule
from proofs.findings import (
    Circle,
    Finding,
    LeftOver,
    Mismatch,
    NeverMet,
    NoPeer,
    NotNeighbour,
    OutOfOrder,
    OverBound,
    Repeated,
    SentTwice,
    Stray,
    TooEarly,
)
from proofs.matching import pairs

Prefix = tuple[int, ...]
"""For each rank how many of its slots."""


def cut(schedule: Schedule, prefix: Prefix) -> Schedule:
    """The first slots of each rank."""
    programs = tuple(program[:count] for program, count in zip(schedule.programs, prefix, strict=True))
    return Schedule(schedule.routes, programs, schedule.name)


def smallest_prefix(schedule: Schedule, finding: Finding) -> Prefix | None:
    """How many slots of each rank show the fault; ``None`` where it is that something is missing.

    Most faults show on one rank or two, and the others need not run at all.  For a deadlock the prefix is closed:
    no message in it loses its partner, so that what is left stops for the reason told and for no other.
    """
    match finding:
        case Circle(_, waits):
            places = [place for wait in waits for place in (wait.place, wait.partner)]
            return closed(schedule, up_to(schedule, places))
        case NeverMet(_, place):
            return closed(schedule, up_to(schedule, [place]))
        case Mismatch(one, other, _) | SentTwice(one, other) | Repeated(one, other) | OutOfOrder(one, other):
            return up_to(schedule, [one, other])
        case Stray(place) | TooEarly(place) | NoPeer(place) | NotNeighbour(place):
            return up_to(schedule, [place])
        case OverBound(rank, slot):
            return tuple(slot + 1 if other == rank else 0 for other in range(schedule.ranks))
        case LeftOver():
            return None
        case _:
            return None


def up_to(schedule: Schedule, places: Iterable[Placed]) -> Prefix:
    """Each rank up to the last of these places."""
    counts = [0] * schedule.ranks
    for place in places:
        counts[place.rank] = max(counts[place.rank], place.slot + 1)
    return tuple(counts)


def closed(schedule: Schedule, prefix: Prefix) -> Prefix:
    """The smallest prefix around this one in which every message has the partner that it has in the whole."""
    partner: dict[tuple[int, int], list[Placed]] = {}
    for send, receive in pairs(schedule):
        partner.setdefault((send.rank, send.slot), []).append(receive)
        partner.setdefault((receive.rank, receive.slot), []).append(send)
    counts = list(prefix)
    fresh = [(rank, slot) for rank, count in enumerate(counts) for slot in range(count)]
    while fresh:
        for other in partner.get(fresh.pop(), []):
            fresh += ((other.rank, slot) for slot in range(counts[other.rank], other.slot + 1))
            counts[other.rank] = max(counts[other.rank], other.slot + 1)
    return tuple(counts)
