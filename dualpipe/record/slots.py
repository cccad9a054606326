"""The slots of a rank: the ops that were issued together."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from dualpipe.record.collectives import NONE, Collectives
from dualpipe.record.events import CollectiveId, ForwardId, Message, MessageId, RankLog
from dualpipe.record.gradients import lacking
from dualpipe.record.lineage import Lineage
from dualpipe.record.naming import Named
from dualpipe.schedule import SENDS, B, F, Kind, Op, Placed, Program, Task, W

_ORDER = {F: 0, B: 1, W: 2}
_COMPUTES = frozenset(_ORDER)


class Posted(NamedTuple):
    """An op, of a message which end it is, and the line of the program."""

    op: Op
    message: MessageId | None
    at: str = ""


class Programs(NamedTuple):
    """The programs of all ranks, and the place in them of every message end.

    ``lines`` has the lines of the program for all other ops.  ``early`` counts the computations that began with
    messages in flight; ``notes`` are on repeated ops.
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
    """The slots of every rank, and what does not show in them.

    Several tensors of one stage boundary are one op at both ends if at both ends they are in one slot or in slots that
    follow each other, or with nothing in between but other messages of the two ranks, in the same order at both.  This
    requires that the ends have the same names, that each tensor is received into memory of its
    own, and that a tensor sent before or in another slot is at least used.  Every other message has an op of its own,
    even if another op of its slot has the same name.
    """
    ops = named.ops
    ranks = [_program(log, ops, lineage, collectives) for log in logs]
    joined = _joined(
        named, messages, partner, _Order({log.rank: slots for log, (slots, _) in zip(logs, ranks, strict=True)})
    )
    made: list[Program] = []
    placed: dict[MessageId, Placed] = {}
    lines: dict[Placed, str] = {}
    for log, (slots, _) in zip(logs, ranks, strict=True):
        kept = [own for slot in slots if (own := _sorted([each for each in slot if each.message not in joined]))]
        made.append(tuple(tuple(each.op for each in slot) for slot in kept))
        for number, slot in enumerate(kept):
            for position, each in enumerate(slot):
                place = Placed(log.rank, number, position, each.op)
                if each.message is not None:
                    placed[each.message] = place
                elif each.at:
                    lines[place] = each.at
    placed |= {id: placed[whole] for id, whole in joined.items() if whole in placed}
    return Programs(tuple(made), placed, lines, sum(early for _, early in ranks), _repeated(ops, messages, joined))


class _Order:
    """Which slot every message end is in, and what is between two of them."""

    def __init__(self, slots: Mapping[int, Sequence[Sequence[Posted]]]) -> None:
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

    def follow_each_other(self, first: MessageId, later: MessageId) -> bool:
        """Whether two ends of one op share a slot, or nothing else is in their slots and between those."""
        slots = self._slots[first.rank][self._slot_of[first] : self._slot_of[later] + 1]
        return len(slots) == 1 or len({each.op for slot in slots for each in slot}) == 1

    def in_step(self, ends: Sequence[tuple[MessageId, MessageId]], partner: Mapping[MessageId, MessageId]) -> bool:
        """Whether at both ends nothing but messages between the two ranks is in between, in the same order."""
        between = [
            [each.message for slot in self._slots[a.rank][self._slot_of[a] + 1 : self._slot_of[b]] for each in slot]
            for a, b in ends
        ]
        return [None if id is None else partner.get(id) for id in between[0]] == between[1] and None not in between[1]


