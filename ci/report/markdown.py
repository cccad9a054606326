"""The page for a job's summary, in Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ci.change import FIGURES, ScheduleChange, side_by_side
from ci.judgement import Judgement
from ci.outcome import ExitCode, Finding, Outcome, Verdict
from ci.report.grouping import left_out, shown
from ci.report.terminal import judges_told

MARKS = {
    Verdict.PASSED: "✅",
    Verdict.REFUSED: "❌",
    Verdict.UNKNOWN: "❔",
    Verdict.SKIPPED: "➖",
}
HEADS = {
    ExitCode.PASSED: "✅ Passed",
    ExitCode.REFUSED: "❌ Refused",
    ExitCode.UNKNOWN: "❔ Unknown: not every check gave an answer",
}
MOST_BYTES = 900_000
"""GitHub takes no summary above 1 MiB."""
_MOST_SHOWN = 4
"""How many diffs of a schedule family are written out."""


def markdown(judgement: Judgement) -> str:
    """The whole page.  Parts that would make it longer than a summary may be are left out, and told."""
    size, left = 0, 0
    lines: list[str] = []
    for part in _parts(judgement):
        more = sum(len(line.encode(errors="replace")) + 1 for line in part)
        if size + more > MOST_BYTES:
            left += 1
        else:
            size += more
            lines += part
    if left:
        lines += ["", f"{left} more findings and diffs are in gate.json."]
    return "\n".join(lines) + "\n"


def complaint_in_markdown(error: Exception) -> str:
    """The page where there is no judgement."""
    return f"# Schedule gate: ⚠️ Bad input\n\n{_cell(str(error))}\n"


def _parts(judgement: Judgement) -> Iterator[list[str]]:
    """The page in parts that stand by themselves."""
    yield list(_head(judgement))
    for outcome in judgement.outcomes:
        yield from _findings(outcome)
    if judgement.schedules:
        yield list(_table(judgement.schedules))
        yield from _diffs(judgement.schedules)


def _head(judgement: Judgement) -> Iterator[str]:
    yield f"# Schedule gate: {HEADS[judgement.exit_code]}"
    yield ""
    files = len(judgement.changed)
    yield (
        f"{files} file{'s' * (files != 1)} and {len(judgement.schedules)} schedules differ from "
        f"`{judgement.base.revision[:12]}` ({_cell(judgement.base.why)}). {judgement.seconds:.1f} s."
    )
    if judgement.selection.everything:
        yield f"Everything was run: {_cell(judgement.selection.everything)}."
    if judgement.judges:
        yield f"{_cell(judges_told(judgement.judges))}."
    yield ""
    yield "| | check | verdict | seconds | run for |"
    yield "|---|---|---|---:|---|"
    for outcome in judgement.outcomes:
        told = f"{outcome.verdict.value}: {_cell(outcome.told)}"
        yield f"| {MARKS[outcome.verdict]} | {outcome.check} | {told} | {outcome.seconds:.1f} | {_cell(outcome.why)} |"


def _findings(outcome: Outcome) -> Iterator[list[str]]:
    if not outcome.findings:
        return
    findings = shown(outcome)
    stories = [finding for finding in findings if "\n" in finding.message.strip()]
    yield ["", f"## {outcome.check} refuses", ""]
    for finding in findings:
        if finding not in stories:
            yield [f"* {_where(finding)}{_cell(finding.message)}"]
    for finding in stories:
        where = f" at `{finding.path}:{finding.line}`" if finding.path else ""
        yield ["", f"**{finding.rule}**{where}", "", *fenced("text", finding.message.splitlines())]
    if more := left_out(outcome):
        yield ["", f"{more}: they are in `gate.json` and `gate.xml`."]


def _where(finding: Finding) -> str:
    return f"`{finding.path}:{finding.line}` " if finding.path else ""


def _table(changes: tuple[ScheduleChange, ...]) -> Iterator[str]:
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


def _diffs(changes: tuple[ScheduleChange, ...]) -> Iterator[list[str]]:
    for change in changes[:_MOST_SHOWN]:
        head = f"<details{' open' if change is changes[0] else ''}><summary>{change.name}</summary>"
        yield ["", head, "", *fenced("diff", change.diff), "", "</details>"]
    if len(changes) > _MOST_SHOWN:
        yield ["", f"The diffs of {len(changes) - _MOST_SHOWN} larger ones are left out."]


def _figures(change: ScheduleChange) -> list[tuple[str, str, str]]:
    return side_by_side(change.figures_before, change.figures_after)


def fenced(language: str, lines: Sequence[str]) -> Iterator[str]:
    """Lines as a block of code; a fence within them does not end it."""
    fence = "````" if any("```" in line for line in lines) else "```"
    yield f"{fence}{language}"
    yield from lines
    yield fence


def _cell(text: str) -> str:
    """Text on one line, within a table or not: no bars, and no markup of HTML."""
    plain = " ".join(text.split()).replace("|", "\\|")
    return plain.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
