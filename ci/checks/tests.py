"""The check ``tests``: runs pytest on the selected files and reads the JUnit report that pytest writes.

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
"""How much of a failed test is kept: the first characters of its error, and the last ones of its trace."""


def check(
    files: Sequence[str], why: str, report: Path, workers: int, stop_at_failure: bool, with_long: Sequence[str]
) -> Check:
    """The check that runs the tests of ``files`` in the given order.

    pytest writes its report to ``report``.  Tests marked ``long`` are left out and counted, except in the files
    ``with_long``.  With ``stop_at_failure`` the run ends at the first test that fails.
    """
    count_file = report.with_suffix(".long")

    def read(done: Completed) -> Reading:
        not_run = _not_run(int(count_file.read_text()) if count_file.exists() else 0)
        if done.code == _NOTHING_COLLECTED and not not_run:
            return Verdict.UNKNOWN, "no answer: the selected files have no test", ()
        if done.code == _NOTHING_COLLECTED:
            return Verdict.SKIPPED, f"all tests of the selected files are long{not_run}", ()
        passed, skipped, findings = read_report(report.read_text())
        summary = f"{passed} passed, {len(findings)} failed, {skipped} skipped{not_run}"
        if findings:
            return Verdict.REFUSED, summary, tuple(findings)
        if done.code != 0:
            return no_answer(done)
        return (Verdict.PASSED if passed else Verdict.SKIPPED), summary, ()

    options = ["-q", "--tb=short", "-p", "no:cacheprovider", "-o", "junit_family=xunit1", f"--junitxml={report}"]
    options += ["-p", __name__, f"--long-count={count_file}", *(f"--with-long={file}" for file in with_long)]
    options += ["-n", str(workers), "--dist", "loadfile"] if workers else ["-p", "no:xdist"]
    options += ["-x"] if stop_at_failure else []
    limit = LONG_LIMIT_S if with_long else LIMIT_S
    return Check("tests", why, python("-m", "pytest", *options, *files), limit, read)


def _not_run(count: int) -> str:
    return f", {count} long test{'s' * (count > 1)} not run" if count else ""


def read_report(text: str) -> tuple[int, int, list[Finding]]:
    """What a JUnit report says: the number of passed tests, that of skipped ones, and the failures."""
    passed = skipped = 0
    findings = []
    for case in ET.fromstring(text).iter("testcase"):
        failure = next((child for child in case if child.tag in ("failure", "error")), None)
        if failure is not None:
            findings.append(_finding(case, failure))
        elif case.find("skipped") is not None:
            skipped += 1
        else:
            passed += 1
    return passed, skipped, findings


def _finding(case: ET.Element, failure: ET.Element) -> Finding:
    path = case.get("file") or case.get("classname", "").replace(".", "/") + ".py"
    error = failure.get("message", "").strip() or "failed"
    trace = (failure.text or "").strip()
    message = f"{case.get('name')}: {error[:_MESSAGE]}\n\n{trace[-_TRACE:]}"
    return Finding("test", message, path, int(case.get("line") or 0) + 1)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("gate")
    group.addoption("--with-long", action="append", default=[], metavar="FILE", help="also run this file's long tests")
    group.addoption("--long-count", metavar="FILE", help="write the number of long tests that do not run to this file")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted = {(config.rootpath / file).resolve() for file in config.getoption("--with-long")}
    left_out = [item for item in items if item.get_closest_marker("long") and item.path.resolve() not in wanted]
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=left_out)
    Path(config.getoption("--long-count")).write_text(str(len(left_out)))
