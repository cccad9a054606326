"""The autograd engine, wrapped to watch its runs or to set what holds within them."""

from __future__ import annotations

from typing import Any


class Engine:
    """The autograd engine; a subclass wraps ``run_backward``, which every backward calls."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)
