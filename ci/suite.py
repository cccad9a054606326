"""The selected tests as a check: pytest, read from its own report."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path

from ci.check import Check, Reading, crashed
from ci.outcome import Finding, Verdict
from ci.process import Completed, python

LIMIT_S, LONG_LIMIT_S = 900.0, 1800.0
_NOTHING_COLLECTED = 5  # pytest's exit code
_MOST_SAID, _MOST_TRACED = 2000, 4000
"""Characters of a failed test's error, from its beginning, and of the trace, from its end."""


def tests(files: Sequence[str], why: str, report: Path, workers: int, first: bool, long: Sequence[str]) -> Check:
    """Run test files in the order given; ``first`` stops at the first failure, ``report`` is written by pytest.

    The tests marked ``long`` are left out, and counted, but for those of the files ``long``.
    """
    left = report.with_suffix(".long")

    def read(done: Completed) -> Reading:
        not_run = _not_run(int(left.read_text()) if left.exists() else 0)
        if done.code == _NOTHING_COLLECTED and not not_run:
            return Verdict.UNKNOWN, "no answer: the selected files have no test", ()
        if done.code == _NOTHING_COLLECTED:
            return Verdict.SKIPPED, f"none of the selected files has a test that is not long{not_run}", ()
        passed, skipped, findings = read_report(report.read_text())
        told = f"{passed} passed, {len(findings)} failed, {skipped} skipped{not_run}"
        if findings:
            return Verdict.REFUSED, told, tuple(findings)
        if done.code != 0:
            return crashed(done)
        return (Verdict.PASSED if passed else Verdict.SKIPPED), told, ()

    options = ["-q", "--tb=short", "-p", "no:cacheprovider", "-o", "junit_family=xunit1", f"--junitxml={report}"]
    options += ["-p", "ci.long", f"--long-left={left}", *(f"--long-of={file}" for file in long)]
    options += ["-n", str(workers)] if workers else ["-p", "no:xdist"]
    options += ["-x"] if first else []
    limit = LONG_LIMIT_S if long else LIMIT_S
    return Check("tests", why, python("-m", "pytest", *options, *files), limit, read)


def _not_run(long: int) -> str:
    return f", {long} long test{'s' * (long > 1)} not run" if long else ""


def read_report(text: str) -> tuple[int, int, list[Finding]]:
    """How many tests passed and were skipped, and the failures, of a JUnit report."""
    passed = skipped = 0
    findings = []
    for case in ET.fromstring(text).iter("testcase"):
        failure = next((found for found in case if found.tag in ("failure", "error")), None)
        if failure is not None:
            findings.append(_failed(case, failure))
        elif case.find("skipped") is not None:
            skipped += 1
        else:
            passed += 1
    return passed, skipped, findings


def _failed(case: ET.Element, failure: ET.Element) -> Finding:
    path = case.get("file") or case.get("classname", "").replace(".", "/") + ".py"
    said = failure.get("message", "").strip() or "failed"
    trace = (failure.text or "").strip()
    message = f"{case.get('name')}: {said[:_MOST_SAID]}\n\n{trace[-_MOST_TRACED:]}"
    return Finding("test", message, path, int(case.get("line") or 0) + 1)
