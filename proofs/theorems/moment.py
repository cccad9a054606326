"""The computes before and after a slot of messages, and when they run according to given times.

If rows may be empty, it depends on the size which compute is next: each possibility is a ``Moment`` with its condition.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from typing import NamedTuple

from dualpipe.schedule.phase_table import Affine, affine
from proofs.theorems.constraint import Constraints, at_least, below, equal, substitute
from proofs.theorems.symbolic import Position, Rank, computes_of, is_compute

Times = Mapping[tuple[str, str, int], Affine]
"""When each compute starts: by kind of rank, row and number among the computes of the row's body.

In the symbols of the kind (``Rank.symbols``) and ``i``, the iteration.  The row ``end`` is the end of the program.
A compute that is not listed starts at time 0.
"""

END = "end"
"""The row of a program's end, which counts as a compute that takes no time."""


class Moment(NamedTuple):
    """A compute slot: the condition under which it is the one in question, its number on its rank, its start and end.

    The program's start and its end count as computes that take no time, numbers -1 and the number of computes.
    """

    name: str
    given: Constraints
    number: Affine
    start: Affine
    end: Affine


def moment(rank: Rank, row: int, step: int, iteration: Affine, times: Times, given: Constraints = ()) -> Moment:
    """The compute that is ``step`` of ``row`` in an iteration."""
    at = Position(rank, row, step, 0, iteration)
    number = computes_of(at.the_row.steps).index(step)
    start = substitute(times.get((rank.kind, at.the_row.name, number), 0), {**rank.symbols, "i": iteration})
    return Moment(str(at), given, at.computes, start, start + len(at.the_step))


def start_of(rank: Rank, given: Constraints = ()) -> Moment:
    return Moment(f"the start of {rank.name}", given, affine(-1), affine(0), affine(0))


def end_of(rank: Rank, times: Times, given: Constraints = ()) -> Moment:
    end = substitute(times.get((rank.kind, END, 0), 0), rank.symbols)
    return Moment(f"the end of {rank.name}", given, rank.total(is_compute), end, end)


def after(at: Position, times: Times) -> Iterator[Moment]:
    """The compute that follows a position (the program's end if none does)."""
    return filter(_is_possible, _after(at, times))


def before(at: Position, times: Times) -> Iterator[Moment]:
    """The compute that a position follows (the program's start if none does)."""
    return filter(_is_possible, _before(at, times))


def first(rank: Rank, times: Times) -> Iterator[Moment]:
    """The first compute of a program."""
    return filter(_is_possible, _first(rank, times))


def _is_possible(moment: Moment) -> bool:
    """False if a row of constant length would need another length."""
    return all(constraint.terms or constraint.holds({}) for constraint in moment.given)


def _after(at: Position, times: Times) -> Iterator[Moment]:
    rank, row, count = at.rank, at.row, at.rank.count(at.the_row)
    inside = [s for s in computes_of(at.the_row.steps) if s > at.step]
    if inside:
        yield moment(rank, row, inside[0], at.iteration, times)
        return
    given: Constraints = ()
    if again := computes_of(at.the_row.steps):
        following = at.iteration + 1
        yield moment(rank, row, again[0], following, times, (below(following, count),))
        given = (equal(following, count),)
    for later in range(row + 1, len(rank.table)):
        given = yield from _if_not_empty(rank, later, 0, given, times)
    yield end_of(rank, times, given)


def _before(at: Position, times: Times) -> Iterator[Moment]:
    rank, row = at.rank, at.row
    inside = [s for s in computes_of(at.the_row.steps) if s < at.step]
    if inside:
        yield moment(rank, row, inside[-1], at.iteration, times)
        return
    given: Constraints = ()
    if again := computes_of(at.the_row.steps):
        yield moment(rank, row, again[-1], at.iteration - 1, times, (at_least(at.iteration, 1),))
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
    """Yield the row's first (``end`` 0) or last (-1) compute, if any; return the conditions under which it has none."""
    the_row = rank.table[row]
    computes = computes_of(the_row.steps)
    if not computes:
        return given
    count = rank.count(the_row)
    iteration = affine(0) if end == 0 else count - 1
    yield moment(rank, row, computes[end], iteration, times, (*given, at_least(count, 1)))
    return (*given, equal(count, 0))
