"""The page of a judgement as data for ``ci.timelines``."""

from __future__ import annotations

from typing import Any

from ci.judgement import Judgement
from ci.outcome import Finding
from ci.report.grouping import grouped

MOST_DRAWN, LONGEST = 6, 8_000
"""How many schedules are drawn, those with findings first, and the most characters of one."""


def page(judgement: Judgement) -> dict[str, Any]:
    """Verdict, checks, findings, and the schedules to draw."""
    faulty = {finding.schedule for _, finding in judgement.findings if finding.rule not in ("golden", "changelog")}
    drawable = [change for change in judgement.schedules if len(change.after or change.before or "") <= LONGEST]
    drawn = sorted(drawable, key=lambda change: change.name not in faulty)[:MOST_DRAWN]
    left = len(judgement.schedules) - len(drawn)
    counts = f"{len(judgement.changed)} files and {len(judgement.schedules)} schedules differ from {judgement.base}."
    return {
        "title": "Schedule gate",
        "verdict": judgement.exit_code.name.lower(),
        "lead": f"{counts} {left} larger ones are not drawn." if left else counts,
        "checks": [
            [outcome.check, outcome.verdict.value, f"{outcome.seconds:.1f}", outcome.told, outcome.why]
            for outcome in judgement.outcomes
        ],
        "findings": [
            [finding.rule, _where(finding), finding.message]
            for outcome in judgement.outcomes
            for finding in grouped(outcome.findings)
        ],
        "schedules": [{"name": change.name, "before": change.before, "after": change.after} for change in drawn],
    }


def _where(finding: Finding) -> str:
    return f"{finding.path}:{finding.line}" if finding.path else ""
