"""How a schedule fails on the fake ranks: an op that its rank cannot run, or a deadlock."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from dualpipe.errors import RuleError
from dualpipe.schedule import SENDS, Op


class SetupError(RuleError):
    """Stages or data that do not fit the schedule."""


class Misstep(RuleError):  # noqa: N818 - the name states what happened
    """An op that its rank cannot run: ``op`` of ``rank``, in slot ``slot`` (from 0)."""

    def __init__(self, rank: int, slot: int, op: Op, rule: str, got: str, fix: str) -> None:
        self.rank, self.slot, self.op = rank, slot, op
        super().__init__(rule, f"rank {rank}, slot {slot}, {op}: {got}", fix)


class Awaited(NamedTuple):
    """A message that was posted in slot ``slot`` and is not matched; ``peer`` is the rank at its other end."""

    slot: int
    op: Op
    peer: int

    def __str__(self) -> str:
        direction = "to" if self.op.kind in SENDS else "from"
        return f"{self.op} {direction} rank {self.peer}"


class Waiting(NamedTuple):
    """A rank that cannot continue: it is at ``op`` of slot ``slot``, or at its end if ``op`` is ``None``."""

    rank: int
    slot: int
    op: Op | None
    awaited: tuple[Awaited, ...]

    def __str__(self) -> str:
        place = "at its end" if self.op is None else f"at {self.op} of slot {self.slot}"
        return f"rank {self.rank}, {place}, waits for {', '.join(map(str, self.awaited))}"


class Deadlock(RuleError):  # noqa: N818 - the field's term
    """No rank can move.  ``waiting``: for each rank that has not finished, where it is and what it waits for."""

    def __init__(self, waiting: Sequence[Waiting]) -> None:
        self.waiting = tuple(waiting)
        super().__init__(
            "every rank must reach its end",
            "the remaining ranks wait\n  " + "\n  ".join(map(str, waiting)),
            "give each of these messages its partner, in the order in which the other rank posts",
        )
