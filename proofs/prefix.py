"""The smallest beginning of a schedule that still shows a fault."""

from __future__ import annotations

from collections.abc import Iterable

from dualpipe.schedule import Placed, Schedule
from proofs.deadlock_search import matched_pairs
from proofs.fault import Place
from proofs.findings import Finding

Prefix = tuple[int, ...]
"""For each rank how many of its slots."""


def cut(schedule: Schedule, prefix: Prefix) -> Schedule:
    """The first slots of each rank."""
    programs = tuple(program[:count] for program, count in zip(schedule.programs, prefix, strict=True))
    return Schedule(schedule.routes, programs, schedule.name, schedule.groups)


def smallest_prefix(schedule: Schedule, finding: Finding) -> Prefix | None:
    """How many slots of each rank are enough to show the fault; ``None`` if the whole schedule is needed.

    Most faults show on one rank or two, and the others do not have to run at all.  For a deadlock the prefix is closed:
    no message in it loses its partner, so that its ranks stop for the reason in the story and for no other.
    """
    places = finding.shown_by()
    if places is None:
        return None
    prefix = up_to(schedule, places)
    return closed(schedule, prefix) if finding.check == "deadlock" else prefix


def up_to(schedule: Schedule, places: Iterable[Place | Placed]) -> Prefix:
    """Each rank up to the last of these places."""
    counts = [0] * schedule.ranks
    for place in places:
        counts[place.rank] = max(counts[place.rank], place.slot + 1)
    return tuple(counts)


def closed(schedule: Schedule, prefix: Prefix) -> Prefix:
    """The smallest prefix around this one in which every message has the partner that it has in the whole."""
    partners: dict[tuple[int, int], list[Placed]] = {}
    for send, receive in matched_pairs(schedule):
        partners.setdefault((send.rank, send.slot), []).append(receive)
        partners.setdefault((receive.rank, receive.slot), []).append(send)
    counts = list(prefix)
    new = [(rank, slot) for rank, count in enumerate(counts) for slot in range(count)]
    while new:
        for other in partners.get(new.pop(), []):
            new += ((other.rank, slot) for slot in range(counts[other.rank], other.slot + 1))
            counts[other.rank] = max(counts[other.rank], other.slot + 1)
    return tuple(counts)
