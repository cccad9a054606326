"""A timeline as the drawings need it: cells, frames, gaps and tones.

A slot of several computes is one span of time.  Here it is divided among its ops in proportion to their costs::

    span      0F3>+3B1<+3W1<  from 6 to 9
    cells     0F3> 6..7   3B1< 7..8   3W1< 8..9        a frame around all three, for F and B overlap
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple

from dualpipe.schedule import COMPUTE, B, F, Lane, Op, Placed, Schedule, Slot, W
from dualpipe.timeline.timeline import Costs, Span, Timeline


class Cell(NamedTuple):
    """A compute op with its part of the time of its slot, in the timeline's unit."""

    at: Placed
    start: float
    end: float


class Stretch(NamedTuple):
    """A stretch of a rank's time: that of a slot, or one without compute."""

    rank: int
    start: float
    end: float


class Tone(NamedTuple):
    """What is drawn in one shade: the ``chunk``-th stage of a lane on its rank.

    DualPipe has two tones, one for each lane; DualPipeV has two on its one lane, for the way down the V and back up.
    """

    lane: Lane
    chunk: int


@dataclass(frozen=True)
class Chart:
    """A timeline as a drawing needs it.

    Attributes
    ----------
    cells:
        One for each compute op, rank by rank in order.
    wholes:
        For the B of each full backward whose W follows at once, the cell of that W.
    frames:
        The slots in which a forward and a backward overlap.
    gaps:
        Where a rank does not compute, from 0 to the makespan: the bubble.
    tones:
        For each tone of the schedule the stages that have it, in order.
    """

    timeline: Timeline
    cells: tuple[Cell, ...]
    wholes: Mapping[Placed, Cell]
    frames: tuple[Stretch, ...]
    gaps: tuple[Stretch, ...]
    tones: Mapping[Tone, tuple[int, ...]]


def chart(timeline: Timeline) -> Chart:
    """The chart of a timeline.  The gaps of a rank add up to its bubble."""
    cells: list[Cell] = []
    frames: list[Stretch] = []
    gaps: list[Stretch] = []
    for rank, spans in enumerate(timeline.spans):
        computes = [span for span in spans if span.ops[0].kind in COMPUTE]
        for span in computes:
            cells += divide(rank, span, timeline.costs)
            if overlaps(span.ops):
                frames.append(Stretch(rank, span.start, span.end))
        edges = [0.0, *(edge for span in computes for edge in (span.start, span.end)), timeline.makespan]
        gaps += [Stretch(rank, end, start) for end, start in list(pairwise(edges))[::2] if start > end]
    return Chart(timeline, tuple(cells), wholes(cells), tuple(frames), tuple(gaps), tones(timeline.schedule))


def divide(rank: int, span: Span, costs: Costs) -> list[Cell]:
    """A compute slot's ops, one after the other within its time."""
    shares = [share(op, span.ops, costs) for op in span.ops]
    if not sum(shares):
        shares = [1.0] * len(shares)
    total = sum(shares)
    ends = [span.start + (span.end - span.start) * done / total for done in accumulate(shares)]
    ends[-1] = span.end
    placed = (Placed(rank, span.slot, position, op) for position, op in enumerate(span.ops))
    return [Cell(at, start, end) for at, start, end in zip(placed, [span.start, *ends], ends, strict=False)]


def share(op: Op, slot: Slot, costs: Costs) -> float:
    """What an op costs within its slot; the cost of a full backward is divided in the ratio of B to W."""
    costs = costs.of(op)
    alone = {F: costs.F, B: costs.B, W: costs.W}[op.kind]
    partner = op._replace(kind=W if op.kind is B else B)
    if op.kind is F or partner not in slot:
        return alone
    split = costs.B + costs.W
    return costs.backward * (alone / split if split else 0.5)


def overlaps(slot: Slot) -> bool:
    """Whether a forward and a backward run in it together."""
    return {F, B} <= {op.kind for op in slot}


def wholes(cells: Iterable[Cell]) -> dict[Placed, Cell]:
    """The cell of W by the place of its B, for the full backwards in which W follows B at once."""
    return {
        b.at: w
        for b, w in pairwise(cells)
        if (b.at.rank, b.at.slot) == (w.at.rank, w.at.slot) and (b.at.op.kind, w.at.op) == (B, b.at.op._replace(kind=W))
    }


def tone(schedule: Schedule, op: Op) -> Tone:
    """The tone of a compute op: its lane, and how many earlier stages of the lane its rank holds."""
    route = schedule.routes[op.lane]
    return Tone(op.lane, route[: op.stage].count(route[op.stage]))


def tones(schedule: Schedule) -> dict[Tone, tuple[int, ...]]:
    """The stages of each tone; lane ``>`` before ``<``, then in order of depth."""
    found: dict[Tone, tuple[int, ...]] = {}
    for lane in schedule.lanes:
        for stage in range(len(schedule.routes[lane])):
            key = tone(schedule, Op(F, lane, stage, 0))
            found[key] = (*found.get(key, ()), stage)
    return dict(sorted(found.items(), key=lambda item: (schedule.lanes.index(item[0].lane), item[0].chunk)))


def named(tones: Mapping[Tone, tuple[int, ...]]) -> tuple[str, ...]:
    """The name of each tone: its lane, its stages or both, as far as these distinguish it; empty for a single tone."""
    lanes = [key.lane for key in tones]
    names = []
    for lane, stages in zip(lanes, tones.values(), strict=True):
        own = f"lane {lane}" if len(set(lanes)) > 1 else ""
        part = f"stages {stages[0]}–{stages[-1]}" if lanes.count(lane) > 1 else ""
        names.append(", ".join(filter(None, (own, part))))
    return tuple(names)
