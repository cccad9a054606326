"""What was observed when a program ran a schedule: when each message was waited for, and what touched its memory.

A schedule that ``dualpipe record`` wrote has these events.  They take no part in what the schedule means.
``dualpipe.schedule.observed_text`` reads and prints their text form.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import NamedTuple

from dualpipe.schedule.op import Op, Placed


class What(StrEnum):
    """What happened to a message or to its memory.

    ``read`` and ``write`` are the program's; those of the communication itself are not events.  ``free`` gives the
    memory back or makes it larger or smaller.  From ``keep`` to ``drop`` the autograd graph of a forward needs the
    memory: ``by`` is that forward.
    """

    POST = "post"
    WAIT = "wait"
    READ = "read"
    WRITE = "write"
    FREE = "free"
    KEEP = "keep"
    DROP = "drop"

    __hash__ = str.__hash__


class Event(NamedTuple):
    """One event: ``by`` is the op that was running, or ``None``; ``place`` is the line of the program."""

    what: What
    message: Placed
    by: Op | None
    place: str


class Guess(NamedTuple):
    """A message whose name is a guess, and the ops that it could be as well."""

    message: Placed
    others: tuple[Op, ...]


class Observed:
    """The events of every rank, in the order in which they happened, and the messages whose names are guesses.

    ``lines`` are the lines of the program at which it ran its computes and collectives.  It is empty for a schedule
    that was not recorded.  An immutable value.
    """

    __slots__ = ("_places", "events", "guesses", "lines")

    def __init__(
        self,
        events: Iterable[Iterable[Event]] = (),
        guesses: Iterable[Guess] = (),
        lines: Mapping[Placed, str] | None = None,
    ) -> None:
        self.events = tuple(map(tuple, events))
        self.guesses: Mapping[Placed, tuple[Op, ...]] = dict(guesses)
        self.lines: Mapping[Placed, str] = dict(lines or {})
        self._places: dict[Placed, str] = {}
        for own in self.events:
            for event in own:
                if event.what is What.POST:
                    self._places.setdefault(event.message, event.place)

    def __bool__(self) -> bool:
        return any(self.events)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Observed) and (self.events, self.guesses, self.lines) == (
            other.events,
            other.guesses,
            other.lines,
        )

    def __hash__(self) -> int:
        return hash(self.events)

    def place(self, placed: Placed) -> str:
        """The line that posted a message or ran another op, or an empty text."""
        return self._places.get(placed) or self.lines.get(placed, "")


def frames_of(place: str) -> list[str]:
    """The lines of a place: the one itself, the line that called its function, and so on."""
    return re.split(r" \(called at |, ", place.removesuffix(")")) if place else []


NOTHING = Observed()
