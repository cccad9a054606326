"""What a story adds about the messages of a finding: superfluous ones, where they were posted, and guessed names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import fields

from dualpipe.schedule import COMPUTE, MESSAGES, SB, SENDS, SF, B, Chunk, F, Kind, Op, Placed, Schedule
from proofs.channels import shifted_by
from proofs.findings import (
    Finding,
    LeftOver,
    Mismatch,
    Missing,
    Overwritten,
    Repeated,
    TouchedInFlight,
    Unmatched,
    Wait,
)


def remarks(schedule: Schedule, finding: Finding) -> Iterator[str]:
    """One line for each remark."""
    others = [place for place in _placed(finding) if place.op.kind not in MESSAGES]
    for place in dict.fromkeys(others):
        if at := schedule.observed.place(place):
            yield f"{place.op} in slot {place.slot} of rank {place.rank} is at {at}"
    if isinstance(finding, Mismatch) and schedule.observed and any(place.op.kind is Kind.US for place in others):
        # the recorder writes this kind for nothing else
        yield "the calls differ in their function, or in the type or the number of elements of what they are given"
    if isinstance(finding, Missing) and (before := _before(schedule, finding)) is not None:
        at = schedule.observed.place(before)
        yield f"{before.op} in slot {before.slot} of rank {before.rank}, which comes before it, is at {at}"
    if isinstance(finding, TouchedInFlight | Overwritten):
        return  # their stories have the lines of the program
    found = list(_messages(finding))
    instead = list(_sent_instead(schedule)) if isinstance(finding, Mismatch | LeftOver | Unmatched | Repeated) else []
    if instead:
        for again, never in instead:
            yield (
                f"rank {again.rank} sends {again.op.bare} more than once, again in slot {again.slot}, and never sends "
                f"{never}: does it send another tensor than the one that it has just computed?"
            )
            found.append(again)
    elif isinstance(finding, Mismatch | LeftOver | Unmatched):
        extras = dict.fromkeys(extra for placed in found for extra in _superfluous(schedule, placed))
        for extra in extras:
            earlier = shifted_by(schedule, extra)
            yield _on_superfluous(schedule, extra) if earlier is None else _on_shift(schedule, extra, earlier)
            found += [extra] if earlier is None else [earlier, extra]
    for placed in dict.fromkeys(found):
        yield from _on_place(schedule, placed)


def _before(schedule: Schedule, finding: Missing) -> Placed | None:
    """The last compute of the same task on the rank, if its line is known; or else of the chunk."""
    own = [p for p in schedule if p.rank == finding.rank and p.op.chunk == finding.op.chunk and p.op.kind in COMPUTE]
    own = [placed for placed in own if schedule.observed.place(placed)]
    same = [placed for placed in own if placed.op.task == finding.op.task]
    return (same or own)[-1] if own else None


def _messages(finding: Finding) -> Iterator[Placed]:
    """The messages that a finding names."""
    return (placed for placed in _placed(finding) if placed.op.kind in MESSAGES)


def _placed(finding: Finding) -> Iterator[Placed]:
    """The ops that a finding names."""
    for field in fields(finding):
        value = getattr(finding, field.name)
        waits = [item for item in value if isinstance(item, Wait)] if isinstance(value, tuple) else []
        others = [item for item in value if isinstance(item, Placed)] if isinstance(value, tuple) else []
        for placed in [value, *others, *(end for wait in waits for end in (wait.place, wait.partner))]:
            if isinstance(placed, Placed):
                yield placed


def _sent_instead(schedule: Schedule) -> Iterator[tuple[Placed, Op]]:
    """For each chunk: the first send that repeats a result computed only once, and a computed result that is not sent.

    If a result is computed twice, it is also sent twice.  This is not a fault of the rank: another one sent the input
    twice.
    """
    for rank, program in enumerate(schedule.programs):
        placed = [
            Placed(rank, number, position, op)
            for number, slot in enumerate(program)
            for position, op in enumerate(slot)
        ]
        computed = Counter((place.op.kind, place.op.task) for place in placed if place.op.kind in _SENT_AS)
        sent = Counter(place.op.bare for place in placed if place.op.kind in SENDS)
        seen: set[Op] = set()
        reported: set[tuple[Kind, Chunk]] = set()
        for place in placed:
            op = place.op.bare
            kind = next((made for made, sends in _SENT_AS.items() if sends is op.kind), None)
            if kind is None or (op.kind, op.chunk) in reported:
                continue
            if op in seen and computed[kind, op.task] == 1:
                made = (Op(op.kind, *task) for of, task in computed if of is kind and Chunk(*task[:2]) == op.chunk)
                never = next((other for other in made if not sent[other]), None)
                if never is not None:
                    reported.add((op.kind, op.chunk))
                    yield place, never
            seen.add(op)


_SENT_AS = {F: SF, B: SB}
"""What is computed, and the send of its result."""


def _superfluous(schedule: Schedule, placed: Placed) -> list[Placed]:
    """Messages up to this one, of the same rank, peer and direction, that repeat another one.

    Of two with the same name it is the one whose name is a guess, because nothing uses it; else the second one.
    """
    peer, sends = schedule.peer(placed.op), placed.op.kind in SENDS
    same: dict[Op, list[Placed]] = {}
    for other in schedule:
        op = other.op
        of_pair = other.rank == placed.rank and op.kind in MESSAGES and schedule.peer(op) == peer
        if of_pair and (op.kind in SENDS) == sends and other[:3] <= placed[:3]:
            same.setdefault(op.bare, []).append(other)
    guesses = schedule.observed.guesses
    repeated = [group for group in same.values() if len(group) > 1]
    return [next((one for one in group if one in guesses), group[1]) for group in repeated]


def _on_superfluous(schedule: Schedule, extra: Placed) -> str:
    sends = extra.op.kind in SENDS
    verb, noun, other = ("sends", "send", "receives") if sends else ("receives", "receive", "sends")
    what = f"rank {extra.rank} {verb} {extra.op.bare} more than once"
    if extra in schedule.observed.guesses and not sends:
        which = "one of those" if schedule.programs[extra.rank][extra.slot].count(extra.op) > 1 else "that"
        what += f", and nothing uses {which} in slot {extra.slot}"
    else:
        what += f", again in slot {extra.slot}"
    return f"{what}: this is one {noun} too many, or rank {schedule.peer(extra.op)} {other} one too few"


def _on_shift(schedule: Schedule, extra: Placed, earlier: Placed) -> str:
    peer = schedule.peer(extra.op)
    return (
        f"rank {extra.rank} posts one receive from rank {peer} too many, probably {earlier.op} in slot {earlier.slot}: "
        f"without it, its later receives from rank {peer} would fit what that rank sends, and now nothing uses what it "
        f"receives in slot {extra.slot} ({extra.op})"
    )


def _on_place(schedule: Schedule, placed: Placed) -> Iterator[str]:
    """Where a recorded message was posted, and whether its name is a guess."""
    observed, op, slot = schedule.observed, placed.op, schedule.programs[placed.rank][placed.slot]
    nth = f", message {placed.position + 1} of it," if slot.count(op) > 1 else ""
    if place := observed.place(placed):
        yield f"{op} in slot {placed.slot}{nth} of rank {placed.rank} was posted at {place}"
    others = observed.guesses.get(placed)
    if others is not None:
        shows = "made what is sent" if op.kind in SENDS else "uses what is received"
        also = f"; it could also be {' or '.join(map(str, others))}" if others else ""
        yield f"that it is {op} is a guess by order, since no observed forward or backward {shows}{also}"
