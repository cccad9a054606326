"""Verdicts: ``Proved``, ``Refuted`` with what was found, ``Unknown`` or ``Skipped`` with the reason; never a bool."""

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

    ``finding`` says where; ``core`` is the solver's smallest set of facts, in words, that together are impossible.
    Two refutations are the same answer even where they point at different faults of one schedule.
    """

    finding: Finding | None
    core: tuple[str, ...] = field(default=(), compare=False)
    word = "refuted"


@dataclass(frozen=True)
class Unknown:
    """The solver gave up, which is never the same as proved."""

    reason: str
    word = "unknown"


@dataclass(frozen=True)
class Skipped:
    """The check says nothing about this schedule."""

    reason: str
    word = "skipped"


Verdict = Proved | Refuted | Unknown | Skipped


class ExitCode(IntEnum):
    """What a command ends with."""

    PROVED = 0
    REFUTED = 1
    BAD_INPUT = 2
    UNKNOWN = 3


_WORST_FIRST = (ExitCode.BAD_INPUT, ExitCode.REFUTED, ExitCode.UNKNOWN, ExitCode.PROVED)


def worst(codes: Iterable[ExitCode]) -> ExitCode:
    """The exit code of several files: bad input before refuted before unknown before proved."""
    return min(codes, key=_WORST_FIRST.index, default=ExitCode.PROVED)


def overall(verdicts: Iterable[Verdict]) -> ExitCode:
    """Refuted if any check is, else unknown if any is, else proved; a skipped check takes no part."""
    by_type = {
        Refuted: ExitCode.REFUTED,
        Unknown: ExitCode.UNKNOWN,
        Proved: ExitCode.PROVED,
        Skipped: ExitCode.PROVED,
    }
    return worst(by_type[type(verdict)] for verdict in verdicts)
