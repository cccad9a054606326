"""A family: one named schedule at all its sizes, as kinds of rank and kinds of link."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from dualpipe.schedule.phase_table import Action, Affine, symbol
from proofs.theorems.constraint import Values
from proofs.theorems.obligation import Link
from proofs.theorems.symbolic import Rank

Times = Mapping[str, tuple[Affine | int, ...]]
"""For each row the start of each of its computes in iteration ``i``, in the table's symbols.

``"NAME, last"`` has those of the row's last iteration if that differs, ``"end"`` the end of the program.
"""

i = symbol("i")
"""The iteration of a row, in ``Times``."""


@dataclass(frozen=True)
class Family:
    """One named schedule for all sizes.

    Parameters
    ----------
    name, sizes:
        The schedule's name in ``dualpipe.schedule.generate.PLANS``, and its sizes in words.
    ranks, links:
        Together they must cover all ranks and all ordered pairs that exchange messages (the coverage test checks).
    chunks:
        The numbers of the table's chunks.
    each:
        The number of microbatches of each chunk.
    times:
        For each kind of rank the times that the deadlock theorem relies on.
    bounds:
        The figures that the theorems about memory and time claim.
    values:
        ``values(plan_sizes, suffix)``: the values of a rank's symbols at one size, the symbols ending in the suffix.
    world:
        ``world(values)``: the numbers of ranks and microbatches that the values of the symbols stand for.
    turn:
        For each kind of rank the actions that need one of the rank's other chunk, where a lane turns.
    """

    name: str
    sizes: str
    ranks: tuple[Rank, ...]
    links: tuple[Link, ...]
    chunks: tuple[int, ...]
    each: Affine
    times: Mapping[str, Times]
    bounds: Bounds
    values: Callable[[Mapping[str, int], str], dict[str, int]]
    world: Callable[[Values], tuple[int, int]]
    turn: Mapping[str, Mapping[Action, Action]] = field(default_factory=dict)


@dataclass(frozen=True)
class Bounds:
    """The figures that are claimed, in the table's symbols (so that they may differ from rank to rank).

    ``live`` counts for each chunk the microbatches between F and the end of B, ``memory`` those of all chunks between F
    and the end of W, ``pending`` the deferred W (``None`` if there are none).  ``makespan`` is the end if F, B and W
    take one unit of time each.  ``makespan_reached``: whether schedules of two or more ranks take exactly that long
    with blocking messages, which a test checks.  ``words`` has the figures as text.
    """

    live: tuple[Affine, ...]
    memory: Affine
    pending: Affine | None
    makespan: Affine
    words: Mapping[str, str]
    makespan_reached: bool = True
