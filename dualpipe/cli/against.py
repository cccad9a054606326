"""``dualpipe prove --against``: the schedule that the others are compared with."""

from __future__ import annotations

from dualpipe.cli.options import find_schedule
from dualpipe.cli.proving import Against
from dualpipe.errors import RuleError
from dualpipe.schedule import Schedule
from dualpipe.schedule.generate import NAMES, SizeError, generate


def find_against(name: str, ranks: int | None, microbatches: int | None, entry_timeout: float) -> Against:
    """The schedule of ``--against``.

    A named schedule is made for the given size, or else for the size of the one that is compared with it; a file or an
    entry point has its own size.
    """
    if name in NAMES:
        return Against(name, lambda schedule: _of_size(name, schedule, ranks, microbatches))
    found = find_schedule(name, None, None, entry_timeout)
    return Against(found.name or name, lambda schedule: found)


def _of_size(name: str, schedule: Schedule, ranks: int | None, microbatches: int | None) -> Schedule:
    if microbatches is None:
        counts = schedule.microbatches
        if len(set(counts.values())) > 1:
            raise RuleError(
                f"--against {name} is made for as many microbatches as the schedule has",
                "it has " + " and ".join(f"{count} of lane {lane}" for lane, count in counts.items()),
                "say with -M for how many of all lanes together it should be made",
            )
        microbatches = sum(counts.values())
    try:
        return generate(name, schedule.ranks if ranks is None else ranks, microbatches)
    except SizeError as error:
        own = "give with -M how many microbatches the program has"
        cut = f"{own}, since it ended before it ran all of them" if schedule.failures else ""
        fix = cut or f"{error.fix}; if the schedule was cut short, {own}"
        raise RuleError(error.rule, error.got, fix) from error
