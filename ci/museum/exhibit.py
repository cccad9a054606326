"""What the museum shows: a change of the sources, and what the gate must say of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ci.errors import GateError


@dataclass(frozen=True)
class Edit:
    """One replacement of text that stands in a file exactly once."""

    path: str
    old: str
    new: str

    def applied(self, text: str) -> str:
        """The text with the replacement made.  Raises ``GateError`` unless ``old`` stands there exactly once."""
        count = text.count(self.old)
        if count != 1:
            got = f"{self.path} has it {count} times: {self.old!r}"
            raise GateError("the text that an exhibit replaces stands in its file once", got, "write the exhibit anew")
        return text.replace(self.old, self.new)


@dataclass(frozen=True)
class Exhibit:
    """A change.

    Parameters
    ----------
    title:
        What goes wrong, or for a harmless change what is done.
    edits:
        The change.  Where it changes schedules, the goldens and the changelog are brought up to date as its author
        would, so that it is the schedule itself that is judged.
    check, rule, says:
        The check that must refuse it, the rule of one of its findings, and a regular expression of what that finding
        says: of a test its name first, and then what it found.  No check: the change is harmless and must pass.
    number:
        The number of the fault in the list of known ones, 0 for one that is not in it.
    """

    title: str
    edits: tuple[Edit, ...]
    check: str = ""
    rule: str = ""
    says: str = ""
    number: int = 0

    @property
    def harmless(self) -> bool:
        return not self.check

    def fits(self, message: str) -> bool:
        """Whether a finding says what it must."""
        return re.search(self.says, message, re.DOTALL) is not None

    @property
    def path(self) -> str:
        """The file that is changed, or the first of several."""
        return self.edits[0].path

    def plant(self, root: Path) -> None:
        """Change the files under ``root``."""
        texts: dict[str, str] = {}
        for edit in self.edits:
            before = texts[edit.path] if edit.path in texts else (root / edit.path).read_text()
            texts[edit.path] = edit.applied(before)
        write(root, texts)


def write(root: Path, texts: Mapping[str, str]) -> None:
    for path, text in texts.items():
        (root / path).write_text(text)


def fault(
    number: int, title: str, path: str, old: str, new: str, *more: Edit, check: str, rule: str, says: str
) -> Exhibit:
    """A fault by one replacement, or with ``more`` several."""
    return Exhibit(title, (Edit(path, old, new), *more), check, rule, says, number)


def harmless(title: str, path: str, old: str, new: str, *more: Edit) -> Exhibit:
    """A change that must pass."""
    return Exhibit(title, (Edit(path, old, new), *more))
