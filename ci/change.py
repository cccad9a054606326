"""What a change does to a schedule: a diff of its text, rank by rank, and of its figures."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any

Figures = Mapping[str, Any]
"""The figures of a schedule, as ``ci.child.measure`` gives them."""

_CONTEXT = 2
"""How many unchanged slots are shown on each side of a changed one."""

FIGURES = {
    "makespan": "makespan",
    "bubble": "bubble, all ranks",
    "peak_activations": "peak activations by rank",
    "peak_pending_w": "peak pending W by rank",
    "messages": "messages",
}


@dataclass(frozen=True)
class ScheduleChange:
    """A schedule that differs from the base; a text is ``None`` if the schedule is new or gone."""

    name: str
    before: str | None
    after: str | None
    figures_before: Figures | None = None
    figures_after: Figures | None = None

    @property
    def what(self) -> str:
        return "new" if self.before is None else "gone" if self.after is None else "changed"

    @property
    def is_measured(self) -> bool:
        """Whether each side that exists has figures."""
        sides = ((self.before, self.figures_before), (self.after, self.figures_after))
        return all(figures is not None for text, figures in sides if text is not None)

    @property
    def diff(self) -> tuple[str, ...]:
        """A diff of the text forms.  A rank's line is cut to the slots around each difference."""
        return tuple(diff(self.before or "", self.after or ""))

    @property
    def moved(self) -> tuple[tuple[str, str, str], ...]:
        """The figures that differ: name, before and after."""
        before, after = self.figures_before or {}, self.figures_after or {}
        rows = [("it cannot finish", "", after["stuck"])] if "stuck" in after else []
        for key, what in FIGURES.items():
            old, new = _shown(before.get(key)), _shown(after.get(key))
            if old != new:
                rows.append((what, old, new))
        return tuple(rows)


def changes(before: Mapping[str, str], after: Mapping[str, str]) -> list[ScheduleChange]:
    """The schedules whose text differs, the smallest first."""
    names = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    found = [ScheduleChange(name, before.get(name), after.get(name)) for name in names]
    return sorted(found, key=lambda change: (len(change.after or change.before or ""), change.name))


def diff(before: str, after: str) -> Iterator[str]:
    """The lines of two schedule texts that differ, the head first, then the ranks."""
    old, new = _lines(before), _lines(after)
    for key in {**old, **new}:
        one, other = old.get(key), new.get(key)
        if one == other:
            continue
        if one is None or other is None:
            yield from (f"-{one}" for one in [one] if one is not None)
            yield from (f"+{other}" for other in [other] if other is not None)
        elif key.startswith("rank "):
            yield from _rank_diff(key, one, other)
        else:
            yield from (f"-{one}", f"+{other}")


def _lines(text: str) -> dict[str, str]:
    """The lines by their first words: ``rank 0``, ``lane >``, ``schedule``."""
    found = {}
    for line in text.splitlines():
        words = line.split(":")[0].split()
        key = " ".join(words[:2]) if words[:1] in (["rank"], ["lane"]) else " ".join(words[:1])
        found[key] = line
    return found


def _rank_diff(key: str, one: str, other: str) -> Iterator[str]:
    old, new = one.split(":", 1)[1].split(), other.split(":", 1)[1].split()
    matcher = SequenceMatcher(None, old, new, autojunk=False)
    groups = list(matcher.get_grouped_opcodes(_CONTEXT))
    of_old = [(group[0][1], group[-1][2]) for group in groups]
    of_new = [(group[0][3], group[-1][4]) for group in groups]
    for sign, slots, spans in (("-", old, of_old), ("+", new, of_new)):
        shown: list[str] = []
        end = 0
        for first, last in spans:
            shown += [*_gap(first - end), *slots[first:last]]
            end = last
        yield f"{sign}{key}: {' '.join([*shown, *_gap(len(slots) - end)])}"


def _gap(slots: int) -> list[str]:
    return [f"...{slots}..."] if slots else []


def _shown(value: object) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    return f"{value:g}" if isinstance(value, (int, float)) else ""


def named_in(change: ScheduleChange, text: str) -> bool:
    """Whether a text names the schedule with its size, or shows a line of its diff."""
    words = [set(line.split()) for line in text.splitlines()]
    shown = (line[1:].split() for line in change.diff if line.startswith("+"))
    named = re.search(rf"(?<![\w-]){re.escape(change.name)}(?!\w)", text) is not None
    return named or any(set(line) <= there for line in shown for there in words)


def side_by_side(figures: Figures | None, other: Figures | None) -> list[tuple[str, str, str]]:
    """Every figure of both sides, for a table."""
    one, two = figures or {}, other or {}
    return [(what, _shown(one.get(key)), _shown(two.get(key))) for key, what in FIGURES.items()]
