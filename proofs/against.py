"""Where a schedule departs from another one, rank by rank: what ``dualpipe prove --against`` reports.

Five aspects are compared separately.  In each aspect only the first departure of a rank is reported.

===========  =========================================================================================================
order        the sequence of the rank's F and B
weights      the positions of the W in that sequence
messages     for each peer, the sequence of sends to it and that of receives from it
collectives  for each group, the sequence of the rank's collectives; not compared if a schedule has no collectives
slots        which ops are issued together, and between which computes the messages are posted
===========  =========================================================================================================

Ops of one slot are issued together, so except in ``slots`` their order within the slot does not matter: ``F+B+W`` is
the same as ``F`` and ``B+W`` in two slots.  A difference in one of the first four aspects changes what a rank computes,
holds or exchanges.  A difference in slots alone does not; it is reported but not counted as a departure.

After a rank's first departure in ``order``, one in ``weights`` or ``messages`` is left out, and so is one in ``slots``
after any other departure: it would show the same fault again.  So would what a rank that failed lacks at its end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from dualpipe.errors import RuleError
from dualpipe.schedule import COLLECTIVES, B, F, Kind, Lane, Op, Placed, Schedule, W
from proofs.buffers_search import in_shared_memory
from proofs.channels import apart
from proofs.verdict import ExitCode


class Aspect(StrEnum):
    """What is compared."""

    ORDER = "order"
    WEIGHTS = "weights"
    MESSAGES = "messages"
    COLLECTIVES = "collectives"
    SLOTS = "slots"


@dataclass(frozen=True)
class Departure:
    """The first op at which a rank departs from the other schedule in an aspect.

    Attributes
    ----------
    here, there:
        What this schedule has at that point, and what the other one has; ``None`` after the last op.
    later:
        Where the other schedule has the op of ``here`` on this rank; ``None`` if it never has.
    found:
        Where this schedule has the op of ``there`` on this rank; ``None`` if it never has.
    surplus:
        In ``messages``, how many messages the rank has more than in the other schedule, of which ``here`` is the first;
        0 if none, or if that does not show.  If it is negative, ``there`` is the first of those that it lacks, and
        ``here`` the op with which the slots between the same F and B begin.
    is_open:
        Whether these messages may also be posted only earlier or later: the program ended before that could show.
    """

    aspect: Aspect
    rank: int
    here: Placed | None
    there: Placed | None
    later: Placed | None
    found: Placed | None
    surplus: int = 0
    is_open: bool = False

    @property
    def counts(self) -> bool:
        """Whether it makes the verdict ``departs``; a difference in slots does not."""
        return self.aspect is not Aspect.SLOTS


@dataclass(frozen=True)
class Misplaced:
    """A stage that the two schedules have on different ranks; ``None`` if a schedule has no such stage."""

    lane: Lane
    stage: int
    here: int | None
    there: int | None


@dataclass(frozen=True)
class Comparison:
    """A schedule compared with another one.

    ``misplaced`` are the stages on different ranks; if there are any, nothing else was compared.  ``departures`` are
    ordered by rank and aspect, with those that do not count after all others.
    """

    here: Schedule
    there: Schedule
    name: str
    misplaced: tuple[Misplaced, ...]
    departures: tuple[Departure, ...]

    @property
    def sizes(self) -> tuple[Lane, ...]:
        """The lanes that have different numbers of microbatches."""
        one, other = self.here.microbatches, self.there.microbatches
        return tuple(lane for lane in Lane if lane in one and lane in other and one[lane] != other[lane])

    @property
    def has_collectives(self) -> tuple[bool, bool]:
        """Whether this schedule has collectives, and whether the other one has; they are compared if both have."""
        one, other = (any(at.op.kind in COLLECTIVES for at in schedule) for schedule in (self.here, self.there))
        return one, other

    @property
    def unsure(self) -> int:
        """How many names of receives were not compared, since they are uncertain: they shared memory with others."""
        return sum(len(in_shared_memory(self.here, rank)) for rank in range(self.here.ranks))

    @property
    def departs(self) -> bool:
        return bool(self.misplaced) or any(departure.counts for departure in self.departures)

    @property
    def verdict(self) -> str:
        """``departs``, ``same but for slots`` or ``same``."""
        if self.departs:
            return "departs"
        return "same but for slots" if self.departures else "same"

    @property
    def exit_code(self) -> ExitCode:
        return ExitCode.REFUTED if self.departs else ExitCode.PROVED

    def as_json(self) -> dict[str, Any]:
        """The object under ``against`` in the output of ``dualpipe prove --json``."""
        from proofs.departure_story import meaning, place, tell

        return {
            "name": self.name,
            "verdict": self.verdict,
            "collectives_compared": all(self.has_collectives),
            "names_not_compared": self.unsure,
            "misplaced": [
                {"lane": str(each.lane), "stage": each.stage, "here": each.here, "there": each.there}
                for each in self.misplaced
            ],
            "departures": [
                {
                    "aspect": str(each.aspect),
                    "rank": each.rank,
                    "here": _plain(each.here),
                    "there": _plain(each.there),
                    "story": tell(each, self),
                    "meaning": meaning(each, self),
                    "place": place(each, self),
                }
                for each in self.departures
            ],
        }


def _plain(placed: Placed | None) -> dict[str, Any] | None:
    return None if placed is None else {"slot": placed.slot, "op": str(placed.op)}


def compare(here: Schedule, there: Schedule, name: str = "") -> Comparison:
    """Compare a schedule with another one; ``name`` is what reports call the other.

    Raises ``RuleError`` if they have different numbers of ranks.
    """
    name = name or there.name or "the other schedule"
    if here.ranks != there.ranks:
        raise RuleError(
            "--against compares schedules with the same number of ranks",
            f"the schedule has {here.ranks} and {name} has {there.ranks}",
            "name one with as many ranks",
        )
    misplaced = tuple(_misplaced(here, there))
    found = [] if misplaced else [each for rank in range(here.ranks) for each in _of_rank(here, there, rank)]
    departures = sorted(found, key=lambda each: not each.counts)
    return Comparison(here, there, name, misplaced, tuple(departures))


def _misplaced(here: Schedule, there: Schedule) -> Iterator[Misplaced]:
    for lane in Lane:
        one, other = here.routes.get(lane, ()), there.routes.get(lane, ())
        for stage in range(max(len(one), len(other))):
            ranks = [route[stage] if stage < len(route) else None for route in (one, other)]
            if ranks[0] != ranks[1]:
                yield Misplaced(lane, stage, *ranks)


Group = tuple[Placed, ...]
"""Ops that are issued together."""


def _of_rank(here: Schedule, there: Schedule, rank: int) -> Iterator[Departure]:
    order = _in_computes(Aspect.ORDER, here, there, rank, frozenset({F, B}))
    weights = _in_computes(Aspect.WEIGHTS, here, there, rank, frozenset({F, B, W}))
    messages, slots = _in_messages(here, there, rank, order), _in_slots(here, there, rank)
    collectives = _in_collectives(here, there, rank)
    found = [] if order is None else [order]
    failed = any(each.rank == rank and each.ends_early and not each.is_later for each in here.failures)
    if failed and order is not None and order.here is None:
        if weights is not None and weights.here is None:
            weights = None  # the same end
        if slots is not None and _slot(slots) == len(here.programs[rank]) - 1:
            slots = None  # the op that failed
    if weights is not None and W in {placed.op.kind for placed in (weights.here, weights.there) if placed is not None}:
        found.append(weights)
    if messages is not None and (order is None or _slot(messages) < _slot(order)):
        found.append(messages)
    if collectives is not None:
        found.append(collectives)
    if slots is not None and all(_slot(slots) < _slot(other) for other in found):
        found.append(slots)
    return iter(found)


def _slot(departure: Departure) -> float:
    """The slot in which this schedule departs from the other."""
    return float("inf") if departure.here is None else departure.here.slot


def _in_computes(
    aspect: Aspect, here: Schedule, there: Schedule, rank: int, kinds: frozenset[Kind]
) -> Departure | None:
    """The first difference between the rank's computes of these kinds."""
    one, other = (_groups(schedule, rank, kinds) for schedule in (here, there))
    return _departure(aspect, here, there, rank, *_difference(one, other))


