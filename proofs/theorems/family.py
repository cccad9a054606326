"""A family: one named schedule at all its sizes, as kinds of rank and kinds of link."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

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
        Together they must be all ranks and all ordered pairs that exchange messages (the coverage control looks).
    chunks:
        The numbers of the table's chunks.
    each:
        How many microbatches pass each chunk.
    bounds:
        What the theorems about memory claim, by name.
    values:
        ``values(plan_sizes, suffix)``: the symbols of a rank with this suffix, at one size.
    world:
        The numbers of ranks and of microbatches, each in one symbol of the sizes.
    turn:
        For each kind of rank what an op needs of the other chunk (where a lane turns).
    """

    name: str
    sizes: str
    ranks: tuple[Rank, ...]
    links: tuple[Link, ...]
    chunks: tuple[int, ...]
    each: Affine
    bounds: Bounds
    values: Callable[[Mapping[str, int], str], dict[str, int]]
    world: tuple[Affine, Affine]
    turn: Mapping[str, Mapping[Action, Action]] = field(default_factory=dict)

    def size_of(self, values: Values) -> tuple[int, int]:
        """Ranks and microbatches of the size that the symbols stand for."""
        ranks, microbatches = self.world
        return ranks.at(values), microbatches.at(values)


@dataclass(frozen=True)
class Bounds:
    """The figures that are claimed, in the table's symbols (so that they may differ from rank to rank).

    ``live`` is for each chunk the microbatches between F and the end of B, ``memory`` all chunks' between F and the
    end of W, ``pending`` the W that wait (``None`` if none ever does).  The texts say the same in words.
    """

    live: tuple[Affine, ...]
    memory: Affine
    pending: Affine | None
    words: Mapping[str, str]
