"""The checks that need no process: the goldens, the generator, and the changelog entry of a changed schedule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest

from ci.change import ScheduleChange, named_in
from ci.golden import Expansion
from ci.result import CheckResult, Finding, Verdict

CHANGELOG = "CHANGELOG.md"
GENERATOR = "dualpipe/schedule/generate.py"


def check_goldens(expected: Expansion, kept: Mapping[str, str]) -> CheckResult:
    """Whether the golden files are what the generator gives; ``kept`` are those of the tree, by path."""
    files = expected.files(kept)
    findings = []
    for path in sorted({*files, *kept}):
        have, want = kept.get(path), files.get(path)
        if have == want:
            continue
        if have is None:
            message = f"{path} is missing; run make golden"
        elif want is None:
            message = f"{path} belongs to a schedule that no longer exists; run make golden"
        else:
            message = f"{path} is not what the generator gives; run make golden, and look at what it changes"
        findings.append(Finding("golden", message, path, _first_difference(have or "", want or "")))
    summary = f"{len(findings)} of {len(files)} lag behind" if findings else f"{len(files)} files are up to date"
    return _result("golden", summary, findings)


def check_generator(now: Expansion) -> CheckResult:
    """Whether the tree's own code gives every schedule of the golden sizes."""
    findings = [Finding("schedule", f"{name}: {error}", GENERATOR, 1, name) for name, error in now.failed.items()]
    if not now.texts and not findings:
        findings = [Finding("schedule", "the generator gives no schedule at all", GENERATOR)]
    summary = f"{len(findings)} cannot be expanded" if findings else f"{len(now.texts)} schedules expanded"
    return _result("generator", summary, findings)


def check_changelog(changes: Sequence[ScheduleChange], before: str, after: str) -> CheckResult:
    """Whether a new entry names each changed schedule with a size, or shows its diff."""
    if not changes:
        return _result("changelog", "no schedule changed, so no entry is needed", [])
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
            message = (
                f"{name} changed and {CHANGELOG} has no new entry that names it with one of the {len(changed)} sizes; "
                f"write one that says why, such as:\n- {smallest.name}: ...\n\n"
            )
            message += "\n".join(f"      {line}" for line in smallest.diff)
            findings.append(Finding("changelog", message, CHANGELOG, 1, smallest.name))
    missing = f"{len(findings)} of {len(families)} schedules have no entry"
    return _result("changelog", missing if findings else "the changed schedules are named", findings)


def _result(check: str, summary: str, findings: Sequence[Finding]) -> CheckResult:
    verdict = Verdict.REFUSED if findings else Verdict.PASSED
    return CheckResult(check, verdict, "always", summary, tuple(findings))


def family(name: str) -> str:
    """``dualpipe-lowered-P4-M8`` belongs to the family ``dualpipe-lowered``."""
    return name.partition("-P")[0]


def added_lines(before: str, after: str) -> list[str]:
    """The lines of a text that it did not have before."""
    had = set(before.splitlines())
    return [line for line in after.splitlines() if line not in had]


def _first_difference(one: str, other: str) -> int:
    pairs = zip_longest(one.splitlines(), other.splitlines())
    return next((number for number, (a, b) in enumerate(pairs, start=1) if a != b), 1)
