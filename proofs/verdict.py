"""Verdicts: ``Proved``, ``Refuted`` with a finding, ``Unknown`` or ``Skipped`` with the reason; never a bool."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import IntEnum

from proofs.findings import Finding


@dataclass(frozen=True)
class Proved:
    """The check holds."""

    word = "proved"


@dataclass(frozen=True)
class Refuted:
    """The check fails.

    ``finding`` is the fault; ``core`` is a smallest set of facts, in words, that the solver found to be contradictory.
    Two refutations count as the same answer even if they point at different faults of one schedule.
    """

    finding: Finding | None
    core: tuple[str, ...] = field(default=(), compare=False)
    word = "refuted"


@dataclass(frozen=True)
class Unknown:
    """The solver gave up.  It is never counted as proved."""

    reason: str
    word = "unknown"


@dataclass(frozen=True)
class Skipped:
    """The check does not apply to this schedule."""

    reason: str
    word = "skipped"


Verdict = Proved | Refuted | Unknown | Skipped


class ExitCode(IntEnum):
    """The exit code of a command."""

    PROVED = 0
    REFUTED = 1
    BAD_INPUT = 2
    UNKNOWN = 3


_WORST_FIRST = (ExitCode.BAD_INPUT, ExitCode.REFUTED, ExitCode.UNKNOWN, ExitCode.PROVED)


def worst(codes: Iterable[ExitCode]) -> ExitCode:
    """The exit code of several files: bad input before refuted before unknown before proved."""
    return min(codes, key=_WORST_FIRST.index, default=ExitCode.PROVED)


def overall(verdicts: Iterable[Verdict]) -> ExitCode:
    """Refuted if any verdict is, else unknown if any is, else proved; a skipped check does not count."""
    by_type = {
        Refuted: ExitCode.REFUTED,
        Unknown: ExitCode.UNKNOWN,
        Proved: ExitCode.PROVED,
        Skipped: ExitCode.PROVED,
    }
    return worst(by_type[type(verdict)] for verdict in verdicts)
