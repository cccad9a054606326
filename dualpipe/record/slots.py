"""The slots of a rank: the ops that were issued together."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from dualpipe.record.collectives import NONE, Collectives
from dualpipe.record.events import CollectiveId, Message, MessageId, RankLog
from dualpipe.record.gradients import lacking
from dualpipe.record.lineage import Lineage
from dualpipe.record.naming import Named
from dualpipe.schedule import SENDS, B, F, Op, Placed, Program, Task, W

_ORDER = {F: 0, B: 1, W: 2}
_COMPUTES = frozenset(_ORDER)


class Entry(NamedTuple):
    """One op of a slot: for a send or a receive the message that it posts, for other ops the line of the program."""

    op: Op
    message: MessageId | None
    at: str = ""


class Programs(NamedTuple):
    """The programs of all ranks, and where in them everything is.

    ``placed`` has the place of every send and receive, ``lines`` the line of the program for every other op.  ``early``
    counts the computations that began while messages were in flight.  ``notes`` name the ops that a rank repeats.
    """

    of_rank: tuple[Program, ...]
    placed: Mapping[MessageId, Placed]
    lines: Mapping[Placed, str]
    early: int
    notes: list[str]


def programs(
    logs: Sequence[RankLog],
    named: Named,
    messages: Mapping[MessageId, Message],
    partner: Mapping[MessageId, MessageId],
    lineage: Lineage,
    collectives: Collectives = NONE,
) -> Programs:
    """Arrange the ops of every rank in slots.

    A stage boundary may have several tensors, which a program sends as several messages.  In a schedule they are one
    op.  So messages are merged into one send op and one receive op if

    - their sends have the same name (stage, microbatch and lane), and so have their receives,
    - on each of the two ranks they are in one slot or in consecutive slots; or only messages between these two ranks
      are in between, in the same order on both,
    - each is received into memory of its own, and
    - if they are in several slots or repeat a tensor, the program uses each received tensor.

    Every other message has an op of its own, even if its slot has another op with the same name.
    """
    ops = named.ops
    ranks = [_program(log, ops, lineage, collectives) for log in logs]
    merged = _merged(
        named, messages, partner, _Order({log.rank: slots for log, (slots, _) in zip(logs, ranks, strict=True)})
    )
    made: list[Program] = []
    placed: dict[MessageId, Placed] = {}
    lines: dict[Placed, str] = {}
    for log, (slots, _) in zip(logs, ranks, strict=True):
        kept = [own for slot in slots if (own := _sorted([each for each in slot if each.message not in merged]))]
        made.append(tuple(tuple(each.op for each in slot) for slot in kept))
        for number, slot in enumerate(kept):
            for position, each in enumerate(slot):
                place = Placed(log.rank, number, position, each.op)
                if each.message is not None:
                    placed[each.message] = place
                elif each.at:
                    lines[place] = each.at
    placed |= {id: placed[whole] for id, whole in merged.items() if whole in placed}
    return Programs(tuple(made), placed, lines, sum(early for _, early in ranks), _repeated(ops, messages, merged))


class _Order:
    """The slot of every send and receive, and what is between two of them on a rank."""

    def __init__(self, slots: Mapping[int, Sequence[Sequence[Entry]]]) -> None:
        self._slots = slots
        self._slot_of = {
            each.message: number
            for own in slots.values()
            for number, slot in enumerate(own)
            for each in slot
            if each.message is not None
        }

    def __contains__(self, id: MessageId) -> bool:
        return id in self._slot_of

    def share_a_slot(self, first: MessageId, later: MessageId) -> bool:
        return self._slot_of[first] == self._slot_of[later]

    def are_adjacent(self, first: MessageId, later: MessageId) -> bool:
        """Whether two messages with the same op share a slot, or their slots and all slots in between have only it."""
        slots = self._slots[first.rank][self._slot_of[first] : self._slot_of[later] + 1]
        return len(slots) == 1 or len({each.op for slot in slots for each in slot}) == 1

    def only_partners_between(
        self, ends: Sequence[tuple[MessageId, MessageId]], partner: Mapping[MessageId, MessageId]
    ) -> bool:
        """Whether only messages between the two ranks are in between, and in the same order on both.

        ``ends`` are the two sends on the one rank, and the two receives on the other.
        """
        between = [
            [each.message for slot in self._slots[a.rank][self._slot_of[a] + 1 : self._slot_of[b]] for each in slot]
            for a, b in ends
        ]
        return [None if id is None else partner.get(id) for id in between[0]] == between[1] and None not in between[1]


def _merged(
    named: Named, messages: Mapping[MessageId, Message], partner: Mapping[MessageId, MessageId], order: _Order
) -> dict[MessageId, MessageId]:
    """For every send or receive that is merged into the op of an earlier one (see ``programs``) that earlier one."""
    ops = named.ops
    earlier: dict[tuple[object, ...], list[tuple[MessageId, MessageId]]] = {}
    merged: dict[MessageId, MessageId] = {}
    for send in ops:
        receive = partner.get(send)
        if not messages[send].send or receive is None or receive not in order:
            continue
        tensors = earlier.setdefault((ops[send], send.rank, ops[receive], receive.rank), [])
        ends = list(zip(tensors[-1], (send, receive), strict=True)) if tensors else []
        if not all(order.are_adjacent(*end) for end in ends) and not order.only_partners_between(ends, partner):
            tensors.clear()
        sent, received = ({messages[pair[end]].memory for pair in tensors} for end in (0, 1))
        doubtful = messages[send].memory in sent or not all(order.share_a_slot(*end) for end in ends)
        if tensors and messages[receive].memory not in received and not (doubtful and receive in named.unused):
            merged |= {send: tensors[0][0], receive: tensors[0][1]}
        tensors.append((send, receive))
    return merged


def _repeated(
    ops: Mapping[MessageId, Op], messages: Mapping[MessageId, Message], merged: Collection[MessageId]
) -> list[str]:
    """Notes on the ops that a rank has more than once, with the lines of the program."""
    places: dict[tuple[int, Op], list[str]] = {}
    for id, op in ops.items():
        if id not in merged:
            places.setdefault((id.rank, op), []).append(messages[id].at)
    return [
        f"rank {rank}: {op} occurs {len(at)} times, posted at {' and '.join(dict.fromkeys(at))}; messages are merged "
        "only if they have different tensors of one stage boundary, with nothing else between them at both ends"
        for (rank, op), at in places.items()
        if len(at) > 1
    ]


def _program(
    log: RankLog, ops: Mapping[MessageId, Op], lineage: Lineage, collectives: Collectives
) -> tuple[list[list[Entry]], int]:
    """The slots of one rank, and how many computations began while messages were in flight.

    The messages of one call are one slot: those of a batch, or a single one.  NCCL runs the messages of a batch
    together, and single messages of a communicator in the order in which they were posted.  A backward and the weight
    gradients of the same run of the autograd engine are one slot.  So are all computations within one call of a
    function that overlaps a forward with a backward (``--together`` names such functions).  A collective is placed
    where the program waits for it, or for a later one of its group, because NCCL runs the collectives of a group in the
    order of their launches.
    """
    last_weight, only_weights = last_weights(log), weights_without_backward(log)
    slots: list[list[Entry]] = []
    joins = False  # whether the next computation may join the last slot
    slot_of_run: dict[int, int] = {}  # run of the engine -> its slot; forgotten when a message is posted
    backward_at: dict[tuple[int | None, Task], int] = {}  # run of the engine and task -> the slot of the B
    together: int | None = None  # the call of an overlapping function that the last computation was part of
    early = 0
    pending: set[int] = set()  # the messages that the rank has not waited for
    of_other_threads: list[list[Entry]] = []  # slots of sends that another thread has posted
    launched: list[int] = []  # the collectives that the rank has not waited for

    def compute(ops: list[Op | None], run: int | None = None) -> None:
        nonlocal joins, early, together
        entries = [Entry(op, None, event.get("path", event["at"])) for op in ops if op is not None]
        if not entries:
            return
        joins = joins and together is not None and together == event.get("together")
        together = event.get("together")
        early += bool(pending) and entries[0].op.kind is not W
        for each in [each for each in entries if each.op.kind is W and (run, each.op.task) in backward_at]:
            slots[backward_at[run, each.op.task]].append(each)  # even if messages were posted since the B
            entries.remove(each)
        if not entries:
            return
        if run is not None and run in slot_of_run:
            slot = slots[slot_of_run[run]]
            slot += entries
            slot.sort(key=lambda each: (_ORDER[each.op.kind], each.op.mb))  # within a run the engine chooses the order
            backward_at.update({(run, each.op.task): slot_of_run[run] for each in entries if each.op.kind is B})
            return
        if joins:
            slots[-1] += entries
        else:
            slots.append(entries)
        joins = True
        if run is not None:
            slot_of_run[run] = len(slots) - 1
            backward_at.update({(run, each.op.task): len(slots) - 1 for each in entries if each.op.kind is B})

    def collect(numbers: list[int]) -> None:
        nonlocal joins
        for number in numbers:
            launched.remove(number)
            if (op := collectives.ops.get(CollectiveId(log.rank, number))) is not None:
                slots.append([Entry(op, None, log.collectives[number].at)])
                joins = False
                slot_of_run.clear()

    launched += _in_other_steps(log, collectives, later=False)
    collect(list(launched))
    for index, event in enumerate(log.events):
        match event["event"]:
            case "collective":
                launched.append(event["collective"])
            case "collect":
                own = log.collectives[event["collective"]]
                of_group = [n for n in launched if log.collectives[n].group_name == own.group_name]
                collect(of_group[: of_group.index(own.id.number) + 1] if own.id.number in of_group else [])
            case "forward" if event["first"] and log.find(event["forward"]) == event["forward"]:
                compute([lineage.op(F, log, event["forward"])])
            case "backward":
                compute([lineage.op(B, log, forward) for forward in event["forwards"]], event["run"])
                with_b = (*event["untrainable"], *event.get("sharded", ()))
                compute([lineage.op(W, log, forward) for forward in with_b], event["run"])
            case "weights requested":
                alone = [f for f in event["forwards"] if only_weights.get(log.find(f)) == index]
                compute([op for f in alone if (op := lineage.op(B, log, f)) and op.stage == 0], event["run"])
                finished = [f for f in event["forwards"] if last_weight.get(log.find(f)) == index]
                compute([lineage.op(W, log, forward) for forward in finished], event["run"])
            case "weights":
                finished = [f for f in event["forwards"] if last_weight.get(log.find(f)) == index]
                compute([lineage.op(W, log, forward) for forward in finished], event["run"])
            case "post":
                ids = [MessageId(log.rank, posted["message"]) for posted in event["messages"]]
                entries = [Entry(ops[id], id) for id in ids if id in ops]
                pending |= {id.number for id in ids if id in ops}
                if entries and not event.get("own", True) and all(each.op.kind in SENDS for each in entries):
                    of_other_threads.append(entries)
                if entries:
                    slots.append(entries)
                    joins = False
                    slot_of_run.clear()
            case "wait":
                joins = joins and not event["own"]
                pending -= set(event["messages"])
    launched += _in_other_steps(log, collectives, later=True)
    collect(list(launched))
    for slot in of_other_threads:
        _move_to_producer(slots, slot)
    return slots, early


def _move_to_producer(slots: list[list[Entry]], slot: list[Entry]) -> None:
    """Move a slot of sends to where its tensors were computed, but not before earlier sends to the same peer.

    Another thread posted these sends.  The computing thread does not wait for them, so their position among its own
    messages is a matter of chance.
    """
    at = next(number for number, each in enumerate(slots) if each is slot)
    ready = at
    peers = {each.op.peer for each in slot}
    while ready > 0 and not any(
        (other.op.task in {each.op.task for each in slot} and other.op.kind in _COMPUTES)
        or (other.op.kind in SENDS and other.op.peer in peers)
        for other in slots[ready - 1]
    ):
        ready -= 1
    slots.insert(ready, slots.pop(at))


def _in_other_steps(log: RankLog, collectives: Collectives, later: bool) -> list[int]:
    """The collectives that the rank launched in a later (or earlier) training step and other ranks in this one."""
    here = {event["collective"] for event in log.events if event["event"] == "collective"}
    own = [id.number for id in collectives.ops if id.rank == log.rank and id.number not in here]
    return sorted(number for number in own if (log.collectives[number].step > collectives.step) == later)


def last_weights(log: RankLog) -> dict[int, int]:
    """For every forward the index of the last event that adds to its weight gradients; its W ends there.

    If no event adds to them, it is the last run of the engine in which the program requested gradients of weights.  A
    forward with a parameter whose gradient was never computed has no W; that of one with sharded weights is with its B.
    """
    last: dict[str, dict[int, int]] = {"weights requested": {}, "weights": {}}
    without = {*lacking(log), *(number for number, forward in log.forwards.items() if forward.sharded)}
    for index, event in enumerate(log.events):
        if event["event"] in last:
            computed = [forward for forward in map(log.find, event["forwards"]) if forward not in without]
            last[event["event"]].update(dict.fromkeys(computed, index))
    return last["weights requested"] | last["weights"]


def weights_without_backward(log: RankLog) -> dict[int, int]:
    """For every forward without a backward whose weight gradients the program requested, the first such event."""
    first: dict[int, int] = {}
    for index, event in enumerate(log.events):
        if event["event"] == "weights requested":
            for forward in map(log.find, event["forwards"]):
                first.setdefault(forward, index)
    return {n: index for n, index in first.items() if n in log.forwards and not log.forwards[n].backward_began}


def _sorted(slot: list[Entry]) -> list[Entry]:
    """The computes of a slot in the order F, B, W, as schedules write them; messages stay in the order posted."""
    return sorted(slot, key=lambda each: _ORDER.get(each.op.kind, 0))
