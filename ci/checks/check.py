"""A check: a command with a time limit, and a function that reads its answer."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from signal import strsignal
from typing import Any

from ci.process import Completed, run
from ci.result import CheckResult, Finding, Verdict

Reading = tuple[Verdict, str, tuple[Finding, ...]]
"""A verdict, a summary in a few words, and the findings."""


@dataclass(frozen=True)
class Check:
    """One command to run.  ``why`` is the reason for running it, ``limit`` is in seconds."""

    name: str
    why: str
    command: tuple[str, ...]
    limit: float
    read: Callable[[Completed], Reading]


def run_check(check: Check, root: Path) -> CheckResult:
    """Run a check.  One that exceeds its time limit, or gives no answer, is unknown and never passed."""
    done = run(check.command, root, check.limit)
    if done.code is None:
        return CheckResult(
            check.name, Verdict.UNKNOWN, check.why, f"no answer within {check.limit:g} s", (), done.seconds
        )
    try:
        verdict, summary, findings = check.read(done)
    except Exception as error:  # an answer of another form is no answer
        verdict, summary, findings = no_answer(done, f" ({type(error).__name__}: {error})")
    return CheckResult(check.name, verdict, check.why, summary, findings, done.seconds)


def skipped(check: Check, reason: str) -> CheckResult:
    """The result of a check that does not run, which is not the same as passed."""
    return CheckResult(check.name, Verdict.SKIPPED, check.why, reason)


def no_answer(done: Completed, detail: str = "") -> Reading:
    """The reading of a command that ended without an answer; a negative code is the signal that ended it."""
    if done.code is not None and done.code < 0:
        return Verdict.UNKNOWN, f"no answer: signal {-done.code} ended it ({strsignal(-done.code)})", ()
    return Verdict.UNKNOWN, f"no answer: it ended with {done.code} and {done.last_line}{detail}", ()


def json_lines(done: Completed) -> list[dict[str, Any]]:
    """The JSON objects that a command printed, one per line."""
    return [json.loads(line) for line in done.out.splitlines() if line.startswith("{")]


def count_schedules(findings: Sequence[Finding]) -> int:
    """How many schedules the findings are about."""
    return len({finding.schedule for finding in findings})
