"""A planted fault: one record, whether it is planted in the sources, in a schedule or in the running code."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, ParamSpec, TypeVar

from ci import GateError

Given = ParamSpec("Given")
Planted = TypeVar("Planted")


@dataclass(frozen=True)
class Fault(Generic[Given, Planted]):
    """A fault, how to plant it, and how it must be found.

    Parameters
    ----------
    number:
        Its number in docs/reference/museum.md, 0 for one that is not in that list.
    title:
        What goes wrong.
    plant:
        Plants it: edits of the sources, or a function that makes a faulty schedule or patches the running code.
    checks:
        The checks that must refuse it; a check of the gate with the rule of its finding, as ``tests/test``.
    says:
        A regular expression that the message of the first check's finding matches; a test's message begins with its
        name.
    """

    number: int
    title: str
    plant: Callable[Given, Planted]
    checks: tuple[str, ...]
    says: str

    def matches(self, message: str) -> bool:
        """Whether a finding's message is the expected one."""
        return re.search(self.says, message, re.DOTALL) is not None


@dataclass(frozen=True)
class Edit:
    """One replacement of text that occurs in a file exactly once."""

    path: str
    old: str
    new: str

    def apply(self, text: str) -> str:
        """The text with the replacement made.  Raises ``GateError`` unless ``old`` occurs exactly once."""
        count = text.count(self.old)
        if count != 1:
            got = f"{self.path} has it {count} times: {self.old!r}"
            raise GateError("a planted fault must replace text that occurs once in its file", got, "update the record")
        return text.replace(self.old, self.new)


@dataclass(frozen=True)
class Edits:
    """Replacements in files below a root.  Schedules that they change need new goldens and a changelog entry."""

    edits: tuple[Edit, ...]

    def __call__(self, root: Path) -> None:
        """Change the files; none if one of the texts is not found.  Raises ``GateError``."""
        texts: dict[str, str] = {}
        for edit in self.edits:
            before = texts[edit.path] if edit.path in texts else (root / edit.path).read_text()
            texts[edit.path] = edit.apply(before)
        for path, text in texts.items():
            (root / path).write_text(text)


@dataclass(frozen=True)
class SourceFault(Fault[[Path], None]):
    """A fault planted in the sources, or a harmless change, which no check may refuse."""

    plant: Edits

    @property
    def harmless(self) -> bool:
        return not self.checks

    @property
    def path(self) -> str:
        """The file that is changed, or the first of several."""
        return self.plant.edits[0].path


def fault(
    number: int, title: str, path: str, old: str, new: str, *more: Edit, check: str, rule: str, says: str
) -> SourceFault:
    """A fault planted by one replacement, or with ``more`` by several."""
    return SourceFault(number, title, Edits((Edit(path, old, new), *more)), (f"{check}/{rule}",), says)


def harmless(title: str, path: str, old: str, new: str, *more: Edit) -> SourceFault:
    """A change that must pass."""
    return SourceFault(0, title, Edits((Edit(path, old, new), *more)), (), "")
