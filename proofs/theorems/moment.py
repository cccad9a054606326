"""The computes before and after a message slot, and when they run according to a family's ``Times``.

If rows may be empty, the next compute depends on the size.  Each possibility is a ``Moment`` with its condition.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import NamedTuple

from dualpipe.schedule import MESSAGES
from dualpipe.schedule.phase_table import Affine, Step, affine
from proofs.theorems.constraint import Constraints, TableError, at_least, below, equal, substitute
from proofs.theorems.family import Times
from proofs.theorems.symbolic import Position, Rank, is_compute


class UntimedError(TableError):
    """A table with computes for which the family has no times."""


class Moment(NamedTuple):
    """A compute slot, if ``given`` holds: its number within the rank, its start and its end.

    The start and the end of the program count as computes that take no time; their numbers are -1 and the number of
    computes.
    """

    name: str
    given: Constraints
    number: Affine
    start: Affine
    end: Affine


def moments(rank: Rank, row: int, step: int, iteration: Affine, times: Times) -> Iterator[Moment]:
    """The compute at ``step`` of ``row`` in an iteration: two cases if the row's last iteration has its own time.

    Raises ``UntimedError`` if ``times`` do not fit the table.
    """
    the_row = rank.table[row]
    at = Position(rank, row, step, 0, iteration)
    computes = _computes(the_row.steps)
    sizes = {**rank.sizes, "i": iteration}
    last = affine(rank.count(the_row) - 1)
    cases: list[tuple[str, Constraints]] = [(the_row.name, ())]
    if f"{the_row.name}, last" in times:
        cases = [(the_row.name, (below(iteration, last),)), (f"{the_row.name}, last", (equal(iteration, last),))]
    for name, given in cases:
        starts = times.get(name, ())
        if len(starts) != len(computes):
            raise UntimedError(
                "each compute of each row has a time",
                f"row {name!r} of {rank.kind} has {len(computes)} computes and {len(starts)} times",
                "give the family times that fit its table",
            )
        start = substitute(starts[computes.index(step)], sizes)
        yield Moment(f"{at} ({name})", given, at.computes, start, start + len(at.the_step))


def start_of(rank: Rank, given: Constraints = ()) -> Moment:
    return Moment(f"the start of {rank.name}", given, affine(-1), affine(0), affine(0))


def end_of(rank: Rank, times: Times, given: Constraints = ()) -> Moment:
    end = substitute(times["end"][0], rank.sizes)
    return Moment(f"the end of {rank.name}", given, rank.total(is_compute), end, end)


def after(at: Position, times: Times) -> Iterator[Moment]:
    """The compute that follows a position (the program's end if none does)."""
    return filter(_is_possible, _after(at, times))


def before(at: Position, times: Times) -> Iterator[Moment]:
    """The compute that precedes a position (the program's start if none does)."""
    return filter(_is_possible, _before(at, times))


def first(rank: Rank, times: Times) -> Iterator[Moment]:
    """The first compute of a program."""
    return filter(_is_possible, _first(rank, times))


def _is_possible(moment: Moment) -> bool:
    """Whether no row of constant length would need another length."""
    return all(constraint.terms or constraint.holds({}) for constraint in moment.given)


def _after(at: Position, times: Times) -> Iterator[Moment]:
    rank, row, count = at.rank, at.row, at.rank.count(at.the_row)
    inside = [s for s in _computes(at.the_row.steps) if s > at.step]
    if inside:
        yield from moments(rank, row, inside[0], at.iteration, times)
        return
    given: Constraints = ()
    if again := _computes(at.the_row.steps):
        for moment in moments(rank, row, again[0], at.iteration + 1, times):
            yield moment._replace(given=(*moment.given, below(at.iteration + 1, count)))
        given = (equal(at.iteration + 1, count),)
    for later in range(row + 1, len(rank.table)):
        given = yield from _if_not_empty(rank, later, 0, given, times)
    yield end_of(rank, times, given)


def _before(at: Position, times: Times) -> Iterator[Moment]:
    rank, row = at.rank, at.row
    inside = [s for s in _computes(at.the_row.steps) if s < at.step]
    if inside:
        yield from moments(rank, row, inside[-1], at.iteration, times)
        return
    given: Constraints = ()
    if again := _computes(at.the_row.steps):
        for moment in moments(rank, row, again[-1], at.iteration - 1, times):
            yield moment._replace(given=(*moment.given, at_least(at.iteration, 1)))
        given = (equal(at.iteration, 0),)
    for earlier in reversed(range(row)):
        given = yield from _if_not_empty(rank, earlier, -1, given, times)
    yield start_of(rank, given)


def _first(rank: Rank, times: Times) -> Iterator[Moment]:
    given: Constraints = ()
    for row in range(len(rank.table)):
        given = yield from _if_not_empty(rank, row, 0, given, times)
    yield end_of(rank, times, given)


def _if_not_empty(
    rank: Rank, row: int, end: int, given: Constraints, times: Times
) -> Generator[Moment, None, Constraints]:
    """The row's first (``end`` 0) or last (-1) compute, if it is not empty; returns the condition that it is."""
    the_row = rank.table[row]
    computes = _computes(the_row.steps)
    if not computes:
        return given
    count = rank.count(the_row)
    iteration = affine(0) if end == 0 else count - 1
    for moment in moments(rank, row, computes[end], iteration, times):
        yield moment._replace(given=(*given, *moment.given, at_least(count, 1)))
    return (*given, equal(count, 0))


def _computes(steps: tuple[Step, ...]) -> list[int]:
    return [s for s, step in enumerate(steps) if step[0].kind not in MESSAGES]
