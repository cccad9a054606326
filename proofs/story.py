"""Puts a finding into words, for someone who did not write the schedule."""

from __future__ import annotations

from collections import defaultdict
from typing import assert_never

from dualpipe.schedule import COLLECTIVES, MESSAGES, RECEIVES, SENDS, Chunk, Kind, Op, Placed
from dualpipe.schedule.observed import What
from proofs.findings import (
    Clash,
    Empty,
    Finding,
    LeftAlone,
    LeftOver,
    Live,
    Mismatch,
    Missing,
    NeverJoined,
    NoPeer,
    NotMember,
    NotNeighbour,
    OutOfOrder,
    OverBound,
    Overwritten,
    Repeated,
    SentTwice,
    Stray,
    TooEarly,
    TouchedInFlight,
    Unmatched,
    Wait,
    WaitCycle,
)
from proofs.models import Model

__all__ = ["tell"]

VERBS = {
    Kind.F: "runs the forward",
    Kind.B: "runs the backward for the input",
    Kind.W: "computes the weight gradient",
    Kind.SF: "sends the activation",
    Kind.SB: "sends the gradient",
}
NOUNS = {
    Kind.F: "the forward",
    Kind.B: "the backward for the input",
    Kind.W: "the weight gradient",
    Kind.RF: "the activation",
    Kind.RB: "the gradient",
}
TOGETHER = {
    Kind.AA: "the all-to-all",
    Kind.AR: "the all-reduce",
    Kind.US: "the unsharding of the weights",
    Kind.RS: "the resharding of the weights",
    Kind.RG: "the reduction of the gradients",
}


def tell(finding: Finding) -> str:
    """The story of a finding: one line, or one for each step of it."""
    match finding:
        case Empty():
            return "no rank computes anything, so the schedule cannot be complete"
        case Missing(op, rank, largest):
            mbs = f"microbatches are 0 to {largest}" if largest else "only microbatch is 0"
            return f"rank {rank} never {VERBS[op.kind]} of {op.task} ({op}), and the lane's {mbs}"
        case Repeated(first, second):
            verb = VERBS[first.op.kind]
            return f"rank {first.rank} {verb} of {first.op.task} twice: {_slot(first)} and again {_slot(second)}"
        case Stray(place, holder):
            what = f"{VERBS[place.op.kind]} of {place.op.task} {_slot(place)}"
            return f"rank {place.rank} {what}, but rank {holder} holds that stage"
        case TooEarly():
            return _too_early(finding)
        case NoPeer():
            return _no_peer(finding)
        case NotNeighbour():
            return _not_neighbour(finding)
        case Mismatch(send, receive, _):
            return (
                f"rank {receive.rank} expects {content(receive.op)} {_slot(receive)}, but the next message from "
                f"rank {send.rank} is {content(send.op)}, sent {_slot(send)}\n"
                "messages carry no tag, so the rank cannot tell them apart: the run would hang, or finish with wrong "
                "gradients"
            )
        case LeftOver():
            return _left_over(finding)
        case SentTwice(first, second):
            return (
                f"rank {first.rank} sends {content(first.op)} twice, {_slot(first)} and again {_slot(second)}; "
                "the second one is received too, and nothing consumes it"
            )
        case NotMember(place, members):
            who = f"ranks {', '.join(map(str, members))}"
            return f"rank {place.rank} joins {_collective(place.op)} {_slot(place)}, and that group has the {who} alone"
        case Clash():
            return _clash(finding)
        case LeftAlone():
            place, absent = finding.place, f"rank {finding.absent}, which is a member too,"
            return (
                f"rank {place.rank} joins {_collective(place.op)} as collective {finding.nth + 1} of its group "
                f"{_slot(place)}, and {absent} joins only {finding.joined}"
            )
        case WaitCycle(model, waits):
            return _wait_cycle(model, waits)
        case Unmatched():
            return _unmatched(finding)
        case NeverJoined():
            place, model = finding.place, finding.model
            return (
                f"{_stream(model)}rank {place.rank} waits for ever {_slot(place)} until rank {finding.absent} joins "
                f"{_collective(place.op)}: it is collective {finding.nth + 1} of its group, and rank {finding.absent} "
                f"joins only {finding.joined} ({model} messages)"
            )
        case OverBound():
            return _over_bound(finding)
        case OutOfOrder(first, second):
            done = "adds the weight gradient" if first.op.kind is Kind.W else "runs the backward"
            return (
                f"rank {first.rank} {done} of microbatch {first.op.mb} {_slot(first)} before that of "
                f"microbatch {second.op.mb} {_slot(second)}, both at {first.op.chunk}: "
                "sums in another order round differently, so the gradients are not reproducible bit by bit"
            )
        case TouchedInFlight():
            return _touched(finding)
        case Overwritten(message, forward, by, kept, written, used):
            what = f"receives {content(by)} ({by})" if by is not None and by.kind in RECEIVES else "writes"
            return (
                f"rank {message.rank} {what} into the memory of {content(message.op)}, received {_slot(message)}, "
                f"at {written}\n"
                f"the graph of {forward}, made at {kept}, still needs that memory: its backward at {used} computes "
                "wrong gradients"
            )
        case _:
            assert_never(finding)


