"""DualPipe and DualPipeV, also with late W, at every size: N ranks from an end to the middle, two chunks each.

    DualPipe    0 -> 1 -> .. -> N-1 | N-1 <- .. <- 1 <- 0      2N ranks; the mirrored half runs the same tables
    DualPipeV   0 -> 1 -> .. -> N-1 )                          N ranks; the lane turns in the middle rank

h is a rank's distance from the nearer end.  Ranks with h <= N - 2 are *outer*, h = N - 1 is the *middle* (*lone* if
N = 1).  Since some counts of a table depend on whether h is odd, h is written ``2 e + odd``.
"""

from __future__ import annotations

from collections.abc import Mapping

from dualpipe.schedule import RB, RF, SB, SF, B, F
from dualpipe.schedule.generate import TWO_WAY, LateW, with_late_w
from dualpipe.schedule.phase_table import Action, Affine, Table, symbol
from proofs.theorems.constraint import Constraints, at_least, equal
from proofs.theorems.family import Bounds, Family
from proofs.theorems.obligation import Link
from proofs.theorems.symbolic import Rank

N, H, h = symbol("N"), symbol("H"), symbol("h")

TURN = {Action(F, 1): Action(F, 0), Action(B, 0): Action(B, 1)}
"""The actions of DualPipeV's middle rank that need its other chunk, where DualPipe receives from the mirror rank."""


def dualpipe(outer: Table | None = None, middle: Table | None = None, late_w: LateW = LateW.none) -> Family:
    """DualPipe, with P = 2N ranks and M = 2H microbatches, half on each lane; tables not given are its own."""
    return _two_way(
        with_late_w("dualpipe", late_w),
        "all even P >= 2 and all even M >= 2P",
        _ranks(outer or TWO_WAY[late_w].outer, middle or TWO_WAY[late_w].middle, folded=False),
        {
            "live": "P - h on the lane that enters at the nearer end, h + 1 on the other (h = min(r, P - 1 - r))",
            "memory": "P + 1 on every rank",
            "pending": "min(r, P - 1 - r) + 1 on rank r",
            "way": "every microbatch enters at either end and passes the P ranks in their order, one stage on each",
        },
    )


def dualpipev(outer: Table | None = None, middle: Table | None = None, late_w: LateW = LateW.none) -> Family:
    """DualPipeV, with P = N ranks and M = H microbatches, each on both chunks of every rank."""
    return _two_way(
        with_late_w("dualpipev", late_w),
        "all P >= 1 and all M >= 2P",
        _ranks(outer or TWO_WAY[late_w].outer, middle or TWO_WAY[late_w].middle, folded=True),
        {
            "live": "2P - r in the lane's first half, r + 1 in its second on rank r",
            "memory": "2P + 1 on every rank",
            "pending": "r + 1 on rank r",
            "way": "every microbatch passes the P ranks in their order and then all the way back, one stage on each",
        },
    )


Ranks = Mapping[str, Mapping[str, Rank]]
"""For each suffix the kinds of rank by name."""


def _two_way(name: str, sizes: str, ranks: Ranks, words: Mapping[str, str]) -> Family:
    kinds = ranks[""]
    folded = kinds["lone"].exists[Action(SF, 0)] is None
    lanes = 1 if folded else 2
    return Family(
        name=name,
        sizes=sizes,
        ranks=tuple(kinds.values()),
        links=(*_rows(ranks), *(() if folded else _mirrors(ranks))),
        deepest=(kinds["middle"], kinds["lone"]),
        chunks=(0, 1),
        stages=(h, 2 * N - 1 - h),
        each=H,
        bounds=Bounds(
            live=(2 * N - h, h + 1),
            memory=2 * N + 1,
            pending=h + 1,
            least=6 * H + N - 1,
            words=words,
        ),
        values=_values,
        world=(N * lanes, H * lanes),
        turn=dict.fromkeys(("middle", "lone"), TURN) if folded else {},
    )


def _ranks(outer: Table, middle: Table, folded: bool) -> Ranks:
    return {suffix: _kinds(outer, middle, folded, suffix) for suffix in ("", "'")}


def _kinds(outer: Table, middle: Table, folded: bool, suffix: str) -> Mapping[str, Rank]:
    distance = _distance(suffix)
    sizes = {"N": N, "H": H, "h": distance, "odd": symbol(f"odd{suffix}")}
    every = (at_least(H, 2 * N), at_least(distance, 0), at_least(sizes["odd"], 0), at_least(1, sizes["odd"]))
    outwards = (at_least(distance, 1),)
    edge = dict.fromkeys((Action(RF, 0), Action(SB, 0), Action(SF, 1), Action(RB, 1)), outwards)
    nothing: dict[Action, Constraints | None] = dict.fromkeys(edge, None)
    turn: dict[Action, Constraints | None] = dict.fromkeys(
        (Action(SF, 0), Action(RB, 0), Action(RF, 1), Action(SB, 1)), None if folded else ()
    )
    return {
        "outer": Rank("outer", outer, sizes, (*every, at_least(N - 2, distance)), edge, suffix),
        "middle": Rank("middle", middle, sizes, (*every, at_least(N, 2), equal(N - 1, distance)), edge | turn, suffix),
        "lone": Rank("lone", middle, sizes, (*every, equal(N, 1), equal(distance, 0)), nothing | turn, suffix),
    }


def _rows(ranks: Ranks) -> tuple[Link, ...]:
    """Between neighbours on the same side of the middle: inwards from h to h + 1, and outwards."""
    inwards = {Action(SF, 0): Action(RF, 0), Action(SB, 1): Action(RB, 1)}
    outwards = {Action(SF, 1): Action(RF, 1), Action(SB, 0): Action(RB, 0)}
    tie = (equal(_distance("'"), _distance("") + 1),)
    here = ranks[""]["outer"]
    return tuple(
        link
        for kind in ("outer", "middle")
        for there in (ranks["'"][kind],)
        for link in (
            Link(f"outer to {kind}", here, there, inwards, tie),
            Link(f"{kind} to outer", there, here, outwards, tie),
        )
    )


def _mirrors(ranks: Ranks) -> tuple[Link, ...]:
    """Between the two ranks in the middle, which mirror each other."""
    across = {Action(SF, 0): Action(RF, 1), Action(SB, 1): Action(RB, 0)}
    tie = (equal(_distance("'"), _distance("")),)
    return tuple(
        Link(f"{kind} to {kind}", ranks[""][kind], ranks["'"][kind], across, tie) for kind in ("middle", "lone")
    )


def _distance(suffix: str) -> Affine:
    return 2 * symbol(f"e{suffix}") + symbol(f"odd{suffix}")


def _values(sizes: Mapping[str, int], suffix: str) -> dict[str, int]:
    near, parity = divmod(sizes["h"], 2)
    return {"N": sizes["N"], "H": sizes["H"], f"e{suffix}": near, f"odd{suffix}": parity}
