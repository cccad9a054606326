"""What a check found: data first, reports are made from it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from typing import Any

BOOKKEEPING = frozenset({"golden", "changelog", "counts"})
"""Rules that hold a record to the tree: what they find is no fault of a schedule, and hides none."""


class Verdict(Enum):
    """What became of a check.  A skipped one was not run, which is neither passed nor a verdict on the change."""

    PASSED = "passed"
    REFUSED = "refused"
    UNKNOWN = "unknown"
    SKIPPED = "skipped"


class ExitCode(IntEnum):
    """What the gate ends with, as ``dualpipe prove`` does."""

    PASSED = 0
    REFUSED = 1
    BAD_INPUT = 2
    UNKNOWN = 3


@dataclass(frozen=True)
class Finding:
    """One fault.

    Parameters
    ----------
    rule:
        What refuses it: the name of a check of ``prove``, ``bitwise``, ``run``, ``test``, ``golden`` and so on.
    message:
        The story; its first line says what is wrong.
    path, line:
        The source that it points to.
    schedule, data:
        Where it is one of a schedule: its name, and the finding as ``prove`` gives it.
    """

    rule: str
    message: str
    path: str = ""
    line: int = 1
    schedule: str = ""
    data: Mapping[str, Any] = field(default_factory=dict)

    @property
    def first_line(self) -> str:
        return next(iter(self.message.splitlines()), "")


@dataclass(frozen=True)
class Outcome:
    """A check with its verdict.

    ``why`` says what the check was run for, ``told`` what it did or why it has no verdict, in a few words.
    """

    check: str
    verdict: Verdict
    why: str
    told: str = ""
    findings: tuple[Finding, ...] = ()
    seconds: float = 0.0

    @property
    def is_fault(self) -> bool:
        """Whether it refuses the change for more than bookkeeping."""
        rules = {finding.rule for finding in self.findings}
        return self.verdict is Verdict.REFUSED and not (rules and rules <= BOOKKEEPING)


def exit_code(outcomes: Iterable[Outcome]) -> ExitCode:
    """Refused if any check is, else unknown if any is, else passed."""
    verdicts = {outcome.verdict for outcome in outcomes}
    if Verdict.REFUSED in verdicts:
        return ExitCode.REFUSED
    if Verdict.UNKNOWN in verdicts:
        return ExitCode.UNKNOWN
    return ExitCode.PASSED
