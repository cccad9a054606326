"""What a page shows, as plain values.  ``dualpipe.page.render`` turns them into HTML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from dualpipe.schedule import Schedule
from dualpipe.timeline.timeline import Costs, Timeline


@dataclass(frozen=True)
class Mark:
    """One step of a counterexample: a place and, if there is one, the place that it waits for or is matched with.

    Parameters
    ----------
    rank, slot:
        The place, counted from 0.
    op:
        The op as the schedule file writes it, such as ``2RF3>``; empty for the whole slot.
    sentence:
        The step in words.
    peer_rank, peer_slot, peer_op:
        The other end of the arrow.  If ``peer_slot`` is ``None``, the arrow ends on the row of ``peer_rank``, which
        never reaches such an op.  If ``peer_rank`` is ``None``, there is no arrow.
    """

    rank: int
    slot: int
    op: str
    sentence: str
    peer_rank: int | None = None
    peer_slot: int | None = None
    peer_op: str = ""


@dataclass(frozen=True)
class Counterexample:
    """Why a check fails: its name, the story in words, and the story's places on the timeline."""

    title: str
    story: str
    marks: Sequence[Mark] = ()


@dataclass(frozen=True)
class Table:
    """Rows of text.  A cell that is one of the words in ``VERDICTS`` is shown as a badge."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Comparison:
    """A schedule, or two versions of it.

    Parameters
    ----------
    before, after:
        Either may be missing: a schedule that is new, removed, or just looked at (only ``after``).  With both, the
        page shows what changed, slot by slot.
    verdict:
        One of ``VERDICTS``, or any other short text.
    source:
        Where the schedule comes from, such as a file's path.
    counterexamples:
        Their marks are places of ``after``, or of ``before`` if there is no ``after``.
    tables:
        Shown below the timelines.  The figures and the changed slots, which the page computes itself, come after them.
    costs, blocking:
        How the timelines are simulated; see ``dualpipe.timeline.simulate``.
    """

    name: str
    before: Schedule | None = None
    after: Schedule | None = None
    verdict: str = ""
    source: str = ""
    counterexamples: Sequence[Counterexample] = ()
    tables: Sequence[Table] = ()
    costs: Costs = field(default_factory=Costs)
    blocking: bool = False


class Steps(NamedTuple):
    """A level over time: from each time on, the level after it.  ``times`` and ``levels`` are of equal length."""

    times: Sequence[float]
    levels: Sequence[float]

    @property
    def peak(self) -> float:
        return max(self.levels, default=0.0)

    @property
    def flat(self) -> list[float]:
        """Times and levels in turn, rounded, without those that another level replaces at once."""
        last = {round(time, 4): round(level, 4) for time, level in zip(self.times, self.levels, strict=True)}
        return [number for step in last.items() for number in step]


class Drawn(NamedTuple):
    """A schedule of a gallery.

    Its name, the caption of its timeline, the timeline, and the memory of each rank.
    """

    name: str
    caption: str
    timeline: Timeline
    memory: Sequence[Steps]


@dataclass(frozen=True)
class Gallery:
    """Timelines of several schedules, one above the other on one time axis; ``unit`` is that of their memory."""

    name: str
    drawn: Sequence[Drawn]
    unit: str
    source: str = ""


@dataclass(frozen=True)
class Page:
    """The whole page: a title, an overall verdict, a sentence or two, then the sections in order."""

    title: str
    verdict: str
    sections: Sequence[Comparison | Gallery | Table]
    lead: str = ""


VERDICTS = (
    "proved",
    "refuted",
    "unknown",
    "skipped",
    "bad input",
    "equal",
    "changed",
    "new",
    "removed",
    "passed",
    "refused",
)
"""The verdicts that have a colour and a sign of their own."""
