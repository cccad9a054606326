"""The page of a judgement as data for ``ci.timelines``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ci.change import ScheduleChange
from ci.judgement import Judgement
from ci.outcome import BOOKKEEPING, Finding, Outcome
from ci.report.grouping import left_out, shown

MOST_DRAWN, LONGEST = 6, 8_000
"""How many schedules are drawn, those with findings first, and the most characters of one."""


def page(judgement: Judgement) -> dict[str, Any]:
    """Verdict, the schedule of the first finding, findings, checks, and the other schedules to draw."""
    known = {change.name: change for change in judgement.schedules}
    told = [(outcome, finding) for outcome in judgement.outcomes for finding in shown(outcome)]
    faulty = dict.fromkeys(finding.schedule for _, finding in told if finding.rule not in BOOKKEEPING)
    names = [*(name for name in faulty if name in known or name in judgement.texts), *known]
    drawable = [made for name in dict.fromkeys(names) if (made := _drawn(name, known, judgement.texts)) is not None]
    drawn = drawable[:MOST_DRAWN]
    left = len(known.keys() - {schedule["name"] for schedule in drawn})
    counts = f"{len(judgement.changed)} files and {len(judgement.schedules)} schedules differ from {judgement.base}."
    return {
        "title": "Schedule gate",
        "verdict": judgement.exit_code.name.lower(),
        "lead": f"{counts} {left} of the schedules are not drawn." if left else counts,
        "first": next((schedule["name"] for schedule in drawn if told and schedule["name"] == told[0][1].schedule), ""),
        "checks": [
            [outcome.check, outcome.verdict.value, f"{outcome.seconds:.1f}", outcome.told, outcome.why]
            for outcome in judgement.outcomes
        ],
        "findings": [row for outcome in judgement.outcomes for row in _rows(outcome)],
        "schedules": drawn,
    }


def _rows(outcome: Outcome) -> list[list[str]]:
    rows = [[finding.rule, _where(finding), finding.message] for finding in shown(outcome)]
    if more := left_out(outcome):
        rows.append(["test", "", f"{more}: gate.json and gate.xml have them all"])
    return rows


def _drawn(name: str, known: Mapping[str, ScheduleChange], texts: Mapping[str, str]) -> dict[str, Any] | None:
    """A schedule before and after the change; ``None`` for one that is too long to draw."""
    before, after = (known[name].before, known[name].after) if name in known else (texts[name], texts[name])
    if len(after or before or "") > LONGEST:
        return None
    return {"name": name, "before": before, "after": after}


def _where(finding: Finding) -> str:
    return f"{finding.path}:{finding.line}" if finding.path else ""
