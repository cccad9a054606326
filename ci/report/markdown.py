"""The page for a job's summary, in Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ci.change import FIGURES, ScheduleChange, side_by_side
from ci.evaluation import Evaluation
from ci.report.grouping import left_out, shown
from ci.report.terminal import describe_checking
from ci.result import CheckResult, ExitCode, Finding, Verdict

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
"""GitHub accepts no summary above 1 MiB."""
_MOST_SHOWN = 4
"""How many diffs of schedules are shown."""


def markdown(evaluation: Evaluation) -> str:
    """The whole page.  Parts that would exceed ``MOST_BYTES`` are left out, and the last line counts them."""
    size, left = 0, 0
    lines: list[str] = []
    for part in _parts(evaluation):
        more = sum(len(line.encode(errors="replace")) + 1 for line in part)
        if size + more > MOST_BYTES:
            left += 1
        else:
            size += more
            lines += part
    if left:
        lines += ["", f"{left} more findings and diffs are in gate.json."]
    return "\n".join(lines) + "\n"


def bad_input_in_markdown(error: Exception) -> str:
    """The page if there is no evaluation."""
    return f"# Schedule gate: ⚠️ Bad input\n\n{_cell(str(error))}\n"


def _parts(evaluation: Evaluation) -> Iterator[list[str]]:
    """The page in parts, each of which can be left out."""
    yield list(_head(evaluation))
    for result in evaluation.results:
        yield from _findings(result)
    if evaluation.schedules:
        yield list(_table(evaluation.schedules))
        yield from _diffs(evaluation.schedules)


def _head(evaluation: Evaluation) -> Iterator[str]:
    yield f"# Schedule gate: {HEADS[evaluation.exit_code]}"
    yield ""
    files = len(evaluation.changed)
    yield (
        f"{files} file{'s' * (files != 1)} and {len(evaluation.schedules)} schedules differ from "
        f"`{evaluation.base.revision[:12]}` ({_cell(evaluation.base.why)}). {evaluation.seconds:.1f} s."
    )
    if evaluation.selection.everything:
        yield f"Everything was run: {_cell(evaluation.selection.everything)}."
    if evaluation.checking:
        yield f"{_cell(describe_checking(evaluation.checking))}."
    yield ""
    yield "| | check | verdict | seconds | run for |"
    yield "|---|---|---|---:|---|"
    for result in evaluation.results:
        verdict = f"{result.verdict.value}: {_cell(result.summary)}"
        yield f"| {MARKS[result.verdict]} | {result.check} | {verdict} | {result.seconds:.1f} | {_cell(result.why)} |"


def _findings(result: CheckResult) -> Iterator[list[str]]:
    if not result.findings:
        return
    findings = shown(result)
    stories = [finding for finding in findings if "\n" in finding.message.strip()]
    yield ["", f"## {result.check} refuses", ""]
    for finding in findings:
        if finding not in stories:
            yield [f"* {_where(finding)}{_cell(finding.message)}"]
    for finding in stories:
        where = f" at `{finding.path}:{finding.line}`" if finding.path else ""
        yield ["", f"**{finding.rule}**{where}", "", *fenced("text", finding.message.splitlines())]
    if more := left_out(result):
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
    """Lines as a block of code, which a fence within them does not end."""
    fence = "````" if any("```" in line for line in lines) else "```"
    yield f"{fence}{language}"
    yield from lines
    yield fence


def _cell(text: str) -> str:
    """Text on one line, without bars and HTML markup."""
    plain = " ".join(text.split()).replace("|", "\\|")
    return plain.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
