"""Which checks and tests a change needs, by the table of path prefixes in ``ci.selection``.

The row with the longest prefix of a changed path decides.  A file without a row needs everything, as does a change to
the gate itself, to the build or to a file's mode, and the deletion of a file.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import assert_never

from ci.extent import Extent
from ci.faults.collection import PLANTED
from ci.golden import COUNTS, is_golden_schedule
from ci.repository import Changed
from ci.selection import CHECKS, OWN, ROWS, TABLES, Row

ARCHITECTURE = "tests/test_architecture.py"
"""Reads every source; needed by all of them and so not in the table."""
FAULTS_FIT = "tests/ci/test_faults.py::test_a_planted_fault_finds_the_text_that_it_replaces_and_leaves_python"
WITH_FAULTS = frozenset(edit.path for fault in PLANTED for edit in fault.plant.edits)
"""Files in which faults are planted.  Each needs ``FAULTS_FIT``, even for a comment: the replaced text may have one."""


@dataclass(frozen=True)
class Selection:
    """The checks and tests to run.

    Parameters
    ----------
    checks:
        Names of ``CHECKS``, each with the reason.
    tests:
        Files of tests and single tests, in the order in which they run.
    long:
        Files of tests that changed themselves: their tests marked ``long`` run too.
    everything:
        Why everything runs; empty if not everything does.
    """

    checks: Mapping[str, str] = field(default_factory=dict)
    tests: tuple[str, ...] = ()
    long: tuple[str, ...] = ()
    everything: str = ""


def select(files: Sequence[str], changed: Sequence[Changed]) -> Selection:
    """The checks and tests that a change needs, in a tree with these files."""
    tests = tuple(filter(is_test, files))
    remaining = (change for change in changed if is_test(change.path) and change.after is not None)
    long = tuple(change.path for change in remaining if change.extent is not Extent.LAYOUT)
    if everything := next(filter(None, map(_why_everything, changed)), ""):
        return Selection(dict.fromkeys(CHECKS, everything), tests, long, everything)
    checks: dict[str, str] = {}
    near: list[str] = []
    far: list[str] = []
    for change in changed:
        row = row_of(change)
        checks |= {check: f"{change.path} changed" for check in row.checks if check not in checks}
        near += [test for entry in row.near for test in _expanded(entry, change.path, tests)]
        near += [FAULTS_FIT] * (change.path in WITH_FAULTS)
        near += [ARCHITECTURE] * (change.path.endswith(".py") and row != Row())
        far += [test for entry in row.far for test in _expanded(entry, change.path, tests)]
    return Selection(checks, _distinct([*near, *far], tests), long)


def row_of(change: Changed) -> Row:
    """The row of a change.  Raises ``KeyError`` if its path has none."""
    if change.path == COUNTS:
        return Row(("theorems",))
    if is_golden_schedule(change.path):
        return Row((), ("tests/schedule",))
    row = Row((), (change.path,)) if is_test(change.path) and change.path not in ROWS else row_of_path(change.path)
    match change.extent:
        case Extent.LAYOUT:
            return Row()
        case Extent.TABLES:
            return TABLES
        case Extent.CODE:
            return row
        case never:
            assert_never(never)


def row_of_path(path: str) -> Row:
    """The row with the longest prefix of a path.  Raises ``KeyError`` if there is none."""
    return ROWS[max((prefix for prefix in ROWS if path.startswith(prefix)), key=len, default="")]


def is_test(path: str) -> bool:
    return path.startswith("tests/") and PurePosixPath(path).name.startswith("test_") and path.endswith(".py")


def _why_everything(change: Changed) -> str:
    """Why a change needs everything; empty if it does not."""
    if change.path.startswith(OWN):
        return f"{change.path} is the gate's own, or decides what everything runs on"
    if change.mode:
        return f"{change.path} changes its mode, {change.mode}"
    try:
        row_of(change)
    except KeyError:
        return f"{change.path} has no row in ci/selection.py"
    if change.after is None and not is_golden_schedule(change.path):
        return f"{change.path} is deleted"
    return ""


def _expanded(entry: str, changed: str, tests: Sequence[str]) -> list[str]:
    """The tests of an entry of a row; in a folder the test named like the changed file comes first."""
    if entry.endswith(".py") or "::" in entry:
        return [entry.format(page=changed)]
    found = [path for path in tests if path.startswith(f"{entry}/")]
    return sorted(found, key=lambda path: PurePosixPath(path).name != f"test_{PurePosixPath(changed).stem}.py")


def _distinct(selected: Sequence[str], tests: Collection[str]) -> tuple[str, ...]:
    """The selected tests that exist, each once, and without single tests of files that run as a whole."""
    existing = dict.fromkeys(test for test in selected if test.partition("::")[0] in tests)
    return tuple(test for test in existing if "::" not in test or test.partition("::")[0] not in existing)