def content(op: Op) -> str:
    """What a message carries: ``the activation of microbatch 3 of lane > (stage 1 to stage 2)``."""
    forwards = _forwards(op)
    here, there = op.stage, op.stage + (1 if op.kind in (Kind.SF, Kind.RB) else -1)
    source, target = (here, there) if op.kind in SENDS else (there, here)
    noun = "the activation" if forwards else "the gradient"
    where = f"stage {source} to stage {target}" if min(source, target) >= 0 else f"at stage {op.stage}"
    return f"{noun} of microbatch {op.mb} of lane {op.lane} ({where})"


def _collective(op: Op) -> str:
    """A collective with its stage and group: ``the reduction of the gradients of stage 0 of lane > in group 1``."""
    where = "" if op.peer is None else f" in group {op.peer}"
    return f"{TOGETHER[op.kind]} of {op.task if op.kind is Kind.AA else op.chunk}{where}"


def _clash(finding: Clash) -> str:
    what = [
        f"{_collective(placed.op._replace(peer=None))} for rank {placed.rank} {_slot(placed)}"
        for placed in (finding.first, finding.second)
    ]
    return (
        f"collective {finding.nth + 1} of group {finding.first.op.peer} is {what[0]} and {what[1]}\n"
        "the members of a group take the k-th collective of one for that of the other: the run would hang, or finish "
        "with wrong results"
    )


def _stream(model: Model) -> str:
    return "the message stream of " if model.overlaps else ""


def _forwards(op: Op) -> bool:
    return op.kind in (Kind.SF, Kind.RF)


def _slot(place: Placed) -> str:
    return f"in slot {place.slot} ({place.op})"


def _too_early(finding: TooEarly) -> str:
    place, need, later = finding.place, finding.need, finding.later
    gets = "receives" if need.kind in MESSAGES else "computes" if need.kind is Kind.W else "runs"
    if later is None:
        when = f"never {gets} ({need})"
    elif later.slot == place.slot:
        when = f"{gets} later in the same slot ({need})"
    else:
        when = f"{gets} only {_slot(later)}"
    verb = f"{VERBS[place.op.kind]} of {place.op.task}" if place.op.kind in VERBS else f"joins {_collective(place.op)}"
    what = f"rank {place.rank} {verb} {_slot(place)}"
    return f"{what}, but this needs {NOUNS[need.kind]} of {need.task}, which it {when}"


def _no_peer(finding: NoPeer) -> str:
    place = finding.place
    verb = "sends" if place.op.kind in SENDS else "receives"
    noun = "an activation" if _forwards(place.op) else "a gradient"
    reason = _nowhere(place, finding.peer, finding.ranks, finding.holder, finding.neighbour)
    return f"rank {place.rank} {verb} {noun} at stage {place.op.stage} {_slot(place)}, but {reason}"


def _nowhere(place: Placed, peer: int | None, ranks: int, holder: int, neighbour: int | None) -> str:
    """Why no other rank can be at the other end of a message."""
    op = place.op
    side = "after" if op.kind in (Kind.SF, Kind.RB) else "before"
    if neighbour is None:
        reason = f"lane {op.lane} has no stage {side} stage {op.stage}, so no rank is at the other end"
    elif neighbour == holder:
        reason = (
            f"the stage {side} stage {op.stage} of lane {op.lane} is on rank {holder} as well, and stages on one rank "
            "pass tensors without a message"
        )
    elif holder != place.rank:
        reason = f"rank {holder} holds {op.chunk}"
    else:
        reason = f"rank {neighbour} is its neighbour there"
    if peer is not None and not 0 <= peer < ranks:
        return f"there is no rank {peer}, only {f'0 to {ranks - 1}' if ranks > 1 else 'rank 0'}; {reason}"
    named = op.peer is not None
    if named and peer == place.rank:
        return f"it names its own rank as the other end; {reason}"
    if named and neighbour is None:
        return f"lane {op.lane} has no stage {side} stage {op.stage}, and rank {peer} has no part in it"
    return reason


def _not_neighbour(finding: NotNeighbour) -> str:
    place = finding.place
    verb, towards = ("sends", "to") if place.op.kind in SENDS else ("receives", "from")
    what = f"rank {place.rank} {verb} {content(place.op)} {towards} rank {finding.peer} {_slot(place)}"
    if place.rank != finding.holder:
        return f"{what}, but rank {finding.holder} holds stage {place.op.stage} of lane {place.op.lane}"
    if finding.neighbour == finding.holder:
        reason = _nowhere(place, None, 0, finding.holder, finding.neighbour)
    else:
        reason = f"rank {finding.neighbour} is its neighbour there"
    return f"{what}, but {reason}"


