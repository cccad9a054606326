"""The check ``theorems``: the theorems for every size, and how many obligations each of them has."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ci.checks.check import Check, Reading, json_lines, no_answer
from ci.golden import COUNTS, Counts
from ci.location import BOUNDS, Location, Locator
from ci.process import Completed, python
from ci.result import Finding, Verdict

LIMIT_S = 400.0
_TIMES_DO_NOT_FIT = ("the times of the proof do not fit this table", "each compute of each row has a time")
"""How ``prove`` begins the reason for a theorem that its recorded times no longer prove, and that nothing refutes."""


def check(
    recorded: Counts,
    base: Counts,
    why: str,
    locator: Locator,
    explained: Callable[[str], bool],
    times: Callable[[str, str], Location],
) -> Check:
    """The theorems for every size, and their counts against the recorded ones.

    If fewer obligations arise than at the base, the changelog needs an entry: ``explained(name)`` says whether it has
    one.  If a theorem is not proved only because the recorded times do not fit the table, the check is outdated:
    ``times(family, reason)`` is the location of those times.
    """

    def read(done: Completed) -> Reading:
        results = json_lines(done)
        if not results or done.code not in (0, 1, 3):
            return no_answer(done)
        findings = [_refuted(result, locator, times) for result in results if result["verdict"] == "refuted"]
        counts = {result["name"]: (result["obligations"], result["non_vacuous"]) for result in results}
        unknown = [result for result in results if result["verdict"] == "unknown"]
        outdated = [result for result in unknown if result["reason"].startswith(_TIMES_DO_NOT_FIT)]
        stale = tuple(_stale_times(result, times(_family(result), result["reason"])) for result in outdated)
        if not findings and outdated and all(_depends_on(result, outdated) for result in unknown):
            return Verdict.OUTDATED, f"the recorded times do not fit {len(stale)} of {len(results)} theorems", stale
        findings += stale if findings else ()
        if not unknown and not findings:
            findings += stale_counts(recorded, counts)
            findings += fallen_counts(base, counts, explained)
        if findings:
            return Verdict.REFUSED, f"{len(findings)} findings", tuple(findings)
        if unknown:
            first = unknown[0]
            summary = f"{len(unknown)} of {len(results)} not proved; {first['name']}: {first['reason']}"
            return Verdict.UNKNOWN, summary, ()
        return Verdict.PASSED, f"{len(results)} theorems proved for every size", ()

    command = python("-m", "dualpipe.cli", "prove", "--all-sizes", "--json")
    return Check("theorems", why, command, LIMIT_S, read)


def _depends_on(result: Mapping[str, Any], outdated: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a theorem is unknown only for its times, or for those of theorems of its family that it rests on."""
    if result in outdated:
        return True
    premises = result["reason"].removeprefix("rests on ").partition(", not proved")[0].split(" and ")
    missing = {other["name"].partition(": ")[2] for other in outdated if _family(other) == _family(result)}
    return result["reason"].startswith("rests on ") and missing.issuperset(premises)


def _family(result: Mapping[str, Any]) -> str:
    return str(result["name"]).partition(": ")[0]


def _stale_times(result: Mapping[str, Any], location: Location) -> Finding:
    message = (
        f"{result['name']} is not proved, and nothing refutes it: the table may be right and slower than recorded\n"
        f"{result['reason']}\n"
        f"edit {location.what} in {location.path}: write starts so late that no compute starts before its needs have "
        "ended, one for each compute of a row, and the 'end' to match\n"
        "if the end grows, edit makespan and its words in the bounds there; if no bound is reached at every size, "
        "write makespan_reached=False beside it\n"
        f"then run dualpipe prove --all-sizes --schedule {_family(result)}, make golden and the gate again"
    )
    return Finding("times", message, location.path, location.line)


def _refuted(result: Mapping[str, Any], locator: Locator, times: Callable[[str, str], Location]) -> Finding:
    message = f"{result['name']} is refuted: {result['statement']}\n{result['reason']}"
    bound = result["name"].partition(": ")[2]
    if bound in BOUNDS:
        location = times(_family(result), bound)
        message += (
            f"\nif this much is intended, edit {bound} and its words in the family's bounds, "
            f"{location.path}:{location.line}, and say why in CHANGELOG.md"
        )
    return Finding("theorem", message, locator.cause.path, locator.cause.line)


def stale_counts(recorded: Counts, counts: Counts) -> list[Finding]:
    """The recorded counts that differ from those of the tree."""
    findings = []
    for name in {**recorded, **counts}:
        old, new = recorded.get(name), counts.get(name)
        if old != new:
            line = list(recorded).index(name) + 1 if name in recorded else 1
            message = f"{name}: {_counted(new)}, and {COUNTS} records {_counted(old)}; run make golden"
            findings.append(Finding("counts", message, COUNTS, line))
    return findings


def fallen_counts(base: Counts, counts: Counts, explained: Callable[[str], bool]) -> list[Finding]:
    """Theorems of which fewer obligations arise than at the base, without an entry of the changelog."""
    findings = []
    for name, (_, before) in base.items():
        arising = counts.get(name, (0, 0))[1]
        if arising < before and not explained(name):
            message = f"{name}: {arising} obligations arise, {before} before; say why in CHANGELOG.md, naming {name!r}"
            findings.append(Finding("counts", message, COUNTS, 1 + list(counts).index(name) if name in counts else 1))
    return findings


def _counted(count: tuple[int, int] | None) -> str:
    return "none" if count is None else f"{count[0]} obligations of which {count[1]} arise"
