"""How a schedule fails on the fake ranks: a step that makes no sense, or ranks that wait for ever."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from dualpipe.errors import RuleError
from dualpipe.schedule import SENDS, Op


class SetupError(RuleError):
    """Stages or data that do not fit the schedule."""


class Misstep(RuleError):  # noqa: N818 - the name says what happened
    """An op that its rank cannot do: at ``rank``, in slot ``slot`` (from 0), the op ``op``."""

    def __init__(self, rank: int, slot: int, op: Op, rule: str, got: str, fix: str) -> None:
        self.rank, self.slot, self.op = rank, slot, op
        super().__init__(rule, f"rank {rank}, slot {slot}, {op}: {got}", fix)


class Awaited(NamedTuple):
    """A message that was posted in slot ``slot`` and has met no partner; ``peer`` is the rank at its other end."""

    slot: int
    op: Op
    peer: int

    def __str__(self) -> str:
        direction = "to" if self.op.kind in SENDS else "from"
        return f"{self.op} {direction} rank {self.peer}"


class Waiting(NamedTuple):
    """A rank that cannot go on: it stands at ``op`` of slot ``slot``, or (``op`` is ``None``) at its end."""

    rank: int
    slot: int
    op: Op | None
    awaited: tuple[Awaited, ...]

    def __str__(self) -> str:
        place = "at its end" if self.op is None else f"at {self.op} of slot {self.slot}"
        return f"rank {self.rank}, {place}, waits for {', '.join(map(str, self.awaited))}"


class Deadlock(RuleError):  # noqa: N818 - the field's own word
    """No rank can move.  ``waiting`` has, for each rank that is not over, where it stands and what it waits for."""

    def __init__(self, waiting: Sequence[Waiting]) -> None:
        self.waiting = tuple(waiting)
        super().__init__(
            "every rank reaches its end",
            "all that are left wait\n  " + "\n  ".join(map(str, waiting)),
            "give each of these messages its partner, in the order in which the other rank posts",
        )
