"""Theorem ``order``: on its own rank every op runs after what it needs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from dualpipe.schedule import RB, RF, SB, SF, B, F, Kind, W
from dualpipe.schedule.phase_table import Action
from proofs.theorems.constraint import at_least, equal
from proofs.theorems.family import Family
from proofs.theorems.obligation import Obligation
from proofs.theorems.symbolic import Rank, earlier, exactly

NEEDS: Mapping[Kind, tuple[Kind, ...]] = {F: (RF,), B: (F, RB), W: (B,), SF: (F,), SB: (B,)}
"""For each kind the kinds of its own chunk that it needs, if they exist.

The coverage test compares this with ``Schedule.needs``.
"""


def order(family: Family) -> Iterator[Obligation]:
    for rank in family.ranks:
        for kind, needed in NEEDS.items():
            for chunk in family.chunks:
                for required in needed:
                    yield from _after(rank, Action(kind, chunk), Action(required, chunk))
        for action, other in family.turn.get(rank.kind, {}).items():
            yield from _after(rank, action, other)


def _after(rank: Rank, action: Action, need: Action) -> Iterator[Obligation]:
    needed = rank.positions(exactly(need), "j")
    for second in rank.positions(exactly(action), "i"):
        for first in needed:
            yield Obligation(
                rank,
                f"{second} after {first}",
                (*second.guard, *first.guard, equal(second.mb, first.mb)),
                (at_least(earlier(first, second), 0),),
                (str(action), second.mb, str(need), first.mb),
            )
