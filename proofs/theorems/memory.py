"""Theorems ``live`` and ``memory``: how many microbatches' activations a rank holds, at most and at its peak.

Activations are allocated by F only, so it is enough to look at each F: what its slot allocates counts, what the
slot releases does not yet.
"""

from __future__ import annotations

from collections.abc import Iterator

from dualpipe.schedule import B, F
from dualpipe.schedule.phase_table import Action, Affine
from proofs.theorems.constraint import at_least, substitute
from proofs.theorems.family import Family
from proofs.theorems.obligation import Obligation
from proofs.theorems.symbolic import Mark, Place, exactly, is_weight


def live(family: Family) -> Iterator[Obligation]:
    """From F to the end of B, for each chunk."""
    for rank in family.ranks:
        for chunk, most in zip(family.chunks, family.bounds.live, strict=True):
            allocate, release = exactly(Action(F, chunk)), exactly(Action(B, chunk))
            bound = substitute(most, rank.sizes)
            for place in rank.places(allocate, "i"):
                yield _at_most(place, allocate, release, bound, f"chunk {chunk}")


def memory(family: Family) -> Iterator[Obligation]:
    """From F to the end of W, pending W counted, all chunks together."""
    for rank in family.ranks:
        bound = substitute(family.bounds.memory, rank.sizes)
        allocate = exactly(*(Action(F, chunk) for chunk in family.chunks))
        for place in rank.places(allocate, "i"):
            yield _at_most(place, allocate, is_weight, bound, "all")


def _at_most(place: Place, allocate: Mark, release: Mark, bound: Affine, what: str) -> Obligation:
    held = place.through_step(allocate) - place.before_step(release)
    return Obligation(
        place.rank,
        f"live at {place} ({what})",
        place.guard,
        (at_least(bound, held),),
        (what, str(place.action), place.mb, held),
    )
