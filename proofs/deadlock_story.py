"""The stories of ``deadlock``: wait cycles, and what never completes."""

from __future__ import annotations

from dualpipe.schedule import COLLECTIVES, MESSAGES, SENDS, Placed
from proofs.findings import Unmatched, Wait
from proofs.models import Model
from proofs.words import collective, content, forwards, in_slot


def never_joined(finding: Unmatched) -> str:
    """A collective that a member never joins."""
    place, model = finding.place, finding.model
    story = (
        f"{_stream(model)}rank {place.rank} waits forever {in_slot(place)} until rank {finding.peer} joins "
        f"{collective(place.op)}: it is collective {finding.nth + 1} of its group, and rank {finding.peer} "
        f"joins only {finding.posted} ({model} messages)"
    )
    return "\n".join([story, *_circle(finding)])


def _circle(finding: Unmatched) -> list[str]:
    """The lines on the ranks that wait for each other, so that none of them posts what another one lacks."""
    lines = [
        f"rank {place.rank} gets no further than slot {place.slot} ({place.op}), {_wants(place)}"
        for place in finding.circle
    ]
    if not lines:
        return []
    ranks = sorted({finding.place.rank, *(place.rank for place in finding.circle)})
    who = f"ranks {', '.join(map(str, ranks[:-1]))} and {ranks[-1]}"
    kinds = {place.op.kind in SENDS for place in (finding.place, *finding.circle) if place.op.kind in MESSAGES}
    only_messages = all(place.op.kind in MESSAGES for place in (finding.place, *finding.circle))
    does = {True: ", each in a send", False: ", each in a receive"}
    each = does[kinds.pop()] if only_messages and len(kinds) == 1 else ""
    return [*lines, f"so {who} wait for each other{each}"]


def _wants(place: Placed) -> str:
    """What a blocked rank waits for."""
    if place.op.kind in COLLECTIVES:
        return f"where it waits to join {collective(place.op)}"
    verb = "send" if place.op.kind in SENDS else "receive"
    return f"where it waits to {verb} {content(place.op)}"


def _stream(model: Model) -> str:
    return "the message stream of " if model.overlaps and not model.edges else ""


def wait_cycle(model: Model, waits: tuple[Wait, ...]) -> str:
    """One line for each rank, and one for all of them."""
    blocked = {wait.place.rank: wait.place.slot for wait in waits}
    lines = [_wait(model, wait, blocked[wait.partner.rank]) for wait in waits]
    ranks = sorted(blocked)
    who = f"ranks {', '.join(map(str, ranks[:-1]))} and {ranks[-1]}"
    return "\n".join([*lines, f"so {who} wait for each other and none of them can go on ({model} messages)"])


def _wait(model: Model, wait: Wait, partner_blocked_in: int) -> str:
    place, partner = wait.place, wait.partner
    stream = _stream(model)
    if partner.op.kind in COLLECTIVES:
        until = f"until rank {partner.rank} joins {collective(place.op)}, which"
    elif place.op.kind not in MESSAGES:  # with a communicator for each pair
        verb, noun = ("sends it", "send") if partner.op.kind in SENDS else ("receives", "receive")
        until = f"until rank {partner.rank} {verb} {content(partner.op)}; that {noun}"
    elif place.op.kind not in SENDS:
        until = f"until rank {partner.rank} sends it {content(place.op)}; the send that matches it"
    elif model.capacity:
        until = f"for room to send rank {partner.rank} {content(place.op)}; the receive that makes room"
    else:
        until = f"until rank {partner.rank} receives {content(place.op)}; the receive that matches it"
    return (
        f"{stream}rank {place.rank} waits {in_slot(place)} {until} is {in_slot(partner)} there, "
        f"and {stream}rank {partner.rank} gets no further than slot {partner_blocked_in}"
    )


def unmatched(finding: Unmatched) -> str:
    """A message without a partner."""
    place, peer, posted, model = finding.place, finding.peer, finding.posted, finding.model
    sends = place.op.kind in SENDS
    opposite, towards = ("receives", "from") if sends else ("sends", "to")
    what = content(place.op)
    if not finding.possible or peer is None:
        noun = "the activation" if forwards(place.op) else "the gradient"
        what = f"{noun} of {place.op.task}"
        there = "no rank is at the other end" if peer is None else f"there is no rank {peer}"
        reason = f"rank {peer} would be at both ends" if peer == place.rank else there
    elif posted == 0:
        reason = f"rank {peer} {opposite} nothing {towards} it"
    else:
        between = f"rank {place.rank} to rank {peer}" if sends else f"rank {peer} to rank {place.rank}"
        reason = f"this is message {finding.nth + 1} from {between}, and rank {peer} {opposite} only {posted}"
    if model.edges:
        noun = "send" if sends else "receive"
        verb = f"rank {place.rank} posts the {noun} of {what} {in_slot(place)}, and it never completes"
    elif sends and finding.nth - model.capacity < posted:
        verb = f"rank {place.rank} sends {what} {in_slot(place)} into a buffer that is never emptied"
    else:
        does = "send" if sends else "receive"
        verb = f"{_stream(model)}rank {place.rank} waits forever {in_slot(place)} to {does} {what}"
    return "\n".join([f"{verb}: {reason} ({model} messages)", *_circle(finding)])
