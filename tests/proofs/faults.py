"""Faults of order and of messages that real pipeline implementations shipped, each planted in a schedule of ours.

``plant`` returns the faulty schedule.  All ``checks`` must refute it, and the story of the first one matches
``says``.  The numbers are those of docs/reference/museum.md.
"""

from ci.faults.fault import Fault
from dualpipe.schedule import DOWN, RECEIVES, RF, SENDS, UP, B, F, Kind, Lane, Op, Program, Schedule, Slot, W
from dualpipe.schedule.generate import dualpipe, dualpipev, one_f_one_b, zb1p
from tests.mutations import drop, duplicate, insert, relabelled, reorder, split_all, take_out


def place(schedule: Schedule, op: Op) -> tuple[int, int, int]:
    """Rank, slot and position of an op."""
    return next((rank, slot, position) for rank, slot, position, other in schedule if other == op)


def both_sides_send_first() -> Schedule:
    return split_all(one_f_one_b(2, 4), key=lambda op: op.kind in RECEIVES)


def a_ring_sends_before_it_receives() -> Schedule:
    return split_all(ring(4), key=lambda op: op.kind in RECEIVES)


def previous_and_next_peer_are_one() -> Schedule:
    """With two ranks all messages of a rank go to the same peer; one side has them in the order of the other lane."""
    rank, slot, _ = place(dualpipe(2, 8), Op(RF, UP, 1, 2))
    return reorder(dualpipe(2, 8), rank, slot, *_swapped(dualpipe(2, 8).programs[rank][slot], RECEIVES))


def two_sends_of_a_batch_swapped() -> Schedule:
    schedule = dualpipe(4, 8)
    rank, slot = next(
        (rank, number)
        for rank, program in enumerate(schedule.programs)
        for number, slot in enumerate(program)
        if len(_to_one_peer(schedule, slot)) == 2
    )
    return reorder(schedule, rank, slot, *_swapped(schedule.programs[rank][slot], SENDS))


def _to_one_peer(schedule: Schedule, slot: Slot) -> list[Op]:
    sends = [op for op in slot if op.kind in SENDS]
    return sends if len({schedule.peer(op) for op in sends}) == 1 else []


def _swapped(slot: Slot, kinds: frozenset[Kind]) -> list[int]:
    """The positions of a slot with the first two ops of these kinds exchanged."""
    positions = list(range(len(slot)))
    one, other = [position for position in positions if slot[position].kind in kinds][:2]
    positions[one], positions[other] = other, one
    return positions


def receives_and_sends_not_coalesced() -> Schedule:
    return split_all(one_f_one_b(4, 8), key=lambda op: op.kind in SENDS)


def a_receive_nobody_consumes() -> Schedule:
    schedule = one_f_one_b(4, 8)
    rank, slot, _ = place(schedule, Op(F, UP, 1, 7))
    return insert(schedule, rank, slot, (Op(RF, UP, 1, 8),))


def weight_gradient_of_an_empty_queue() -> Schedule:
    schedule = zb1p(4, 8)
    rank, slot, position = place(schedule, Op(W, UP, 2, 0))
    return take_out(schedule, rank, slot, position, place(schedule, Op(B, UP, 2, 0))[1])


def weight_gradient_stored_and_never_run() -> Schedule:
    return drop(zb1p(4, 8), *place(zb1p(4, 8), Op(W, UP, 3, 7)))


def stages_in_a_loop_for_a_v() -> Schedule:
    v = dualpipev(4, 8)
    return Schedule({UP: (0, 1, 2, 3, 0, 1, 2, 3)}, v.programs, v.name)


def mirror_chunk_used_by_the_wrong_lane() -> Schedule:
    other = {UP: DOWN, DOWN: UP}
    return relabelled(dualpipe(4, 8), (2, 3), lambda op: op._replace(lane=other[op.lane]))


def a_receive_too_many_on_a_middle_rank() -> Schedule:
    return duplicate(dualpipe(4, 8), *place(dualpipe(4, 8), Op(RF, UP, 1, 2)))


