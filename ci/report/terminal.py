"""What the gate prints: the verdicts, the findings, what changed; or one JSON object."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

from ci.judgement import Judgement
from ci.outcome import ExitCode, Finding, Outcome
from ci.report.grouping import left_out, shown

_WORDS = {ExitCode.PASSED: "PASSED", ExitCode.REFUSED: "REFUSED", ExitCode.UNKNOWN: "UNKNOWN"}
_MOST_NAMED = 6
_MOST_LINES = 12
"""How many lines of a finding's story are printed."""


def terminal(judgement: Judgement, as_json: bool) -> str:
    """The text for standard output."""
    if as_json:
        return json.dumps(as_data(judgement)) + "\n"
    return "\n".join(_lines(judgement)) + "\n"


def as_data(judgement: Judgement) -> dict[str, object]:
    """The judgement as plain data."""
    return {
        "base": judgement.base.revision,
        "compared_with": judgement.base.why,
        "judges_changed": judgement.judges,
        "verdict": judgement.exit_code.name.lower(),
        "seconds": round(judgement.seconds, 2),
        "changed": [change.path for change in judgement.changed],
        "schedules": [
            {
                "name": change.name,
                "what": change.what,
                "diff": list(change.diff),
                "before": change.figures_before,
                "after": change.figures_after,
            }
            for change in judgement.schedules
        ],
        "checks": [_outcome(outcome) for outcome in judgement.outcomes],
    }


def complaint(error: Exception) -> dict[str, object]:
    """Bad input as plain data."""
    return {"verdict": ExitCode.BAD_INPUT.name.lower(), "error": str(error)}


def _outcome(outcome: Outcome) -> dict[str, object]:
    return {
        "check": outcome.check,
        "verdict": outcome.verdict.value,
        "why": outcome.why,
        "told": outcome.told,
        "seconds": round(outcome.seconds, 2),
        "findings": [_finding(finding) for finding in outcome.findings],
    }


def _finding(finding: Finding) -> dict[str, object]:
    return {
        "rule": finding.rule,
        "message": finding.message,
        "path": finding.path,
        "line": finding.line,
        "schedule": finding.schedule,
        "data": dict(finding.data),
    }


def _lines(judgement: Judgement) -> Iterator[str]:
    for change in judgement.schedules:
        moved = "; ".join(f"{what} {old or '-'} -> {new or '-'}" for what, old, new in change.moved)
        still = moved or "no figure moves"
        yield f"{change.name} {change.what}: {still if change.is_measured else 'its figures could not be measured'}"
    if judgement.schedules:
        yield from (f"  {line}" for line in judgement.schedules[0].diff)
    for outcome, finding in [(o, finding) for o in judgement.outcomes for finding in (*shown(o), None)]:
        if finding is None:
            if more := left_out(outcome):
                yield f"{more}: --json and --output have them all"
            continue
        where = f"{finding.path}:{finding.line}: " if finding.path else ""
        yield f"{where}{outcome.check}/{finding.rule}"
        story = finding.message.splitlines()
        yield from (f"  {line}" for line in story[:_MOST_LINES])
        if len(story) > _MOST_LINES:
            yield f"  and {len(story) - _MOST_LINES} lines more in the reports"
    for outcome in judgement.outcomes:
        yield f"{outcome.check:<16} {outcome.verdict.value:<8} {outcome.seconds:6.1f} s  {outcome.told}"
    if judgement.judges:
        yield judges_told(judgement.judges)
    yield f"{_WORDS[judgement.exit_code]} in {judgement.seconds:.1f} s, against {judgement.base}"


def judges_told(judges: Sequence[str]) -> str:
    """That the change touches what judges it, for a reader to look at."""
    more = f" and {len(judges) - _MOST_NAMED} more" if len(judges) > _MOST_NAMED else ""
    return f"Of what judges this change it changes {', '.join(judges[:_MOST_NAMED])}{more}: read that yourself"
