"""What the recorder has put into torch, and how to take it out again."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import FunctionType
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

    def stand_before(self, function: Callable[..., Any], wrap: Callable[[Any], Callable[..., Any]]) -> None:
        """Let a function, under all names that are bound to it already, call ``wrap(the function as it was)``."""
        inner: Any = inspect.unwrap(function)
        code, name = inner.__code__, f"_recorded_{inner.__name__}"
        original = FunctionType(code, inner.__globals__, inner.__name__, inner.__defaults__, inner.__closure__)
        original.__kwdefaults__ = inner.__kwdefaults__
        self.put_item(inner.__globals__, name, wrap(original))
        made: dict[str, Any] = {}
        exec(f"def stand_in(*args, **kwargs): return {name}(*args, **kwargs)", made)
        self.later(lambda: setattr(inner, "__code__", code))
        inner.__code__ = made["stand_in"].__code__

    def put_item(self, table: dict[str, Any], name: str, value: Any) -> None:
        """Add to a module's names."""

        def remove() -> None:
            del table[name]

        self.later(remove)
        table[name] = value

    def later(self, undo: Callable[[], None]) -> None:
        """Call this when everything newer has been undone."""
        self._undo.append(undo)

    def undo(self) -> None:
        while self._undo:
            self._undo.pop()()
