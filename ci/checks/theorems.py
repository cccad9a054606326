"""The check ``theorems``: the theorems for every size, and how many obligations each of them has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ci.checks.check import Check, Reading, json_lines, no_answer
from ci.golden import COUNTS, Count, Counts
from ci.location import BOUNDS, Location, Locator
from ci.process import Completed, python
from ci.result import Finding, Verdict

LIMIT_S = 400.0


def check(
    recorded: Counts,
    base: Counts,
    why: str,
    locator: Locator,
    explained: Callable[[str], bool],
    bounds: Callable[[str, str], Location],
) -> Check:
    """The check that proves the theorems for every size and compares their counts and makespans with the recorded ones.

    If fewer obligations arise than at the base, or a makespan differs from that of the base, the changelog needs an
    entry: ``explained(name)`` says whether it has one.  ``bounds(family, name)`` is the line of a bound in the sources.
    """

    def read(done: Completed) -> Reading:
        results = json_lines(done)
        if not results or done.code not in (0, 1, 3):
            return no_answer(done)
        findings = [_refuted(result, locator, bounds) for result in results if result["verdict"] == "refuted"]
        counts = {result["name"]: Count.of(result) for result in results}
        unknown = [result for result in results if result["verdict"] == "unknown"]
        if not unknown and not findings:
            findings += stale_counts(recorded, counts)
            findings += fallen_counts(base, counts, explained)
            findings += changed_makespans(base, counts, explained)
        if findings:
            return Verdict.REFUSED, f"{len(findings)} findings", tuple(findings)
        if unknown:
            first = unknown[0]
            summary = f"{len(unknown)} of {len(results)} not proved; {first['name']}: {first['reason']}"
            return Verdict.UNKNOWN, summary, ()
        changed = "".join(f"; {name} {now}; was {before}" for name, before, now in _changed(base, counts))
        return Verdict.PASSED, f"{len(results)} theorems proved for every size{changed}", ()

    command = python("-m", "dualpipe.cli", "prove", "--all-sizes", "--json")
    return Check("theorems", why, command, LIMIT_S, read)


def _refuted(result: Mapping[str, Any], locator: Locator, bounds: Callable[[str, str], Location]) -> Finding:
    message = f"{result['name']} is refuted: {result['statement']}\n{result['reason']}"
    family, _, bound = result["name"].partition(": ")
    if bound in BOUNDS:
        location = bounds(family, bound)
        message += (
            f"\nif this much is intended, edit {bound} and its words in the family's bounds, "
            f"{location.path}:{location.line}, and say why in CHANGELOG.md"
        )
    return Finding("theorem", message, locator.cause.path, locator.cause.line)


def stale_counts(recorded: Counts, counts: Counts) -> list[Finding]:
    """A finding for each recorded count that differs from that of the tree."""
    findings = []
    for name in {**recorded, **counts}:
        old, new = recorded.get(name), counts.get(name)
        if old != new:
            line = list(recorded).index(name) + 1 if name in recorded else 1
            message = f"{name}: {_counted(new)}, and {COUNTS} records {_counted(old)}; run make golden"
            findings.append(Finding("counts", message, COUNTS, line))
    return findings


def fallen_counts(base: Counts, counts: Counts, explained: Callable[[str], bool]) -> list[Finding]:
    """A finding for each theorem with fewer arising obligations than at the base and no entry in the changelog."""
    findings = []
    for name, before in base.items():
        arising = counts[name].arising if name in counts else 0
        if arising < before.arising and not explained(name):
            fallen = f"{name}: {arising} obligations arise, {before.arising} before"
            message = f"{fallen}; say why in CHANGELOG.md, naming {name!r}"
            findings.append(Finding("counts", message, COUNTS, 1 + list(counts).index(name) if name in counts else 1))
    return findings


def changed_makespans(base: Counts, counts: Counts, explained: Callable[[str], bool]) -> list[Finding]:
    """A finding for each makespan that differs from that of the base and has no entry in the changelog."""
    return [
        Finding(
            "counts",
            f"{name} {now}; was {before}: say why in CHANGELOG.md, naming {name!r}",
            COUNTS,
            1 + list(counts).index(name),
        )
        for name, before, now in _changed(base, counts)
        if not explained(name)
    ]


def _changed(base: Counts, counts: Counts) -> list[tuple[str, str, str]]:
    """The theorems whose bound differs from that at the base, each with the bound before and now."""
    both = [(name, base[name].bound, count.bound) for name, count in counts.items() if name in base]
    return [(name, before, now) for name, before, now in both if before and now != before]


def _counted(count: Count | None) -> str:
    if count is None:
        return "none"
    bound = f" and the bound {count.bound}" if count.bound else ""
    return f"{count.obligations} obligations of which {count.arising} arise{bound}"
