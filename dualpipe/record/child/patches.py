"""Changes to torch that can be undone."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import FunctionType
from typing import Any

_ABSENT = object()


class Patches:
    """The changes made so far, and how to undo each."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def put(self, owner: Any, name: str, value: Any) -> None:
        """Replace an attribute."""
        old = vars(owner).get(name, _ABSENT)
        self.later((lambda: delattr(owner, name)) if old is _ABSENT else (lambda: setattr(owner, name, old)))
        setattr(owner, name, value)

    def wrap(self, function: Callable[..., Any], wrapper: Callable[[Any], Callable[..., Any]]) -> None:
        """Make a function call ``wrapper(the original function)``, under all names that are already bound to it."""
        inner: Any = inspect.unwrap(function)
        code, name = inner.__code__, f"_recorded_{inner.__name__}"
        while name in inner.__globals__:  # a function that is wrapped already
            name += "_"
        original = FunctionType(code, inner.__globals__, inner.__name__, inner.__defaults__, inner.__closure__)
        original.__kwdefaults__ = inner.__kwdefaults__
        self.put_item(inner.__globals__, name, wrapper(original))
        signature = inspect.signature(inner)
        if "__signature__" not in vars(inner):
            self.put(inner, "__signature__", signature)
        made: dict[str, Any] = {}
        exec(f"def stand_in(*args, **kwargs): return {name}(*args, **kwargs)", made)
        self.later(lambda: setattr(inner, "__code__", code))
        inner.__code__ = made["stand_in"].__code__

    def put_item(self, table: dict[str, Any], name: str, value: Any) -> None:
        """Add a name to a module."""

        def remove() -> None:
            del table[name]

        self.later(remove)
        table[name] = value

    def later(self, undo: Callable[[], None]) -> None:
        """Call ``undo`` when all newer changes have been undone."""
        self._undo.append(undo)

    def undo(self) -> None:
        while self._undo:
            self._undo.pop()()
