"""The checks that judge schedules: the six of ``prove``, the theorems, and the trial on ranks."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ci.check import Check, Reading, crashed
from ci.golden import COUNTS, Count, Counts
from ci.outcome import Finding, Verdict
from ci.place import BOUNDS, Place, Places
from ci.process import Completed, python

PROVE_LIMIT_S, THEOREMS_LIMIT_S, TRIAL_LIMIT_S = 120.0, 400.0, 240.0


def prove(files: Sequence[Path], why: str, places: Places) -> Check:
    """The six checks on schedule files."""
    names = [file.stem for file in files]

    def read(done: Completed) -> Reading:
        reports = _lines(done)
        if len(reports) != len(names):
            return crashed(done)
        findings = [
            finding for name, report in zip(names, reports, strict=True) for finding in _refuted(name, report, places)
        ]
        unknown = [name for name, report in zip(names, reports, strict=True) if report["verdict"] == "unknown"]
        if findings:
            return Verdict.REFUSED, f"{_count(findings)} of {len(names)} schedules refuted", tuple(findings)
        if unknown:
            return Verdict.UNKNOWN, f"a solver gave up on {', '.join(unknown)}", ()
        if any(report["verdict"] != "proved" for report in reports):
            return crashed(done)
        return Verdict.PASSED, f"{_schedules(names)} proved", ()

    command = python("-m", "dualpipe.cli", "prove", "--json", *map(str, files))
    return Check("prove", why, command, PROVE_LIMIT_S, read)


def _refuted(name: str, report: Mapping[str, Any], places: Places) -> list[Finding]:
    """The findings about one schedule, in the order of the checks."""
    if report["verdict"] == "bad input":
        return [Finding("schedule", f"{name}: {report['error']}", places.cause.path, places.cause.line, name)]
    findings = []
    for check, result in report["checks"].items():
        if result["verdict"] == "refuted":
            data = result.get("finding", {})
            place = places.of(name, data)
            story = result.get("story", "refuted")
            told = f"{name}: {story}" + (f"\nmade by {place.what}" if place.what else "")
            findings.append(Finding(check, told, place.path, place.line, name, data))
    return findings


def theorems(
    recorded: Counts,
    base: Counts,
    why: str,
    places: Places,
    explained: Callable[[str], bool],
    bounds: Callable[[str, str], Place],
) -> Check:
    """The theorems for every size, and their counts and the bounds of makespans against the recorded ones.

    Fewer obligations that arise than at the base, and another makespan, need an entry of the changelog:
    ``explained(name)`` says whether there is one.  ``bounds(family, name)`` is where a bound is written.
    """

    def read(done: Completed) -> Reading:
        results = _lines(done)
        if not results or done.code not in (0, 1, 3):
            return crashed(done)
        findings = [_theorem(result, places, bounds) for result in results if result["verdict"] == "refuted"]
        counts = {result["name"]: Count.of(result) for result in results}
        unknown = [result for result in results if result["verdict"] == "unknown"]
        if not unknown and not findings:
            findings += stale_counts(recorded, counts)
            findings += fallen_counts(base, counts, explained)
            findings += changed_bounds(base, counts, explained)
        if findings:
            return Verdict.REFUSED, f"{len(findings)} findings", tuple(findings)
        if unknown:
            first = unknown[0]
            told = f"{len(unknown)} of {len(results)} not proved; {first['name']}: {first['reason']}"
            return Verdict.UNKNOWN, told, ()
        moved = [f"; {name} {now}; was {before}" for name, before, now in _moved(base, counts)]
        return Verdict.PASSED, f"{len(results)} theorems proved for every size{''.join(moved)}", ()

    return Check(
        "theorems", why, python("-m", "dualpipe.cli", "prove", "--all-sizes", "--json"), THEOREMS_LIMIT_S, read
    )


def _family(result: Mapping[str, Any]) -> str:
    return str(result["name"]).partition(": ")[0]


def _theorem(result: Mapping[str, Any], places: Places, bounds: Callable[[str, str], Place]) -> Finding:
    message = f"{result['name']} is refuted: {result['statement']}\n{result['reason']}"
    bound = result["name"].partition(": ")[2]
    if bound in BOUNDS:
        place = bounds(_family(result), bound)
        message += (
            f"\nif this much is intended, edit {bound} and its words in the family's bounds, "
            f"{place.path}:{place.line}, and say why in CHANGELOG.md"
        )
    return Finding("theorem", message, places.cause.path, places.cause.line)


def stale_counts(recorded: Counts, counts: Counts) -> list[Finding]:
    """The recorded counts that are not those of the tree."""
    findings = []
    for name in {**recorded, **counts}:
        old, new = recorded.get(name), counts.get(name)
        if old != new:
            line = list(recorded).index(name) + 1 if name in recorded else 1
            told = f"{name}: {_counted(new)}, and {COUNTS} records {_counted(old)}; run make golden"
            findings.append(Finding("counts", told, COUNTS, line))
    return findings


def fallen_counts(base: Counts, counts: Counts, explained: Callable[[str], bool]) -> list[Finding]:
    """Theorems of which fewer obligations arise than at the base, and no entry of the changelog says why."""
    findings = []
    for name, before in base.items():
        arising = counts[name].arising if name in counts else 0
        if arising < before.arising and not explained(name):
            told = (
                f"{name}: {arising} obligations arise, {before.arising} did before; "
                f"say in CHANGELOG.md why, naming {name!r}"
            )
            findings.append(Finding("counts", told, COUNTS, 1 + list(counts).index(name) if name in counts else 1))
    return findings


def changed_bounds(base: Counts, counts: Counts, explained: Callable[[str], bool]) -> list[Finding]:
    """Makespans that are not those of the base, and no entry of the changelog says why."""
    return [
        Finding(
            "counts",
            f"{name} {now}; was {before}: say in CHANGELOG.md why, naming {name!r}",
            COUNTS,
            1 + list(counts).index(name),
        )
        for name, before, now in _moved(base, counts)
        if not explained(name)
    ]


def _moved(base: Counts, counts: Counts) -> list[tuple[str, str, str]]:
    """The theorems whose bound is another one than at the base, with both."""
    both = [(name, base[name].bound, count.bound) for name, count in counts.items() if name in base]
    return [(name, before, now) for name, before, now in both if before and now != before]


def _counted(count: Count | None) -> str:
    if count is None:
        return "none"
    bound = f" and the bound {count.bound}" if count.bound else ""
    return f"{count.obligations} obligations of which {count.arising} arise{bound}"


def trial(files: Sequence[Path], why: str, places: Places, blocking: bool = False, first: bool = False) -> Check:
    """Fake ranks and real processes against the oracle, on schedule files; ``first`` stops at one that differs."""
    name, options = ("trial, blocking", ["--blocking"]) if blocking else ("trial", [])
    names = [file.stem for file in files]
    return _trial(name, [*options, *map(str, files)], names, "plain PyTorch", why, places, first)


def trial_on_megatron(names: Sequence[str], why: str, places: Places, first: bool = False) -> Check:
    """The drop-in against Megatron's own 1F1B, on cases of ``ci.trial``."""
    return _trial("trial, Megatron", ["--megatron", *names], names, "Megatron's 1F1B", why, places, first)


