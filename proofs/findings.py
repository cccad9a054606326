"""What a check finds, as data; ``proofs.story`` puts it into words.

A finding can be looked up in the schedule file: it names ranks, slots (counted from 0 within the rank) and ops as the
file writes them.  ``places()`` lists them, and prefix and page read that list.  A new class of finding is written here
and added to ``Finding``; mypy then names the matches that lack it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from dualpipe.schedule import Kind, Lane, Op, Placed
from dualpipe.schedule.observed import What
from proofs.models import Model


@dataclass(frozen=True)
class Place:
    """A place that a finding is about: an op in a slot of a rank, or the whole slot where ``op`` is ``None``.

    ``target`` is the op that it waits for or clashes with.  Without one, ``peer`` may be the rank that should have such
    an op; that rank need not exist.
    """

    rank: int
    slot: int
    op: Op | None = None
    target: Placed | None = None
    peer: int | None = None


def _place(placed: Placed, target: Placed | None = None, peer: int | None = None) -> Place:
    return Place(placed.rank, placed.slot, placed.op, target, peer)


@dataclass(frozen=True)
class _Finding(ABC):
    """What all findings share: ``check`` is the check that is refuted, ``fault`` the name of the fault."""

    check: ClassVar[str]
    fault: ClassVar[str]
    ends_early: ClassVar[bool] = False
    """Whether a rank that ends early is enough to cause it."""

    @abstractmethod
    def places(self) -> tuple[Place, ...]:
        """The places that the finding is about, the primary one first; none where there is no op to point at."""

    def shown_by(self) -> tuple[Place | Placed, ...] | None:
        """The places up to which the programs show the fault; ``None`` where only the whole schedule does.

        By default these are all places and their targets.
        """
        places = self.places()
        return *places, *(place.target for place in places if place.target is not None)

    def as_json(self) -> dict[str, Any]:
        """The fault's name and its fields: an op with its place becomes ``{"rank": 0, "slot": 5, "op": "0SF2>"}``."""
        return {"fault": self.fault} | {field.name: _plain(getattr(self, field.name)) for field in fields(self)}


class _Absence(_Finding):
    """Something is missing, or not in the programs.  Only the whole schedule shows it."""

    ends_early = True

    def shown_by(self) -> None:
        pass


@dataclass(frozen=True)
class _Pair(_Finding):
    """Two ops that must not both be there, or not in this order; the second one is wrong."""

    first: Placed
    second: Placed

    def places(self) -> tuple[Place, ...]:
        return (_place(self.second, self.first),)


@dataclass(frozen=True)
class Empty(_Absence):
    """No rank computes anything."""

    check = "complete"
    fault = "empty"

    def places(self) -> tuple[Place, ...]:
        return ()


@dataclass(frozen=True)
class Missing(_Absence):
    """A stage never runs an op of a microbatch.  ``largest`` is the largest microbatch that the lane names."""

    check = "complete"
    fault = "missing"
    op: Op
    rank: int
    largest: int

    def places(self) -> tuple[Place, ...]:
        return ()


@dataclass(frozen=True)
class Repeated(_Pair):
    """A stage runs the same compute twice."""

    check = "complete"
    fault = "repeated"


@dataclass(frozen=True)
class Stray(_Finding):
    """A compute of a stage that the rank does not hold; rank ``holder`` does."""

    check = "complete"
    fault = "stray"
    place: Placed
    holder: int

    def places(self) -> tuple[Place, ...]:
        return (_place(self.place, peer=self.holder),)


@dataclass(frozen=True)
class TooEarly(_Finding):
    """An op before something that it needs on its own rank; ``later`` is the place of that, if it has one."""

    check = "order"
    fault = "too early"
    place: Placed
    need: Op
    later: Placed | None

    def places(self) -> tuple[Place, ...]:
        return (_place(self.place, self.later),)

    def shown_by(self) -> tuple[Placed]:
        return (self.place,)


@dataclass(frozen=True)
class NoPeer(_Finding):
    """A message whose other end is no other rank: it leaves the lane, stays on its rank, or names no rank at all.

    ``holder`` is the rank of the op's stage and ``neighbour`` that of the stage at the other end, if there is one.
    """

    check = "messages"
    fault = "no peer"
    place: Placed
    peer: int | None
    ranks: int
    holder: int
    neighbour: int | None

    def places(self) -> tuple[Place, ...]:
        return (_place(self.place, peer=self.peer),)


@dataclass(frozen=True)
class NotNeighbour(_Finding):
    """A message between ranks that the lane does not join for it.

    ``holder`` is the rank of the op's stage and ``neighbour`` the rank that it should exchange the message with.
    """

    check = "messages"
    fault = "not the neighbour"
    place: Placed
    peer: int
    holder: int
    neighbour: int

    def places(self) -> tuple[Place, ...]:
        return (_place(self.place, peer=self.peer),)


@dataclass(frozen=True)
class Mismatch(_Finding):
    """The ``nth`` (from 0) send between two ranks matches a receive that expects something else."""

    check = "messages"
    fault = "mismatch"
    send: Placed
    receive: Placed
    nth: int

    def places(self) -> tuple[Place, ...]:
        return (_place(self.receive, self.send),)


@dataclass(frozen=True)
class LeftOver(_Absence):
    """The ``nth`` (from 0) send or receive of an ordered pair, of which the other side posts only ``posted``."""

    check = "messages"
    fault = "left over"
    place: Placed
    peer: int
    nth: int
    posted: int

    def places(self) -> tuple[Place, ...]:
        return (_place(self.place, peer=self.peer),)


@dataclass(frozen=True)
class SentTwice(_Pair):
    """A message that is sent and received a second time, which nobody consumes."""

    check = "messages"
    fault = "sent twice"


