"""The result of one party of a verification."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from reference.launch import Failure
from reference.trace import Difference

Progress = Callable[[str, int, int], None]
"""Called with a party's name, the rank within it, and the steps it has finished."""


@dataclass(frozen=True)
class Party:
    """How one party came out: what differs from the truth, or how it failed to finish.

    ``alone``: it is one process, whose own rank says nothing.
    """

    name: str
    differences: tuple[Difference, ...]
    failures: tuple[Failure, ...]
    seconds: float
    alone: bool = False

    @property
    def equal(self) -> bool:
        return not self.differences and not self.failures

    @property
    def verdict(self) -> str:
        return "equal" if self.equal else "failed" if self.failures else "different"

    @property
    def told(self) -> list[str]:
        """How the party failed, in words."""
        return [f"{f.kind}: {f.text}" if self.alone else str(f) for f in self.failures]

    def as_json(self) -> dict[str, Any]:
        return {
            "verdict": self.verdict,
            "differences": len(self.differences),
            "first_difference": str(self.differences[0]) if self.differences else None,
            "failures": self.told,
            "seconds": round(self.seconds, 3),
        }
