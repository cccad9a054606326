"""Tensors that a forward receives though no stage made them: inputs, labels, masks."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from dualpipe.record.events import Forward, Message, MessageId, RecordError


def sent_to(
    id: MessageId, messages: Mapping[MessageId, Message], partner: Mapping[MessageId, MessageId]
) -> Message | None:
    """The send that a receive met."""
    return messages.get(partner[id]) if id in partner else None


def find_data(
    forwards: Collection[Forward], messages: Mapping[MessageId, Message], partner: Mapping[MessageId, MessageId]
) -> frozenset[MessageId]:
    """The receives that bring a forward what no stage made.

    Raises ``RecordError`` where a forward has nothing else and a gradient goes back: then it is an activation.
    """
    back = {(owner, m.peer): m for m in messages.values() for owner in m.gradient_of}
    found: set[MessageId] = set()
    for forward in forwards:
        sent = {id: sent_to(id, messages, partner) for id in forward.messages}
        other = {id for id, s in sent.items() if s is not None and not s.activation_of and not s.gradient_of}
        if other and len(other) == len(sent) and not forward.after:
            for id in sorted(other):
                if (forward.owner, messages[id].peer) in back:
                    raise _no_module(forward, messages[partner[id]])
        found |= other
    return frozenset(found)


def _no_module(forward: Forward, sent: Message) -> RecordError:
    return RecordError(
        "a stage's activation is what a torch.nn.Module call made",
        f"rank {forward.owner.rank} begins a forward at {forward.at} from what rank {sent.id.rank} sends at "
        f"{sent.at}, and no module call made that",
        "put the stage's computation into a module",
    )


def notes_on_data(
    data: Collection[MessageId], messages: Mapping[MessageId, Message], partner: Mapping[MessageId, MessageId]
) -> list[str]:
    places = sorted({(partner[id].rank, messages[partner[id]].at, id.rank) for id in data})
    return [
        f"what rank {one} sends at {at} to a forward of rank {other} was made by no module call; it is taken for data"
        for one, at, other in places
    ]