@dataclass(frozen=True)
class NotMember(_Finding):
    """A rank joins a collective of a group that it is no member of."""

    check = "messages"
    fault = "no member"
    place: Placed
    members: tuple[int, ...]

    def places(self) -> tuple[Place, ...]:
        return (_place(self.place),)


@dataclass(frozen=True)
class Clash(_Pair):
    """The ``nth`` (from 0) collective of a group is one thing for one member and another thing for another member."""

    check = "messages"
    fault = "clash"
    nth: int


@dataclass(frozen=True)
class LeftAlone(_Absence):
    """The ``nth`` (from 0) collective of a group, which the member ``absent`` never joins: it joins only ``joined``."""

    check = "messages"
    fault = "left alone"
    place: Placed
    absent: int
    nth: int
    joined: int

    def places(self) -> tuple[Place, ...]:
        return (_place(self.place, peer=self.absent),)


@dataclass(frozen=True)
class Wait:
    """A rank is blocked at ``place`` until another rank posts ``partner``: the message that would let it go on, or the
    same collective of its group."""

    place: Placed
    partner: Placed


@dataclass(frozen=True)
class WaitCycle(_Finding):
    """Ranks that wait for each other: each wait is for the rank of the next one, and the last for the first rank.

    Every partner is posted after the slot where its rank is blocked.
    """

    check = "deadlock"
    fault = "circle"
    model: Model
    waits: tuple[Wait, ...]

    def places(self) -> tuple[Place, ...]:
        return tuple(_place(wait.place, wait.partner) for wait in self.waits)


@dataclass(frozen=True)
class Unmatched(_Finding):
    """A message without a partner: it is number ``nth`` (from 0) of its pair, and the other side posts ``posted``.

    ``possible`` is whether there is another rank at the other end.
    """

    ends_early = True
    check = "deadlock"
    fault = "never met"
    model: Model
    place: Placed
    peer: int | None
    nth: int
    posted: int
    possible: bool

    def places(self) -> tuple[Place, ...]:
        return (_place(self.place, peer=self.peer),)


@dataclass(frozen=True)
class NeverJoined(_Finding):
    """A collective at which a rank waits for ever: the member ``absent`` of its group joins only ``joined`` of them."""

    ends_early = True
    check = "deadlock"
    fault = "never joined"
    model: Model
    place: Placed
    absent: int
    nth: int
    joined: int

    def places(self) -> tuple[Place, ...]:
        return (_place(self.place, peer=self.absent),)


@dataclass(frozen=True)
class Live:
    """A microbatch held at a stage, named by its F; ``until`` is the op that it waits for, B or W."""

    op: Op
    until: Kind


@dataclass(frozen=True)
class OverBound(_Finding):
    """The first slot in which a rank holds more microbatches than its bound; ``source`` describes the bound."""

    check = "memory"
    fault = "over the bound"
    rank: int
    slot: int
    live: tuple[Live, ...]
    bound: int
    source: str

    def places(self) -> tuple[Place, ...]:
        return (Place(self.rank, self.slot),)


@dataclass(frozen=True)
class OutOfOrder(_Pair):
    """A B or W, which add to gradients, that runs after that of a later microbatch of the same stage and lane."""

    check = "accumulation"
    fault = "out of order"


@dataclass(frozen=True)
class TouchedInFlight(_Absence):
    """The memory of a message is read, written or freed between its post and its wait.

    ``by`` is the op that does it, if known.  ``posted``, ``touched`` and ``waited`` are lines of the program; a message
    that is never waited for has no ``waited``.
    """

    ends_early = False  # the access is a fault whatever happens later
    check = "buffers"
    fault = "touched in flight"
    message: Placed
    what: What
    by: Op | None
    posted: str
    touched: str
    waited: str | None

    def places(self) -> tuple[Place, ...]:
        return (_place(self.message),)


@dataclass(frozen=True)
class Overwritten(_Absence):
    """The memory of a received tensor is written to while the graph of ``forward`` needs it.

    ``by`` is the message that is received into it, if it is one.  ``kept``, ``written`` and ``used`` are lines of the
    program: where the graph was made, where the write was, and where the backward used what had been overwritten.
    """

    ends_early = False  # the access is a fault whatever happens later
    check = "buffers"
    fault = "overwritten"
    message: Placed
    forward: Op
    by: Op | None
    kept: str
    written: str
    used: str

    def places(self) -> tuple[Place, ...]:
        return (_place(self.message),)


Finding = (
    Empty
    | Missing
    | Repeated
    | Stray
    | TooEarly
    | NoPeer
    | NotNeighbour
    | Mismatch
    | LeftOver
    | SentTwice
    | NotMember
    | Clash
    | LeftAlone
    | WaitCycle
    | Unmatched
    | NeverJoined
    | OverBound
    | OutOfOrder
    | TouchedInFlight
    | Overwritten
)
"""A fault in a schedule: ``check`` is the check that it refutes and ``fault`` its name.

``as_json()`` is all of it as data, with an op and its place as ``{"rank": 0, "slot": 5, "op": "0SF2>"}``.
"""


def _plain(value: object) -> Any:
    match value:
        case Placed(rank, slot, _, op):
            return {"rank": rank, "slot": slot, "op": str(op)}
        case Op() | Model() | Lane() | Kind() | What():
            return str(value)
        case Live(op, until):
            return {"op": str(op), "until": str(until)}
        case Wait(place, partner):
            return {"place": _plain(place), "partner": _plain(partner)}
        case tuple():
            return [_plain(item) for item in value]
        case None | int() | str():
            return value
    raise AssertionError(f"no JSON for {value!r}")
