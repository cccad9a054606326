"""Why plain search refutes a schedule, for commands that take only right ones."""

from __future__ import annotations

from collections.abc import Collection

from dualpipe.schedule import Schedule
from dualpipe.timeline.comparison import Absent
from proofs.prove import prove
from proofs.report import describe
from proofs.verdict import Refuted


def refutation(name: str, schedule: Schedule, waive: Collection[str] = ()) -> Absent | None:
    """The first failure or refuted check that is not waived, without a run of Z3; ``None`` if there is none.

    A schedule is not refused for exceeding the published bound of ``memory``.  Raises ``RuleError`` for a name in
    ``waive`` that is not a check.
    """
    report = prove(schedule, smt=False, waive=waive)
    for failure in report.failures:
        return Absent(name, f"refuted: {failure}")
    for check, result in report.checks.items():
        if check != "memory" and isinstance(result.verdict, Refuted) and not result.waived:
            reason, *story = describe(result)
            reason = f"refuted: {check}: {reason}"
            return Absent(name, reason, "\n".join([reason, *story]))
    return None
