"""How long-running work reports its progress.  The work and whatever draws its progress share only this protocol."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called with the number of steps done, the total number of steps, and a name.

    The name is that of the next step, or, if several implementations run side by side, of the implementation.  In the
    last call all steps are done; it is made before anything is printed.
    """

    def __call__(self, done: int, total: int, name: str, /) -> None: ...


def silent(done: int, total: int, name: str, /) -> None:
    """Report nothing."""
