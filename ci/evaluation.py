"""The gate's work: find what changed, run the checks it needs, and collect what they find."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from ci import GateError
from ci.change import ScheduleChange
from ci.checks import records
from ci.checks.check import Check, run_check, skipped
from ci.extent import Extent
from ci.golden import FOLDER, Expansion, expansion, kept_files
from ci.history import schedule_changes
from ci.location import NOWHERE, TABLES, Location, Locator, lines_of_rows
from ci.plan import Options, Plan
from ci.process import end_all
from ci.repository import Base, Changed, Repository
from ci.result import CheckResult, ExitCode, Finding, Verdict, exit_code
from ci.selector import Selection, select

_CHECKING = ("ci/", "tests/", "proofs/", "reference/", ".ci/", ".github/")
"""The folders whose code checks the rest; a change there may weaken the checks of itself."""
_RUNTIME_FIRST = ("dualpipe/", "reference/", "proofs/", "examples/", "ci/", "bench/", "tests/")
_OF_SCHEDULES = ("prove", "prove, large", "generator")
"""If one of these checks refuses, the tests would report the same faults again, at greater length."""

Progress = Callable[[str], None]
"""Takes a line about the progress of the checks."""


@dataclass(frozen=True)
class Evaluation:
    """What the gate has found about a change.

    The results are in the order of the reports: proofs, trials, theorems, tests, then bookkeeping.  ``texts`` are the
    schedules of the tree, by name.
    """

    base: Base
    changed: tuple[Changed, ...]
    schedules: tuple[ScheduleChange, ...]
    selection: Selection
    results: tuple[CheckResult, ...]
    seconds: float
    cause: Location = NOWHERE
    texts: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def exit_code(self) -> ExitCode:
        return exit_code(self.results)

    @property
    def checking(self) -> list[str]:
        """The changed files whose code checks the rest.  The gate runs their new code, so a person must read them."""
        paths = (change.path for change in self.changed if change.path.startswith(_CHECKING))
        return [path for path in paths if not path.startswith(FOLDER)]  # goldens are compared with the generator

    @property
    def findings(self) -> list[tuple[CheckResult, Finding]]:
        return [(result, finding) for result in self.results for finding in result.findings]


def evaluate(root: Path, base: str | None, options: Options, progress: Progress) -> Evaluation:
    """Evaluate the work tree at ``root`` against a base revision.

    Raises ``GateError`` for a base that does not exist and for golden files that cannot be read.
    """
    started = time.monotonic()
    repository = Repository(root)
    resolved = repository.resolve(base)
    revision = resolved.revision
    changed = repository.changes(revision)
    selection = select(repository.files(), changed)
    cause = find_cause(repository, revision, changed)
    progress(f"{len(changed)} files differ from {resolved}")
    try:
        now = expansion(root)
    except GateError as error:
        finding = Finding("schedule", str(error), cause.path, cause.line)
        failed = CheckResult("golden", Verdict.REFUSED, "always", "the generator fails", (finding,))
        return Evaluation(resolved, changed, (), selection, (failed,), time.monotonic() - started, cause)
    schedules = schedule_changes(repository, revision, now)
    bookkeeping = [
        records.check_goldens(now, kept_files(root)),
        records.check_changelog(schedules, *repository.texts(revision, records.CHANGELOG)),
    ]
    generator = records.check_generator(now)
    for result in (*bookkeeping, generator):
        progress(f"{result.check}: {result.verdict.value}, {result.summary}")
    with tempfile.TemporaryDirectory(prefix="gate-") as folder:
        locator = _locator(repository, revision, changed, now, cause)
        plan = Plan(repository, revision, now, schedules, selection, locator, options, Path(folder))
        checks = list(plan.checks())
        quick = [check for check in checks if check.name == "prove"]
        results = [*run_all(quick, root, options, progress, []), generator]
        slow = [check for check in checks if check not in quick]
        results += run_all(slow, root, options, progress, results)
    results += bookkeeping
    seconds = time.monotonic() - started
    return Evaluation(resolved, changed, tuple(schedules), selection, tuple(results), seconds, cause, now.texts)


def run_all(
    checks: Sequence[Check], root: Path, options: Options, progress: Progress, before: Sequence[CheckResult]
) -> list[CheckResult]:
    """Run the checks, several at a time; with ``first`` one at a time, until one finds a fault.

    ``before`` are the results so far.  After a schedule was refuted or could not be expanded, the tests run only with
    the option ``all``.
    """
    faults = [result.check for result in before if result.is_fault]

    def run_one(number: int, check: Check) -> CheckResult:
        if options.first and faults:
            return skipped(check, f"{faults[0]} has refused already")
        if check.name == "tests" and options.tested:
            return skipped(check, "the whole suite has passed on this tree, as --tested says")
        wrong = next((fault for fault in faults if fault in _OF_SCHEDULES), "")
        if check.name == "tests" and wrong and not options.all:
            return skipped(check, f"{wrong} refuses the schedules themselves; --all runs the tests too")
        label = f"[{number}/{len(checks)}] {check.name}"
        progress(f"{label} runs: {check.why}")
        result = run_check(check, root)
        faults.extend([result.check] * result.is_fault)
        progress(f"{label}: {result.verdict.value} in {result.seconds:.1f} s, {result.summary}")
        return result

    with ThreadPoolExecutor(1 if options.first else options.jobs) as pool:
        try:
            return list(pool.map(run_one, range(1, len(checks) + 1), checks))
        except BaseException:  # Ctrl-C or a signal: end everything that was started
            pool.shutdown(wait=False, cancel_futures=True)
            end_all()
            raise


def find_cause(repository: Repository, base: str, changed: Sequence[Changed]) -> Location:
    """The location for findings that have none: the first changed line of the most important changed source.

    Sources of the runtime come before tests.  A file in which only comments changed is used if there is no other.
    """
    candidates = [change for change in changed if change.after is not None] or list(changed)
    if not candidates:
        return NOWHERE
    first = min(candidates, key=lambda change: (*_changes_little(change), _nearness(change.path), change.path)).path
    return Location(first, repository.changed_lines(base, first)[0])


def _changes_little(change: Changed) -> tuple[bool, bool]:
    return not change.path.endswith(".py"), change.extent is Extent.LAYOUT


def _nearness(path: str) -> int:
    """The place of the file's folder in ``_RUNTIME_FIRST``."""
    folders = enumerate(_RUNTIME_FIRST)
    return next((at for at, folder in folders if path.startswith(folder)), len(_RUNTIME_FIRST))


def _locator(repository: Repository, base: str, changed: Sequence[Changed], now: Expansion, cause: Location) -> Locator:
    touched = any(change.path == TABLES for change in changed)
    lines = lines_of_rows((repository.now(TABLES) or b"").decode(errors="replace"))
    return Locator(now.rows, lines, frozenset(repository.changed_lines(base, TABLES) if touched else ()), cause)
