"""The messages of a rank to one peer, or from one, compared with those of another schedule.

A receive too many shifts all later ones: each gets the message before its own, and a recorded program uses that as if
it were its own, so the names that are found from the uses shift as well.  The first names that differ are then not
those of the receive that is too many.  What does not shift is its place among the rank's computes.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from itertools import takewhile, zip_longest
from typing import NamedTuple

from dualpipe.schedule import MESSAGES, RB, RF, SENDS, SF, B, F, Op, Placed, Schedule
from dualpipe.schedule.observed import frames_of
from proofs.buffers_search import in_shared_memory

Peer = tuple[int | None, bool]
"""The rank at the other end, and whether the messages are sends."""


class Apart(NamedTuple):
    """Where the messages of a channel first differ.

    ``here`` and ``there`` are what the two schedules have at that point, ``None`` after the last message.  ``surplus``
    is how many messages this schedule has more than the other one from there on; 0 if that does not show.  If it is
    negative, ``there`` is the first message that this schedule lacks, and ``here`` the op with which the slots between
    the same F and B begin.  ``is_open`` is whether the messages may also be posted only earlier or later, since the
    program ended and the names do not tell.
    """

    here: Placed | None
    there: Placed | None
    surplus: int = 0
    is_open: bool = False


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
    although the other one goes on.  A name that is a guess, or that of a receive into memory that another one uses at
    that time, agrees with every other.
    """
    one, other = channels(here, rank), channels(there, rank)
    guesses = {*here.observed.guesses, *there.observed.guesses, *in_shared_memory(here, rank)}
    own = [message for messages in one.values() for message in messages]
    lines = {message: frames_of(here.observed.place(message)) for message in own}
    for key in one.keys() | other.keys():
        ours, theirs = one.get(key, []), other.get(key, [])
        first = _first_apart(ours, theirs, guesses)
        is_certain = len(ours) > len(theirs) or (first is not None and None not in first[:2])
        found = None
        if is_cut_short or is_certain:
            gaps = _gaps(here, rank, ours), _gaps(there, rank, theirs)
            begins = _gaps(here, rank, [Placed(rank, slot, 0, ops[0]) for slot, ops in enumerate(here.programs[rank])])
            found = _Counts(*gaps, begins, guesses, lines).apart(computes + 1, is_cut_short)
            found = None if found is None else found._replace(is_open=not is_certain)
        if (which := found or first) is not None:
            yield which


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


class _Counts(NamedTuple):
    """The messages of a channel in the two schedules, by how many F and B of the rank come before them.

    ``slots`` are the first ops of the slots of this schedule, and ``lines`` are those of all messages of the rank.
    """

    ours: Sequence[Sequence[Placed]]
    theirs: Sequence[Sequence[Placed]]
    slots: Sequence[Sequence[Placed]]
    guesses: Container[Placed]
    lines: Mapping[Placed, Sequence[str]]

    def apart(self, end: int, is_cut_short: bool) -> Apart | None:
        """The first message too many or too few, if from there on one of the two always has posted more.

        A schedule that only posts messages earlier or later has as many of them by the end.  Only of a program that is
        cut short are messages said to be too few: in another one the names show which is missing.
        """
        found: Apart | None = None
        more = 0
        for gap, (one, other) in enumerate([*zip(self.ours, self.theirs, strict=False)][:end]):
            if is_cut_short and gap == len(self.ours) - 1 and len(one) < len(other):
                break  # it ended before it posted the rest
            more += len(one) - len(other)
            if found is None and more:
                found = self._more(gap) if more > 0 else self._fewer(gap) if is_cut_short else None
                if found is None:
                    return None
            elif found is not None and more * found.surplus <= 0:
                return None
        return None if found is None else found._replace(surplus=more)

    def _more(self, gap: int) -> Apart | None:
        """The message too many in a gap; ``None`` if its name shows another fault."""
        one, other = self.ours[gap], self.theirs[gap]
        at = self._unlike_by_line(one, other)
        at = _first_unlike(one, other, self.guesses) if at is None else at
        op = one[at].op
        if one[at] not in self.guesses:
            if op.bare in {placed.op.bare for own in (*self.ours[:gap], one[:at]) for placed in own}:
                return None  # it is repeated
            if _form(op) not in {_form(each.op) for own in self.theirs for each in own}:
                return None  # it is a message of another channel
        after = next(filter(None, self.theirs[gap + 1 :]), [None])[0]
        return Apart(one[at], other[at] if at < len(other) else after, 1)

    def _fewer(self, gap: int) -> Apart:
        """The first message of the other schedule in a gap that this one lacks."""
        other = self.theirs[gap]
        return Apart(self.slots[gap][0], other[_first_unlike(other, self.ours[gap], self.guesses)], -1)

    def _unlike_by_line(self, one: Sequence[Placed], other: Sequence[Placed]) -> int | None:
        """The one of the messages whose line is most like those that post other kinds; ``None`` if no one is.

        A message too many has the name of the message after it, so its name does not tell it from the right one.  But
        the lines that called the helper that posted it are those of its own kind.
        """
        wanted = {each.op.kind for each in other}
        earlier = [each for each in self.lines if each.slot < one[0].slot and each not in self.guesses]

        def likeness(message: Placed) -> int:
            shared = {True: 0, False: 0}
            for each in earlier:
                is_wanted = each.op.kind in wanted
                both = zip(self.lines[message], self.lines[each], strict=False)
                length = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], both))
                shared[is_wanted] = max(shared[is_wanted], length)
            return shared[False] - shared[True]

        found = [likeness(message) for message in one]
        return found.index(max(found)) if wanted and found.count(max(found)) == 1 else None


def _first_unlike(one: Sequence[Placed], other: Sequence[Placed], guesses: Container[Placed]) -> int:
    """The first of the longer messages ``one`` that is of another kind or chunk than that of ``other``."""
    for at, (mine, theirs) in enumerate(zip(one, other, strict=False)):
        if _form(mine.op) != _form(theirs.op) and mine not in guesses:
            return at
    return len(other)


def _form(op: Op) -> tuple[object, ...]:
    return op.kind, op.chunk


def surplus_receive(schedule: Schedule, rank: int, peer: int | None) -> Placed | None:
    """The receive of a rank from a peer that is one too many and shifts all later ones of the channel, if there is one.

    It is the first one that does not fit the send that it meets, if without it all later receives fit the sends of the
    peer by kind and chunk.
    """
    if peer is None or not 0 <= peer < schedule.ranks:
        return None
    received = channels(schedule, rank).get((peer, False), [])
    sent = channels(schedule, peer).get((rank, True), [])
    guesses = schedule.observed.guesses
    wanted = [_received(each.op) for each in sent]
    first = next((at for at, (one, op) in enumerate(zip(received, wanted, strict=False)) if one.op.bare != op), None)
    if first is None:
        return None
    later = zip(received[first + 1 :], wanted[first:], strict=False)
    fits = [one in guesses or _form(one.op) == _form(op) for one, op in later]
    return received[first] if fits and all(fits) else None


def shifted_by(schedule: Schedule, extra: Placed) -> Placed | None:
    """The receive too many because of which nothing uses what the later receive ``extra`` of the same channel gets."""
    found = surplus_receive(schedule, extra.rank, schedule.peer(extra.op))
    return found if found is not None and found[:3] < extra[:3] else None


def _received(op: Op) -> Op:
    """The receive that a send should meet."""
    kind, stage = (RF, op.stage + 1) if op.kind is SF else (RB, op.stage - 1)
    return Op(kind, op.lane, stage, op.mb)
