"""Puts a finding into words, for someone who did not write the schedule."""

from __future__ import annotations

from collections import defaultdict
from typing import assert_never

from dualpipe.schedule import MESSAGES, RECEIVES, SENDS, Chunk, Kind, Placed
from dualpipe.schedule.observed import What
from proofs.deadlock_story import never_joined, unmatched, wait_cycle
from proofs.findings import (
    Empty,
    Finding,
    LeftOver,
    Live,
    Mismatch,
    Missing,
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
    WaitCycle,
)
from proofs.words import NOUNS, VERBS, collective, content, forwards, in_slot

__all__ = ["tell"]


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
            return f"rank {first.rank} {verb} of {first.op.task} twice: {in_slot(first)} and again {in_slot(second)}"
        case Stray(place, holder):
            what = f"{VERBS[place.op.kind]} of {place.op.task} {in_slot(place)}"
            return f"rank {place.rank} {what}, but rank {holder} holds that stage"
        case TooEarly():
            return _too_early(finding)
        case NoPeer():
            return _no_peer(finding)
        case NotNeighbour():
            return _not_neighbour(finding)
        case Mismatch():
            return _clash(finding) if finding.is_collective else _mismatch(finding)
        case LeftOver():
            return _left_alone(finding) if finding.is_collective else _left_over(finding)
        case SentTwice(first, second):
            return (
                f"rank {first.rank} sends {content(first.op)} twice, {in_slot(first)} and again {in_slot(second)}; "
                "the second one is received too, and nothing consumes it"
            )
        case NotMember(place, members):
            who = f"ranks {', '.join(map(str, members))}"
            return (
                f"rank {place.rank} joins {collective(place.op)} {in_slot(place)}, and that group has the {who} alone"
            )
        case WaitCycle(model, waits):
            return wait_cycle(model, waits)
        case Unmatched():
            return never_joined(finding) if finding.is_collective else unmatched(finding)
        case OverBound():
            return _over_bound(finding)
        case OutOfOrder(first, second):
            done = "adds the weight gradient" if first.op.kind is Kind.W else "runs the backward"
            return (
                f"rank {first.rank} {done} of microbatch {first.op.mb} {in_slot(first)} before that of "
                f"microbatch {second.op.mb} {in_slot(second)}, both at {first.op.chunk}: "
                "sums in another order round differently, so the gradients are not reproducible bit by bit"
            )
        case TouchedInFlight():
            return _touched(finding)
        case Overwritten(message, forward, by, kept, written, used):
            what = f"receives {content(by)} ({by})" if by is not None and by.kind in RECEIVES else "writes"
            return (
                f"rank {message.rank} {what} into the memory of {content(message.op)}, received {in_slot(message)}, "
                f"at {written}\n"
                f"the graph of {forward}, made at {kept}, still needs that memory: its backward at {used} computes "
                "wrong gradients"
            )
        case _:
            assert_never(finding)


def _mismatch(finding: Mismatch) -> str:
    send, receive = finding.first, finding.second
    return (
        f"rank {receive.rank} expects {content(receive.op)} {in_slot(receive)}, but the next message from "
        f"rank {send.rank} is {content(send.op)}, sent {in_slot(send)}\n"
        "messages carry no tag, so the rank cannot tell them apart: the run would hang, or finish with wrong "
        "gradients"
    )


def _clash(finding: Mismatch) -> str:
    what = [
        f"{collective(placed.op._replace(peer=None))} for rank {placed.rank} {in_slot(placed)}"
        for placed in (finding.first, finding.second)
    ]
    return (
        f"collective {finding.nth + 1} of group {finding.first.op.peer} is {what[0]} and {what[1]}\n"
        "the members of a group take the k-th collective of one for that of the other: the run would hang, or finish "
        "with wrong results"
    )


def _left_alone(finding: LeftOver) -> str:
    place = finding.place
    return (
        f"rank {place.rank} joins {collective(place.op)} as collective {finding.nth + 1} of its group "
        f"{in_slot(place)}, and rank {finding.peer}, which is a member too, joins only {finding.posted}"
    )


def _too_early(finding: TooEarly) -> str:
    place, need, later = finding.place, finding.need, finding.later
    gets = "receives" if need.kind in MESSAGES else "computes" if need.kind is Kind.W else "runs"
    if later is None:
        when = f"never {gets} ({need})"
    elif later.slot == place.slot:
        when = f"{gets} later in the same slot ({need})"
    else:
        when = f"{gets} only {in_slot(later)}"
    verb = f"{VERBS[place.op.kind]} of {place.op.task}" if place.op.kind in VERBS else f"joins {collective(place.op)}"
    what = f"rank {place.rank} {verb} {in_slot(place)}"
    return f"{what}, but this needs {NOUNS[need.kind]} of {need.task}, which it {when}"


def _no_peer(finding: NoPeer) -> str:
    place = finding.place
    verb = "sends" if place.op.kind in SENDS else "receives"
    noun = "an activation" if forwards(place.op) else "a gradient"
    reason = _nowhere(place, finding.peer, finding.ranks, finding.holder, finding.neighbour)
    return f"rank {place.rank} {verb} {noun} at stage {place.op.stage} {in_slot(place)}, but {reason}"


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
        return f"lane {op.lane} has no stage {side} stage {op.stage} that rank {peer} could hold"
    return reason


def _not_neighbour(finding: NotNeighbour) -> str:
    place = finding.place
    verb, towards = ("sends", "to") if place.op.kind in SENDS else ("receives", "from")
    what = f"rank {place.rank} {verb} {content(place.op)} {towards} rank {finding.peer} {in_slot(place)}"
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
            f"rank {place.rank} sends {content(place.op)} {in_slot(place)} as message {nth} to rank {peer}, "
            f"{other}: it is never received"
        )
    other = f"which sends only {posted}" if posted else "which sends nothing to it"
    return (
        f"rank {place.rank} waits {in_slot(place)} for {content(place.op)} as message {nth} from rank {peer}, "
        f"{other}: it waits forever"
    )


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
    done = _DONE[finding.what]
    if finding.is_shared:
        done = f"the other, {by}, posted"
        effect = "the one that arrives last is in that memory in the end, so one may be used as the other"
    elif sends:
        effect = "what is sent may be what is in that memory later"
    elif finding.what is What.READ:
        effect = "the message may not have arrived, so it may compute with what was in the memory before"
    else:
        effect = "the message may arrive in that memory later"
    return (
        f"rank {message.rank} {verb} the tensor of {content(message.op)}{doer} while the message {in_slot(message)} "
        f"is in flight\nposted at {finding.posted}\n{done} at {finding.touched}\n{waited}\n{effect}"
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
