"""The op of every message end: by what it holds, what takes it, what its partner is, or what was to come next.

Each end of a message is named by its own side: a send by the tensor that it was given, a receive by the computation
that later takes what it brought.  The two need not agree; ``dualpipe prove`` finds where they do not.  An end that
never met a partner always gets a name, so that it is found too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from dualpipe.record.events import Message, MessageId, Owner, RankLog, RecordError
from dualpipe.record.names import Lineage
from dualpipe.record.unmet import expected
from dualpipe.schedule import RB, RF, SB, SENDS, SF, Kind, Op

_OTHER_END = {SF: RF, RF: SF, SB: RB, RB: SB}


@dataclass(frozen=True)
class Named:
    """The ops of message ends, and what had to be told with care.

    ``control`` counts the ends that were left out, ``unknown`` the sends of what nobody was seen to make; ``unused``
    are the receives of what nobody was seen to take.
    """

    ops: Mapping[MessageId, Op]
    control: int
    unknown: int
    unused: frozenset[MessageId]
    notes: tuple[str, ...]


def name_messages(
    logs: Sequence[RankLog],
    messages: Mapping[MessageId, Message],
    partner: Mapping[MessageId, MessageId],
    lineage: Lineage,
) -> Named:
    """The op of every message end that carries an activation or a gradient or never met a partner.

    Raises ``RecordError`` for a message of several microbatches, and for an end without a partner between two ranks
    that no stage boundary joins.
    """
    used = {id: use for id, use in uses(logs).items() if id not in lineage.data}
    ops: dict[MessageId, Op] = {}
    for id, message in messages.items():
        found = _by_content(message, lineage, used, partner) if message.send else _by_use(used, message, lineage)
        if found is not None:
            ops[id] = found
    unknown: list[Message] = []
    unused: list[Message] = []
    notes = _leave_out_what_leaves(ops, messages, partner, lineage)
    for id, message in messages.items():
        other = partner.get(id)
        if id not in ops and other is not None and other in ops:
            op = _mirrored(ops[other], message)
            if _is_of(op, lineage):
                ops[id] = op
                (unknown if message.send else unused).append(message)
    for id, message in messages.items():
        if id not in ops and id not in partner:
            ops[id] = expected(message, ops, lineage)
            notes.append(_of_unmet(message, ops[id]))
    left = [message for id, message in messages.items() if id not in ops]
    notes += [*_of_unknown(unknown), *_of_unused(unused, ops), *_of_control(left)]
    return Named(ops, len(left), len(unknown), frozenset(message.id for message in unused), tuple(notes))


def uses(logs: Sequence[RankLog]) -> dict[MessageId, tuple[Kind, Owner]]:
    """For every receive what took it: the forward of someone, or the backward."""
    used: dict[MessageId, tuple[Kind, Owner]] = {}
    for log in logs:
        for forward in log.forwards.values():
            used.update(dict.fromkeys(forward.gradients, (RB, forward.owner)))
            used.update(dict.fromkeys(forward.messages, (RF, forward.owner)))
    return used


def _op(kind: Kind, owner: Owner, peer: int, lineage: Lineage) -> Op | None:
    name = lineage.names.get(owner)
    return None if name is None else Op(kind, name.lane, name.stage, name.mb, peer)


def _by_content(
    message: Message, lineage: Lineage, used: Collection[MessageId], partner: Mapping[MessageId, MessageId]
) -> Op | None:
    kind, owners = (SB, message.gradient_of) if message.gradient_of else (SF, message.activation_of)
    if len(owners) > 1:
        other = partner.get(message.id)
        if other is not None and other not in used:
            return None  # a sum of losses, for example
        raise RecordError(
            "a message holds the tensors of one microbatch",
            f"rank {message.id.rank} sends a mixture of {len(owners)} at {message.at}",
            "send them one by one",
        )
    return _op(kind, owners[0], message.peer, lineage) if owners else None


def _by_use(used: Mapping[MessageId, tuple[Kind, Owner]], message: Message, lineage: Lineage) -> Op | None:
    use = used.get(message.id)
    return None if use is None else _op(use[0], use[1], message.peer, lineage)


def _leave_out_what_leaves(
    ops: dict[MessageId, Op],
    messages: Mapping[MessageId, Message],
    partner: Mapping[MessageId, MessageId],
    lineage: Lineage,
) -> list[str]:
    """Take out what the ends of a lane send to no stage and no stage takes, such as a loss for the log."""
    beyond = [
        id
        for id, op in ops.items()
        if op.kind in SENDS and not _is_of(_mirrored(op, messages[id]), lineage) and partner.get(id, id) not in ops
    ]
    for id in beyond:
        del ops[id]
    places = sorted({(id.rank, messages[id].at) for id in beyond})
    return [
        f"rank {rank}: what an end of the pipeline sends at {at} is taken by no stage and is left out"
        for rank, at in places
    ]


def _mirrored(other: Op, message: Message) -> Op:
    """The op of an end that tells nothing by itself, from that of its partner."""
    stage = other.stage + (1 if other.kind in (SF, RB) else -1)
    return Op(_OTHER_END[other.kind], other.lane, stage, other.mb, message.peer)


def _is_of(op: Op, lineage: Lineage) -> bool:
    return 0 <= op.stage < len(lineage.routes[op.lane])


def _of_unmet(message: Message, op: Op) -> str:
    what, got = ("send to", "met no receive") if message.send else ("receive from", "got nothing")
    return (
        f"rank {message.id.rank}: the {what} rank {message.peer} at {message.at} {got}; "
        f"it is named {op} by what was to come next"
    )


def _of_unknown(messages: Sequence[Message]) -> list[str]:
    places = Counter((message.id.rank, message.at) for message in messages)
    return [
        f"rank {rank}: what it sends at {at} was seen to be made by no forward and no backward; it is named by what "
        f"takes it ({count} times)"
        for (rank, at), count in sorted(places.items())
    ]


def _of_unused(messages: Sequence[Message], ops: Mapping[MessageId, Op]) -> list[str]:
    return [
        f"rank {message.id.rank}: what it receives from rank {message.peer} at {message.at} was seen to be taken by no "
        f"forward and no backward; it is named {ops[message.id]} by what was sent"
        for message in messages
    ]


def _of_control(messages: Sequence[Message]) -> list[str]:
    if not messages:
        return []
    places = sorted({message.at for message in messages})
    return [
        f"{len(messages)} message ends carry no activation or gradient of a stage (control data) and are left out: "
        + ", ".join(places[:3])
        + (" ..." if len(places) > 3 else "")
    ]
