"""The tests of a source, run on a mutant in a copy of the tree."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ci.errors import GateError
from ci.mutants.mutation import Mutant
from ci.process import Completed, python, run
from ci.repository import Repository

TESTS = {
    "dualpipe/": ("tests/schedule", "tests/proofs/test_checks.py", "tests/pictures"),
    "dualpipe/cli/": ("tests/cli", "tests/docs/test_snippets.py"),
    "dualpipe/megatron/": ("tests/megatron",),
    "dualpipe/record/": ("tests/record",),
    "dualpipe/testing/": ("tests/record",),
    "dualpipe/testing/launch.py": ("tests/production/test_launch.py",),
    "dualpipe/page/": ("tests/page",),
    "proofs/": ("tests/proofs", "tests/soundness"),
    "proofs/theorems/": ("tests/proofs/theorems",),
    "dualpipe/cli/proving.py": ("tests/cli",),
    "reference/": ("tests/reference", "tests/production", "tests/cli/test_verify.py"),
    "reference/measured.py": ("tests/pictures",),
    "reference/stopwatch.py": ("tests/pictures",),
    "reference/megatron/": ("tests/megatron", "tests/cli/test_verify_megatron.py"),
} | {
    f"dualpipe/{name}.py": ("tests/production", "tests/reference/test_faults.py")
    for name in ("comm", "deepseek", "execute", "modules", "pipeline", "replicas", "transport", "utils", "weightgrad")
}
"""The tests of a source: those of the longest path here that it begins with.  pytest runs them in this order."""

BASELINE_LIMIT_S = 1800.0
LEAST_LIMIT_S = 60.0
_SLOWER = 4.0
"""The time limit of a mutant: so many times what its tests take without it, and no less than the one above."""


@dataclass
class Suite:
    """Tests that run together, and the seconds that they take when nothing is wrong."""

    tests: tuple[str, ...]
    seconds: float
    least: float = LEAST_LIMIT_S

    @property
    def limit(self) -> float:
        return max(self.least, _SLOWER * self.seconds)


@dataclass(frozen=True)
class Trial:
    """What became of a mutant: ``caught``, ``survived`` or ``timed out``; a test that hangs has noticed it."""

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


def chosen_tests(path: str) -> tuple[str, ...]:
    return TESTS[max((prefix for prefix in TESTS if path.startswith(prefix)), key=len)]


def copy_tree(root: Path, folder: Path) -> list[str]:
    """Copy the files of a work tree, those not yet committed too; returns their paths.

    No mutant is ever written into the work tree itself, so none is left there however the run ends.
    """
    paths = [path for path in Repository(root).files() if (root / path).is_file()]
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(root / path, folder / path)
    return paths


@dataclass
class Court:
    """Tries mutants in ``folder``, a copy of the tree; ``tests`` replaces the table ``TESTS`` for every source."""

    folder: Path
    tests: tuple[str, ...] = ()
    suites: dict[tuple[str, ...], Suite] = field(default_factory=dict)

    def try_one(self, mutant: Mutant) -> Trial:
        """Run the tests of the mutant's source on it.  Raises ``GateError`` if they fail without it."""
        suite = self._suite(self.tests or chosen_tests(mutant.path))
        file = self.folder / mutant.path
        original = file.read_text()
        file.write_text(mutant.source)
        try:
            ended = self._pytest(suite.tests, suite.limit)
        finally:
            file.write_text(original)
        outcome = "timed out" if ended.code is None else "survived" if ended.code == 0 else "caught"
        return Trial(mutant, outcome, mutant.diff(original), ended.seconds)

    def _suite(self, tests: tuple[str, ...]) -> Suite:
        if tests not in self.suites:
            ended = self._pytest(tests, BASELINE_LIMIT_S)
            if ended.code != 0:
                raise GateError(
                    "the tests pass before anything is mutated",
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
