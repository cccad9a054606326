"""What an end of a message was for that never met a partner."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import count

from dualpipe.record.events import Message, MessageId, RecordError
from dualpipe.record.names import Lineage
from dualpipe.schedule import RB, RF, SB, SF, Op


def expected(message: Message, ops: Mapping[MessageId, Op], lineage: Lineage) -> Op:
    """The earliest op that the rank still lacked with that peer; one more than there are where it lacks none.

    Raises ``RecordError`` where the two ranks hold no neighbouring stages.
    """
    had = {op.bare for id, op in ops.items() if id.rank == message.id.rank}
    ran = {(n.lane, n.stage, n.mb) for owner, n in lineage.names.items() if owner.rank == message.id.rank}
    candidates = [_first_lacking(boundary, had) for boundary in _boundaries(message, lineage)]
    if not candidates:
        what = "send to" if message.send else "receive from"
        raise RecordError(
            "every message meets its partner",
            f"rank {message.id.rank}: the {what} rank {message.peer} at {message.at} never did, and the two ranks hold "
            "no neighbouring stages",
            "correct the peer, or let the other rank post its end",
        )
    due = [op for op in candidates if op.mb < _microbatches(op, lineage)] or candidates
    ready = [op for op in due if op.kind is RB and (op.lane, op.stage, op.mb) in ran]
    return min(ready or due, key=lambda op: (op.mb, op.kind))._replace(peer=message.peer)


def _boundaries(message: Message, lineage: Lineage) -> Iterator[Op]:
    """The first op of every kind that such an end can be: by where the lanes cross between the two ranks."""
    with_next, with_previous = (SF, SB) if message.send else (RB, RF)
    for lane, route in lineage.routes.items():
        for stage, holder in enumerate(route):
            for kind, other in ((with_next, stage + 1), (with_previous, stage - 1)):
                if holder == message.id.rank and 0 <= other < len(route) and route[other] == message.peer:
                    yield Op(kind, lane, stage, 0)


def _first_lacking(op: Op, had: set[Op]) -> Op:
    return next(other for mb in count() if (other := op._replace(mb=mb)) not in had)


def _microbatches(op: Op, lineage: Lineage) -> int:
    return 1 + max((name.mb for name in lineage.names.values() if name.lane == op.lane), default=-1)
