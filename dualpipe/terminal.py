"""A timeline in a terminal: one line a rank, as wide as the terminal allows.

::

    time    0           4           8           12
    rank 0  F0 F1 F2 f0 b0 w0 f1 F3+b1+w1 ····f2+B0+W0      capitals: lane >, small letters: lane <
    rank 1  ···F0 f0 F1 f1 F2 b0+w0 ···                      + joins what is in one slot, · is a bubble

The text is the same with and without colours; colours are added where there is a terminal to show them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil, floor, log10
from statistics import median

from rich.style import Style
from rich.text import Text

from dualpipe.cells import Cell, Chart, chart, tone
from dualpipe.palette import NAMES, colour, ink
from dualpipe.schedule import B, F, W
from dualpipe.summary import headline
from dualpipe.timeline import Timeline

BUBBLE, JOINT = "·", "+"
_LEAST = 20
"""Columns that the rows have even where the terminal is narrower than that."""
_APART = 6
"""Columns between the numbers of the time line, at least."""


@dataclass(frozen=True)
class Grid:
    """How time is laid on columns: ``scale`` of them a unit, ``numbers`` where microbatches' numbers have room.

    ``full`` is the width, in columns, of a terminal in which they would.
    """

    label: int
    scale: float
    numbers: bool
    full: int

    def column(self, time: float) -> int:
        return floor(time * self.scale + 0.5)


def lines(timeline: Timeline, width: int) -> list[Text]:
    """The timeline: a title, the time, a line a rank, the key, and what had no room.

    The ranks' lines have at most ``width`` columns, or 20 and their label where that is more.
    """
    drawing = chart(timeline)
    grid = fit(drawing, width)
    name, sizes = headline(timeline.schedule)
    told = f"makespan {timeline.makespan:g}, bubble {timeline.bubble_share:.1%} of the ranks' time"
    return [
        Text(f"{name}, {sizes}: {told}"),
        _ruler(drawing, grid),
        *(_row(drawing, grid, rank) for rank in range(len(timeline.spans))),
        *_key(drawing, grid),
        *_missing(timeline, grid, width),
    ]


def fit(drawing: Chart, width: int) -> Grid:
    """The widest layout that fits: numbers and a gap, numbers alone, one letter an op, or what columns there are."""
    makespan = drawing.timeline.makespan or 1.0
    label = len(f"rank {len(drawing.timeline.spans) - 1}  ")
    room = max(width - label, _LEAST)
    digits = max((len(str(cell.at.op.mb)) for cell in drawing.cells), default=1)
    op = median([cell.end - cell.start for cell in drawing.cells if cell.end > cell.start] or [makespan])
    full = label + ceil(makespan / op * (digits + 1))
    for columns in (digits + 2, digits + 1, 1):
        if makespan / op * columns <= room:
            return Grid(label, columns / op, columns > 1, full)
    return Grid(label, room / makespan, False, full)


def _row(drawing: Chart, grid: Grid, rank: int) -> Text:
    end = grid.column(drawing.timeline.makespan)
    row = Text(f"rank {rank}".ljust(grid.label))
    reached = 0
    cells = [cell for cell in drawing.cells if cell.at.rank == rank]
    for cell, after in zip(cells, [*cells[1:], None], strict=True):
        start, stop = grid.column(cell.start), grid.column(cell.end)
        row.append(BUBBLE * (start - reached), Style(dim=True))
        joined = after is not None and after.at.slot == cell.at.slot
        row.append(_cell(drawing, cell, stop - start, grid.numbers, joined), _style(drawing, cell))
        reached = max(reached, stop)
    row.append(BUBBLE * (end - reached), Style(dim=True))
    return row


def _cell(drawing: Chart, cell: Cell, columns: int, numbers: bool, joined: bool) -> str:
    """An op in so many columns: ``F12``, or ``F`` where the number has no room, and ``+`` if its slot goes on."""
    letter = _letter(cell.at.op.kind, _tone(drawing, cell))
    text = f"{letter}{cell.at.op.mb}" if numbers else letter
    text = text if len(text) <= columns else letter
    filled = text.ljust(columns)[:columns]
    return filled[:-1] + JOINT if joined and len(text) < columns else filled


def _letter(kind: str, tone: int) -> str:
    return kind if tone == 0 else kind.lower()


def _tone(drawing: Chart, cell: Cell) -> int:
    return list(drawing.tones).index(tone(drawing.timeline.schedule, cell.at.op))


def _style(drawing: Chart, cell: Cell) -> Style:
    ground = colour(cell.at.op.kind, _tone(drawing, cell), len(drawing.tones))
    return Style(color=ink(ground), bgcolor=ground)


def _ruler(drawing: Chart, grid: Grid) -> Text:
    """The times over the rows, at round numbers."""
    makespan = drawing.timeline.makespan
    line = "time".ljust(grid.label)
    for time in _ticks(makespan, grid.scale):
        text = f"{time:g}"
        if grid.column(time) + len(text) <= max(grid.column(makespan), 1):
            line = line.ljust(grid.label + grid.column(time)) + text
    return Text(line, Style(dim=True))


def _ticks(makespan: float, scale: float) -> Iterator[float]:
    """Multiples of 1, 2 or 5 times a power of ten, as near to each other as their numbers allow."""
    least = _APART / scale
    power = 10.0 ** floor(log10(least))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least)
    yield from (step * number for number in range(floor(makespan / step) + 1))


def _key(drawing: Chart, grid: Grid) -> list[Text]:
    """What the letters mean, in their colours."""
    key = Text()
    for number, (name, stages) in enumerate(drawing.tones.items()):
        for kind in (F, B, W):
            ground = colour(kind, number, len(drawing.tones))
            key.append(_letter(kind, number), Style(color=ink(ground), bgcolor=ground))
            key.append(f" {NAMES[kind]}  " if number == 0 else " ")
        if len(drawing.tones) > 1:
            lanes = len({other.lane for other in drawing.tones}) > 1
            key.append(f"lane {name.lane}  " if lanes else f"stages {stages[0]}–{stages[-1]}  ")
    key.append(f"{BUBBLE} bubble")
    joins = any(JOINT in _row(drawing, grid, rank).plain for rank in range(len(drawing.timeline.spans)))
    if joins:
        key.append(f"  {JOINT} one slot")
    return [key]


def _missing(timeline: Timeline, grid: Grid, width: int) -> list[Text]:
    """What had no room, and where it can be seen."""
    if grid.numbers:
        return []
    squeezed = f"a column is {1 / grid.scale:.3g} of time; " if grid.scale < 1 else ""
    told = f"{squeezed}microbatch numbers need {grid.full} columns, and there are {width}"
    return [Text(told), Text("to see more: --svg FILE or --png FILE, or `dualpipe simulate --trace FILE`")]
