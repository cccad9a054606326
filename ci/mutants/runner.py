"""Runs the tests of a source on its mutants, in a copy of the tree."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ci import GateError
from ci.mutants.mutation import Mutant
from ci.process import Completed, python, run
from ci.repository import Repository
from ci.selector import row_of_path

BASELINE_LIMIT_S = 1800.0
LEAST_LIMIT_S = 60.0
_SLOWER = 4.0
"""The time limit of a mutant is this many times the time that its tests take without it, and at least the one above."""


@dataclass
class Suite:
    """Tests that run together, and the seconds they take without a mutant."""

    tests: tuple[str, ...]
    seconds: float
    least: float = LEAST_LIMIT_S

    @property
    def limit(self) -> float:
        return max(self.least, _SLOWER * self.seconds)


@dataclass(frozen=True)
class MutantResult:
    """The outcome of a mutant: ``caught``, ``survived`` or ``timed out``, which means that a test hung."""

    mutant: Mutant
    outcome: str
    diff: str
    seconds: float

    def as_json(self) -> dict[str, Any]:
        return {
            "file": self.mutant.path,
            "line": self.mutant.line,
            "operator": self.mutant.operator,
            "outcome": self.outcome,
            "diff": self.diff,
            "seconds": round(self.seconds, 1),
        }


def near_tests(path: str) -> tuple[str, ...]:
    """The tests of a source: those near it in the table of the gate.  pytest runs them in this order."""
    return row_of_path(path).near


def copy_tree(root: Path, folder: Path) -> list[str]:
    """Copy the files of a work tree, including uncommitted ones.  Returns their paths.

    Mutants are written into the copy only, so that none can be left in the work tree.
    """
    paths = [path for path in Repository(root).files() if (root / path).is_file()]
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(root / path, folder / path)
    return paths


@dataclass
class Runner:
    """Runs mutants in ``folder``, a copy of the tree; ``tests`` replaces the tests of every source."""

    folder: Path
    tests: tuple[str, ...] = ()
    suites: dict[tuple[str, ...], Suite] = field(default_factory=dict)

    def run(self, mutant: Mutant) -> MutantResult:
        """Run the tests of the mutant's source on it.  Raises ``GateError`` if they fail without it."""
        suite = self._suite(self.tests or near_tests(mutant.path))
        file = self.folder / mutant.path
        original = file.read_text()
        file.write_text(mutant.source)
        try:
            ended = self._pytest(suite.tests, suite.limit)
        finally:
            file.write_text(original)
        outcome = "timed out" if ended.code is None else "survived" if ended.code == 0 else "caught"
        return MutantResult(mutant, outcome, mutant.diff(original), ended.seconds)

    def _suite(self, tests: tuple[str, ...]) -> Suite:
        if tests not in self.suites:
            ended = self._pytest(tests, BASELINE_LIMIT_S)
            if ended.code != 0:
                raise GateError(
                    "the tests must pass before anything is mutated",
                    f"pytest {' '.join(tests)} ends with {ended.code}:\n{_end_of(ended)}",
                    "fix them first",
                )
            self.suites[tests] = Suite(tests, ended.seconds)
        return self.suites[tests]

    def _pytest(self, tests: Iterable[str], limit: float) -> Completed:
        options = ("-x", "-q", "-m", "not long", "-p", "no:cacheprovider", "-o", "faulthandler_timeout=0")
        return run(python("-m", "pytest", *options, *tests), self.folder, limit)


def _end_of(ended: Completed) -> str:
    return "\n".join((ended.out + ended.err).splitlines()[-15:])