def ring(ranks: int) -> Schedule:
    """Two stages a rank, placed in a ring; all forwards, then all backwards, as many microbatches as ranks.

    Every rank sends to the next one and receives from the one before in one batch, all at the same time::

        rank 0   0F0 0F1 0F2 0F3 4F0 4F1 ...
        rank 1       1F0 1F1 1F2 1F3 5F0 ...
        rank 2           2F0 2F1 2F2 2F3 ...
        rank 3               3F0 3F1 3F2 ...
    """
    routes: dict[Lane, tuple[int, ...]] = {UP: (*range(ranks), *range(ranks))}
    world = Schedule(routes, ((),) * ranks)

    def program(rank: int) -> Program:
        slots: list[Slot] = []
        batch: list[Op] = []
        turns = [(F, 0), (F, 1), (B, 1), (B, 0)]
        for op in (Op(kind, UP, rank + ranks * turn, mb) for kind, turn in turns for mb in range(ranks)):
            before, after = (op._replace(kind=Kind(side + op.kind)) for side in "RS")
            batch += filter(world.crosses, [before])
            slots += [tuple(batch)] if batch else []
            slots.append((op,) if op.kind is F else (op, op._replace(kind=W)))
            batch = list(filter(world.crosses, [after]))
        return (*slots, tuple(batch)) if batch else tuple(slots)

    return Schedule(routes, tuple(map(program, range(ranks))))


FAULTS = (
    Fault(
        1,
        "both sides send first after receives were deferred",
        both_sides_send_first,
        ("deadlock",),
        "rank 0 waits in slot 3 .0SF1>. until rank 1 receives the activation of microbatch 1",
    ),
    Fault(
        2,
        "fixed order of an exchange in a ring of four",
        a_ring_sends_before_it_receives,
        ("deadlock",),
        "rank 0 waits in slot 7 .0SF3>. until rank 1 receives the activation of microbatch 3",
    ),
    Fault(
        3,
        "two ranks: previous and next peer are the same",
        previous_and_next_peer_are_one,
        ("messages",),
        "rank 1 expects the gradient of microbatch 1 of lane <",
    ),
    Fault(
        4,
        "two sends of one slot swapped",
        two_sends_of_a_batch_swapped,
        ("messages",),
        "rank 1 expects the activation of microbatch 3 of lane >",
    ),
    Fault(
        7,
        "forward receive and backward send not coalesced",
        receives_and_sends_not_coalesced,
        ("deadlock",),
        "rank 2 waits in slot 5 .2RB0>. until rank 3 sends it the gradient of microbatch 0",
    ),
    Fault(
        9,
        "a receive nobody consumes",
        a_receive_nobody_consumes,
        ("messages", "complete", "deadlock"),
        "rank 1 waits in slot 25 .1RF8>. for the activation of microbatch 8",
    ),
    Fault(
        10,
        "W taken from an empty queue",
        weight_gradient_of_an_empty_queue,
        ("order",),
        "rank 2 computes the weight gradient of microbatch 0 at stage 2 of lane > in slot 5 .2W0>.",
    ),
    Fault(
        11,
        "W stored and never run",
        weight_gradient_stored_and_never_run,
        ("complete",),
        "rank 3 never computes the weight gradient of microbatch 7",
    ),
    Fault(
        31,
        "stages placed in a loop instead of a V",
        stages_in_a_loop_for_a_v,
        ("messages", "complete"),
        "rank 0 receives the activation of microbatch 0 of lane > .stage 6 to stage 7. from rank 2",
    ),
    Fault(
        33,
        "the mirror chunk used by the wrong lane on the second half of the ranks",
        mirror_chunk_used_by_the_wrong_lane,
        ("messages", "complete"),
        "rank 2 receives the activation of microbatch 0 of lane > .stage 0 to stage 1. from rank 0",
    ),
    Fault(
        34,
        "one receive too many on a middle rank",
        a_receive_too_many_on_a_middle_rank,
        ("messages", "deadlock"),
        "rank 1 expects the activation of microbatch 2 of lane >",
    ),
)
