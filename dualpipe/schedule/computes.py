"""A schedule of one lane from programs of computes, as the adapters for other generators make it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from dualpipe.schedule.lower import lower
from dualpipe.schedule.op import COMPUTE, UP, ScheduleError, Slot
from dualpipe.schedule.value import Schedule


def one_lane(programs: Sequence[Iterable[Slot]], name: str = "", stage: str = "stage") -> Schedule:
    """The schedule of these programs, with one lane; ``lower`` adds messages if the programs have none.

    The rank that runs the computes of a stage holds the stage.  ``stage`` is the word for a stage in errors.

    Raises
    ------
    ScheduleError
        If no rank or two ranks run a stage, and if the order of computes cannot be run (raised by ``lower``).
    """
    programs = [tuple(program) for program in programs]
    schedule = Schedule({UP: _route(programs, stage)}, programs, name)
    has_messages = any(slot[0].kind not in COMPUTE for program in programs for slot in program)
    return schedule if has_messages else lower(schedule)


def _route(programs: Sequence[Iterable[Slot]], stage: str) -> tuple[int, ...]:
    """The rank that runs each stage."""
    holders: dict[int, int] = {}
    for rank, program in enumerate(programs):
        for op in (op for slot in program for op in slot if op.kind in COMPUTE):
            if holders.setdefault(op.stage, rank) != rank:
                got = f"ranks {holders[op.stage]} and {rank} run {stage} {op.stage}"
                raise ScheduleError(f"each {stage} is on one rank", got, "correct the order")
    if not holders or sorted(holders) != list(range(len(holders))):
        got = f"there are {', '.join(map(str, sorted(holders))) or 'none'}"
        raise ScheduleError(f"{stage}s are numbered from 0 without gaps", got, "give the order of every rank")
    return tuple(holders[each] for each in range(len(holders)))
