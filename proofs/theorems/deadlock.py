"""Theorems ``deadlock``, ``makespan`` and ``makespan at use``: a time for every compute, checked to be an upper bound.

Where messages *block*, a message slot is posted when the compute before it ends, and completes when each of its
messages has matched.  Suppose a time T for every compute slot, with E = T + the slot's duration, such that

    T(next compute of the rank)                   >= E(this one)
    T(compute after the receiver's message slot)  >= E(compute before the sender's message slot)     for every message,
    T(compute after the sender's message slot)    >= E(compute before the receiver's message slot)   for every message.

Then T increases along every wait, so nothing waits for itself: there is no deadlock, whatever the computes really
take.  With the durations that T was computed for, no compute starts after its T, by induction along T, so the last E
bounds the makespan.  ``proofs.theorems.finder`` guesses T.  A wrong guess cannot do harm, since it is checked here.

Where messages are awaited *at use*, a rank posts a message slot when the compute before it ends, and goes on.  A
compute waits for the messages that it needs itself.  Then it suffices that

    T(next compute of the rank)            >= E(this one)
    T(compute that needs a message)        >= E(compute before the sender's message slot)

A message arrives where it is needed, and is posted there in time, by the theorems ``messages`` and ``order``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from enum import Enum
from typing import NamedTuple

from dualpipe.schedule import RB, RF, B, F, Kind
from dualpipe.schedule.phase_table import Action, Affine, affine
from proofs.theorems.constraint import Constraints, at_least, equal, substitute
from proofs.theorems.family import Family
from proofs.theorems.moment import Moment, Times, after, before, end_of, first, moment, start_of
from proofs.theorems.obligation import Link, Obligation, is_possible
from proofs.theorems.symbolic import Position, Rank, exactly, is_compute

USED_BY: Mapping[Kind, Kind] = {RF: F, RB: B}
"""The kind of op that needs a received message."""


class Waiting(Enum):
    """When a rank waits for a message: in the message slot, or at the compute that needs what it brings."""

    BLOCKING = "blocking"
    AT_USE = "awaited at use"


def waits(family: Family, times: Times, waiting: Waiting) -> Iterator[Obligation]:
    """Every compute comes after all that it waits for."""
    for rank in family.ranks:
        yield from _own_order(rank, times)
    for link in family.links:
        yield from _partners(link, times) if waiting is Waiting.BLOCKING else _uses(link, times)


def ends(family: Family, times: Times, bound: Affine) -> Iterator[Obligation]:
    """No program ends after ``bound``, which is in the symbols of the sizes."""
    for rank in family.ranks:
        end, most = end_of(rank, times).end, substitute(bound, rank.symbols)
        yield Obligation(rank, f"the end of {rank.name}", (), (at_least(most, end),), ("end", end, most))


def _own_order(rank: Rank, times: Times) -> Iterator[Obligation]:
    for following in first(rank, times):
        yield _in_time(rank, (), start_of(rank), following, ("own", "own"))
    for at in rank.positions(is_compute, "i"):
        this = moment(rank, at.row, at.step, at.iteration, times)
        for following in after(at, times):
            yield _in_time(rank, at.guard, this, following, ("own", "own"))


def _partners(link: Link, times: Times) -> Iterator[Obligation]:
    sends, receives = exactly(*link.matches), exactly(*link.matches.values())
    received = [_message(receive, times) for receive in link.receiver.positions(receives, "j")]
    for send in (_message(send, times) for send in link.sender.positions(sends, "i")):
        for receive in received:
            same = equal(send.at.before(sends), receive.at.before(receives))
            matched = (*send.at.guard, *receive.at.guard, same)
            if not is_possible(link.domain + matched):
                continue
            yield from _posted(link, matched, send, receive, ("sender", "receiver"))
            yield from _posted(link, matched, receive, send, ("receiver", "sender"))


def _uses(link: Link, times: Times) -> Iterator[Obligation]:
    for sent, received in link.matches.items():
        kind, chunk = received
        needs = link.receiver.positions(exactly(Action(USED_BY[kind], chunk)), "j")
        for send in link.sender.positions(exactly(sent), "i"):
            for use in needs:
                this = moment(link.receiver, use.row, use.step, use.iteration, times)
                arrives = (*send.guard, *use.guard, equal(send.mb, use.mb))
                if is_possible(link.domain + arrives):
                    for earlier in before(send, times):
                        yield _in_time(link, arrives, earlier, this, ("sender", "use"))


class _Message(NamedTuple):
    """A send or a receive, and the computes that may come directly before and after its message slot."""

    at: Position
    before: tuple[Moment, ...]
    after: tuple[Moment, ...]


def _message(at: Position, times: Times) -> _Message:
    return _Message(at, tuple(before(at, times)), tuple(after(at, times)))


def _posted(
    link: Link, matched: Constraints, this: _Message, partner: _Message, roles: tuple[str, str]
) -> Iterator[Obligation]:
    """The compute after ``partner``'s message slot starts after the compute before ``this`` one's ends."""
    for earlier in this.before:
        for later in partner.after:
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
