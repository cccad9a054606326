"""The slots of a rank: the ops that were issued together."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from dualpipe.record.events import ForwardId, Message, MessageId, RankLog
from dualpipe.record.lineage import Lineage
from dualpipe.record.naming import Named
from dualpipe.schedule import B, F, Kind, Op, Program, Slot, Task, W

_ORDER = {F: 0, B: 1, W: 2}


def programs(
    logs: Sequence[RankLog],
    named: Named,
    messages: Mapping[MessageId, Message],
    partner: Mapping[MessageId, MessageId],
    lineage: Lineage,
) -> tuple[tuple[Program, ...], int, list[str]]:
    """The slots of every rank, how many computations began with messages in flight, and notes on repeated ops.

    Several tensors of one stage boundary that are sent in one slot and received in one slot are one op at both ends.
    This requires that the ends have the same names, that each tensor is received into memory of its own, and that a
    tensor sent before is at least used.  Every other message has an op of its own, even if another op of its slot has
    the same name.
    """
    ops = named.ops
    ranks = [_program(log, ops, lineage) for log in logs]
    slot_of = {
        id: number for slots, _ in ranks for number, slot in enumerate(slots) for _, id in slot if id is not None
    }
    joined = _joined(named, messages, partner, slot_of)
    made = tuple(
        tuple(_sorted([op for op, id in slot if id not in joined]) for slot in slots if slot) for slots, _ in ranks
    )
    return made, sum(early for _, early in ranks), _repeated(ops, messages, joined)


def _joined(
    named: Named,
    messages: Mapping[MessageId, Message],
    partner: Mapping[MessageId, MessageId],
    slot_of: Mapping[MessageId, int],
) -> set[MessageId]:
    """The message ends that belong to the op of an earlier one: further tensors of the same boundary."""
    ops = named.ops
    memory: dict[tuple[object, ...], tuple[set[object], set[object]]] = {}  # sent from, and received into
    joined: set[MessageId] = set()
    for id in ops:
        other = partner.get(id)
        if not messages[id].send or other is None or other not in slot_of:
            continue
        key = (ops[id], id.rank, slot_of[id], ops[other], other.rank, slot_of[other])
        sent, received = memory.setdefault(key, (set(), set()))
        again = messages[other].memory in received or (messages[id].memory in sent and other in named.unused)
        if received and not again:
            joined |= {id, other}
        sent.add(messages[id].memory)
        received.add(messages[other].memory)
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
        "only if they have different tensors of one stage boundary, are sent together and are received together"
        for (rank, op), at in places.items()
        if len(at) > 1
    ]


def _program(
    log: RankLog, ops: Mapping[MessageId, Op], lineage: Lineage
) -> tuple[list[list[tuple[Op, MessageId | None]]], int]:
    """The slots of one rank, and how many computations began with messages in flight.

    Messages that were posted with neither a wait nor a computation between them are one slot, because nothing
    distinguishes them.  A backward and the weight gradients of the same run of the engine are one slot.  So are all
    computations of a method that, by its name, overlaps a forward with a backward.
    """
    last_weight, only_weights = _last_weights(log), _weights_without_backward(log)
    slots: list[list[tuple[Op, MessageId | None]]] = []
    open_slot: str | None = None  # "messages" or "compute", if the next op may join the last slot
    of_run: dict[int, int] = {}  # run of the engine -> the slot of its ops since the last message in it
    backward_at: dict[tuple[int | None, Task], int] = {}  # run of the engine and task -> the slot of the B
    together = False
    early = 0
    pending: set[int] = set()

    def compute(ops: list[Op | None], run: int | None = None) -> None:
        nonlocal open_slot, early
        named: list[tuple[Op, MessageId | None]] = [(op, None) for op in ops if op is not None]
        if not named:
            return
        early += bool(pending) and named[0][0].kind is not W
        for each in [pair for pair in named if pair[0].kind is W and (run, pair[0].task) in backward_at]:
            slots[backward_at[run, each[0].task]].append(each)  # even if messages were posted since the B
            named.remove(each)
        if not named:
            return
        if run is not None and run in of_run:
            slots[of_run[run]] += named
            slots[of_run[run]].sort(key=lambda pair: (_ORDER[pair[0].kind], pair[0].mb))  # one run: all of it together
            backward_at.update({(run, op.task): of_run[run] for op, _ in named if op.kind is B})
            return
        if slots and open_slot == "compute" and together:
            slots[-1] += named
        else:
            slots.append(named)
        open_slot = "compute"
        if run is not None:
            of_run[run] = len(slots) - 1
            backward_at.update({(run, op.task): len(slots) - 1 for op, _ in named if op.kind is B})

    for index, event in enumerate(log.events):
        match event["event"]:
            case "together":
                together, open_slot = event["begins"], None
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
                finished = [f for f in event["forwards"] if last_weight[log.find(f)] == index]
                compute([_op_of(W, log, forward, lineage) for forward in finished], event["run"])
            case "post":
                ids = [MessageId(log.rank, posted["message"]) for posted in event["messages"]]
                named = [(ops[id], id) for id in ids if id in ops]
                pending |= {id.number for id in ids if id in ops}
                if not named:
                    continue
                of_run.clear()
                if open_slot != "messages":
                    slots.append([])
                    open_slot = "messages"
                slots[-1] += named
            case "wait":
                open_slot = None if event["own"] else open_slot
                pending -= set(event["messages"])
    return slots, early


def _op_of(kind: Kind, log: RankLog, forward: int, lineage: Lineage) -> Op | None:
    task = lineage.tasks.get(ForwardId(log.rank, log.find(forward)))
    return None if task is None else Op(kind, *task)


def _last_weights(log: RankLog) -> dict[int, int]:
    """For every forward the last event that adds to its weight gradients, at which its W ends.

    If there is none, it is the last run of the engine that was requested to compute gradients of weights.
    """
    last: dict[str, dict[int, int]] = {"weights requested": {}, "weights": {}}
    for index, event in enumerate(log.events):
        if event["event"] in last:
            last[event["event"]].update(dict.fromkeys(map(log.find, event["forwards"]), index))
    return last["weights requested"] | last["weights"]


def _weights_without_backward(log: RankLog) -> dict[int, int]:
    """For every forward of which the program requested gradients of weights alone, the first such event."""
    first: dict[int, int] = {}
    for index, event in enumerate(log.events):
        if event["event"] == "weights requested":
            for forward in map(log.find, event["forwards"]):
                first.setdefault(forward, index)
    return {n: index for n, index in first.items() if n in log.forwards and not log.forwards[n].backward_began}


def _sorted(slot: list[Op]) -> Slot:
    """Computes in the order F, B, W, in which a schedule is written; messages in the order of posting."""
    return tuple(sorted(slot, key=lambda op: _ORDER.get(op.kind, 0)))
