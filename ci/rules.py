"""The rules that need no process: goldens are what the generator gives, a schedule change has its changelog entry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest

from ci.change import ScheduleChange, named_in
from ci.golden import Expansion
from ci.outcome import Finding, Outcome, Verdict

CHANGELOG = "CHANGELOG.md"
GENERATOR = "dualpipe/schedule/generate.py"


def goldens(expected: Expansion, kept: Mapping[str, str]) -> Outcome:
    """Whether the golden files are what the generator gives; ``kept`` are those of the tree, by path."""
    files = expected.files(kept)
    findings = []
    for path in sorted({*files, *kept}):
        one, other = kept.get(path), files.get(path)
        if one == other:
            continue
        if one is None:
            told = f"{path} is missing; run make golden"
        elif other is None:
            told = f"{path} is of a schedule that is no longer there; run make golden"
        else:
            told = f"{path} is not what the generator gives; run make golden, and look at what it changes"
        findings.append(Finding("golden", told, path, _first_difference(one or "", other or "")))
    verdict = Verdict.REFUSED if findings else Verdict.PASSED
    told = f"{len(findings)} of {len(files)} lag behind" if findings else f"{len(files)} files are up to date"
    return Outcome("golden", verdict, "always", told, tuple(findings))


def expanded(now: Expansion) -> Outcome:
    """Whether the tree's own code gives every schedule of the golden sizes."""
    findings = [Finding("schedule", f"{name}: {error}", GENERATOR, 1, name) for name, error in now.failed.items()]
    if not now.texts and not findings:
        findings = [Finding("schedule", "the generator gives no schedule at all", GENERATOR)]
    verdict = Verdict.REFUSED if findings else Verdict.PASSED
    told = f"{len(findings)} cannot be expanded" if findings else f"{len(now.texts)} schedules expanded"
    return Outcome("generator", verdict, "always", told, tuple(findings))


def changelog(changes: Sequence[ScheduleChange], before: str, after: str) -> Outcome:
    """Whether each named schedule that changed is named, with a size, in a new entry, or its diff shown there."""
    why = "always"
    if not changes:
        return Outcome("changelog", Verdict.PASSED, why, "no schedule changed, so no entry is asked for")
    added = "\n".join(added_lines(before, after))
    findings = []
    families: dict[str, list[ScheduleChange]] = {}
    plain = {family(change.name) for change in changes}
    for change in changes:
        name = family(change.name)
        derived_from = name.removesuffix("-lowered")  # its computes are those of the schedule itself
        families.setdefault(derived_from if derived_from in plain else name, []).append(change)
    for name, changed in families.items():
        if not any(named_in(change, added) for change in changed):
            smallest = changed[0]
            told = (
                f"{name} changed and {CHANGELOG} has no new entry that names it with one of the {len(changed)} sizes; "
                f"write one that says why, such as:\n- {smallest.name}: ...\n\n"
            )
            told += "\n".join(f"      {line}" for line in smallest.diff)
            findings.append(Finding("changelog", told, CHANGELOG, 1, smallest.name))
    verdict = Verdict.REFUSED if findings else Verdict.PASSED
    told = (
        f"{len(findings)} of {len(families)} schedules have no entry" if findings else "the changed schedules are named"
    )
    return Outcome("changelog", verdict, why, told, tuple(findings))


def family(name: str) -> str:
    """``dualpipe-lowered-P4-M8`` is of the family ``dualpipe-lowered``."""
    return name.partition("-P")[0]


def added_lines(before: str, after: str) -> list[str]:
    """The lines of a text that it did not have before."""
    had = set(before.splitlines())
    return [line for line in after.splitlines() if line not in had]


def _first_difference(one: str, other: str) -> int:
    pairs = zip_longest(one.splitlines(), other.splitlines())
    return next((number for number, (a, b) in enumerate(pairs, start=1) if a != b), 1)