def _left_over(finding: LeftOver) -> str:
    place, peer, nth, posted = finding.place, finding.peer, finding.nth + 1, finding.posted
    if place.op.kind in SENDS:
        other = f"which receives only {posted}" if posted else "which receives nothing from it"
        return (
            f"rank {place.rank} sends {content(place.op)} {_slot(place)} as message {nth} to rank {peer}, "
            f"{other}: it is never received"
        )
    other = f"which sends only {posted}" if posted else "which sends nothing to it"
    return (
        f"rank {place.rank} waits {_slot(place)} for {content(place.op)} as message {nth} from rank {peer}, "
        f"{other}: it waits forever"
    )


def _wait_cycle(model: Model, waits: tuple[Wait, ...]) -> str:
    blocked = {wait.place.rank: wait.place.slot for wait in waits}
    lines = [_wait(model, wait, blocked[wait.partner.rank]) for wait in waits]
    ranks = sorted(blocked)
    who = f"ranks {', '.join(map(str, ranks[:-1]))} and {ranks[-1]}"
    return "\n".join([*lines, f"so {who} wait for each other and none of them can go on ({model} messages)"])


def _wait(model: Model, wait: Wait, partner_blocked_in: int) -> str:
    place, partner = wait.place, wait.partner
    stream = _stream(model)
    if place.op.kind in COLLECTIVES:
        until = f"until rank {partner.rank} joins {_collective(place.op)}, which"
    elif place.op.kind not in SENDS:
        until = f"until rank {partner.rank} sends it {content(place.op)}; the send that matches it"
    elif model.capacity:
        until = f"for room to send rank {partner.rank} {content(place.op)}; the receive that makes room"
    else:
        until = f"until rank {partner.rank} receives {content(place.op)}; the receive that matches it"
    return (
        f"{stream}rank {place.rank} waits {_slot(place)} {until} is {_slot(partner)} there, "
        f"and {stream}rank {partner.rank} gets no further than slot {partner_blocked_in}"
    )


def _unmatched(finding: Unmatched) -> str:
    place, peer, posted, model = finding.place, finding.peer, finding.posted, finding.model
    sends = place.op.kind in SENDS
    opposite, towards = ("receives", "from") if sends else ("sends", "to")
    what = content(place.op)
    if not finding.possible or peer is None:
        noun = "the activation" if _forwards(place.op) else "the gradient"
        what = f"{noun} of {place.op.task}"
        there = "no rank is at the other end" if peer is None else f"there is no rank {peer}"
        reason = f"rank {peer} would be at both ends" if peer == place.rank else there
    elif posted == 0:
        reason = f"rank {peer} {opposite} nothing {towards} it"
    else:
        between = f"rank {place.rank} to rank {peer}" if sends else f"rank {peer} to rank {place.rank}"
        reason = f"this is message {finding.nth + 1} from {between}, and rank {peer} {opposite} only {posted}"
    if sends and finding.nth - model.capacity < posted:
        verb = f"rank {place.rank} sends {what} {_slot(place)} into a buffer that is never emptied"
    else:
        stream = "the message stream of " if model.overlaps else ""
        verb = f"{stream}rank {place.rank} waits forever {_slot(place)} to {'send' if sends else 'receive'} {what}"
    return f"{verb}: {reason} ({model} messages)"


_TOUCH = {What.READ: "reads", What.WRITE: "writes to", What.FREE: "frees or resizes"}


def _touched(finding: TouchedInFlight) -> str:
    message, by = finding.message, finding.by
    sends = message.op.kind in SENDS
    verb = _TOUCH[finding.what]
    if by is not None and by.kind in MESSAGES:
        verb = f"receives {by} into" if finding.what is What.WRITE else f"sends, as {by},"
        doer = ""
    else:
        doer = "" if by is None else f" in {by}"
    waited = f"waited for at {finding.waited}" if finding.waited is not None else "never waited for"
    if sends:
        effect = "what is sent may be what is in that memory later"
    elif finding.what is What.READ:
        effect = "the message may not have arrived, so it may compute with what was in the memory before"
    else:
        effect = "the message may arrive in that memory later"
    return (
        f"rank {message.rank} {verb} the tensor of {content(message.op)}{doer} while the message {_slot(message)} "
        f"is in flight\nposted at {finding.posted}\n{_DONE[finding.what]} at {finding.touched}\n{waited}\n{effect}"
    )


_DONE = {What.READ: "read", What.WRITE: "written", What.FREE: "freed or resized"}


def _over_bound(finding: OverBound) -> str:
    held, bound = len(finding.live), f"{finding.bound} ({finding.source})"
    count = "1 live activation" if held == 1 else f"{held} live activations"
    head = f"rank {finding.rank} holds {count} in slot {finding.slot}, but may hold only {bound}"
    return "\n".join([f"{head}; live in that slot:", *live_lines(finding.live)])


def live_lines(live: tuple[Live, ...]) -> list[str]:
    """A line for each stage, lane and op (B or W) that microbatches are live and waiting for."""
    microbatches: dict[tuple[Chunk, Kind], list[int]] = defaultdict(list)
    for held in live:
        microbatches[held.op.chunk, held.until].append(held.op.mb)
    return [
        f"  {chunk}, waiting for {until}: microbatch{'es' if len(mbs) > 1 else ''} " + ", ".join(map(str, sorted(mbs)))
        for (chunk, until), mbs in microbatches.items()
    ]
