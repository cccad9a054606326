"""The bug museum: faults of order and of messages that real pipeline implementations shipped or were reported with.

Each exhibit plants one in a schedule of ours, and names the check that has to catch it with the beginning of the story.
"""

from collections.abc import Callable
from dataclasses import dataclass

from dualpipe.generate import dualpipe, dualpipev, one_f_one_b, zb1p
from dualpipe.schedule import DOWN, RECEIVES, RF, SENDS, UP, B, F, Kind, Op, Program, Schedule, W
from tests.mutations import drop, duplicate, insert, relabelled, reorder, split_all, take_out


@dataclass(frozen=True)
class Exhibit:
    """A fault: where it was seen, how it is planted, the checks that refute it and how the story of the first begins."""

    name: str
    seen_in: str
    plant: Callable[[], Schedule]
    checks: tuple[str, ...]
    story: str


def find(schedule: Schedule, op: Op) -> tuple[int, int, int]:
    """Rank, slot and position of an op."""
    return next((rank, slot, position) for rank, slot, position, other in schedule if other == op)


def both_sides_send_first() -> Schedule:
    return split_all(one_f_one_b(2, 4), key=lambda op: op.kind in RECEIVES)


def receives_and_sends_not_coalesced() -> Schedule:
    return split_all(one_f_one_b(4, 8), key=lambda op: op.kind in SENDS)


def ring(ranks: int) -> Schedule:
    """Two stages a rank, placed in a ring; all forwards, then all backwards, with as many microbatches as ranks.

    Every rank sends to the next one and receives from the one before in the same batch, all at the same time::

        rank 0   0F0 0F1 0F2 0F3 4F0 4F1 ...
        rank 1       1F0 1F1 1F2 1F3 5F0 ...
        rank 2           2F0 2F1 2F2 2F3 ...
        rank 3               3F0 3F1 3F2 ...
    """

    def program(rank: int) -> Program:
        forwards = [Op(F, UP, rank + ranks * turn, mb) for turn in (0, 1) for mb in range(ranks)]
        backwards = [Op(B, UP, rank + ranks * turn, mb) for turn in (1, 0) for mb in range(ranks)]
        slots = [*_with_messages(forwards, 2 * ranks - 1), *_with_messages(backwards, 0)]
        return tuple(slots)

    return Schedule({UP: (*range(ranks), *range(ranks))}, tuple(map(program, range(ranks))))


def _with_messages(computes: list[Op], last: int) -> Program:
    """Each compute with its W if it is a B; between two, what the one produced is sent and the other's input received."""
    slots: list[tuple[Op, ...]] = []
    batch: tuple[Op, ...] = ()
    for op in computes:
        send, receive = (Kind("S" + op.kind), Kind("R" + op.kind))
        first = 0 if op.kind is F else max(op.stage, *(other.stage for other in computes))
        begins = op.stage == 0 if op.kind is F else _is_end(op, computes)
        batch += () if begins else (op._replace(kind=receive),)
        slots += [batch] if batch else []
        slots.append((op,) if op.kind is F else (op, op._replace(kind=W)))
        batch = () if op.stage == last else (op._replace(kind=send),)
        del first
    return (*slots, batch) if batch else tuple(slots)


EXHIBITS: tuple[Exhibit, ...] = ()
