"""The gate's work: what changed, which checks that asks for, what they say."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

from ci import judges, rules, suite
from ci.change import ScheduleChange
from ci.check import Check, Reading, run_check, skipped
from ci.errors import GateError
from ci.golden import COUNTS, FOLDER, Counts, Expansion, expansion, kept_files, read_counts
from ci.history import counts_at, schedule_changes
from ci.meaning import Meaning, meaning
from ci.outcome import ExitCode, Finding, Outcome, Verdict, exit_code
from ci.place import NOWHERE, TABLES, Place, Places, bounds_in, lines_of_rows
from ci.process import Completed, end_all
from ci.repository import Base, Changed, Repository
from ci.selection import Selection, select
from ci.trial import MEGATRON

TRIED = ("dualpipe-P2-M4", "dualpipe-P4-M8", "dualpipev-P2-M4", "1f1b-P2-M4", "zb1p-P4-M8", "torch-zbv-4x8")
"""Tried on ranks when what executes changes."""
TRIED_BLOCKING = ("dualpipe-P4-M8",)
_SMALL_TRIAL, _LARGEST_TRIAL = 4, 8
"""Ranks of the schedules that are tried, and the most of one that is where of its name no smaller one changed."""
_LARGE = 20_000
"""Characters of a schedule that is proved apart, so that the others are not kept waiting."""
_FROM_WHAT_RUNS = ("dualpipe/", "reference/", "proofs/", "examples/", "ci/", "bench/", "tests/")
_JUDGES = ("ci/", "tests/", "proofs/", "reference/", ".ci/", ".github/")
_OF_SCHEDULES = ("prove", "prove, large", "generator")
"""The checks after whose refusal the tests would say the same again, at length."""
_FEW = 8
"""So many files of tests are run by one process: further ones take longer to start, importing torch, than they save."""

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """How to run: how many checks at a time, whether to stop at the first fault, and to test what is refuted."""

    jobs: int = 2
    first: bool = False
    all: bool = False


@dataclass(frozen=True)
class Judgement:
    """What the gate has to say of a change.

    The outcomes are in the order in which a reader wants them: proofs, trials, theorems, tests, then bookkeeping.
    ``texts`` are the schedules of the tree, by name.
    """

    base: Base
    changed: tuple[Changed, ...]
    schedules: tuple[ScheduleChange, ...]
    selection: Selection
    outcomes: tuple[Outcome, ...]
    seconds: float
    places: Places = field(default=NOWHERE, repr=False)
    texts: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def exit_code(self) -> ExitCode:
        return exit_code(self.outcomes)

    @property
    def judges(self) -> list[str]:
        """What of the change is itself a judge, and so cannot be judged by it: a reader must look there."""
        judges = (change.path for change in self.changed if change.path.startswith(_JUDGES))
        return [path for path in judges if not path.startswith(FOLDER)]  # goldens are held to the generator

    @property
    def findings(self) -> list[tuple[Outcome, Finding]]:
        return [(outcome, finding) for outcome in self.outcomes for finding in outcome.findings]


def judge(root: Path, base: str | None, options: Options, tell: Tell) -> Judgement:
    """Judge the work tree at ``root`` against a base revision.

    Raises ``GateError`` for a base that does not exist and for golden files that cannot be read.
    """
    started = time.monotonic()
    repository = Repository(root)
    resolved = repository.resolve(base)
    revision = resolved.revision
    changed = repository.changes(revision)
    selection = select(repository, changed)
    tell(f"{len(changed)} files differ from {resolved}")
    try:
        now = expansion(root)
    except GateError as error:
        cause = _cause(repository, revision, changed)
        finding = Finding("schedule", str(error), cause.path, cause.line)
        outcome = Outcome("golden", Verdict.REFUSED, "always", "the generator fails", (finding,))
        places = replace(NOWHERE, cause=cause)
        return Judgement(resolved, changed, (), selection, (outcome,), time.monotonic() - started, places)
    schedules = schedule_changes(repository, revision, now)
    places = _places(repository, revision, changed, now)
    bookkeeping = [rules.goldens(now, kept_files(root)), _changelog(repository, revision, schedules)]
    generator = rules.expanded(now)
    for outcome in (*bookkeeping, generator):
        tell(f"{outcome.check}: {outcome.verdict.value}, {outcome.told}")
    with tempfile.TemporaryDirectory(prefix="gate-") as folder:
        case = _Case(repository, revision, now, schedules, selection, places, options, Path(folder))
        checks = list(case.checks())
        quick = [check for check in checks if check.name == "prove"]
        outcomes = [*run_all(quick, root, options, tell, []), generator]
        slow = [check for check in checks if check not in quick]
        outcomes += run_all(slow, root, options, tell, outcomes)
    outcomes += bookkeeping
    seconds = time.monotonic() - started
    return Judgement(resolved, changed, tuple(schedules), selection, tuple(outcomes), seconds, places, now.texts)


def run_all(
    checks: Sequence[Check], root: Path, options: Options, tell: Tell, before: Sequence[Outcome]
) -> list[Outcome]:
    """Run the checks, several at a time; with ``first`` one after the other, and none after a fault.

    ``before`` are the outcomes so far.  Where a schedule is refuted or cannot be expanded, no tests are run unless the
    options ask for all.
    """
    faults = [outcome.check for outcome in before if outcome.is_fault]

    def one(number: int, check: Check) -> Outcome:
        if options.first and faults:
            return skipped(check, f"{faults[0]} has refused already")
        wrong = next((fault for fault in faults if fault in _OF_SCHEDULES), "")
        if check.name == "tests" and wrong and not options.all:
            return skipped(check, f"{wrong} refuses the schedules themselves; --all runs the tests too")
        place = f"[{number}/{len(checks)}] {check.name}"
        tell(f"{place} runs: {check.why}")
        outcome = run_check(check, root)
        faults.extend([outcome.check] * outcome.is_fault)
        tell(f"{place}: {outcome.verdict.value} in {outcome.seconds:.1f} s, {outcome.told}")
        return outcome

    with ThreadPoolExecutor(1 if options.first else options.jobs) as pool:
        try:
            return list(pool.map(one, range(1, len(checks) + 1), checks))
        except BaseException:  # Ctrl-C or a signal: nothing that was started may go on
            pool.shutdown(wait=False, cancel_futures=True)
            end_all()
            raise


@dataclass(frozen=True)
class _Case:
    """One change with all that its checks need."""

    repository: Repository
    base: str
    now: Expansion
    schedules: Sequence[ScheduleChange]
    selection: Selection
    places: Places
    options: Options
    folder: Path

    def checks(self) -> Iterator[Check]:
        """The checks that the change asks for, the quick ones first."""
        selection, places, first = self.selection, self.places, self.options.first
        changed = {change.name: change.after for change in self.schedules if change.after is not None}
        proved = [name for name, text in changed.items() if len(text) <= _LARGE]
        large = [name for name in changed if name not in proved]
        tried = _tried(changed, self.now.shown)
        untried = [name for name in changed if name not in tried]
        untold = f"of those that changed not tried: {_short(untried)}" if untried else ""
        new = f"{len(changed)} schedules changed" if changed else ""
        if selection.prove:
            proved = [*self.now.shown, *(name for name in proved if name not in self.now.shown)]
        if proved:
            check = judges.prove(self.written(proved), _both(new, selection.prove), places)
            yield check if tried else _saying(check, untold)
        if large:
            told = f"{len(large)} of {len(changed)} changed schedules are large"
            check = replace(judges.prove(self.written(large), told, places), name="prove, large")
            yield check if tried else _saying(check, untold)
        if selection.trial:
            tried = [*(name for name in TRIED if name in self.now.shown), *(n for n in tried if n not in TRIED)]
        if tried:
            check = judges.trial(self.written(tried), _both(new, selection.trial), places, first=first)
            yield _saying(check, untold)
        if selection.trial and (blocking := [name for name in TRIED_BLOCKING if name in self.now.shown]):
            yield judges.trial(self.written(blocking), selection.trial, places, blocking=True, first=first)
        if selection.megatron:
            yield judges.trial_on_megatron(tuple(MEGATRON), selection.megatron, places, first)
        if selection.theorems:
            yield judges.theorems(
                self.recorded(),
                counts_at(self.repository, self.base),
                selection.theorems,
                places,
                self.explained(),
                bounds_in(self.repository.root),
            )
        if selection.tests:
            files = list(selection.tests)
            why = selection.everything or f"{len(files)} files of tests reach the change"
            workers = 0 if first or len(files) <= _FEW else self.options.jobs
            yield suite.tests(files, why, self.folder / "tests.xml", workers, first, selection.long)

    def written(self, names: Sequence[str]) -> list[Path]:
        """Files with the texts of schedules."""
        texts = self.now.texts
        files = [self.folder / f"{name}.txt" for name in names]
        for file in files:
            file.write_text(texts[file.stem])
        return files

    def recorded(self) -> Counts:
        return read_counts((self.repository.now(COUNTS) or b"").decode(errors="replace"))

    def explained(self) -> Callable[[str], bool]:
        added = rules.added_lines(*_texts(self.repository, self.base, rules.CHANGELOG))
        return lambda name: any(name in line for line in added)


def _both(*reasons: str) -> str:
    return "; ".join(filter(None, reasons))


def _tried(changed: Mapping[str, str], shown: Collection[str]) -> list[str]:
    """Of the schedules that changed, the smallest first, those to try on ranks.

    The shown ones of few ranks; of a name that has none the smallest, one rank last, as it sends nothing.
    """
    found = [name for name in changed if name in shown and _ranks(changed[name]) <= _SMALL_TRIAL]
    for name in sorted(changed, key=lambda name: _ranks(changed[name]) == 1):
        if _ranks(changed[name]) <= _LARGEST_TRIAL and _plan(name) not in map(_plan, found):
            found.append(name)
    return found


def _plan(name: str) -> str:
    """``dualpipe-lowered`` of ``dualpipe-lowered-P4-M8``."""
    return name.partition("-P")[0]


def _saying(check: Check, words: str) -> Check:
    """The check, with words added to what it tells."""

    def read(done: Completed) -> Reading:
        verdict, told, findings = check.read(done)
        return verdict, f"{told}; {words}", findings

    return replace(check, read=read) if words else check


def _short(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _ranks(text: str | None) -> int:
    return sum(line.startswith("rank ") for line in (text or "").splitlines())


def _changelog(repository: Repository, base: str, schedules: Sequence[ScheduleChange]) -> Outcome:
    return rules.changelog(schedules, *_texts(repository, base, rules.CHANGELOG))


def _texts(repository: Repository, base: str, path: str) -> tuple[str, str]:
    before, after = repository.at(base, path), repository.now(path)
    return (before or b"").decode(errors="replace"), (after or b"").decode(errors="replace")


def _cause(repository: Repository, base: str, changed: Sequence[Changed]) -> Place:
    """Where the change begins: its first source that says something else than before, what runs before what tests."""
    there = [change for change in changed if change.after is not None] or list(changed)
    if not there:
        return NOWHERE.cause
    first = min(there, key=lambda change: (*_says_nothing_new(change), _nearness(change.path), change.path)).path
    return Place(first, repository.changed_lines(base, first)[0])


def _says_nothing_new(change: Changed) -> tuple[bool, bool]:
    if not change.path.endswith(".py"):
        return True, False
    known = change.before is not None and change.after is not None
    return False, known and meaning(change.before or b"", change.after or b"") is Meaning.NOTHING


def _nearness(path: str) -> int:
    """How near to what runs a file is, by its folder."""
    return next((at for at, folder in enumerate(_FROM_WHAT_RUNS) if path.startswith(folder)), len(_FROM_WHAT_RUNS))


def _places(repository: Repository, base: str, changed: Sequence[Changed], now: Expansion) -> Places:
    touched = any(change.path == TABLES for change in changed)
    lines = lines_of_rows((repository.now(TABLES) or b"").decode(errors="replace"))
    return Places(
        now.rows,
        lines,
        frozenset(repository.changed_lines(base, TABLES) if touched else ()),
        _cause(repository, base, changed),
    )
