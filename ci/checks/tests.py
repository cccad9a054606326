"""The check ``tests``: pytest on the selected files, read from its own report.

pytest also loads this module, as a plugin that leaves out the tests marked ``long`` and counts them.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ci.checks.check import Check, Reading, no_answer
from ci.process import Completed, python
from ci.result import Finding, Verdict

if TYPE_CHECKING:
    import pytest

LIMIT_S, LONG_LIMIT_S = 900.0, 1800.0
_NOTHING_COLLECTED = 5  # pytest's exit code
_MESSAGE, _TRACE = 2000, 4000
"""Characters of a failed test's error, from its beginning, and of its trace, from its end."""


def check(files: Sequence[str], why: str, report: Path, workers: int, first: bool, long: Sequence[str]) -> Check:
    """Run tests in the given order; ``first`` stops at the first failure, pytest writes ``report``.

    The tests marked ``long`` are left out and counted, except those of the files ``long``.
    """
    left_out = report.with_suffix(".long")

    def read(done: Completed) -> Reading:
        not_run = _not_run(int(left_out.read_text()) if left_out.exists() else 0)
        if done.code == _NOTHING_COLLECTED and not not_run:
            return Verdict.UNKNOWN, "no answer: the selected files have no test", ()
        if done.code == _NOTHING_COLLECTED:
            return Verdict.SKIPPED, f"none of the selected files has a test that is not long{not_run}", ()
        passed, skipped, findings = read_report(report.read_text())
        summary = f"{passed} passed, {len(findings)} failed, {skipped} skipped{not_run}"
        if findings:
            return Verdict.REFUSED, summary, tuple(findings)
        if done.code != 0:
            return no_answer(done)
        return (Verdict.PASSED if passed else Verdict.SKIPPED), summary, ()

    options = ["-q", "--tb=short", "-p", "no:cacheprovider", "-o", "junit_family=xunit1", f"--junitxml={report}"]
    options += ["-p", __name__, f"--long-left={left_out}", *(f"--long-of={file}" for file in long)]
    options += ["-n", str(workers), "--dist", "loadfile"] if workers else ["-p", "no:xdist"]
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
        failure = next((child for child in case if child.tag in ("failure", "error")), None)
        if failure is not None:
            findings.append(_failed(case, failure))
        elif case.find("skipped") is not None:
            skipped += 1
        else:
            passed += 1
    return passed, skipped, findings


def _failed(case: ET.Element, failure: ET.Element) -> Finding:
    path = case.get("file") or case.get("classname", "").replace(".", "/") + ".py"
    error = failure.get("message", "").strip() or "failed"
    trace = (failure.text or "").strip()
    message = f"{case.get('name')}: {error[:_MESSAGE]}\n\n{trace[-_TRACE:]}"
    return Finding("test", message, path, int(case.get("line") or 0) + 1)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("gate")
    group.addoption("--long-of", action="append", default=[], metavar="FILE", help="run the long tests of this file")
    group.addoption("--long-left", metavar="FILE", help="write there how many long tests are not run")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted = {(config.rootpath / file).resolve() for file in config.getoption("--long-of")}
    left_out = [item for item in items if item.get_closest_marker("long") and item.path.resolve() not in wanted]
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=left_out)
    Path(config.getoption("--long-left")).write_text(str(len(left_out)))
