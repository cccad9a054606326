"""The messages of a rank to one peer, or from one, compared with those of another schedule.

A receive too many shifts all later ones: each gets the message before its own, and a recorded program uses that as if
it were its own, so the names that are found from the uses shift as well.  The first names that differ are then not
those of the receive that is too many.  What does not shift is its place among the rank's computes.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from itertools import zip_longest
from typing import NamedTuple

from dualpipe.schedule import MESSAGES, RB, RF, SENDS, SF, B, F, Op, Placed, Schedule
from proofs.buffers_search import in_shared_memory

Peer = tuple[int | None, bool]
"""The rank at the other end, and whether the messages are sends."""


class Apart(NamedTuple):
    """Where the messages of a channel first differ.

    ``here`` and ``there`` are what the two schedules have at that point, ``None`` after the last message.  ``surplus``
    is how many messages this schedule has more than the other one from ``here`` on; 0 if that does not show.
    """

    here: Placed | None
    there: Placed | None
    surplus: int = 0


def channels(schedule: Schedule, rank: int) -> Mapping[Peer, list[Placed]]:
    """The messages of a rank by channel, in the order in which they are posted."""
    found: dict[Peer, list[Placed]] = {}
    for number, slot in enumerate(schedule.programs[rank]):
        for position, op in enumerate(slot):
            if op.kind in MESSAGES:
                key = schedule.peer(op), op.kind in SENDS
                found.setdefault(key, []).append(Placed(rank, number, position, op))
    return found


def apart(here: Schedule, there: Schedule, rank: int, computes: int, is_cut_short: bool) -> Iterator[Apart]:
    """The first difference of every channel of a rank.

    The F and B of the rank agree up to the number ``computes``; ``is_cut_short`` is whether its program ends there
    although the other one goes on.  A name that is a guess, or that of a
    receive into memory that another one uses at that time, agrees with every other.
    """
    one, other = channels(here, rank), channels(there, rank)
    guesses = {*here.observed.guesses, *there.observed.guesses, *in_shared_memory(here, rank)}
    for key in one.keys() | other.keys():
        ours, theirs = one.get(key, []), other.get(key, [])
        first = _first_apart(ours, theirs, guesses)
        if first is None:
            continue
        is_certain = len(ours) > len(theirs) or (first.here is not None and first.there is not None)
        gaps = _gaps(here, rank, ours), _gaps(there, rank, theirs)
        yield (_surplus(gaps[0], gaps[1], computes, is_cut_short, guesses) if is_certain else None) or first


def _first_apart(ours: Sequence[Placed], theirs: Sequence[Placed], guesses: Container[Placed]) -> Apart | None:
    for one, other in zip_longest(ours, theirs):
        if one is None or other is None:
            return Apart(one, other)
        if one.op.bare != other.op.bare and one not in guesses and other not in guesses:
            return Apart(one, other)
    return None


def _gaps(schedule: Schedule, rank: int, messages: Sequence[Placed]) -> list[list[Placed]]:
    """The messages by how many F and B of the rank come before them."""
    before = [0]
    for slot in schedule.programs[rank]:
        before.append(before[-1] + sum(op.kind in (F, B) for op in slot))
    gaps: list[list[Placed]] = [[] for _ in range(before[-1] + 1)]
    for message in messages:
        gaps[before[message.slot]].append(message)
    return gaps


def _surplus(
    ours: Sequence[Sequence[Placed]],
    theirs: Sequence[Sequence[Placed]],
    computes: int,
    is_cut_short: bool,
    guesses: Container[Placed],
) -> Apart | None:
    """The first message too many, if from there on this schedule always has posted more than the other one.

    A schedule that only posts messages earlier has no more of them by the end.
    """
    found: Apart | None = None
    more = 0
    posted: list[Placed] = []
    for gap in range(min(computes + 1, len(ours), len(theirs))):
        one, other = ours[gap], theirs[gap]
        is_last = is_cut_short and gap == len(ours) - 1
        if is_last and len(one) < len(other):
            break  # it ended before it posted the rest
        more += len(one) - len(other)
        if found is None and more > 0:
            at = _first_unlike(one, other, guesses)
            if one[at].op.bare in {placed.op.bare for placed in (*posted, *one[:at])}:
                return None  # its name shows that it is repeated
            if one[at] not in guesses and _form(one[at].op) not in {_form(each.op) for own in theirs for each in own}:
                return None  # it is a message of another channel
            found = Apart(one[at], other[at] if at < len(other) else next(filter(None, theirs[gap + 1 :]), [None])[0])
        elif more < 0 or (found is not None and more == 0):
            return None
        posted += one
    return None if found is None else found._replace(surplus=more)


def _first_unlike(one: Sequence[Placed], other: Sequence[Placed], guesses: Container[Placed]) -> int:
    """The first of the longer messages ``one`` that is of another kind or chunk than that of ``other``."""
    for at, (mine, theirs) in enumerate(zip(one, other, strict=False)):
        if _form(mine.op) != _form(theirs.op) and mine not in guesses:
            return at
    return len(other)


def _form(op: Op) -> tuple[object, ...]:
    return op.kind, op.chunk


def shifted_by(schedule: Schedule, extra: Placed) -> Placed | None:
    """The receive too many because of which nothing uses what the later receive ``extra`` of the same channel gets.

    It is the first one that does not fit the send that it meets, if without it all later receives fit the sends of the
    peer by kind and chunk; ``None`` if there is none before ``extra``.
    """
    peer = schedule.peer(extra.op)
    if peer is None or not 0 <= peer < schedule.ranks:
        return None
    received = channels(schedule, extra.rank).get((peer, False), [])
    sent = channels(schedule, peer).get((extra.rank, True), [])
    guesses = schedule.observed.guesses
    wanted = [_received(each.op) for each in sent]
    first = next((at for at, (one, op) in enumerate(zip(received, wanted, strict=False)) if one.op.bare != op), None)
    if first is None or not received[first][:3] < extra[:3]:
        return None
    later = zip(received[first + 1 :], wanted[first:], strict=False)
    fits = [one in guesses or _form(one.op) == _form(op) for one, op in later]
    return received[first] if fits and all(fits) else None


def _received(op: Op) -> Op:
    """The receive that a send should meet."""
    kind, stage = (RF, op.stage + 1) if op.kind is SF else (RB, op.stage - 1)
    return Op(kind, op.lane, stage, op.mb)
