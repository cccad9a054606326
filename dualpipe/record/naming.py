"""From named forwards to the schedule: messages by what they hold and what takes them, slots by what was issued.

Each end of a message is named by its own side: a send by the tensor that it was given, a receive by the computation
that later takes what it brought.  The two need not agree; ``dualpipe prove`` finds where they do not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dualpipe.record.events import Message, MessageId, Owner, RankLog, RecordError
from dualpipe.record.lineage import Lineage
from dualpipe.schedule import RB, RF, SB, SF, B, F, Kind, Op, Program, Slot, W

_ORDER = {F: 0, B: 1, W: 2}


def name_messages(
    logs: Sequence[RankLog],
    messages: Mapping[MessageId, Message],
    partner: Mapping[MessageId, MessageId],
    lineage: Lineage,
) -> tuple[dict[MessageId, Op], list[str]]:
    """The op of every message end that carries an activation or a gradient, and notes on the others.

    Raises ``RecordError`` for a tensor of floating point that met its partner and that one end alone can place beyond
    the ends of its lane, or that no rule names.
    """
    used = _uses(logs)
    ops: dict[MessageId, Op] = {}
    for id, message in messages.items():
        found = _by_content(message, lineage) if message.send else _by_use(used.get(id), message, lineage)
        if found is not None:
            ops[id] = found
    for id, message in messages.items():
        other = partner.get(id)
        if id not in ops and other in ops and other is not None:
            ops[id] = _mirrored(ops[other], message)
    notes: list[str] = []
    unnamed = [m for id, m in messages.items() if id not in ops]
    for message in unnamed:
        guess = None if message.send or message.id in partner else _expected(message, ops, lineage, logs)
        if guess is not None:
            ops[message.id] = guess
            notes.append(
                f"rank {message.id.rank}: the receive from rank {message.peer} at {message.at} got nothing; "
                f"it is named {guess} by what was to come next"
            )
    control = [m for m in unnamed if m.id not in ops]
    stuck = [m for m in control if not m.over and m.id not in partner]
    for message in stuck:
        what = "send" if message.send else "receive"
        notes.append(
            f"rank {message.id.rank}: the {what} of {message.form} at {message.at} never met a partner, holds no "
            "activation or gradient, and is left out"
        )
    met = len(control) - len(stuck)
    if met:
        places = sorted({f"{m.at}" for m in control if m not in stuck})
        notes.append(
            f"{met} message ends carry no activation or gradient of a stage (control data) and are left out: "
            + ", ".join(places[:3])
            + (" ..." if len(places) > 3 else "")
        )
    return ops, notes


def _uses(logs: Sequence[RankLog]) -> dict[MessageId, tuple[Kind, Owner]]:
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


def _by_content(message: Message, lineage: Lineage) -> Op | None:
    kind, owners = (SB, message.gradient_of) if message.gradient_of else (SF, message.activation_of)
    if len(owners) > 1:
        raise RecordError(
            "a message holds the tensors of one microbatch",
            f"rank {message.id.rank} sends a mixture of {len(owners)} at {message.at}",
            "send them one by one",
        )
    return _op(kind, owners[0], message.peer, lineage) if owners else None


def _by_use(use: tuple[Kind, Owner] | None, message: Message, lineage: Lineage) -> Op | None:
    return None if use is None else _op(use[0], use[1], message.peer, lineage)


def _mirrored(other: Op, message: Message) -> Op:
    """The op of an end that tells nothing by itself, from that of its partner."""
    kind = {SF: RF, RF: SF, SB: RB, RB: SB}[other.kind]
    return Op(kind, other.lane, other.stage + (1 if other.kind in (SF, RB) else -1), other.mb, message.peer)


def _expected(message: Message, ops: Mapping[MessageId, Op], lineage: Lineage, logs: Sequence[RankLog]) -> Op | None:
    """What a receive that got nothing was for: the earliest that this rank still lacked from that peer."""
    rank, peer = message.id.rank, message.peer
    had = {op.bare for id, op in ops.items() if id.rank == rank}
    candidates: list[Op] = []
    for lane, route in lineage.routes.items():
        count = 1 + max((n.mb for n in lineage.names.values() if n.lane == lane), default=-1)
        for stage, holder in enumerate(route):
            if holder != rank:
                continue
            for kind, other in ((RF, stage - 1), (RB, stage + 1)):
                if 0 <= other < len(route) and route[other] == peer:
                    lacking = [mb for mb in range(count) if Op(kind, lane, stage, mb) not in had]
                    candidates += [Op(kind, lane, stage, mb, peer) for mb in lacking[:1]]
    done = {owner for owner in lineage.names if owner.rank == rank}
    ran = {(lineage.names[o].lane, lineage.names[o].stage, lineage.names[o].mb) for o in done}
    ready = [op for op in candidates if op.kind is RB and (op.lane, op.stage, op.mb) in ran]
    return next(iter(sorted(ready or candidates, key=lambda op: (op.mb, op.kind)))) if candidates else None


def program(log: RankLog, ops: Mapping[MessageId, Op], lineage: Lineage) -> tuple[Program, int]:
    """The slots of one rank, and how many computations began with messages in flight.

    Messages that were posted with neither a wait nor a computation between them are one slot: nothing tells them
    apart.  A backward and the weight gradients of the same run of the engine are one slot.  So is everything that a
    method computes whose name says that it overlaps a forward and a backward.
    """
    last_weight = _last_weights(log)
    slots: list[list[Op]] = []
    open_slot: str | None = None  # "messages" or "compute", where the next op may join the last slot
    of_run: dict[int, int] = {}  # run of the engine -> the slot with what it computed
    together = False
    early = 0
    pending: set[int] = set()

    def compute(ops: list[Op | None], run: int | None = None) -> None:
        nonlocal open_slot, early
        named = [op for op in ops if op is not None]
        if not named:
            return
        early += bool(pending) and named[0].kind is not W
        if run is not None and run in of_run:
            slots[of_run[run]] += named
            return
        if slots and open_slot == "compute" and together:
            slots[-1] += named
        else:
            slots.append(named)
        open_slot = "compute"
        if run is not None:
            of_run[run] = len(slots) - 1

    for index, event in enumerate(log.events):
        match event["event"]:
            case "together":
                together, open_slot = event["begins"], None
            case "forward" if event["first"] and log.find(event["forward"]) == event["forward"]:
                compute([_op_of(F, log, event["forward"], lineage)])
            case "backward":
                compute([_op_of(B, log, forward, lineage) for forward in event["forwards"]], event["run"])
            case "weights":
                over = [f for f in event["forwards"] if last_weight[log.find(f)] == index]
                compute([_op_of(W, log, forward, lineage) for forward in over], event["run"])
            case "post":
                ids = [MessageId(log.rank, told["message"]) for told in event["messages"]]
                named = [ops[id] for id in ids if id in ops]
                pending |= {id.number for id in ids if id in ops}
                if not named:
                    continue
                if open_slot != "messages":
                    slots.append([])
                    open_slot = "messages"
                for op in named:
                    if op not in slots[-1]:  # several tensors of one boundary are one message of the schedule
                        slots[-1].append(op)
            case "wait":
                open_slot = None if event["own"] else open_slot
                pending -= set(event["messages"])
    return tuple(_sorted(slot) for slot in slots if slot), early


def _op_of(kind: Kind, log: RankLog, forward: int, lineage: Lineage) -> Op | None:
    name = lineage.names.get(Owner(log.rank, log.find(forward)))
    return None if name is None else Op(kind, name.lane, name.stage, name.mb)


def _last_weights(log: RankLog) -> dict[int, int]:
    """For every forward the last event that adds to its weight gradients: there its W is over."""
    last: dict[int, int] = {}
    for index, event in enumerate(log.events):
        if event["event"] == "weights":
            last.update(dict.fromkeys(map(log.find, event["forwards"]), index))
    return last


def _sorted(slot: list[Op]) -> Slot:
    """A compute slot in the order F, B, W, in which a schedule is written; messages as they were posted."""
    return tuple(sorted(slot, key=lambda op: _ORDER.get(op.kind, 0)))
