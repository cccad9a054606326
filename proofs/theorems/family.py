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

``"NAME, last"`` speaks of the row's last iteration where that differs, ``"end"`` of the end of the program.
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
        Together they must be all ranks and all ordered pairs that exchange messages (the coverage control looks).
    chunks:
        The numbers of the table's chunks.
    each:
        How many microbatches pass each chunk.
    times:
        For each kind of rank the times that the deadlock theorem rests on.
    bounds:
        What the theorems about memory and time claim, by name.
    values:
        ``values(plan_sizes, suffix)``: the symbols of a rank with this suffix, at one size.
    world:
        ``world(values)``: ranks and microbatches of the size that the symbols stand for.
    turn:
        For each kind of rank what an op needs of the other chunk (where a lane turns).
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

    ``live`` is for each chunk the microbatches between F and the end of B, ``memory`` all chunks' between F and the
    end of W, ``pending`` the W that wait (``None`` if none ever does), ``makespan`` the end with every F, B and W
    taking one unit of time.
    The texts say the same in words.  ``makespan_reached``: whether the schedules of two or more ranks really take that
    long where messages block, which a test compares.
    """

    live: tuple[Affine, ...]
    memory: Affine
    pending: Affine | None
    makespan: Affine
    words: Mapping[str, str]
    makespan_reached: bool = True
