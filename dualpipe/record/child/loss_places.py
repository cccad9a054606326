"""The lines at which the program scales its losses, and at which it drops one that it had collected."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from .applied import Kind
from .log import call_path
from .marks import Key, key_of
from .regions import weak_storage

_SCALES = frozenset({"mul", "mul_", "div", "div_"})


class LossPlaces:
    """Places of the losses of one rank.

    ``dropped`` is where the program has dropped its last reference to a loss that was in a list; empty if it has not,
    or if only the garbage collector has found out.
    """

    def __init__(self) -> None:
        self.dropped = ""
        self._scaled: dict[Key, tuple[Any, str]] = {}  # by the memory of the result, with its storage (weak)
        self._followed: weakref.ref[Tensor] | None = None
        self._collecting = False

    def watch(self, later: Callable[[Callable[[], None]], None]) -> None:
        """Watch the garbage collector; ``later`` gets what undoes this."""
        gc.callbacks.append(self._collects)
        later(lambda: gc.callbacks.remove(self._collects))

    def made(self, kind: Kind, output: Tensor, _: Sequence[Tensor]) -> None:
        """An operator outside of all modules has made a tensor, or written to one."""
        if output.numel() == 1 and kind.name in _SCALES and (key := key_of(output)) is not None:
            self._scaled[key] = weak_storage(output), call_path()

    def scaled_at(self, loss: Tensor) -> str:
        """Where the program has multiplied or divided a scalar last, to make this one; empty if that is not known."""
        key = key_of(loss)
        storage, place = self._scaled.get(key, (None, "")) if key is not None else (None, "")
        return "" if storage is None or storage.expired() else place  # another tensor may have that memory now

    def follow(self, loss: Tensor) -> None:
        """The program has this loss in a list."""
        self._followed = weakref.ref(loss, self._dies)

    def clear(self) -> None:
        """Forget the losses so far."""
        self.dropped, self._followed = "", None
        self._scaled.clear()

    def _dies(self, _: object) -> None:
        self.dropped = "" if self._collecting else call_path()

    def _collects(self, phase: str, _: dict[str, Any]) -> None:
        self._collecting = phase == "start"
