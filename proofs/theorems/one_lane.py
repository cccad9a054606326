"""1F1B and ZB1P at every size: ranks 0 to P - 1 in a row, one lane, one table.

down   rank r -> rank r + 1   activations     0 <= r <= P - 2
up     rank r + 1 -> rank r   gradients
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from dualpipe.schedule import RB, RF, SB, SF
from dualpipe.schedule.generate import ONE_F_ONE_B, ZB1P
from dualpipe.schedule.phase_table import Action, Affine, Table, symbol
from proofs.theorems.constraint import at_least, below, equal
from proofs.theorems.family import Bounds, Family
from proofs.theorems.obligation import Link
from proofs.theorems.symbolic import Rank

P, M, r = symbol("P"), symbol("M"), symbol("r")

LEAST = 3 * M + P - 1
WAY = "every microbatch passes the P ranks in their order, one stage on each"


def one_f_one_b(table: Table = ONE_F_ONE_B) -> Family:
    """1F1B: at most P - r microbatches in flight on rank r."""
    bounds = Bounds(
        live=(P - r,),
        memory=P - r,
        pending=None,
        least=LEAST,
        words={"live": "P - r on rank r", "memory": "P - r on rank r", "way": WAY},
    )
    return _one_lane("1f1b", table, bounds)


def zb1p(table: Table = ZB1P) -> Family:
    """ZB1P: on every rank the memory of 1F1B's first rank, and at most r + 1 deferred W."""
    bounds = Bounds(
        live=(P - r,),
        memory=P,
        pending=r + 1,
        least=LEAST,
        words={
            "live": "P - r on rank r",
            "memory": "P on every rank",
            "pending": "r + 1 on rank r",
            "way": WAY,
        },
    )
    return _one_lane("zb1p", table, bounds)


def _one_lane(name: str, table: Table, bounds: Bounds) -> Family:
    here, next_one = _rank(table, r, ""), _rank(table, symbol("r'"), "'")
    tie = (equal(symbol("r'"), r + 1),)
    return Family(
        name=name,
        sizes="all P >= 1 and all M >= P",
        ranks=(here,),
        links=(
            Link("down", here, next_one, {Action(SF, 0): Action(RF, 0)}, tie),
            Link("up", next_one, here, {Action(SB, 0): Action(RB, 0)}, tie),
        ),
        deepest=(replace(here, domain=(*here.domain, equal(r, P - 1))),),
        chunks=(0,),
        stages=(r,),
        each=M,
        bounds=bounds,
        values=_values,
        world=(P, M),
    )


def _rank(table: Table, number: Affine, suffix: str) -> Rank:
    before, behind = (at_least(number, 1),), (below(number, P - 1),)
    return Rank(
        "rank",
        table,
        {"P": P, "M": M, "r": number},
        (at_least(P, 1), at_least(M, P), at_least(number, 0), below(number, P)),
        {Action(RF, 0): before, Action(SB, 0): before, Action(SF, 0): behind, Action(RB, 0): behind},
        suffix,
    )


def _values(sizes: Mapping[str, int], suffix: str) -> dict[str, int]:
    return {"P": sizes["P"], "M": sizes["M"], f"r{suffix}": sizes["r"]}
