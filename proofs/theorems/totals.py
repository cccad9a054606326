"""Theorem ``totals``: no phase has a negative length, and every counter reaches the number of microbatches."""

from __future__ import annotations

from collections.abc import Iterator

from dualpipe.schedule import MESSAGES, B, F, W
from dualpipe.schedule.phase_table import Action
from proofs.theorems.constraint import NEVER, at_least, equal
from proofs.theorems.family import Family
from proofs.theorems.obligation import Obligation
from proofs.theorems.symbolic import Position, Rank, exactly


def totals(family: Family) -> Iterator[Obligation]:
    for rank in family.ranks:
        for row in rank.table:
            count = rank.count(row)
            yield Obligation(
                rank, f"row {row.name!r} of {rank.name}", (), (at_least(count, 0),), ("row", row.name, count)
            )
        for chunk in family.chunks:
            for kind in (F, B, *sorted(MESSAGES)):
                yield from _total(family, rank, Action(kind, chunk))
        for at in rank.positions(lambda step, p: step[p].kind is W and step[p].chunk is not None, "i"):
            yield Obligation(
                rank,
                f"{at} has its backward beside it",
                at.guard,
                () if _follows_its_backward(at) else (NEVER,),
                ("beside", str(at.action), at.mb),
            )


def _total(family: Family, rank: Rank, action: Action) -> Iterator[Obligation]:
    exists = rank.exists.get(action, ())
    if exists is None:
        return
    total = rank.total(exactly(action))
    yield Obligation(
        rank, f"all {action} of {rank.name}", exists, (equal(total, family.each),), ("all", str(action), total)
    )


def _follows_its_backward(weight: Position) -> bool:
    """Whether a W is the only one in its slot, after the only B of its chunk."""
    step, action = weight.the_step, weight.action
    backward = Action(B, action.chunk)
    return step.count(action) == step.count(backward) == 1 and step.index(backward) < weight.index