def _joined(
    named: Named, messages: Mapping[MessageId, Message], partner: Mapping[MessageId, MessageId], order: _Order
) -> dict[MessageId, MessageId]:
    """The message ends that belong to the op of an earlier one, which is given: further tensors of its boundary."""
    ops = named.ops
    earlier: dict[tuple[object, ...], list[tuple[MessageId, MessageId]]] = {}
    joined: dict[MessageId, MessageId] = {}
    for id in ops:
        other = partner.get(id)
        if not messages[id].send or other is None or other not in order:
            continue
        row = earlier.setdefault((ops[id], id.rank, ops[other], other.rank), [])
        ends = list(zip(row[-1], (id, other), strict=True)) if row else []
        if not all(order.follow_each_other(*end) for end in ends) and not order.in_step(ends, partner):
            row.clear()
        sent, received = ({messages[pair[end]].memory for pair in row} for end in (0, 1))
        apart = messages[id].memory in sent or not all(order.share_a_slot(*end) for end in ends)
        if row and messages[other].memory not in received and not (apart and other in named.unused):
            joined |= {id: row[0][0], other: row[0][1]}
        row.append((id, other))
    return joined


def _repeated(
    ops: Mapping[MessageId, Op], messages: Mapping[MessageId, Message], joined: Collection[MessageId]
) -> list[str]:
    """Notes on the ops that a rank has more than once, with the lines of the program."""
    places: dict[tuple[int, Op], list[str]] = {}
    for id, op in ops.items():
        if id not in joined:
            places.setdefault((id.rank, op), []).append(messages[id].at)
    return [
        f"rank {rank}: {op} occurs {len(at)} times, posted at {' and '.join(dict.fromkeys(at))}; messages are merged "
        "only if they have different tensors of one stage boundary, with nothing else between them at both ends"
        for (rank, op), at in places.items()
        if len(at) > 1
    ]


def _program(
    log: RankLog, ops: Mapping[MessageId, Op], lineage: Lineage, collectives: Collectives
) -> tuple[list[list[Posted]], int]:
    """The slots of one rank, and how many computations began with messages in flight.

    The messages of one call are one slot: those of a batch, or a single one.  NCCL runs the messages of a batch
    together, and single ones of a communicator in the order in which they were posted.  A backward and the weight
    gradients of the same run of the engine are one slot.  So are all computations of one call of a function that, by
    its name, overlaps a forward with a backward.  A collective is where the program waits for it, or for a later one of
    its group, since NCCL runs those of a group in the order of their launches.
    """
    last_weight, only_weights = last_weights(log), weights_without_backward(log)
    slots: list[list[Posted]] = []
    joins = False  # whether the next computation may join the last slot
    of_run: dict[int, int] = {}  # run of the engine -> the slot of its ops since the last message in it
    backward_at: dict[tuple[int | None, Task], int] = {}  # run of the engine and task -> the slot of the B
    together: int | None = None  # the call that overlaps computations of which the last one was a part
    early = 0
    pending: set[int] = set()
    apart: list[list[Posted]] = []  # slots of sends that another thread has posted
    launched: list[int] = []  # the collectives that the rank has not waited for

    def compute(ops: list[Op | None], run: int | None = None) -> None:
        nonlocal joins, early, together
        named = [Posted(op, None, event.get("path", event["at"])) for op in ops if op is not None]
        if not named:
            return
        joins = joins and together is not None and together == event.get("together")
        together = event.get("together")
        early += bool(pending) and named[0].op.kind is not W
        for each in [each for each in named if each.op.kind is W and (run, each.op.task) in backward_at]:
            slots[backward_at[run, each.op.task]].append(each)  # even if messages were posted since the B
            named.remove(each)
        if not named:
            return
        if run is not None and run in of_run:
            slots[of_run[run]] += named
            slots[of_run[run]].sort(key=lambda each: (_ORDER[each.op.kind], each.op.mb))  # one run: all of it together
            backward_at.update({(run, each.op.task): of_run[run] for each in named if each.op.kind is B})
            return
        if joins:
            slots[-1] += named
        else:
            slots.append(named)
        joins = True
        if run is not None:
            of_run[run] = len(slots) - 1
            backward_at.update({(run, each.op.task): len(slots) - 1 for each in named if each.op.kind is B})

    def collect(numbers: list[int]) -> None:
        nonlocal joins
        for number in numbers:
            launched.remove(number)
            if (op := collectives.ops.get(CollectiveId(log.rank, number))) is not None:
                slots.append([Posted(op, None, log.collectives[number].at)])
                joins = False
                of_run.clear()

    launched += _elsewhere(log, collectives, later=False)
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
                compute([_op_of(F, log, event["forward"], lineage)])
            case "backward":
                compute([_op_of(B, log, forward, lineage) for forward in event["forwards"]], event["run"])
                compute([_op_of(W, log, forward, lineage) for forward in event["untrainable"]], event["run"])
            case "weights requested":
                alone = [f for f in event["forwards"] if only_weights.get(log.find(f)) == index]
                compute([op for f in alone if (op := _op_of(B, log, f, lineage)) and op.stage == 0], event["run"])
                finished = [f for f in event["forwards"] if last_weight.get(log.find(f)) == index]
                compute([_op_of(W, log, forward, lineage) for forward in finished], event["run"])
            case "weights":
                finished = [f for f in event["forwards"] if last_weight.get(log.find(f)) == index]
                compute([_op_of(W, log, forward, lineage) for forward in finished], event["run"])
            case "post":
                ids = [MessageId(log.rank, posted["message"]) for posted in event["messages"]]
                named = [Posted(ops[id], id) for id in ids if id in ops]
                pending |= {id.number for id in ids if id in ops}
                if named and not event.get("own", True) and all(each.op.kind in SENDS for each in named):
                    apart.append(named)
                if named:
                    slots.append(named)
                    joins = False
                    of_run.clear()
            case "wait":
                joins = joins and not event["own"]
                pending -= set(event["messages"])
    launched += _elsewhere(log, collectives, later=True)
    collect(list(launched))
    for slot in apart:
        _put_forward(slots, slot)
    return slots, early


