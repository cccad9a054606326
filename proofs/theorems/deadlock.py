"""Theorems ``deadlock`` and ``makespan``: a time for every compute, of which Z3 checks that nothing comes later.

In the blocking model a batch of messages ends when each of them has met its partner, and a batch is posted when the
compute before it ends.  Suppose a time T for every compute slot, with E = T + the slot's duration, such that

    T(next compute of the rank)            >= E(this one)
    T(compute after the receiver's batch)  >= E(compute before the sender's batch)     for every message,
    T(compute after the sender's batch)    >= E(compute before the receiver's batch)   for every message.

Then T grows along everything that anything waits for, so nothing waits for itself: no deadlock, whatever the
computes really take.  And with the durations that T was made for, by induction along T no compute starts after its
T, so the last E bounds the makespan.  T comes from ``times``; where from does not matter, since it is checked here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from dualpipe.schedule.phase_table import affine
from proofs.theorems.constraint import Constraints, at_least, equal, substitute
from proofs.theorems.family import Family
from proofs.theorems.moment import Moment, after, before, end_of, first, moments, start_of
from proofs.theorems.obligation import Link, Obligation
from proofs.theorems.symbolic import Place, Rank, exactly, is_compute


def deadlock(family: Family) -> Iterator[Obligation]:
    for rank in family.ranks:
        yield from _own_order(family, rank)
    for link in family.links:
        yield from _partners(family, link)


def makespan(family: Family) -> Iterator[Obligation]:
    for rank in family.ranks:
        end = end_of(rank, family.times[rank.kind]).end
        bound = substitute(family.bounds.makespan, rank.sizes)
        yield Obligation(rank, f"the end of {rank.name}", (), (at_least(bound, end),), ("end", end, bound))


def _own_order(family: Family, rank: Rank) -> Iterator[Obligation]:
    times = family.times[rank.kind]
    for moment in first(rank, times):
        yield _in_time(rank, (), start_of(rank), moment, ("own", "own"))
    for place in rank.places(is_compute, "i"):
        for this in moments(rank, place.row, place.step, place.iteration, times):
            for moment in after(place, times):
                yield _in_time(rank, place.guard, this, moment, ("own", "own"))


def _partners(family: Family, link: Link) -> Iterator[Obligation]:
    sends, receives = exactly(*link.meets), exactly(*link.meets.values())
    received = [_message(family, receive) for receive in link.receiver.places(receives, "j")]
    for send in (_message(family, send) for send in link.sender.places(sends, "i")):
        for receive in received:
            same = equal(send.place.before(sends), receive.place.before(receives))
            met = (*send.place.guard, *receive.place.guard, same)
            yield from _posted(link, met, send, receive, ("sender", "receiver"))
            yield from _posted(link, met, receive, send, ("receiver", "sender"))


class _Message(NamedTuple):
    """A send or a receive, and the computes between which its batch may stand."""

    place: Place
    before: tuple[Moment, ...]
    after: tuple[Moment, ...]


def _message(family: Family, place: Place) -> _Message:
    times = family.times[place.rank.kind]
    return _Message(place, tuple(before(place, times)), tuple(after(place, times)))


def _posted(
    link: Link, met: Constraints, this: _Message, partner: _Message, roles: tuple[str, str]
) -> Iterator[Obligation]:
    """What follows ``partner``'s batch comes after what is before ``this`` one's."""
    for earlier in this.before:
        for later in partner.after:
            yield _in_time(link, met, earlier, later, roles)


def _in_time(
    scope: Rank | Link, given: Constraints, earlier: Moment, later: Moment, roles: tuple[str, str]
) -> Obligation:
    return Obligation(
        scope,
        f"{later.name} waits for {earlier.name}",
        (*given, *earlier.given, *later.given),
        (at_least(later.start, earlier.end),),
        (*roles, affine(earlier.number), affine(later.number)),
    )
