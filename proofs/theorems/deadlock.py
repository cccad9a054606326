"""Theorems ``deadlock`` and ``makespan``: a time for every compute, which Z3 checks to be an upper bound.

In the blocking model a message slot is posted when the compute before it ends, and completes when each of its messages
has matched.  Suppose a time T for every compute slot, with E = T + the slot's duration, such that

    T(next compute of the rank)                   >= E(this one)
    T(compute after the receiver's message slot)  >= E(compute before the sender's message slot)     for every message,
    T(compute after the sender's message slot)    >= E(compute before the receiver's message slot)   for every message.

Then T increases along every wait, so nothing waits for itself: there is no deadlock, whatever the computes really
take.  With the durations that T was computed for, no compute starts after its T, by induction along T, so the last E
bounds the makespan.  T is ``Family.times``; its origin does not matter, since it is checked here.
"""

from __future__ import annotations

from collections.abc import Iterator

from dualpipe.schedule.phase_table import affine
from proofs.theorems.constraint import Constraints, at_least, equal, substitute
from proofs.theorems.family import Family
from proofs.theorems.messages import candidates
from proofs.theorems.moment import Moment, after, before, end_of, first, moments, start_of
from proofs.theorems.obligation import Link, Obligation
from proofs.theorems.symbolic import Position, Rank, exactly, is_compute


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
    for at in rank.positions(is_compute, "i"):
        for this in moments(rank, at.row, at.step, at.iteration, times):
            for moment in after(at, times):
                yield _in_time(rank, at.guard, this, moment, ("own", "own"))


def _partners(family: Family, link: Link) -> Iterator[Obligation]:
    sends, receives = exactly(*link.matches), exactly(*link.matches.values())
    for send, receive in candidates(link):
        matched = (*send.guard, *receive.guard, equal(send.before(sends), receive.before(receives)))
        yield from _posted(family, link, matched, send, receive, ("sender", "receiver"))
        yield from _posted(family, link, matched, receive, send, ("receiver", "sender"))


def _posted(
    family: Family, link: Link, matched: Constraints, this: Position, partner: Position, roles: tuple[str, str]
) -> Iterator[Obligation]:
    """The compute after ``partner``'s message slot starts after the compute before ``this`` one's ends."""
    for earlier in before(this, family.times[this.rank.kind]):
        for later in after(partner, family.times[partner.rank.kind]):
            yield _in_time(link, matched, earlier, later, roles)


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
