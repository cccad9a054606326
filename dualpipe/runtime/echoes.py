"""Which messages prove that a rank's sends have been received."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Mapping

from dualpipe.schedule import MESSAGES, RF, SENDS, SF, B, F, Op, Schedule


def find_echoes(schedule: Schedule, rank: int) -> Mapping[Op, tuple[Op, ...]]:
    """For each receive of ``rank`` the F and B whose sends have been received once it has completed.

    The k-th send of one rank to another matches the k-th receive there.  The peer's compute that needs it waits for it,
    so what the peer posts in a later slot proves that it has arrived.
    """
    mine = _messages(schedule, rank)
    found: dict[Op, list[Op]] = defaultdict(list)
    for peer in {peer for peer, _ in mine}:
        if not 0 <= peer < schedule.ranks:
            continue
        theirs = _messages(schedule, peer)
        used = {
            op.bare: number for number, slot in enumerate(schedule.programs[peer]) for op in slot if op.kind in (F, B)
        }
        answers = theirs.get((rank, True), [])
        numbers = [number for number, _ in answers]
        receives = mine.get((peer, False), [])
        for (_, send), (_, receive) in zip(mine.get((peer, True), []), theirs.get((rank, False), []), strict=False):
            user = used.get(Op(F if receive.kind is RF else B, *receive.task))
            if user is None:
                continue
            at = bisect_right(numbers, user)
            if at < len(receives) and at < len(answers):
                found[receives[at][1].bare].append(Op(F if send.kind is SF else B, *send.task))
    return {receive: tuple(sends) for receive, sends in found.items()}


def _messages(schedule: Schedule, rank: int) -> Mapping[tuple[int, bool], list[tuple[int, Op]]]:
    """The messages of a rank with their slots, by peer and whether they are sends."""
    found: dict[tuple[int, bool], list[tuple[int, Op]]] = defaultdict(list)
    for number, slot in enumerate(schedule.programs[rank]):
        for op in slot:
            peer = schedule.peer(op) if op.kind in MESSAGES else None
            if peer is not None:
                found[peer, op.kind in SENDS].append((number, op))
    return found
