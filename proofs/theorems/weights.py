"""Theorems ``queue``, ``pending`` and ``accumulation``: the weight gradients.

The deferred W form a queue, which is like a channel from a rank to itself: the j-th W without a chunk runs the W of the
j-th backward that deferred its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from dualpipe.schedule import W
from dualpipe.schedule.phase_table import Affine
from proofs.theorems.constraint import Constraints, at_least, equal, substitute
from proofs.theorems.family import Family
from proofs.theorems.obligation import Obligation, is_possible
from proofs.theorems.symbolic import Position, Rank, earlier, is_pop, is_push


def queue(family: Family) -> Iterator[Obligation]:
    """No W is taken from an empty queue: the j-th pop comes after the j-th push; and the queue is empty at the end."""
    for rank in family.ranks:
        pushed, popped = rank.total(is_push), rank.total(is_pop)
        yield Obligation(
            rank,
            f"every pending W of {rank.name} is run",
            (),
            (equal(pushed, popped),),
            ("pending", pushed, popped),
        )
        pushes = rank.positions(is_push, "j")
        for pop in rank.positions(is_pop, "i"):
            for push in pushes:
                yield Obligation(
                    rank,
                    f"{pop} runs the W of {push}",
                    (*pop.guard, *push.guard, equal(pop.before(is_pop), push.before(is_push))),
                    (at_least(earlier(push, pop), 0),),
                    (str(push.action), push.mb, pop.before(is_pop)),
                )


def pending(family: Family) -> Iterator[Obligation]:
    """The largest number of deferred W: it is enough to look at each push."""
    assert family.bounds.pending is not None
    for rank in family.ranks:
        bound = substitute(family.bounds.pending, rank.sizes)
        for push in rank.positions(is_push, "i"):
            deferred = push.through_step(is_push) - push.before_step(is_pop)
            yield Obligation(
                rank,
                f"pending W at {push}",
                push.guard,
                (at_least(bound, deferred),),
                (str(push.action), push.mb, deferred),
            )


def accumulation(family: Family) -> Iterator[Obligation]:
    """The W of microbatch m + 1 comes after that of microbatch m, chunk by chunk."""
    for rank in family.ranks:
        for chunk in family.chunks:
            later = list(_weights(rank, chunk, "k", "l"))
            for first in _weights(rank, chunk, "i", "j"):
                for second in later:
                    yield Obligation(
                        rank,
                        f"{second.name} after {first.name}",
                        (*first.given, *second.given, equal(second.mb, first.mb + 1)),
                        (at_least(earlier(first.at, second.at), 0),),
                        (chunk_name(chunk), first.mb, second.mb),
                    )


def chunk_name(chunk: int) -> str:
    return f"W{chunk}"


class _Weight(NamedTuple):
    """One way for a W of a chunk to run, at some size: in its own slot with B, or from the queue."""

    name: str
    at: Position
    mb: Affine
    given: Constraints


def _weights(rank: Rank, chunk: int, iteration: str, pushed: str) -> Iterator[_Weight]:
    for at in rank.positions(lambda step, p: step[p] == (W, chunk), iteration):
        yield _Weight(str(at), at, at.mb, at.guard)
    pushes = rank.positions(lambda step, p: is_push(step, p) and step[p].chunk == chunk, pushed)
    for pop in rank.positions(is_pop, iteration):
        for push in pushes:
            same = equal(pop.before(is_pop), push.before(is_push))
            given = (*pop.guard, *push.guard, same)
            if is_possible(rank.domain + given):
                yield _Weight(f"{pop} of {push}", pop, push.mb, given)
