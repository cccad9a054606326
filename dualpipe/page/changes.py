"""What changed between two schedules, slot by slot."""

from __future__ import annotations

from difflib import SequenceMatcher
from typing import NamedTuple

from dualpipe.schedule import Lane, Program, Schedule, Slot


class Change(NamedTuple):
    """Slots of one rank that were replaced: ``removed``, from slot ``before`` on, by ``added``, from slot ``after`` on.

    One of the two may be empty.
    """

    rank: int
    before: int
    removed: tuple[Slot, ...]
    after: int
    added: tuple[Slot, ...]


def changes(before: Schedule, after: Schedule) -> tuple[Change, ...]:
    """The changes of every rank, in order; a rank that only one of the two has is all removed or all added."""
    found = []
    for rank in range(max(before.ranks, after.ranks)):
        old, new = _program(before, rank), _program(after, rank)
        for tag, start, end, other_start, other_end in SequenceMatcher(None, old, new, autojunk=False).get_opcodes():
            if tag != "equal":
                found.append(Change(rank, start, old[start:end], other_start, new[other_start:other_end]))
    return tuple(found)


def changed_lanes(before: Schedule, after: Schedule) -> tuple[tuple[str, str], ...]:
    """The lines of lanes that differ, before and after; an empty text where there is no such lane."""
    pairs = ((_lane(before, lane), _lane(after, lane)) for lane in Lane)
    return tuple((old, new) for old, new in pairs if old != new)


def _program(schedule: Schedule, rank: int) -> Program:
    return schedule.programs[rank] if rank < schedule.ranks else ()


def _lane(schedule: Schedule, lane: Lane) -> str:
    route = schedule.routes.get(lane)
    return "" if route is None else f"lane {lane} {' '.join(map(str, route))}"
