"""Plain search, the first of the two methods: one pass over the programs for each check, in linear time.

``complete`` counts, ``order`` keeps a set of the ops that each rank has done, ``messages`` pairs the sends of an
ordered pair of ranks with its receives and the collectives of a group's members with each other, ``accumulation``
remembers the last B and W of each stage.  ``deadlock`` is in ``proofs.deadlock_search`` and ``memory`` in
``proofs.memory``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import assert_never

from dualpipe.schedule import (
    COLLECTIVES,
    COMPUTE,
    MESSAGES,
    RECEIVES,
    SENDS,
    SF,
    B,
    Chunk,
    Kind,
    Lane,
    Op,
    Placed,
    Schedule,
    W,
)
from proofs.findings import (
    Clash,
    Empty,
    Finding,
    LeftAlone,
    LeftOver,
    Mismatch,
    Missing,
    NoPeer,
    NotMember,
    NotNeighbour,
    OutOfOrder,
    Repeated,
    SentTwice,
    Stray,
    TooEarly,
)
from proofs.verdict import Proved, Refuted, Verdict

COMPUTES = (Kind.F, Kind.B, Kind.W)
_PairFault = Mismatch | LeftOver | SentTwice
"""The faults of the messages of one ordered pair of ranks."""


def complete(schedule: Schedule) -> Verdict:
    """Every stage runs F, B and W exactly once for each microbatch of its lane.

    The microbatches of a lane are 0 to the largest that any op names, messages included, so a receive for a
    microbatch that no stage runs is found here too.  The work grows with the ops and not with that number.
    """
    return _verdict(_incomplete(schedule))


def _incomplete(schedule: Schedule) -> Finding | None:
    ran: dict[tuple[Chunk, Kind], dict[int, Placed]] = {
        (Chunk(lane, stage), kind): {}
        for lane, route in schedule.routes.items()
        for stage in range(len(route))
        for kind in COMPUTES
    }
    computes = [placed for placed in schedule if placed.op.kind in COMPUTE]
    if not computes:
        return Empty()
    for placed in computes:
        op = placed.op
        if placed.rank != schedule.rank_of(op):
            return Stray(placed, schedule.rank_of(op))
        first = ran[op.chunk, op.kind].setdefault(op.mb, placed)
        if first is not placed:
            return Repeated(first, placed)
    for (chunk, kind), done in ran.items():
        count = schedule.microbatches[chunk.lane]
        if len(done) < count:
            mb = next(number for number in range(count) if number not in done)
            return Missing(Op(kind, *chunk, mb), schedule.routes[chunk.lane][chunk.stage], count - 1)
    return None


def order(schedule: Schedule) -> Verdict:
    """Every op runs after what it needs on its own rank; ops of one slot run in the order written.

    The last reduction of a stage's gradients needs every W of that stage that its rank runs.
    """
    done: set[Op] = set()
    rank = -1
    early: list[tuple[Placed, Op]] = []
    for placed in schedule:
        if placed.rank != rank:
            rank, done = placed.rank, set()
        op = placed.op
        if op.kind not in RECEIVES:  # a receive needs another rank's send, which `messages` and `deadlock` check
            early += ((placed, need) for need in schedule.needs(op) if need not in done)
        done.add(op.bare)
    early += _reduced_early(schedule)
    if not early:
        return Proved()
    placed, need = min(early, key=lambda found: (found[0].slot, found[0].rank))
    later = (other for other in schedule if other.rank == placed.rank and other.op.bare == need)
    return Refuted(TooEarly(placed, need, next(later, None)))


def _reduced_early(schedule: Schedule) -> Iterator[tuple[Placed, Op]]:
    """The last reduction of every stage on every rank with the first W after it, if there is one."""
    last: dict[tuple[int, Chunk], tuple[Placed, Op | None]] = {}
    for placed in schedule:
        key = placed.rank, placed.op.chunk
        if placed.op.kind is Kind.RG:
            last[key] = placed, None
        elif placed.op.kind is W and key in last and last[key][1] is None:
            last[key] = last[key][0], placed.op
    return ((reduction, late) for reduction, late in last.values() if late is not None)


def messages(schedule: Schedule) -> Verdict:
    """Peers are the lane's neighbours, and the k-th send of every ordered pair is what its k-th receive expects.

    The k-th collective of a group is the same for all its members.
    """
    sends: dict[tuple[int, int], list[Placed]] = {}
    receives: dict[tuple[int, int], list[Placed]] = {}
    for placed in schedule:
        if placed.op.kind not in MESSAGES:
            continue
        peer = schedule.peer(placed.op)
        wrong = _wrong_peer(schedule, placed, peer)
        if wrong is not None or peer is None:
            return _verdict(wrong)
        if placed.op.kind in SENDS:
            sends.setdefault((placed.rank, peer), []).append(placed)
        else:
            receives.setdefault((peer, placed.rank), []).append(placed)
    pairs = sorted(sends.keys() | receives.keys())
    found = [fault for pair in pairs for fault in _faults(pair, sends.get(pair, []), receives.get(pair, []))]
    return _verdict(min(found, key=_urgency, default=None) or _wrong_collective(schedule))


def _wrong_collective(schedule: Schedule) -> NotMember | Clash | LeftAlone | None:
    """The first collective of a rank that is no member, of two members that disagree, or that a member never joins."""
    rows: list[dict[int, list[Placed]]] = [{rank: [] for rank in members} for members in schedule.groups]
    for placed in schedule:
        if placed.op.kind in COLLECTIVES and placed.op.peer is not None:
            row = rows[placed.op.peer].get(placed.rank)
            if row is None:
                return NotMember(placed, schedule.groups[placed.op.peer])
            row.append(placed)
    for by_rank in rows:
        first, *others = by_rank.values()
        for other in others:
            for nth, (one, two) in enumerate(zip(first, other, strict=False)):
                if _together(one.op) != _together(two.op):
                    return Clash(one, two, nth)
    for by_rank in rows:
        least = min(by_rank, key=lambda rank: len(by_rank[rank]))
        joined = len(by_rank[least])
        for row in by_rank.values():
            if len(row) > joined:
                return LeftAlone(row[joined], least, joined, joined)
    return None


def _together(op: Op) -> tuple[Kind, int | None]:
    """What the members of a group must agree on: the kind, and except for an all-reduce the stage."""
    return op.kind, None if op.kind is Kind.AR else op.stage


def _wrong_peer(schedule: Schedule, placed: Placed, peer: int | None) -> Finding | None:
    op, ranks = placed.op, schedule.ranks
    neighbour = schedule.neighbour(op)
    if peer is None or neighbour is None or not 0 <= peer < ranks or peer == placed.rank:
        return NoPeer(placed, peer, ranks, schedule.rank_of(op), neighbour)
    if peer != neighbour or placed.rank != schedule.rank_of(op):
        return NotNeighbour(placed, peer, schedule.rank_of(op), neighbour)
    return None


def _faults(pair: tuple[int, int], sends: list[Placed], receives: list[Placed]) -> Iterator[_PairFault]:
    """The first mismatch of an ordered pair, its first message left over, and its first repetition."""
    sender, receiver = pair
    both = min(len(sends), len(receives))
    for nth, (send, receive) in enumerate(zip(sends, receives, strict=False)):
        if _payload(send.op) != _payload(receive.op):
            yield Mismatch(send, receive, nth)
            break
    if len(sends) > both:
        yield LeftOver(sends[both], receiver, both, both)
    if len(receives) > both:
        yield LeftOver(receives[both], sender, both, both)
    seen: dict[Op, Placed] = {}
    for send in sends:
        first = seen.setdefault(send.op.bare, send)
        if first is not send:
            yield SentTwice(first, send)
            break


def _payload(op: Op) -> tuple[bool, Lane, int, int]:
    """What a message carries: whether it is an activation, its lane, the stage before the boundary, the microbatch."""
    forwards = op.kind in (SF, Kind.RF)
    stage_before = op.stage if op.kind in (SF, Kind.RB) else op.stage - 1
    return forwards, op.lane, stage_before, op.mb


def _urgency(fault: _PairFault) -> tuple[int, int]:
    """Mismatches first, since the reader can act on them; then by how early the fault shows."""
    match fault:
        case Mismatch(send, receive, _):
            return 0, max(send.slot, receive.slot)
        case LeftOver(place, _, _, _):
            return 1, place.slot
        case SentTwice(_, second):
            return 2, second.slot
        case _:
            assert_never(fault)


def accumulation(schedule: Schedule) -> Verdict:
    """At each stage and lane the B run in microbatch order, and the W too.

    W adds the gradients of linear layers, B those of all other parameters.
    """
    last: dict[tuple[int, Kind, Chunk], Placed] = {}
    for placed in schedule:
        op = placed.op
        if op.kind in (B, W):
            row = placed.rank, op.kind, op.chunk
            before = last.get(row)
            if before is not None and before.op.mb > op.mb:
                return Refuted(OutOfOrder(before, placed))
            last[row] = placed
    return Proved()


def _verdict(found: Finding | None) -> Verdict:
    return Proved() if found is None else Refuted(found)