def _trial(
    name: str, arguments: Sequence[str], names: Sequence[str], truth: str, why: str, places: Places, first: bool
) -> Check:
    def read(done: Completed) -> Reading:
        reports = _lines(done)
        findings = [finding for report in reports for finding in _differs(report, places)]
        tried = [report["name"] for report in reports]
        if tried != list(names) and not (first and findings and tried == list(names)[: len(tried)]):
            return crashed(done)
        unknown = [report for report in reports if report["verdict"] == "unknown"]
        if findings:
            return Verdict.REFUSED, f"{_count(findings)} of {len(tried)} differ from {truth}", tuple(findings)
        if unknown:
            return Verdict.UNKNOWN, f"{unknown[0]['name']}: {unknown[0]['error']}", ()
        tensors = sum(report["tensors"] for report in reports)
        return Verdict.PASSED, f"{len(tried)} tried, {tensors} tensors bitwise equal to {truth}", ()

    command = python("-m", "ci.trial", *["--first"] * first, *arguments)
    return Check(name, why, command, TRIAL_LIMIT_S, read)


def _differs(report: Mapping[str, Any], places: Places) -> list[Finding]:
    """What is wrong with a trial: complaints of the oracle, then each party's failure or first difference."""
    name, path, line = report["name"], places.cause.path, places.cause.line
    if report["verdict"] == "bad input":
        return [Finding("schedule", f"{name}: {report['error']}", path, line, name)]
    if report["verdict"] in ("equal", "unknown"):
        return []
    findings = [Finding("vital signs", f"{name}: {complaint}", path, line, name) for complaint in report["complaints"]]
    for party, how in report["parties"].items():
        if how["failures"]:
            told = "\n".join(how["failures"])
            findings.append(Finding("run", f"{name}, {party}: {told}", path, line, name))
        elif how["differences"]:
            told = f"{how['differences']} differences, first {how['first_difference']}"
            findings.append(Finding("bitwise", f"{name}, {party}: {told}", path, line, name))
    return findings or [Finding("bitwise", f"{name}: {report['verdict']}", path, line, name)]


def _lines(done: Completed) -> list[dict[str, Any]]:
    """The JSON objects that a command printed, one a line."""
    return [json.loads(line) for line in done.out.splitlines() if line.startswith("{")]


def _count(findings: Sequence[Finding]) -> int:
    return len({finding.schedule for finding in findings})


def _schedules(names: Sequence[str]) -> str:
    return f"{len(names)} schedule{'s' * (len(names) != 1)}"
