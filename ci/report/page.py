"""The page of an evaluation, as data for ``ci.child.page``."""

from __future__ import annotations

from typing import Any

from ci.change import ScheduleChange
from ci.checks.records import family
from ci.evaluation import Evaluation
from ci.report.grouping import left_out, shown
from ci.result import BOOKKEEPING, CheckResult, Finding

MOST_DRAWN, LONGEST = 6, 8_000
"""How many schedules are drawn, those with findings first, and the most characters of one."""


def page(evaluation: Evaluation) -> dict[str, Any]:
    """Verdict, the schedule of the first finding, findings, checks, and one schedule of each other family to draw."""
    findings = [finding for result in evaluation.results for finding in shown(result)]
    drawn = _drawn(evaluation, findings)
    names = [schedule["name"] for schedule in drawn]
    first = findings[0].schedule if findings and findings[0].schedule in names else ""
    left = len({change.name for change in evaluation.schedules} - set(names))
    counts = f"{len(evaluation.changed)} files and {len(evaluation.schedules)} schedules differ from {evaluation.base}."
    return {
        "title": "Schedule gate",
        "verdict": evaluation.exit_code.name.lower(),
        "lead": f"{counts} {left} of the schedules are not drawn." if left else counts,
        "first": first,
        "checks": [
            [result.check, result.verdict.value, f"{result.seconds:.1f}", result.summary, result.why]
            for result in evaluation.results
        ],
        "findings": [row for result in evaluation.results for row in _rows(result)],
        "schedules": drawn,
    }


def _drawn(evaluation: Evaluation, findings: list[Finding]) -> list[dict[str, Any]]:
    """The schedules with findings, and the smallest changed one of each further family."""
    changed = {change.name: change for change in evaluation.schedules}
    names = dict.fromkeys(finding.schedule for finding in findings if finding.rule not in BOOKKEEPING)
    for name in changed:
        if family(name) not in map(family, names):
            names[name] = None
    schedules = []
    for name in names:
        text = evaluation.texts.get(name)
        change = changed.get(name, ScheduleChange(name, None, text))
        if (longest := change.after or change.before) and len(longest) <= LONGEST:
            what = change.what if name in changed else "unchanged"
            schedules.append({"name": name, "what": what, "before": change.before, "after": change.after})
    return schedules[:MOST_DRAWN]


def _rows(result: CheckResult) -> list[list[str]]:
    rows = [[finding.rule, _where(finding), finding.message] for finding in shown(result)]
    if more := left_out(result):
        rows.append(["test", "", f"{more}: gate.json and gate.xml have them all"])
    return rows


def _where(finding: Finding) -> str:
    return f"{finding.path}:{finding.line}" if finding.path else ""
