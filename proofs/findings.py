"""What a check finds, as data; ``proofs.story`` tells it as text.

Every finding names ops with their places, so that it can be looked up in the schedule file: ranks, slots (counted
from 0 within the rank) and the op as the file writes it.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar

from dualpipe.schedule import Kind, Lane, Op, Placed
from proofs.models import Model


@dataclass(frozen=True)
class Finding:
    """A fault in a schedule; ``check`` is the check that it refutes and ``fault`` its name."""

    check: ClassVar[str]
    fault: ClassVar[str]

    def as_json(self) -> dict[str, Any]:
        """The fault's name and its fields: an op with its place becomes ``{"rank": 0, "slot": 5, "op": "0SF2>"}``."""
        return {"fault": self.fault} | {field.name: _plain(getattr(self, field.name)) for field in fields(self)}


@dataclass(frozen=True)
class Empty(Finding):
    """No rank computes anything."""

    check = "complete"
    fault = "empty"


@dataclass(frozen=True)
class Missing(Finding):
    """A stage never runs an op of a microbatch.  ``largest`` is the largest microbatch that the lane names."""

    check = "complete"
    fault = "missing"
    op: Op
    rank: int
    largest: int


@dataclass(frozen=True)
class Repeated(Finding):
    """A stage runs the same compute twice."""

    check = "complete"
    fault = "repeated"
    first: Placed
    second: Placed


@dataclass(frozen=True)
class Stray(Finding):
    """A compute of a stage that the rank does not hold."""

    check = "complete"
    fault = "stray"
    place: Placed
    holder: int


@dataclass(frozen=True)
class TooEarly(Finding):
    """An op before something that it needs on its own rank; ``later`` is where that stands, if anywhere."""

    check = "order"
    fault = "too early"
    place: Placed
    need: Op
    later: Placed | None


@dataclass(frozen=True)
class NoPeer(Finding):
    """A message whose other end is no other rank: it leaves the lane, stays on its rank, or names no rank at all.

    ``holder`` is the rank of the op's stage and ``neighbour`` that of the stage at the other end, if there is one."""

    check = "messages"
    fault = "no peer"
    place: Placed
    peer: int | None
    ranks: int
    holder: int
    neighbour: int | None


@dataclass(frozen=True)
class NotNeighbour(Finding):
    """A message between ranks that the lane does not join for it: ``holder`` is the rank of the op's stage and
    ``neighbour`` the one that it should talk to."""

    check = "messages"
    fault = "not the neighbour"
    place: Placed
    peer: int
    holder: int
    neighbour: int


@dataclass(frozen=True)
class Mismatch(Finding):
    """The ``nth`` (from 0) send between two ranks meets a receive that expects something else."""

    check = "messages"
    fault = "mismatch"
    send: Placed
    receive: Placed
    nth: int


@dataclass(frozen=True)
class LeftOver(Finding):
    """The ``nth`` (from 0) send or receive of an ordered pair, of which the other side posts only ``posted``."""

    check = "messages"
    fault = "left over"
    place: Placed
    peer: int
    nth: int
    posted: int


@dataclass(frozen=True)
class SentTwice(Finding):
    """A message that is sent and received a second time, which nobody consumes."""

    check = "messages"
    fault = "sent twice"
    first: Placed
    second: Placed


@dataclass(frozen=True)
class Wait:
    """A rank stands at ``place`` until ``partner``, the message that would meet it, is posted by its rank."""

    place: Placed
    partner: Placed


@dataclass(frozen=True)
class Circle(Finding):
    """Each wait is for the rank of the next one and the last for the first; every partner lies behind the slot in
    which its own rank stands."""

    check = "deadlock"
    fault = "circle"
    model: Model
    waits: tuple[Wait, ...]


@dataclass(frozen=True)
class NeverMet(Finding):
    """A message for which the other side has no partner: it is number ``nth`` (from 0) of ``posted`` over there.

    ``possible`` says whether another rank is at the other end at all."""

    check = "deadlock"
    fault = "never met"
    model: Model
    place: Placed
    peer: int | None
    nth: int
    posted: int
    possible: bool


@dataclass(frozen=True)
class Live:
    """A microbatch held at a stage, named by its F; ``until`` says what it waits for, B or W."""

    op: Op
    until: Kind


@dataclass(frozen=True)
class OverBound(Finding):
    """The first slot in which a rank holds more microbatches than its bound; ``source`` says whose bound it is."""

    check = "memory"
    fault = "over the bound"
    rank: int
    slot: int
    live: tuple[Live, ...]
    bound: int
    source: str


@dataclass(frozen=True)
class OutOfOrder(Finding):
    """A B or W, which add to gradients, that runs after that of a later microbatch of the same stage and lane."""

    check = "accumulation"
    fault = "out of order"
    first: Placed
    second: Placed


def _plain(value: object) -> Any:
    match value:
        case Placed(rank, slot, _, op):
            return {"rank": rank, "slot": slot, "op": str(op)}
        case Op() | Model() | Lane() | Kind():
            return str(value)
        case Live(op, until):
            return {"op": str(op), "until": str(until)}
        case Wait(place, partner):
            return {"place": _plain(place), "partner": _plain(partner)}
        case tuple():
            return [_plain(item) for item in value]
        case _:
            return value
