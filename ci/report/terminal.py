"""The output of the gate: what changed, the findings and the verdicts; or one JSON object."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

from ci.evaluation import Evaluation
from ci.report.grouping import left_out, shown
from ci.result import CheckResult, ExitCode, Finding

_WORDS = {ExitCode.PASSED: "PASSED", ExitCode.REFUSED: "REFUSED", ExitCode.UNKNOWN: "UNKNOWN"}
_MOST_NAMED = 6
_MOST_LINES = 12
"""How many lines of a finding's story are printed."""


def terminal(evaluation: Evaluation, as_json: bool) -> str:
    """The text for standard output."""
    if as_json:
        return json.dumps(as_data(evaluation)) + "\n"
    return "\n".join(_lines(evaluation)) + "\n"


def as_data(evaluation: Evaluation) -> dict[str, object]:
    """The evaluation as plain data."""
    return {
        "base": evaluation.base.revision,
        "compared_with": evaluation.base.why,
        "judges_changed": evaluation.checking,
        "verdict": evaluation.exit_code.name.lower(),
        "seconds": round(evaluation.seconds, 2),
        "changed": [change.path for change in evaluation.changed],
        "schedules": [
            {
                "name": change.name,
                "what": change.what,
                "diff": list(change.diff),
                "before": change.figures_before,
                "after": change.figures_after,
            }
            for change in evaluation.schedules
        ],
        "checks": [_result(result) for result in evaluation.results],
    }


def bad_input(error: Exception) -> dict[str, object]:
    """Bad input as plain data."""
    return {"verdict": ExitCode.BAD_INPUT.name.lower(), "error": str(error)}


def _result(result: CheckResult) -> dict[str, object]:
    return {
        "check": result.check,
        "verdict": result.verdict.value,
        "why": result.why,
        "told": result.summary,
        "seconds": round(result.seconds, 2),
        "findings": [_finding(finding) for finding in result.findings],
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


def _lines(evaluation: Evaluation) -> Iterator[str]:
    for change in evaluation.schedules:
        moved = "; ".join(f"{what} {old or '-'} -> {new or '-'}" for what, old, new in change.moved)
        still = moved or "no figure moves"
        yield f"{change.name} {change.what}: {still if change.is_measured else 'its figures could not be measured'}"
    if evaluation.schedules:
        yield from (f"  {line}" for line in evaluation.schedules[0].diff)
    for result, finding in [(o, finding) for o in evaluation.results for finding in (*shown(o), None)]:
        if finding is None:
            if more := left_out(result):
                yield f"{more}: --json and --output have them all"
            continue
        where = f"{finding.path}:{finding.line}: " if finding.path else ""
        yield f"{where}{result.check}/{finding.rule}"
        story = finding.message.splitlines()
        yield from (f"  {line}" for line in story[:_MOST_LINES])
        if len(story) > _MOST_LINES:
            yield f"  and {len(story) - _MOST_LINES} more lines in the reports"
    for result in evaluation.results:
        yield f"{result.check:<16} {result.verdict.value:<8} {result.seconds:6.1f} s  {result.summary}"
    if evaluation.checking:
        yield describe_checking(evaluation.checking)
    yield f"{_WORDS[evaluation.exit_code]} in {evaluation.seconds:.1f} s, against {evaluation.base}"


def describe_checking(paths: Sequence[str]) -> str:
    """The files that check the change and are changed by it, for a person to read."""
    more = f" and {len(paths) - _MOST_NAMED} more" if len(paths) > _MOST_NAMED else ""
    return f"The change edits files that check it, {', '.join(paths[:_MOST_NAMED])}{more}: read that yourself"
