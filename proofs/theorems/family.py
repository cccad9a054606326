"""A family: one named schedule at all its sizes, as kinds of rank and kinds of link."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction

from dualpipe.schedule.phase_table import Action, Affine
from proofs.theorems.constraint import Values
from proofs.theorems.obligation import Link
from proofs.theorems.symbolic import Rank


@dataclass(frozen=True, eq=False)
class Family:
    """One named schedule for all sizes.

    Parameters
    ----------
    name, sizes:
        The schedule's name in ``dualpipe.schedule.generate.PLANS``, and its sizes in words.
    ranks, links:
        Together they must cover all ranks and all ordered pairs that exchange messages (the coverage test checks).
    deepest:
        The ranks that no microbatch reaches sooner than any other; at every size there is one of them.
    chunks, stages:
        The numbers of the table's chunks, and the stage of each in the table's symbols.
    each:
        The number of microbatches of each chunk.
    bounds:
        The figures that the theorems about memory claim.
    values:
        ``values(plan_sizes, suffix)``: the values of a rank's symbols at one size, the symbols ending in the suffix.
    world:
        The numbers of ranks and of microbatches, each in one symbol of the sizes.
    turn:
        For each kind of rank the actions that need one of the rank's other chunk, where a lane turns.
    """

    name: str
    sizes: str
    ranks: tuple[Rank, ...]
    links: tuple[Link, ...]
    deepest: tuple[Rank, ...]
    chunks: tuple[int, ...]
    stages: tuple[Affine, ...]
    each: Affine
    bounds: Bounds
    values: Callable[[Mapping[str, int], str], dict[str, int]]
    world: tuple[Affine, Affine]
    turn: Mapping[str, Mapping[Action, Action]] = field(default_factory=dict)

    def size_of(self, values: Values) -> tuple[int, int]:
        """Ranks and microbatches of the size with these values of the symbols."""
        ranks, microbatches = self.world
        return ranks.at(values), microbatches.at(values)

    def in_words(self, bound: Affine) -> str:
        """A bound in ranks P and microbatches M: ``"3M + P/2 - 1"``."""
        parts = [(Fraction(bound.constant), "")]
        for expression, letter in zip(self.world, "PM", strict=True):
            ((name, factor),) = expression.terms.items()
            parts.insert(0, (Fraction(bound.terms.get(name, 0), factor), letter))
        text = ""
        for value, letter in parts:
            if value:
                sign = ("-" if value < 0 else "") if not text else (" - " if value < 0 else " + ")
                number = str(abs(value.numerator)) if abs(value.numerator) != 1 or not letter else ""
                text += sign + number + letter + (f"/{value.denominator}" if value.denominator != 1 else "")
        return text or "0"


@dataclass(frozen=True)
class Bounds:
    """The figures that are claimed, in the table's symbols (so that they may differ from rank to rank).

    ``live`` counts for each chunk the microbatches between F and the end of B, ``memory`` those of all chunks between F
    and the end of W, ``pending`` the deferred W (``None`` if there are none).  ``least`` is the time before which no
    schedule whose microbatches go the same way can end.  ``words`` has the figures as text, and that way.
    """

    live: tuple[Affine, ...]
    memory: Affine
    pending: Affine | None
    least: Affine
    words: Mapping[str, str]