def _in_collectives(here: Schedule, there: Schedule, rank: int) -> Departure | None:
    """The first difference between the collectives of the rank, if both schedules have any."""
    if not _have_collectives(here, there):
        return None
    one, other = (_groups(schedule, rank, COLLECTIVES) for schedule in (here, there))
    return _departure(Aspect.COLLECTIVES, here, there, rank, *_difference(one, other, _in_group))


def _in_group(op: Op) -> Op:
    """A collective with its group, since each group is a communicator of its own."""
    return op


def _groups(schedule: Schedule, rank: int, kinds: frozenset[Kind]) -> Iterator[Group]:
    for number, slot in enumerate(schedule.programs[rank]):
        group = tuple(Placed(rank, number, position, op) for position, op in enumerate(slot) if op.kind in kinds)
        if group:
            yield group


def _bare(op: Op) -> Op:
    return op.bare


def _difference(
    one: Iterable[Group], other: Iterable[Group], key: Callable[[Op], Op] = _bare
) -> tuple[Placed | None, Placed | None]:
    """The first ops at which two sequences of groups differ, both ``None`` if they do not.

    Ops are compared by ``key``.  Ops within a group have no order, and a group of one sequence may be split into
    several groups of the other.
    """
    rest = iter(one), iter(other)
    open_ones: tuple[list[Placed], list[Placed]] = [], []
    while True:
        for groups, current in zip(rest, open_ones, strict=True):
            if not current:
                current.extend(next(groups, ()))
        ours, theirs = open_ones
        if not ours or not theirs:
            return (ours[0] if ours else None), (theirs[0] if theirs else None)
        common = {key(placed.op) for placed in ours} & {key(placed.op) for placed in theirs}
        if not common:
            return ours[0], theirs[0]
        for current in open_ones:
            for op in common:
                current.remove(next(placed for placed in current if key(placed.op) == op))


