"""The schedules of the base, from its golden files, or from its own generator if these do not have them."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ci import GateError
from ci.change import ScheduleChange, changes
from ci.golden import COUNTS, DIGESTS, Counts, Expansion, digest, expansion, path_of, read_counts, read_digests
from ci.process import python, run
from ci.repository import Repository

MEASURE_LIMIT_S = 60.0


def schedule_changes(repository: Repository, base: str, now: Expansion) -> list[ScheduleChange]:
    """Every schedule of the golden sizes that differs from the base, with its figures, the smallest first."""
    before = {name: text for name, text in texts_at(repository, base, now).items() if name not in now.failed}
    found = changes(before, now.texts)
    return measured(repository.root, found) if found else []


def texts_at(repository: Repository, base: str, now: Expansion) -> dict[str, str]:
    """The texts of the base.

    A schedule whose digest at the base is still right has the text it has now.  The base's generator runs only if a
    golden file is missing, a digest differs, or a schedule is gone of which the base has only a digest.  If the
    generator fails, those schedules count as new, or as without text.
    """
    kept = {name: _text(repository.at(base, path_of(name))) for name in now.shown}
    found = {name: text for name, text in kept.items() if text is not None}
    digests = read_digests(_text(repository.at(base, DIGESTS)) or "")
    found |= {name: text for name, text in now.digested.items() if digests.get(name) == digest(text)}
    gone = [name for name in golden_names(repository, base) if name not in now.shown]
    found |= {name: text for name in gone if (text := _text(repository.at(base, path_of(name)))) is not None}
    lost = digests.keys() - now.texts.keys() - now.failed.keys()
    if lost or not set(now.texts) <= set(found):
        old = _expansion_at(repository, base)
        found = {**old.texts, **found} if old else found
    return dict.fromkeys(lost, "") | found


def golden_names(repository: Repository, base: str) -> list[str]:
    """The shown schedules that have a golden file at the base."""
    return [Path(path).stem for path in repository.listed(base, str(Path(path_of("")).parent)) if _is_shown(path)]


def _is_shown(path: str) -> bool:
    return path.endswith(".txt") and path not in (DIGESTS, COUNTS)


def _expansion_at(repository: Repository, base: str) -> Expansion | None:
    with tempfile.TemporaryDirectory(prefix="gate-base-") as folder:
        try:
            repository.export(base, Path(folder))
            return expansion(repository.root, Path(folder))
        except GateError:
            return None


def counts_at(repository: Repository, base: str) -> Counts:
    """The counts of theorems recorded at the base; empty if it has no record."""
    return read_counts(_text(repository.at(base, COUNTS)) or "")


def measured(root: Path, found: Sequence[ScheduleChange]) -> list[ScheduleChange]:
    """The changes with their figures on both sides, if the tree's simulator gives them."""
    texts = {f"{side} {change.name}": text for change in found for side, text in _sides(change)}
    done = run(python("-m", "ci.child.measure"), root, MEASURE_LIMIT_S, stdin=json.dumps(texts))
    try:
        figures: Mapping[str, Mapping[str, object]] = json.loads(done.out) if done.code == 0 else {}
    except json.JSONDecodeError:
        figures = {}
    return [
        replace(
            change,
            figures_before=figures.get(f"before {change.name}"),
            figures_after=figures.get(f"after {change.name}"),
        )
        for change in found
    ]


def _sides(change: ScheduleChange) -> list[tuple[str, str]]:
    both = (("before", change.before), ("after", change.after))
    return [(side, text) for side, text in both if text is not None]


def _text(data: bytes | None) -> str | None:
    return None if data is None else data.decode(errors="replace")
