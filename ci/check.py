"""A check: a command with a time limit, and how its answer is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ci.outcome import Finding, Outcome, Verdict
from ci.process import Completed, run

Reading = tuple[Verdict, str, tuple[Finding, ...]]
"""A verdict, a few words on it, and the findings."""


@dataclass(frozen=True)
class Check:
    """One command to run; ``why`` says what it is run for, ``limit`` is in seconds."""

    name: str
    why: str
    command: tuple[str, ...]
    limit: float
    read: Callable[[Completed], Reading]


def run_check(check: Check, root: Path) -> Outcome:
    """Run a check.  One whose time is up, or that ends without an answer, is unknown: it is never passed."""
    done = run(check.command, root, check.limit)
    if done.code is None:
        return Outcome(check.name, Verdict.UNKNOWN, check.why, f"no answer within {check.limit:g} s", (), done.seconds)
    try:
        verdict, told, findings = check.read(done)
    except Exception as error:  # an answer of any other form is none
        told = f"no answer: it ended with {done.code} and {done.last_words} ({type(error).__name__}: {error})"
        return Outcome(check.name, Verdict.UNKNOWN, check.why, told, (), done.seconds)
    return Outcome(check.name, verdict, check.why, told, findings, done.seconds)


def skipped(check: Check, reason: str) -> Outcome:
    """A check that is not run, which is not the same as passed."""
    return Outcome(check.name, Verdict.SKIPPED, check.why, reason)


def crashed(done: Completed) -> Reading:
    """What is said of a command that ended without an answer."""
    return Verdict.UNKNOWN, f"no answer: it ended with {done.code} and {done.last_words}", ()
