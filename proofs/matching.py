"""Which send meets which receive, for what is *told* about a deadlock: who the partner is, and where it stands.

No verdict rests on it: ``proofs.deadlock_search`` counts messages as it runs, ``proofs.deadlock_smt`` matches alone.
"""

from __future__ import annotations

from collections.abc import Iterator

from dualpipe.schedule import COMPUTE, SENDS, Placed, Schedule

Side = dict[tuple[int, int], list[Placed]]
Sides = tuple[Side, Side]


def other_rank(schedule: Schedule, placed: Placed) -> int | None:
    """The rank at the other end of a message if there is one: a rank of the schedule, and not the op's own."""
    peer = schedule.peer(placed.op)
    return peer if peer is not None and 0 <= peer < schedule.ranks and peer != placed.rank else None


def sides(schedule: Schedule) -> Sides:
    """The sends and the receives of each ordered pair of ranks (sender, receiver), in the order posted."""
    sends: Side = {}
    receives: Side = {}
    for placed in schedule:
        if placed.op.kind in COMPUTE:
            continue
        peer = other_rank(schedule, placed)
        if peer is not None and placed.op.kind in SENDS:
            sends.setdefault((placed.rank, peer), []).append(placed)
        elif peer is not None:
            receives.setdefault((peer, placed.rank), []).append(placed)
    return sends, receives


def pairs(schedule: Schedule) -> Iterator[tuple[Placed, Placed]]:
    """Every send with the receive that it meets."""
    sends, receives = sides(schedule)
    for pair, row in sends.items():
        yield from zip(row, receives.get(pair, []), strict=False)
