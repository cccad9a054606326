"""1F1B and ZB1P at every size: ranks 0 to P - 1 in a row, one lane, one table.

down   rank r -> rank r + 1   activations     0 <= r <= P - 2
up     rank r + 1 -> rank r   gradients
"""

from __future__ import annotations

from collections.abc import Mapping

from dualpipe.schedule import RB, RF, SB, SF
from dualpipe.schedule.generate import ONE_F_ONE_B, ZB1P
from dualpipe.schedule.phase_table import Action, Affine, Table, symbol
from proofs.theorems.constraint import at_least, below, equal
from proofs.theorems.family import Bounds, Family, Times, i
from proofs.theorems.obligation import Link
from proofs.theorems.symbolic import Rank

P, M, r = symbol("P"), symbol("M"), symbol("r")

ONE_F_ONE_B_TIMES: Times = {
    "1 warm-up": (r + i,),
    "2 one forward, one backward": (3 * P - 2 * r - 3 + 3 * i, 3 * P - 2 * r - 2 + 3 * i),
    "2 last": (3 * M + r - 3, 3 * M + r - 2),
    "3 cooldown": (3 * M + r + 1 + 3 * i,),
    "end": (3 * M + 3 * P - 2 * r - 3,),
}

ZB1P_TIMES: Times = {
    "1 warm-up": (r + i,),
    "2 weights deferred": (2 * P - r - 2 + 3 * i, 2 * P - r - 1 + 3 * i),
    "3 one of each": (2 * P + 2 * r - 2 + 3 * i, 2 * P + 2 * r - 1 + 3 * i, 2 * P + 2 * r + 3 * i),
    "3 last": (3 * M - P + 2 * r - 2, 3 * M - P + 2 * r - 1, 3 * M - P + 2 * r),
    "4 cooldown": (3 * M + r + 2 * i, 3 * M + r + 1 + 2 * i),
    "5 weights": (3 * M + 2 * P - r - 2 + i,),
    "end": (3 * M + 2 * P - 2,),
}


def one_f_one_b(table: Table = ONE_F_ONE_B) -> Family:
    """1F1B: at most P - r microbatches in flight on rank r, and 3(P - 1) units of bubble."""
    bounds = Bounds(
        live=(P - r,),
        memory=P - r,
        pending=None,
        makespan=3 * M + 3 * (P - 1),
        words={"live": "P - r on rank r", "memory": "P - r on rank r", "makespan": "3M + 3(P - 1)"},
    )
    return _one_lane("1f1b", table, ONE_F_ONE_B_TIMES, bounds)


def zb1p(table: Table = ZB1P) -> Family:
    """ZB1P: on every rank the memory of 1F1B's first rank, at most r + 1 deferred W, and 2(P - 1) units of bubble."""
    bounds = Bounds(
        live=(P - r,),
        memory=P,
        pending=r + 1,
        makespan=3 * M + 2 * (P - 1),
        words={
            "live": "P - r on rank r",
            "memory": "P on every rank",
            "pending": "r + 1 on rank r",
            "makespan": "3M + 2(P - 1)",
        },
    )
    return _one_lane("zb1p", table, ZB1P_TIMES, bounds)


def _one_lane(name: str, table: Table, times: Times, bounds: Bounds) -> Family:
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
        chunks=(0,),
        each=M,
        times={"rank": times},
        bounds=bounds,
        values=_values,
        world=lambda values: (values["P"], values["M"]),
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
