"""Interleaved 1F1B and ZBV as orders of computes; ``lower`` adds their messages.

Both have two chunks of one lane on each rank, on 2P stages.  The theorems cover schedules that
``dualpipe.schedule.phase_table`` expands from a table.  It can expand neither, so they have no theorems:

* Interleaved 1F1B goes through groups of P microbatches, first at chunk 0, then at chunk 1.  A table repeats a body of
  fixed length; here the body grows with P, and how often it is repeated is M / P.
* ZBV defers the W of its two chunks in two queues, and ends with one queue after the other.  The W of a table without
  a chunk is the one that the rank deferred first, whatever its chunk.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from dualpipe.schedule import UP, B, F, Op, Program, Schedule, Slot, W
from dualpipe.schedule.phase_table import Row, Table, symbol

CHUNKS = 2
"""Chunks on each rank."""


def interleaved_order(ranks: int, microbatches: int) -> Schedule:
    """Interleaved 1F1B with two chunks a rank, without messages; ``microbatches`` is a multiple of ``ranks``.

    The order of ``get_schedule_table`` in Megatron-core, with its warm-up (arXiv 2104.04473).  Rank ``r`` holds stages
    ``r`` and ``P + r``; every backward is full.
    """
    programs = tuple(_interleaved(ranks, microbatches, rank) for rank in range(ranks))
    return Schedule({UP: tuple(range(ranks)) * CHUNKS}, programs)


def _interleaved(ranks: int, microbatches: int, rank: int) -> Program:
    """Forwards of the warm-up, then one forward and one backward in turn, then the backwards that remain."""
    visits = [
        (chunk, mb)
        for group in range(0, microbatches, ranks)
        for chunk in range(CHUNKS)
        for mb in range(group, group + ranks)
    ]
    forwards = [(Op(F, UP, chunk * ranks + rank, mb),) for chunk, mb in visits]
    backwards: list[Slot] = []
    for chunk, mb in visits:
        stage = (CHUNKS - 1 - chunk) * ranks + rank
        backwards.append((Op(B, UP, stage, mb), Op(W, UP, stage, mb)))
    warm_up = min((CHUNKS - 1) * ranks + 2 * (ranks - rank - 1), len(forwards))
    steady = [slot for pair in zip(forwards[warm_up:], backwards, strict=False) for slot in pair]
    return (*forwards[:warm_up], *steady, *backwards[len(forwards) - warm_up :])


P, M, r = symbol("P"), symbol("M"), symbol("r")

ZBV: Table = (
    Row("1 down the V", 2 * (P - r) - 1, "F0"),
    Row("2 up the V as well", r, "F1 F0"),
    Row("3 first backwards", P - r, "F1 B1 W1"),
    Row("4 steady state", M - 2 * P + r + 1, "F0 B0 W0 F1 B1 W1"),
    Row("5 forwards end", P - r - 1, "B0 W0 F1 B1 W1"),
    Row("6 W deferred", r, "B0 B1"),
    Row("7 backwards end", P - r, "B0 W0"),
    Row("8 weights", r, "W1"),
    Row("8 weights of the way down", r, "W0"),
)
"""The computes of rank ``r``, in rows that only ``zbv_order`` reads.  Unlike in a phase table, ``W0`` is the oldest W
of chunk 0, whether or not it follows its B."""


def zbv_order(ranks: int, microbatches: int) -> Schedule:
    """ZBV (ZB-V of arXiv 2401.10241, section 6) as torch's ``ScheduleZBVZeroBubble`` orders it, without messages.

    Rank ``r`` holds stages ``r`` and ``2P - 1 - r``.  With less than ``2P - 1`` microbatches it is the order for
    ``2P - 1`` without those that do not exist.
    """
    programs = tuple(
        tuple((op,) for op in _zbv(ranks, max(2 * ranks - 1, microbatches), rank) if op.mb < microbatches)
        for rank in range(ranks)
    )
    return Schedule({UP: (*range(ranks), *reversed(range(ranks)))}, programs)


def _zbv(ranks: int, microbatches: int, rank: int) -> Iterator[Op]:
    sizes = {"P": ranks, "M": microbatches, "r": rank}
    stages = (rank, 2 * ranks - 1 - rank)
    counts = Counter[tuple[str, int]]()
    for row in ZBV:
        for (kind, chunk), *_ in row.steps * row.times(sizes):
            if chunk is None:
                raise AssertionError(f"row {row.name!r} names no chunk")
            yield Op(kind, UP, stages[chunk], counts[kind, chunk])
            counts[kind, chunk] += 1
