"""Theorems ``queue``, ``pending`` and ``accumulation``: the weight gradients.

The W that wait form a queue, and a queue is a channel of a rank to itself: the j-th W without a chunk runs the W of
the j-th backward that put its own off.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from dualpipe.schedule import W
from dualpipe.schedule.phase_table import Affine
from proofs.theorems.constraint import Constraints, at_least, equal, substitute
from proofs.theorems.family import Family
from proofs.theorems.obligation import Obligation
from proofs.theorems.symbolic import Place, Rank, earlier, is_pop, is_push


def queue(family: Family) -> Iterator[Obligation]:
    """The queue is never asked when empty: the j-th pop comes after the j-th push; and it is empty in the end."""
    for rank in family.ranks:
        pushed, popped = rank.total(is_push), rank.total(is_pop)
        yield Obligation(
            rank,
            f"every pending W of {rank.name} is run",
            (),
            (equal(pushed, popped),),
            ("pending", pushed, popped),
        )
        pushes = rank.places(is_push, "j")
        for pop in rank.places(is_pop, "i"):
            for push in pushes:
                yield Obligation(
                    rank,
                    f"{pop} runs the W of {push}",
                    (*pop.guard, *push.guard, equal(pop.before(is_pop), push.before(is_push))),
                    (at_least(earlier(push, pop), 0),),
                    (str(push.action), push.mb, pop.before(is_pop)),
                )


def pending(family: Family) -> Iterator[Obligation]:
    """How many W wait at most: it is enough to look where one joins."""
    assert family.bounds.pending is not None
    for rank in family.ranks:
        bound = substitute(family.bounds.pending, rank.sizes)
        for push in rank.places(is_push, "i"):
            waiting = push.through_step(is_push) - push.before_step(is_pop)
            yield Obligation(
                rank,
                f"pending W at {push}",
                push.guard,
                (at_least(bound, waiting),),
                (str(push.action), push.mb, waiting),
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
                        (at_least(earlier(first.place, second.place), 0),),
                        (chunk_name(chunk), first.mb, second.mb),
                    )


def chunk_name(chunk: int) -> str:
    return f"W{chunk}"


class _Weight(NamedTuple):
    """One way in which a W of a chunk can come to be run."""

    name: str
    place: Place
    mb: Affine
    given: Constraints


def _weights(rank: Rank, chunk: int, iteration: str, pushed: str) -> Iterator[_Weight]:
    for place in rank.places(lambda step, p: step[p] == (W, chunk), iteration):
        yield _Weight(str(place), place, place.mb, place.guard)
    pushes = rank.places(lambda step, p: is_push(step, p) and step[p].chunk == chunk, pushed)
    for pop in rank.places(is_pop, iteration):
        for push in pushes:
            same = equal(pop.before(is_pop), push.before(is_push))
            yield _Weight(f"{pop} of {push}", pop, push.mb, (*pop.guard, *push.guard, same))