def _departure(
    aspect: Aspect, here: Schedule, there: Schedule, rank: int, one: Placed | None, other: Placed | None
) -> Departure | None:
    if one is None and other is None:
        return None
    later = None if one is None else _next(there, rank, one.op, 0 if other is None else other.slot)
    found = None if other is None else _next(here, rank, other.op, 0 if one is None else one.slot)
    return Departure(aspect, rank, one, other, later, found)


def _next(schedule: Schedule, rank: int, op: Op, start: int) -> Placed | None:
    """Where a rank has an op: the first place from a slot on, or else the last one before it."""
    key = _in_group if op.kind in COLLECTIVES else _bare
    places = [placed for placed in _placed(schedule, rank) if key(placed.op) == key(op)]
    return next((placed for placed in places if placed.slot >= start), places[-1] if places else None)


def _placed(schedule: Schedule, rank: int) -> Iterator[Placed]:
    for number, slot in enumerate(schedule.programs[rank]):
        for position, op in enumerate(slot):
            yield Placed(rank, number, position, op)


def _in_messages(here: Schedule, there: Schedule, rank: int, order: Departure | None) -> Departure | None:
    """The first difference in what the rank sends to a peer or receives from one."""
    end = None if order is None else order.here
    agreed = here.programs[rank] if end is None else here.programs[rank][: end.slot]
    computes = sum(op.kind in (F, B) for slot in agreed for op in slot)
    is_cut_short = order is not None and order.here is None
    found = []
    for each in apart(here, there, rank, computes, is_cut_short):
        departure = _departure(Aspect.MESSAGES, here, there, rank, each.here, each.there)
        if departure is not None:
            found.append(replace(departure, surplus=each.surplus, is_open=each.is_open))
    return min(found, key=lambda each: _position(each, len(here.programs[rank])), default=None)


def _position(departure: Departure, end: int) -> tuple[int, int, int]:
    here, there = departure.here, departure.there
    own = (end, 0) if here is None else (here.slot, here.position)
    return (*own, 0 if there is None else there.slot)


def _in_slots(here: Schedule, there: Schedule, rank: int) -> Departure | None:
    ignored = frozenset() if _have_collectives(here, there) else COLLECTIVES
    rows = (
        [(number, slot) for number, slot in enumerate(schedule.programs[rank]) if slot[0].kind not in ignored]
        for schedule in (here, there)
    )
    guesses = {*here.observed.guesses, *in_shared_memory(here, rank)}
    for (here_number, one), (there_number, other) in zip(*rows, strict=False):
        ours, theirs = {op.bare for op in one}, {op.bare for op in other}
        unsure = {placed.op.bare for placed in guesses if placed[:2] == (rank, here_number)}
        if ours != theirs and (ours - unsure - theirs or len(one) != len(other)):
            alone = next((at for at, op in enumerate(one) if op.bare not in {o.bare for o in other}), 0)
            missing = next((at for at, op in enumerate(other) if op.bare not in {o.bare for o in one}), 0)
            at = Placed(rank, here_number, alone, one[alone]), Placed(rank, there_number, missing, other[missing])
            return _departure(Aspect.SLOTS, here, there, rank, *at)
    return None


def _have_collectives(here: Schedule, there: Schedule) -> bool:
    """Whether both schedules have collectives."""
    return all(any(at.op.kind in COLLECTIVES for at in schedule) for schedule in (here, there))
