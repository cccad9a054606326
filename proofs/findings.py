"""What a check finds, as data; ``proofs.story`` puts it into words.

A finding can be looked up in the schedule file: it names ranks, slots (counted from 0 within the rank) and ops as the
file writes them.  ``places()`` lists them, and prefix and page read that list.  A new class of finding is written here
and added to ``Finding``; mypy then names the matches that lack it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from dualpipe.schedule import RECEIVES, Kind, Op, Placed
from dualpipe.schedule.observed import What
from proofs.fault import Absence, Fault, OfEither, Pair, Place, place_of
from proofs.models import Model


@dataclass(frozen=True)
class Empty(Absence):
    """No rank computes anything."""

    check = "complete"
    fault = "empty"

    def places(self) -> tuple[Place, ...]:
        return ()


@dataclass(frozen=True)
class Missing(Absence):
    """A stage never runs an op of a microbatch.  ``largest`` is the largest microbatch that the lane names."""

    check = "complete"
    fault = "missing"
    op: Op
    rank: int
    largest: int

    def places(self) -> tuple[Place, ...]:
        return ()


@dataclass(frozen=True)
class Repeated(Pair):
    """A stage runs the same compute twice."""

    check = "complete"
    fault = "repeated"


@dataclass(frozen=True)
class Stray(Fault):
    """A compute of a stage that the rank does not hold; rank ``holder`` does."""

    check = "complete"
    fault = "stray"
    place: Placed
    holder: int

    def places(self) -> tuple[Place, ...]:
        return (place_of(self.place, peer=self.holder),)


@dataclass(frozen=True)
class TooEarly(Fault):
    """An op before something that it needs on its own rank; ``later`` is the place of that, if it has one."""

    check = "order"
    fault = "too early"
    place: Placed
    need: Op
    later: Placed | None

    def places(self) -> tuple[Place, ...]:
        return (place_of(self.place, self.later),)

    def shown_by(self) -> tuple[Placed]:
        return (self.place,)


@dataclass(frozen=True)
class NoPeer(Fault):
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
        return (place_of(self.place, peer=self.peer),)


@dataclass(frozen=True)
class NotNeighbour(Fault):
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
        return (place_of(self.place, peer=self.peer),)


@dataclass(frozen=True)
class Mismatch(OfEither, Pair):
    """Two ops that meet by their number and are not the same thing.

    The ``nth`` (from 0) send between two ranks, and the receive that it matches; or the ``nth`` collective of a group,
    of two members.
    """

    check = "messages"
    names = "mismatch", "clash"
    keys: ClassVar = {"first": "send", "second": "receive"}, {}
    nth: int


_MEMBER: Mapping[str, str | None] = {"peer": "absent", "posted": "joined"}


@dataclass(frozen=True)
class LeftOver(OfEither, Absence):
    """A message or a collective that rank ``peer`` has no counterpart of: it has only ``posted``.

    It is the ``nth`` (from 0) send or receive of an ordered pair of ranks, or the ``nth`` collective of a group, of
    which ``peer`` is a member.
    """

    check = "messages"
    names = "left over", "left alone"
    keys: ClassVar = {}, _MEMBER
    place: Placed
    peer: int
    nth: int
    posted: int

    def places(self) -> tuple[Place, ...]:
        return (place_of(self.place, peer=self.peer),)


@dataclass(frozen=True)
class SentTwice(Pair):
    """A message that is sent and received a second time, although nothing consumes it."""

    check = "messages"
    fault = "sent twice"


@dataclass(frozen=True)
class NotMember(Fault):
    """A rank joins a collective of a group of which it is not a member."""

    check = "messages"
    fault = "no member"
    place: Placed
    members: tuple[int, ...]

    def places(self) -> tuple[Place, ...]:
        return (place_of(self.place),)


@dataclass(frozen=True)
class Wait:
    """A rank is blocked at ``place`` until another rank posts ``partner``: the message that would let it go on, or the
    same collective of its group."""

    place: Placed
    partner: Placed


@dataclass(frozen=True)
class WaitCycle(Fault):
    """Ranks that wait for each other: each wait is for the rank of the next one, and the last for the first rank.

    Every partner is posted after the slot where its rank is blocked.
    """

    check = "deadlock"
    fault = "circle"
    model: Model
    waits: tuple[Wait, ...]

    def places(self) -> tuple[Place, ...]:
        return tuple(place_of(wait.place, wait.partner) for wait in self.waits)


@dataclass(frozen=True)
class Unmatched(OfEither):
    """A message without a partner, or a collective that member ``peer`` of its group never joins.

    It is number ``nth`` (from 0) of its pair or group, and the other side has only ``posted``.  ``possible`` is whether
    there is another rank at the other end.  If ``peer`` gets no further itself because it waits for this rank, directly
    or through others, ``circle`` has the ops at which those ranks are blocked, from ``peer`` on.
    """

    ends_early = True
    check = "deadlock"
    names = "never met", "never joined"
    keys: ClassVar = {}, {**_MEMBER, "possible": None}
    model: Model
    place: Placed
    peer: int | None
    nth: int
    posted: int
    possible: bool = True
    circle: tuple[Placed, ...] = ()

    def places(self) -> tuple[Place, ...]:
        return (place_of(self.place, peer=self.peer), *map(place_of, self.circle))


@dataclass(frozen=True)
class Live:
    """A microbatch held at a stage, named by its F; ``until`` is the op that it waits for, B or W."""

    op: Op
    until: Kind


@dataclass(frozen=True)
class OverBound(Fault):
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
class OutOfOrder(Pair):
    """A B or W, which add to gradients, that runs after that of a later microbatch of the same stage and lane."""

    check = "accumulation"
    fault = "out of order"


@dataclass(frozen=True)
class TouchedInFlight(Absence):
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

    @property
    def is_shared(self) -> bool:
        """Whether two receives are in flight into the same memory."""
        return (
            self.what is What.WRITE
            and self.message.op.kind in RECEIVES
            and self.by is not None
            and self.by.kind in RECEIVES
        )

    def places(self) -> tuple[Place, ...]:
        return (place_of(self.message),)


@dataclass(frozen=True)
class Overwritten(Absence):
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
        return (place_of(self.message),)


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
    | WaitCycle
    | Unmatched
    | OverBound
    | OutOfOrder
    | TouchedInFlight
    | Overwritten
)
"""A fault in a schedule: ``check`` is the check that it refutes and ``fault`` its name.

``as_json()`` is all of it as data, with an op and its place as ``{"rank": 0, "slot": 5, "op": "0SF2>"}``.
"""
