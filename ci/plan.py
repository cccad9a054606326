"""The checks that a change needs, with the schedules each of them takes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ci.change import ScheduleChange
from ci.checks import prove, tests, theorems, trial
from ci.checks.check import Check, Reading
from ci.checks.records import CHANGELOG, added_lines, family
from ci.child.verify import MEGATRON
from ci.golden import COUNTS, Counts, Expansion, read_counts
from ci.history import counts_at
from ci.location import Locator, bounds_in
from ci.process import Completed
from ci.repository import Repository
from ci.selector import Selection

TRAINED = ("dualpipe-P2-M4", "dualpipe-P4-M8", "dualpipev-P2-M4", "1f1b-P2-M4", "zb1p-P4-M8", "torch-zbv-4x8")
"""Schedules to train with when the runtime changes."""
TRAINED_BLOCKING = ("dualpipe-P4-M8",)
_FEW_RANKS, _MOST_RANKS = 4, 8
"""The most ranks of a changed schedule to train with; the second number if no schedule of that name has fewer."""
_LARGE = 20_000
"""Schedules of more characters are proved in a process of their own, so that the others do not wait for them."""
_FEW_FILES = 8
"""Up to this many test files run in one process: more processes take longer to import torch than they save."""


@dataclass(frozen=True)
class Options:
    """How to run.

    ``jobs``: how many checks at a time.  ``first``: stop at the first fault.  ``all``: test refuted schedules too.
    ``tested``: the whole suite has passed on this tree, so the check ``tests`` is skipped.
    """

    jobs: int = 2
    first: bool = False
    all: bool = False
    tested: bool = False


@dataclass(frozen=True)
class Plan:
    """A change, with all that its checks need; ``folder`` is for files that they read and write."""

    repository: Repository
    base: str
    now: Expansion
    schedules: Sequence[ScheduleChange]
    selection: Selection
    locator: Locator
    options: Options
    folder: Path

    def checks(self) -> Iterator[Check]:
        """The checks that the change needs, the quick ones first."""
        needed, locator, first = self.selection.checks, self.locator, self.options.first
        changed = {change.name: change.after for change in self.schedules if change.after is not None}
        to_prove = [name for name, text in changed.items() if len(text) <= _LARGE]
        large = [name for name in changed if name not in to_prove]
        to_train = _to_train(changed, self.now.shown)
        not_tried = [name for name in changed if name not in to_train]
        note = f"changed but not tried: {_short(not_tried)}" if not_tried else ""
        new = f"{len(changed)} schedules changed" if changed else ""
        if "prove" in needed:
            to_prove = [*self.now.shown, *(name for name in to_prove if name not in self.now.shown)]
        if to_prove:
            check = prove.check(self.written(to_prove), _joined(new, needed.get("prove", "")), locator)
            yield check if to_train else _with_note(check, note)
        if large:
            why = f"{len(large)} of {len(changed)} changed schedules are large"
            check = replace(prove.check(self.written(large), why, locator), name="prove, large")
            yield check if to_train else _with_note(check, note)
        if "trial" in needed:
            named = [name for name in TRAINED if name in self.now.shown]
            to_train = [*named, *(name for name in to_train if name not in TRAINED)]
        if to_train:
            why = _joined(new, needed.get("trial", ""))
            yield _with_note(trial.check(self.written(to_train), why, locator, first=first), note)
        if "trial" in needed and (blocking := [name for name in TRAINED_BLOCKING if name in self.now.shown]):
            yield trial.check(self.written(blocking), needed["trial"], locator, blocking=True, first=first)
        if "trial, Megatron" in needed:
            yield trial.check_megatron(tuple(MEGATRON), needed["trial, Megatron"], locator, first)
        if "theorems" in needed:
            yield theorems.check(
                self.recorded(),
                counts_at(self.repository, self.base),
                needed["theorems"],
                locator,
                self.explained(),
                bounds_in(self.repository.root),
            )
        if files := self.selection.tests:
            why = self.selection.everything or f"{len(files)} files of tests reach the change"
            workers = 0 if first or len(files) <= _FEW_FILES else self.options.jobs
            yield tests.check(files, why, self.folder / "tests.xml", workers, first, self.selection.long)

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
        """Whether a new line of the changelog names a theorem."""
        added = added_lines(*self.repository.texts(self.base, CHANGELOG))
        return lambda name: any(name in line for line in added)


def _to_train(changed: Mapping[str, str], shown: Collection[str]) -> list[str]:
    """Which of the changed schedules to train with, the smallest first.

    The shown ones with few ranks.  If a name has none, its smallest; one with a single rank, which sends nothing, only
    if there is no other.
    """
    found = [name for name in changed if name in shown and _ranks(changed[name]) <= _FEW_RANKS]
    for name in sorted(changed, key=lambda name: _ranks(changed[name]) == 1):
        if _ranks(changed[name]) <= _MOST_RANKS and family(name) not in map(family, found):
            found.append(name)
    return found


def _ranks(text: str) -> int:
    return sum(line.startswith("rank ") for line in text.splitlines())


def _joined(*reasons: str) -> str:
    return "; ".join(filter(None, reasons))


def _short(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _with_note(check: Check, note: str) -> Check:
    """The check, with a note added to its summary."""

    def read(done: Completed) -> Reading:
        verdict, summary, findings = check.read(done)
        return verdict, f"{summary}; {note}", findings

    return replace(check, read=read) if note else check
