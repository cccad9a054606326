"""The page for a job's summary, in Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ci.change import FIGURES, ScheduleChange, side_by_side
from ci.judgement import Judgement
from ci.outcome import ExitCode, Finding, Outcome, Verdict
from ci.report.grouping import grouped

MARKS = {Verdict.PASSED: "✅", Verdict.REFUSED: "❌", Verdict.UNKNOWN: "❔", Verdict.SKIPPED: "➖"}
HEADS = {
    ExitCode.PASSED: "✅ Passed",
    ExitCode.REFUSED: "❌ Refused",
    ExitCode.UNKNOWN: "❔ Unknown: not every check gave an answer",
}
_MOST_SHOWN = 4
"""How many diffs of a schedule family are written out."""


def markdown(judgement: Judgement) -> str:
    """The whole page."""
    return "\n".join(_lines(judgement)) + "\n"


def _lines(judgement: Judgement) -> Iterator[str]:
    yield f"# Schedule gate: {HEADS[judgement.exit_code]}"
    yield ""
    files = len(judgement.changed)
    yield (
        f"{files} file{'s' * (files != 1)} and {len(judgement.schedules)} schedules differ from "
        f"`{judgement.base[:12]}`. {judgement.seconds:.1f} s."
    )
    if judgement.selection.everything:
        yield f"Everything was run: {judgement.selection.everything}."
    yield ""
    yield "| | check | verdict | seconds | run for |"
    yield "|---|---|---|---:|---|"
    for outcome in judgement.outcomes:
        told = f"{outcome.verdict.value}: {_cell(outcome.told)}"
        yield f"| {MARKS[outcome.verdict]} | {outcome.check} | {told} | {outcome.seconds:.1f} | {_cell(outcome.why)} |"
    for outcome in judgement.outcomes:
        yield from _findings(outcome)
    if judgement.schedules:
        yield from _schedules(judgement.schedules)


def _findings(outcome: Outcome) -> Iterator[str]:
    if not outcome.findings:
        return
    yield ""
    yield f"## {outcome.check} refuses"
    yield ""
    findings = grouped(outcome.findings)
    stories = [finding for finding in findings if "\n" in finding.message.strip()]
    for finding in findings:
        if finding not in stories:
            yield f"* {_where(finding)}{_cell(finding.message)}"
    for finding in stories:
        where = f" at `{finding.path}:{finding.line}`" if finding.path else ""
        yield ""
        yield f"**{finding.rule}**{where}"
        yield ""
        yield from fenced("text", finding.message.splitlines())


def _where(finding: Finding) -> str:
    return f"`{finding.path}:{finding.line}` " if finding.path else ""


def _schedules(changes: tuple[ScheduleChange, ...]) -> Iterator[str]:
    yield ""
    yield "## Schedules that change"
    yield ""
    yield f"| schedule | | {' | '.join(FIGURES.values())} |"
    yield f"|---|---|{'---|' * len(FIGURES)}"
    for change in changes:
        cells = [old if old == new else f"{old} → **{new}**" for _, old, new in _figures(change)]
        stuck = (change.figures_after or {}).get("stuck")
        cells = [f"cannot finish: {_cell(stuck)}"] + [""] * (len(FIGURES) - 1) if stuck else cells
        yield f"| {change.name} | {change.what} | {' | '.join(cells)} |"
    for change in changes[:_MOST_SHOWN]:
        yield ""
        yield f"<details{' open' if change is changes[0] else ''}><summary>{change.name}</summary>"
        yield ""
        yield from fenced("diff", change.diff)
        yield ""
        yield "</details>"
    if len(changes) > _MOST_SHOWN:
        yield ""
        yield f"The diffs of {len(changes) - _MOST_SHOWN} larger ones are left out."


def _figures(change: ScheduleChange) -> list[tuple[str, str, str]]:
    return side_by_side(change.figures_before, change.figures_after)


def fenced(language: str, lines: Sequence[str]) -> Iterator[str]:
    """Lines as a block of code; a fence within them does not end it."""
    fence = "````" if any("```" in line for line in lines) else "```"
    yield f"{fence}{language}"
    yield from lines
    yield fence


def _cell(text: str) -> str:
    """Text for a table's cell: one line, no bars."""
    return " ".join(text.split()).replace("|", "\\|")
