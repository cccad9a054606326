"""Theorems ``live`` and ``memory``: the largest number of microbatches whose activations a rank holds.

Only F allocates activations, so it is enough to look at each F, counting what its slot allocates and not what the slot
releases.
"""

from __future__ import annotations

from collections.abc import Iterator

from dualpipe.schedule import B, F
from dualpipe.schedule.phase_table import Action, Affine
from proofs.theorems.constraint import at_least, substitute
from proofs.theorems.family import Family
from proofs.theorems.obligation import Obligation
from proofs.theorems.symbolic import Mark, Position, exactly, is_weight


def live(family: Family) -> Iterator[Obligation]:
    """From F to the end of B, for each chunk."""
    for rank in family.ranks:
        for chunk, most in zip(family.chunks, family.bounds.live, strict=True):
            allocate, release = exactly(Action(F, chunk)), exactly(Action(B, chunk))
            bound = substitute(most, rank.sizes)
            for at in rank.positions(allocate, "i"):
                yield _at_most(at, allocate, release, bound, f"chunk {chunk}")


def memory(family: Family) -> Iterator[Obligation]:
    """From F to the end of W, deferred W included, all chunks together."""
    for rank in family.ranks:
        bound = substitute(family.bounds.memory, rank.sizes)
        allocate = exactly(*(Action(F, chunk) for chunk in family.chunks))
        for at in rank.positions(allocate, "i"):
            yield _at_most(at, allocate, is_weight, bound, "all")


def _at_most(at: Position, allocate: Mark, release: Mark, bound: Affine, what: str) -> Obligation:
    held = at.through_step(allocate) - at.before_step(release)
    return Obligation(
        at.rank,
        f"live at {at} ({what})",
        at.guard,
        (at_least(bound, held),),
        (what, str(at.action), at.mb, held),
    )
