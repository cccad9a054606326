"""What the findings of all checks share: a place, the base class of a fault, and its JSON."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from enum import StrEnum
from typing import Any, ClassVar

from dualpipe.schedule import COLLECTIVES, Op, Placed
from proofs.models import Model


@dataclass(frozen=True)
class Place:
    """An op in a slot of a rank, or the whole slot where ``op`` is ``None``.

    ``target`` is the op that it waits for or clashes with.  Without one, ``peer`` may be the rank that should have such
    an op; that rank may not exist.
    """

    rank: int
    slot: int
    op: Op | None = None
    target: Placed | None = None
    peer: int | None = None


def place_of(placed: Placed, target: Placed | None = None, peer: int | None = None) -> Place:
    """The place of an op."""
    return Place(placed.rank, placed.slot, placed.op, target, peer)


@dataclass(frozen=True)
class Fault(ABC):
    """What all findings share; ``check`` is the check that is refuted."""

    check: ClassVar[str]
    ends_early: ClassVar[bool] = False
    """Whether a rank that ends early is enough to cause it."""

    @property
    @abstractmethod
    def fault(self) -> str:
        """The name of the fault."""

    @abstractmethod
    def places(self) -> tuple[Place, ...]:
        """The places that the finding is about, the primary one first; empty if there is no op to point at."""

    def shown_by(self) -> tuple[Place | Placed, ...] | None:
        """The places up to which the programs show the fault; ``None`` if only the whole schedule shows it.

        By default these are all places and their targets.
        """
        places = self.places()
        return *places, *(place.target for place in places if place.target is not None)

    def as_json(self) -> dict[str, Any]:
        """The fault's name and its fields: an op with its place becomes ``{"rank": 0, "slot": 5, "op": "0SF2>"}``."""
        return {"fault": self.fault} | {field.name: plain(getattr(self, field.name)) for field in fields(self)}


@dataclass(frozen=True)
class OfEither(Fault):
    """A fault that messages and collectives have alike, with names of its own for each of the two."""

    names: ClassVar[tuple[str, str]]
    """The name of the fault of a message, and that of a collective."""
    keys: ClassVar[tuple[Mapping[str, str | None], Mapping[str, str | None]]]
    """For either of them the fields whose key in the JSON is another one; ``None`` leaves the field out."""

    @property
    def is_collective(self) -> bool:
        """Whether it is a fault of a collective."""
        op = self.places()[0].op
        return op is not None and op.kind in COLLECTIVES

    @property
    def fault(self) -> str:
        return self.names[self.is_collective]

    def as_json(self) -> dict[str, Any]:
        keys: dict[str, str | None] = {field.name: field.name for field in fields(self)}
        keys |= self.keys[self.is_collective]
        return {"fault": self.fault} | {key: plain(getattr(self, name)) for name, key in keys.items() if key}


class Absence(Fault):
    """Something is missing, or not in the programs.  Only the whole schedule shows it."""

    ends_early = True

    def shown_by(self) -> None:
        pass


@dataclass(frozen=True)
class Pair(Fault):
    """Two ops that must not both be there, or not in this order; the second one is wrong."""

    first: Placed
    second: Placed

    def places(self) -> tuple[Place, ...]:
        return (place_of(self.second, self.first),)


def plain(value: object) -> Any:
    """The value as JSON has it."""
    match value:
        case Placed(rank, slot, _, op):
            return {"rank": rank, "slot": slot, "op": str(op)}
        case Op() | Model() | StrEnum():
            return str(value)
        case tuple():
            return [plain(item) for item in value]
        case None | int() | str():
            return value
    if isinstance(value, type) or not is_dataclass(value):
        raise AssertionError(f"no JSON for {value!r}")
    return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
