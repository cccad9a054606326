"""What a check found, as data; the reports are made from it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from typing import Any

BOOKKEEPING = frozenset({"golden", "changelog", "counts"})
"""Rules that compare a record with the tree.  Their findings mean that a record is wrong, not that a schedule is."""


class Verdict(Enum):
    """The verdict of a check.

    ``SKIPPED``: the check did not run.  That does not count as passed, and is not a verdict on the change.
    """

    PASSED = "passed"
    REFUSED = "refused"
    UNKNOWN = "unknown"
    SKIPPED = "skipped"


class ExitCode(IntEnum):
    """The exit codes of the gate, the same as those of ``dualpipe prove``."""

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
        The rule that the change breaks: a check of ``prove``, ``bitwise``, ``run``, ``test``, ``golden`` and so on.
    message:
        The story; its first line says what is wrong.
    path, line:
        Its location in the sources.
    schedule, data:
        For a finding about a schedule: the schedule's name, and the finding as JSON of ``dualpipe prove``.
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
class CheckResult:
    """The verdict of a check, and its findings.

    ``why`` says why the check was needed; ``summary`` says briefly what it did, or why it has no verdict.
    """

    check: str
    verdict: Verdict
    why: str
    summary: str = ""
    findings: tuple[Finding, ...] = ()
    seconds: float = 0.0

    @property
    def is_fault(self) -> bool:
        """Whether the check refuses the change by a rule that is not in ``BOOKKEEPING``."""
        rules = {finding.rule for finding in self.findings}
        return self.verdict is Verdict.REFUSED and not (rules and rules <= BOOKKEEPING)


def exit_code(results: Iterable[CheckResult]) -> ExitCode:
    """Refused if any check is, else unknown if any is, else passed."""
    verdicts = {result.verdict for result in results}
    if Verdict.REFUSED in verdicts:
        return ExitCode.REFUSED
    if Verdict.UNKNOWN in verdicts:
        return ExitCode.UNKNOWN
    return ExitCode.PASSED
