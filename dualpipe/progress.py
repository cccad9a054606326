"""How long work reports its progress.  Whoever draws it (``dualpipe.cli``) and whoever makes it share this alone."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Called before each step with how many steps are done, how many there are, and the name of the next one.

    The last call has all steps done and comes before anything is printed.
    """

    def __call__(self, done: int, total: int, name: str, /) -> None: ...


def silent(done: int, total: int, name: str, /) -> None:
    """Report nothing."""
