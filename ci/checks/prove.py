"""The check ``prove``: the six checks of ``dualpipe prove`` on schedule files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ci.checks.check import Check, Reading, count_schedules, json_lines, no_answer
from ci.location import Locator
from ci.process import Completed, python
from ci.result import Finding, Verdict

LIMIT_S = 120.0


def check(files: Sequence[Path], why: str, locator: Locator) -> Check:
    """The six checks on schedule files."""
    names = [file.stem for file in files]

    def read(done: Completed) -> Reading:
        reports = json_lines(done)
        if len(reports) != len(names):
            return no_answer(done)
        by_name = list(zip(names, reports, strict=True))
        findings = [finding for name, report in by_name for finding in _refuted(name, report, locator)]
        unknown = [name for name, report in by_name if report["verdict"] == "unknown"]
        if findings:
            summary = f"{count_schedules(findings)} of {len(names)} schedules refuted"
            return Verdict.REFUSED, summary, tuple(findings)
        if unknown:
            return Verdict.UNKNOWN, f"a solver gave up on {', '.join(unknown)}", ()
        if any(report["verdict"] != "proved" for report in reports):
            return no_answer(done)
        return Verdict.PASSED, f"{len(names)} schedule{'s' * (len(names) != 1)} proved", ()

    command = python("-m", "dualpipe.cli", "prove", "--json", *map(str, files))
    return Check("prove", why, command, LIMIT_S, read)


def _refuted(name: str, report: Mapping[str, Any], locator: Locator) -> list[Finding]:
    """The findings about one schedule, in the order of the checks."""
    if report["verdict"] == "bad input":
        return [Finding("schedule", f"{name}: {report['error']}", locator.cause.path, locator.cause.line, name)]
    findings = []
    for rule, result in report["checks"].items():
        if result["verdict"] == "refuted":
            data = result.get("finding", {})
            location = locator.locate(name, data)
            story = result.get("story", "refuted")
            message = f"{name}: {story}" + (f"\nmade by {location.what}" if location.what else "")
            findings.append(Finding(rule, message, location.path, location.line, name, data))
    return findings
