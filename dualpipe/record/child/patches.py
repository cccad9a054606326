"""What the recorder has put into torch, and how to take it out again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_ABSENT = object()


class Patches:
    """How to undo each change, newest last."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def put(self, owner: Any, name: str, value: Any) -> None:
        """Replace an attribute."""
        old = vars(owner).get(name, _ABSENT)
        self.later((lambda: delattr(owner, name)) if old is _ABSENT else (lambda: setattr(owner, name, old)))
        setattr(owner, name, value)

    def later(self, undo: Callable[[], None]) -> None:
        """Call this when everything newer has been undone."""
        self._undo.append(undo)

    def undo(self) -> None:
        while self._undo:
            self._undo.pop()()
