"""The op of every message end, found from its content, its use, its partner, or what its rank still had to do.

Each end is named from its own side: a send from the tensor that it was given, a receive from the computation that later
uses its tensor.  The two names may differ; ``dualpipe prove`` finds where they do not.  An end that was never
matched always gets a name, so that ``prove`` finds it too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count

from dualpipe.record.events import ForwardId, Message, MessageId, RankLog, RecordError
from dualpipe.record.lineage import Lineage
from dualpipe.record.phrases import counted
from dualpipe.schedule import RB, RF, SB, SENDS, SF, B, Chunk, F, Kind, Op
from dualpipe.schedule.observed import frames_of

_SERVES = {SF: F, RF: F, SB: B, RB: B}  # the compute on its own rank that a message end comes from or goes to
_OTHER_END = {SF: RF, RF: SF, SB: RB, RB: SB}


@dataclass(frozen=True)
class Named:
    """The ops of message ends, and which of them are uncertain.

    ``control`` counts the ends that were left out, ``unknown`` the sends whose tensor no observed computation made, and
    ``weights`` those whose tensor is the gradient of a parameter;
    ``unused`` are the receives whose tensor no observed computation used, and no send passed on.  ``guesses`` has all
    ends that neither their content nor their use names, with the other ops that each could be.
    """

    ops: Mapping[MessageId, Op]
    guesses: Mapping[MessageId, tuple[Op, ...]]
    control: int
    unknown: int
    weights: int
    unused: frozenset[MessageId]
    notes: tuple[str, ...]


def name_messages(
    logs: Sequence[RankLog],
    messages: Mapping[MessageId, Message],
    partner: Mapping[MessageId, MessageId],
    lineage: Lineage,
) -> Named:
    """The op of every message end that carries an activation or a gradient, or that was never matched.

    Raises ``RecordError`` for a message with tensors of several microbatches, and for an unmatched end between two
    ranks that do not hold neighbouring stages.
    """
    used = {id: use for id, use in uses(logs).items() if id not in lineage.data}
    ops: dict[MessageId, Op] = {}
    for id, message in messages.items():
        found = _by_content(message, lineage, used, partner) if message.send else _by_use(used, message, lineage)
        if found is not None:
            ops[id] = found
    unknown: list[Message] = []
    unused: list[Message] = []
    passed_on = {receive for message in messages.values() for receive in message.passed_on}
    notes = _drop_outputs(ops, messages, partner, lineage)
    for id, message in messages.items():
        other = partner.get(id)
        if id not in ops and other is not None and other in ops:
            op = _mirrored(ops[other], message)
            if _is_in_a_lane(op, lineage):
                ops[id] = op
                if id not in passed_on:
                    (unknown if message.send else unused).append(message)
    guesses: dict[MessageId, tuple[Op, ...]] = {message.id: () for message in (*unknown, *unused)}
    forms = _forms(ops, messages)
    kinds = _kinds_by_line(ops, messages)
    next_computes = {log.rank: _next_computes(log, lineage) for log in logs}
    for id, message in messages.items():
        if id not in ops and id not in partner:
            ops[id], guesses[id] = _expected(message, ops, lineage, forms, kinds, next_computes[id.rank].get(id))
            notes.append(_note_on_unmatched(message, ops[id], guesses[id]))
    left = [message for id, message in messages.items() if id not in ops]
    notes += [*_notes_on_unknown(unknown), *_notes_on_unused(unused, ops), *_notes_on_control(left)]
    wrong = sum(bool(message.weights) for message in unknown)
    unused_ones = frozenset(message.id for message in unused)
    return Named(ops, guesses, len(left), len(unknown) - wrong, wrong, unused_ones, tuple(notes))


def uses(logs: Sequence[RankLog]) -> dict[MessageId, tuple[Kind, ForwardId]]:
    """For every receive that was used: by the forward (RF) or the backward (RB) of which forward."""
    used: dict[MessageId, tuple[Kind, ForwardId]] = {}
    for log in logs:
        for forward in log.forwards.values():
            used.update(dict.fromkeys(forward.gradients, (RB, forward.id)))
            used.update(dict.fromkeys(forward.messages, (RF, forward.id)))
    return used


def _op(kind: Kind, forward: ForwardId, peer: int, lineage: Lineage) -> Op | None:
    task = lineage.tasks.get(forward)
    return None if task is None else Op(kind, *task, peer)


def _by_content(
    message: Message, lineage: Lineage, used: Collection[MessageId], partner: Mapping[MessageId, MessageId]
) -> Op | None:
    kind, forwards = (SB, message.gradient_of) if message.gradient_of else (SF, message.activation_of)
    if len(forwards) > 1:
        other = partner.get(message.id)
        if other is not None and other not in used:
            return None  # a sum of losses, for example
        raise RecordError(
            "a message has the tensors of one microbatch",
            f"rank {message.id.rank} sends a mixture of {len(forwards)} at {message.at}",
            "send them one by one",
        )
    return _op(kind, forwards[0], message.peer, lineage) if forwards else None


def _by_use(used: Mapping[MessageId, tuple[Kind, ForwardId]], message: Message, lineage: Lineage) -> Op | None:
    use = used.get(message.id)
    return None if use is None else _op(use[0], use[1], message.peer, lineage)


def _drop_outputs(
    ops: dict[MessageId, Op],
    messages: Mapping[MessageId, Message],
    partner: Mapping[MessageId, MessageId],
    lineage: Lineage,
) -> list[str]:
    """Remove sends at the ends of a lane that no stage uses, such as a loss for the log; returns notes on them."""
    outputs = [
        id
        for id, op in ops.items()
        if op.kind in SENDS
        and not _is_in_a_lane(_mirrored(op, messages[id]), lineage)
        and partner.get(id, id) not in ops
    ]
    for id in outputs:
        del ops[id]
    places = sorted({(id.rank, messages[id].at) for id in outputs})
    return [
        f"rank {rank}: an end of the pipeline sends at {at} what no stage uses; it is left out" for rank, at in places
    ]


def _mirrored(other: Op, message: Message) -> Op:
    """The op of an end, from that of its partner."""
    stage = other.stage + (1 if other.kind in (SF, RB) else -1)
    return Op(_OTHER_END[other.kind], other.lane, stage, other.mb, message.peer)


def _is_in_a_lane(op: Op, lineage: Lineage) -> bool:
    return 0 <= op.stage < len(lineage.routes[op.lane])


def _forms(
    ops: Mapping[MessageId, Op], messages: Mapping[MessageId, Message]
) -> dict[tuple[int, Kind, Chunk], set[str]]:
    """For every rank, kind and chunk the types and shapes of its messages."""
    forms: dict[tuple[int, Kind, Chunk], set[str]] = {}
    for id, op in ops.items():
        forms.setdefault((id.rank, op.kind, op.chunk), set()).add(messages[id].form)
    return forms


def _kinds_by_line(
    ops: Mapping[MessageId, Op], messages: Mapping[MessageId, Message]
) -> dict[tuple[bool, str], set[Kind]]:
    """For sends and receives, and every line that posted some or called what did, their kinds."""
    kinds: dict[tuple[bool, str], set[Kind]] = {}
    for id, op in ops.items():
        for line in frames_of(messages[id].at):
            kinds.setdefault((messages[id].send, line), set()).add(op.kind)
    return kinds


def _next_computes(log: RankLog, lineage: Lineage) -> dict[MessageId, Op]:
    """For every message of a rank the forward or backward that began next after its post."""
    found: dict[MessageId, Op] = {}
    posted: list[MessageId] = []
    for event in log.events:
        if event["event"] == "post":
            posted += [MessageId(log.rank, message["message"]) for message in event["messages"]]
        elif event["event"] in ("forward", "backward"):
            forwards = event["forwards"] if event["event"] == "backward" else [event["forward"]]
            kind = B if event["event"] == "backward" else F
            tasks = [lineage.tasks.get(ForwardId(log.rank, log.find(forward))) for forward in forwards]
            begun = [Op(kind, *task) for task in tasks if task is not None]
            if begun:
                found |= dict.fromkeys(posted, begun[0])
                posted = []
    return found


def _expected(
    message: Message,
    ops: Mapping[MessageId, Op],
    lineage: Lineage,
    forms: Mapping[tuple[int, Kind, Chunk], set[str]],
    kinds: Mapping[tuple[bool, str], set[Kind]],
    next_compute: Op | None,
) -> tuple[Op, tuple[Op, ...]]:
    """The name of an unmatched end, and the others that it could have.

    For each stage boundary between the two ranks there are two candidates: the earliest op that the rank still lacks,
    and one for a microbatch beyond those that it has.  The candidates are compared by these preferences, in this order:
    the type and shape of the message; the kind of the messages that the same line posts; an op of the program rather
    than one beyond; an op that the next forward or backward of the rank needs or made; a gradient for a forward that
    ran; the earliest microbatch.

    Raises ``RecordError`` if the two ranks do not hold neighbouring stages.
    """
    had = {op.bare for id, op in ops.items() if id.rank == message.id.rank}
    ran = {task for forward, task in lineage.tasks.items() if forward.rank == message.id.rank}
    candidates = [_first_lacking(boundary, had) for boundary in _boundaries(message, lineage)]
    if not candidates:
        what = "send to" if message.send else "receive from"
        raise RecordError(
            "every message has a partner",
            f"rank {message.id.rank}: the {what} rank {message.peer} at {message.at} has none, and the two ranks "
            "do not hold neighbouring stages",
            "correct the peer, or let the other rank post its end",
        )

    by_line = [found for line in frames_of(message.at) if (found := kinds.get((message.send, line)))]
    usual = {kind for found in by_line if len(found) == 1 for kind in found}

    def rank(op: Op) -> tuple[bool | int | str, ...]:
        known = forms.get((message.id.rank, op.kind, op.chunk), {message.form})
        wanted = next_compute is not None and next_compute == Op(_SERVES[op.kind], *op.task)
        is_due = op.mb < _microbatches(op, lineage)
        is_backward_due = op.kind is RB and op.task in ran
        unusual = usual != {op.kind}
        return message.form not in known, unusual, not is_due, not wanted, not is_backward_due, op.mb, op.kind

    best, *others = sorted(candidates, key=rank)
    possible = [op for op in others if rank(op)[:3] == rank(best)[:3]]
    return best._replace(peer=message.peer), tuple(op._replace(peer=message.peer) for op in possible)


def _boundaries(message: Message, lineage: Lineage) -> Iterator[Op]:
    """For every stage boundary between the two ranks, the op of microbatch 0 that such an end can be."""
    with_next, with_previous = (SF, SB) if message.send else (RB, RF)
    for lane, route in lineage.routes.items():
        for stage, holder in enumerate(route):
            for kind, other in ((with_next, stage + 1), (with_previous, stage - 1)):
                if holder == message.id.rank and 0 <= other < len(route) and route[other] == message.peer:
                    yield Op(kind, lane, stage, 0)


def _first_lacking(op: Op, had: set[Op]) -> Op:
    return next(other for mb in count() if (other := op._replace(mb=mb)) not in had)


def _microbatches(op: Op, lineage: Lineage) -> int:
    return 1 + max((task.mb for task in lineage.tasks.values() if task.lane == op.lane), default=-1)


def _note_on_unmatched(message: Message, op: Op, others: Sequence[Op]) -> str:
    what, missing = ("send to", "receive") if message.send else ("receive from", "send")
    name = f"{op}, the next op that its rank expects"
    return (
        f"rank {message.id.rank}: the {what} rank {message.peer} at {message.at} was matched by no {missing}; "
        f"it is named {name}"
        + (f"; this is a guess, and it could be {' or '.join(map(str, others))}" if others else "")
    )


def _notes_on_unknown(messages: Sequence[Message]) -> list[str]:
    places = Counter((message.id.rank, message.at, message.weights) for message in messages)
    return [
        f"rank {rank}: what it sends at {at} is the gradient of {', '.join(weights)}, where a stage takes that of its "
        f"output; it is named by what uses it ({times} times)"
        if weights
        else f"rank {rank}: no observed forward or backward made what it sends at {at}; it is named by what uses it "
        f"({times} times)"
        for (rank, at, weights), times in sorted(places.items())
    ]


def _notes_on_unused(messages: Sequence[Message], ops: Mapping[MessageId, Op]) -> list[str]:
    return [
        f"rank {message.id.rank}: no observed forward or backward uses what it receives from rank {message.peer} at "
        f"{message.at}; it is named {ops[message.id]} by what was sent"
        for message in messages
    ]


def _notes_on_control(messages: Sequence[Message]) -> list[str]:
    if not messages:
        return []
    places = sorted({message.at for message in messages})
    data = "no activation or gradient of a stage (control data) and"
    count = counted(len(messages), f"message end carries {data} is", f"message ends carry {data} are")
    return [f"{count} left out: " + ", ".join(places[:3]) + (" ..." if len(places) > 3 else "")]