def _put_forward(slots: list[list[Posted]], slot: list[Posted]) -> None:
    """Put a slot of sends of another thread where their tensors were ready, but after earlier sends to the same peer.

    The thread that computes does not wait for them, so where they were posted among its own messages is chance.
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


def _elsewhere(log: RankLog, collectives: Collectives, later: bool) -> list[int]:
    """The collectives of the rank in later or earlier training steps that meet those of other ranks in this one."""
    here = {event["collective"] for event in log.events if event["event"] == "collective"}
    own = [id.number for id in collectives.ops if id.rank == log.rank and id.number not in here]
    first = min(here, default=0)
    return sorted(number for number in own if (number > first) == later)


def _op_of(kind: Kind, log: RankLog, forward: int, lineage: Lineage) -> Op | None:
    task = lineage.tasks.get(ForwardId(log.rank, log.find(forward)))
    return None if task is None else Op(kind, *task)


def last_weights(log: RankLog) -> dict[int, int]:
    """For every forward the last event that adds to its weight gradients, at which its W ends.

    If there is none, it is the last run of the engine that was requested to compute gradients of weights.  A forward
    with a parameter whose gradient was never computed has no W.
    """
    last: dict[str, dict[int, int]] = {"weights requested": {}, "weights": {}}
    without = lacking(log)
    for index, event in enumerate(log.events):
        if event["event"] in last:
            computed = [forward for forward in map(log.find, event["forwards"]) if forward not in without]
            last[event["event"]].update(dict.fromkeys(computed, index))
    return last["weights requested"] | last["weights"]


def weights_without_backward(log: RankLog) -> dict[int, int]:
    """For every forward of which the program requested gradients of weights alone, the first such event."""
    first: dict[int, int] = {}
    for index, event in enumerate(log.events):
        if event["event"] == "weights requested":
            for forward in map(log.find, event["forwards"]):
                first.setdefault(forward, index)
    return {n: index for n, index in first.items() if n in log.forwards and not log.forwards[n].backward_began}


def _sorted(slot: list[Posted]) -> list[Posted]:
    """Computes in the order F, B, W, in which a schedule is written; messages in the order of posting."""
    return sorted(slot, key=lambda each: _ORDER.get(each.op.kind, 0))
