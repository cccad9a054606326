"""Theorems ``deadlock`` and ``makespan``: a time for every compute, of which Z3 checks that nothing comes later.

In the blocking model a slot of messages ends when each of them has met its partner, and it is posted when the compute
before it ends.  Suppose a time T for every compute slot, with E = T + the slot's duration, such that

    T(next compute of the rank)           >= E(this one)
    T(compute after the receiver's slot)  >= E(compute before the sender's slot)     for every message,
    T(compute after the sender's slot)    >= E(compute before the receiver's slot)   for every message.

Then T grows along everything that anything waits for, so nothing waits for itself: no deadlock, whatever the
computes really take.  And with the durations that T was made for, by induction along T no compute starts after its
T, so the last E bounds the makespan.  ``proofs.theorems.finder`` guesses T.  A wrong guess cannot do harm, since it is
checked here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from dualpipe.schedule.phase_table import Affine, affine
from proofs.theorems.constraint import Constraints, at_least, equal, substitute
from proofs.theorems.family import Family
from proofs.theorems.moment import Moment, Times, after, before, end_of, first, moment, start_of
from proofs.theorems.obligation import Link, Obligation
from proofs.theorems.symbolic import Place, Rank, exactly, is_compute


def deadlock(family: Family, times: Times) -> Iterator[Obligation]:
    """Every compute comes after all that it waits for."""
    for rank in family.ranks:
        yield from _own_order(rank, times)
    for link in family.links:
        yield from _partners(link, times)


def makespan(family: Family, times: Times, bound: Affine) -> Iterator[Obligation]:
    """No program ends after ``bound``, which is in the symbols of the sizes."""
    for rank in family.ranks:
        end, most = end_of(rank, times).end, substitute(bound, rank.symbols)
        yield Obligation(rank, f"the end of {rank.name}", (), (at_least(most, end),), ("end", end, most))


def _own_order(rank: Rank, times: Times) -> Iterator[Obligation]:
    for following in first(rank, times):
        yield _in_time(rank, (), start_of(rank), following, ("own", "own"))
    for place in rank.places(is_compute, "i"):
        this = moment(rank, place.row, place.step, place.iteration, times)
        for following in after(place, times):
            yield _in_time(rank, place.guard, this, following, ("own", "own"))


def _partners(link: Link, times: Times) -> Iterator[Obligation]:
    sends, receives = exactly(*link.meets), exactly(*link.meets.values())
    received = [_message(receive, times) for receive in link.receiver.places(receives, "j")]
    for send in (_message(send, times) for send in link.sender.places(sends, "i")):
        for receive in received:
            same = equal(send.place.before(sends), receive.place.before(receives))
            met = (*send.place.guard, *receive.place.guard, same)
            yield from _posted(link, met, send, receive, ("sender", "receiver"))
            yield from _posted(link, met, receive, send, ("receiver", "sender"))


class _Message(NamedTuple):
    """A send or a receive, and the computes between which its slot may be."""

    place: Place
    before: tuple[Moment, ...]
    after: tuple[Moment, ...]


def _message(place: Place, times: Times) -> _Message:
    return _Message(place, tuple(before(place, times)), tuple(after(place, times)))


def _posted(
    link: Link, met: Constraints, this: _Message, partner: _Message, roles: tuple[str, str]
) -> Iterator[Obligation]:
    """What follows ``partner``'s slot comes after what is before ``this`` one's."""
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
