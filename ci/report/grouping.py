"""Groups of findings that are one fault to a reader: the same rule at the same location, in several schedules."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from ci.result import CheckResult, Finding

MOST_TESTS = 5
"""How many failed tests are shown: one fault makes many fail, and the nearest are first."""
_MOST_NAMED = 6
"""How many further schedules a group names."""


def grouped(findings: Iterable[Finding]) -> list[Finding]:
    """The first finding of each group, which has the smallest schedule, with the names of the other schedules added."""
    groups: dict[tuple[str, str, int], list[Finding]] = {}
    for number, finding in enumerate(findings):
        key = (finding.rule, finding.path, finding.line) if finding.schedule else (finding.rule, "", -1 - number)
        groups.setdefault(key, []).append(finding)
    return [_together(group) for group in groups.values()]


def shown(result: CheckResult) -> list[Finding]:
    """The findings for a reader: one a group, and only the first few failed tests."""
    return [
        finding
        for number, finding in enumerate(grouped(result.findings))
        if finding.rule != "test" or number < MOST_TESTS
    ]


def left_out(result: CheckResult) -> str:
    """How many failed tests ``shown`` leaves out, in words; empty if none."""
    more = sum(finding.rule == "test" for finding in result.findings) - MOST_TESTS
    return f"and {more} failed test{'s' * (more > 1)} more" if more > 0 else ""


def _together(group: list[Finding]) -> Finding:
    first = group[0]
    others = list(dict.fromkeys(finding.schedule for finding in group if finding.schedule != first.schedule))
    if not others:
        return first
    more = f" and {len(others) - _MOST_NAMED} more" if len(others) > _MOST_NAMED else ""
    return replace(first, message=f"{first.message.rstrip()}\nlikewise in {', '.join(others[:_MOST_NAMED])}{more}")
