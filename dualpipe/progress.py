"""How long work reports its progress.  Whoever draws it (``dualpipe.cli``) and whoever makes it share this alone."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called with the number of steps done, the number of all steps, and a name.

    The name is that of the next step, or, where several implementations run side by side, of the one that takes the
    steps.  The last call has all steps done and comes before anything is printed.
    """

    def __call__(self, done: int, total: int, name: str, /) -> None: ...


def silent(done: int, total: int, name: str, /) -> None:
    """Report nothing."""
