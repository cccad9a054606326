"""How a rank of a recorded program failed, which is a part of what a recording says about the program."""

from __future__ import annotations

from typing import NamedTuple

from dualpipe.schedule.op import ScheduleError

LATER = "in a later training step"
"""What the text of a failure says if the rank got beyond the training step that the schedule is."""


class Failure(NamedTuple):
    """A rank, and what happened to it: ``raised IndexError at train.py:11 during 2F0<``.  Printed as a sentence."""

    rank: int
    what: str

    @property
    def is_hang(self) -> bool:
        """Whether the rank waited until it was stopped, so that its failure may follow from the schedule itself."""
        return self.what.startswith("waited ")

    @property
    def ends_early(self) -> bool:
        """Whether the rank's program ends there; not if it only calls another collective than other pipelines."""
        return not self.what.startswith("calls ")

    @property
    def is_later(self) -> bool:
        """Whether the rank got beyond the recorded step, so that nothing in the schedule follows from its failure."""
        return f" {LATER}" in self.what

    def __str__(self) -> str:
        return f"rank {self.rank} {self.what}"


def check_failures(failures: tuple[Failure, ...], ranks: int) -> None:
    """Raise ``ScheduleError`` unless failures name existing ranks, each with one printable line without ``#``."""
    for failure in failures:
        rank, what = failure
        if type(rank) is not int or not 0 <= rank < ranks:
            got = f"got rank {rank!r} of {ranks}"
            raise ScheduleError("a failure names a rank that has a program", got, "correct the rank")
        if not isinstance(what, str) or not what.isprintable() or "#" in what or what != what.strip() or not what:
            raise ScheduleError("a failure is one printable line without #", f"got {what!r}", "see printable()")


def printable(text: str, limit: int = 500) -> str:
    """A text as one printable line without ``#``, as the text of a failure has to be."""
    words = " ".join("".join(c if c.isprintable() and c != "#" else " " for c in text).split())
    return words if len(words) <= limit else words[: limit - 1] + "…"
