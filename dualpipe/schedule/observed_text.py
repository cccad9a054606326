"""The lines of a schedule file for what was observed when a program ran it.

::

    place 1 train.py:14 (called at train.py:40)
    place 2 train.py:15
    events 1: post:1RF0>@0:1 read:1RF0>@0:1F0>:2 wait:1RF0>@0:2
    lines 1: 1F0>:3 1B0>:4 1RG>@0:5
    guesses 1: 1RB0>@2:1RF1>@0

An event is what happened, the message, for all but ``post`` and ``wait`` the op that did it (``-`` if unknown), and the
number of the place.  ``1RF0>@0/2`` is the second ``1RF0>@0`` of the rank.  ``lines`` are the places of computes and
collectives.  A guess is the message and what it may be.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

from dualpipe.schedule.observed import Event, Guess, Observed, What
from dualpipe.schedule.op import MESSAGES, Op, Placed, Program

WORDS = ("place", "events", "lines", "guesses")
"""The words that such lines begin with."""
Line = tuple[int, str]
"""The number of a line, from 1, and its text without the comment."""
Fail = Callable[[int, int, str, str], NoReturn]
"""Raises an error at a line and a column: what was found and what was expected."""

_ALONE = frozenset({What.POST, What.WAIT})  # events that no op does
_ESCAPES = {"%": "%25", "#": "%23", "\n": "%0A", "\r": "%0D"}


def lines_of(observed: Observed, programs: Sequence[Program]) -> list[str]:
    """The lines of what was observed; none if nothing was."""
    number: dict[str, str] = {}
    shown: list[str] = []
    for rank, own in enumerate(observed.events):
        names = {placed: name for name, placed in _named(rank, programs[rank])}
        words = []
        for what, message, by, place in own:
            at = number.setdefault(place, str(len(number) + 1))
            words.append(":".join([what, names[message], *([] if what in _ALONE else [str(by or "-")]), at]))
        guesses = [
            ":".join([names[message], *map(str, others)])
            for message, others in observed.guesses.items()
            if message.rank == rank
        ]
        lines = [
            f"{name}:{number.setdefault(observed.lines[placed], str(len(number) + 1))}"
            for placed, name in names.items()
            if placed in observed.lines
        ]
        shown += [
            " ".join([f"{word} {rank}:", *found])
            for word, found in (("events", words), ("lines", lines), ("guesses", guesses))
            if found
        ]
    escape = str.maketrans(_ESCAPES)
    return [f"place {count} {place.translate(escape)}" for place, count in number.items()] + shown


def _named(rank: int, program: Program) -> Iterator[tuple[str, Placed]]:
    """The ops of a rank with the names that these lines give them."""
    count: Counter[Op] = Counter()
    for slot, ops in enumerate(program):
        for position, op in enumerate(ops):
            count[op] += 1
            yield f"{op}/{count[op]}" if count[op] > 1 else str(op), Placed(rank, slot, position, op)


def read(lines: Sequence[Line], programs: Sequence[Program], op: Callable[[int, int, str], Op], fail: Fail) -> Observed:
    """What the lines say about a schedule of these programs; ``op`` reads an op at a line and a column."""
    return _Reader(programs, op, fail).read(lines)


class _Reader:
    """One pass for the places, and one for the lines that name them."""

    def __init__(self, programs: Sequence[Program], op: Callable[[int, int, str], Op], fail: Fail) -> None:
        self._ops = [dict(_named(rank, program)) for rank, program in enumerate(programs)]
        self._places: dict[str, str] = {}
        self._op, self._fail = op, fail

    def read(self, lines: Sequence[Line]) -> Observed:
        events: dict[int, list[Event]] = {}
        guesses: list[Guess] = []
        at: dict[Placed, str] = {}
        rest = []
        for number, text in lines:
            if (found := re.match(r"\s*place\s+([0-9]{1,9})\s+(\S.*?)\s*$", text)) is not None:
                self._places[found.group(1)] = re.sub(
                    "%(25|23|0A|0D)", lambda m: chr(int(m.group(1), 16)), found.group(2)
                )
            else:
                rest.append((number, text))
        for number, text in rest:
            head = re.match(r"\s*(events|lines|guesses)\s+([0-9]{1,9})\s*:", text)
            if head is None or int(head.group(2)) >= len(self._ops):
                expected = "'place N LINE', 'events RANK: ...', 'lines RANK: ...' or 'guesses RANK: ...'"
                self._fail(number, 1, repr(text.strip()[:40]), expected)
            rank = int(head.group(2))
            words = re.compile(r"\S+").finditer(text, head.end())
            if head.group(1) == "events":
                events.setdefault(rank, []).extend(self._event(rank, number, word) for word in words)
            elif head.group(1) == "lines":
                at |= dict(self._line(rank, number, word) for word in words)
            else:
                guesses += [self._guess(rank, number, word) for word in words]
        return Observed([events.get(rank, []) for rank in range(len(self._ops))] if events else (), guesses, at)

    def _line(self, rank: int, number: int, word: re.Match[str]) -> tuple[Placed, str]:
        name, _, place = word.group().rpartition(":")
        placed = self._ops[rank].get(name)
        if placed is None or placed.op.kind in MESSAGES:
            form = f"a compute or a collective of rank {rank}, as its line writes it, with a place, as 1F0>:3"
            self._fail(number, word.start() + 1, repr(word.group()[:40]), form)
        return placed, self._place(number, word.start() + 1, place)

    def _place(self, number: int, column: int, name: str) -> str:
        found = self._places.get(name)
        if found is None:
            self._fail(number, column, repr(name[:40]), "the number of a 'place' line")
        return found

    def _event(self, rank: int, number: int, word: re.Match[str]) -> Event:
        column, fields = word.start() + 1, word.group().split(":")
        what = next((each for each in What if each == fields[0]), None)
        if what is None or len(fields) != (3 if what in _ALONE else 4):
            form = "post:MESSAGE:PLACE, wait:MESSAGE:PLACE, or read, write, free, keep or drop as read:MESSAGE:OP:PLACE"
            self._fail(number, column, repr(word.group()[:40]), form)
        by = None if what in _ALONE or fields[2] == "-" else self._op(number, column, fields[2])
        place = self._place(number, column, fields[-1])
        return Event(what, self._message(rank, number, column, fields[1]), by, place)

    def _guess(self, rank: int, number: int, word: re.Match[str]) -> Guess:
        name, *others = word.group().split(":")
        column = word.start() + 1
        message = self._message(rank, number, column, name)
        return Guess(message, tuple(self._op(number, column, other) for other in others))

    def _message(self, rank: int, number: int, column: int, name: str) -> Placed:
        found = self._ops[rank].get(name)
        if found is None or found.op.kind not in MESSAGES:
            self._fail(number, column, repr(name[:40]), f"a message of rank {rank}, as its line writes it")
        return found
