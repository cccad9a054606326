"""A timeline in a terminal: one line for each rank, wrapped to the terminal's width like lines of sheet music.

::

    time    0       3       6       9
    rank 0  F0 F1 F2 f0 b0 w0 f1 F3+b1+w1      capitals: lane >, small letters: lane <
    rank 1  ···F0 f0 F1 f1 F2 b0+w0 f2+B0      + joins what is in one slot, · is a bubble

    time    12      15
    rank 0  ···f2+B0+W0 b2+w2 ···
    rank 1  +W0 F3+b1+w1 f3+B1+W1

The text is the same with and without colours, which are used only on a terminal.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil, floor, log10
from statistics import median

from rich.style import Style
from rich.text import Text

from dualpipe.errors import RuleError
from dualpipe.schedule import B, F, W
from dualpipe.timeline.chart import Cell, Chart, chart, named, tone
from dualpipe.timeline.palette import NAMES, colour, ink
from dualpipe.timeline.summary import headline
from dualpipe.timeline.timeline import Timeline

BUBBLE, JOINT = "·", "+"
_LEAST = 20
"""The least number of columns of a row, even on a narrower terminal."""
_MOST = 10_000
"""The most columns of a drawing, all bands together."""
_APART = 6
"""The least number of columns between two numbers of the time line."""
_BANDS = 3
"""The most bands into which rows are broken to make room for numbers in the cells."""


@dataclass(frozen=True)
class Grid:
    """How time is mapped to columns.

    A line has ``label`` columns for the rank's name and ``room`` columns of the row; ``scale`` columns are one unit of
    time.  With ``numbers`` the cells show their microbatches, for which a terminal needs ``wanted`` columns.
    """

    label: int
    room: int
    scale: float
    numbers: bool
    wanted: int

    def column(self, time: float) -> int:
        return floor(time * self.scale + 0.5)


def lines(timeline: Timeline, width: int) -> list[Text]:
    """The timeline: a title, bands with the time and a line for each rank, the key, and what did not fit.

    The ranks' lines have at most ``width`` columns, but no fewer than 20 and their label.  Raises ``RuleError`` for
    more than 10,000 columns in all.
    """
    drawing = chart(timeline)
    grid = fit(drawing, width)
    if timeline.makespan * grid.scale > _MOST:
        raise RuleError(
            f"a drawing of letters may have at most {_MOST} columns",
            f"this would have {timeline.makespan * grid.scale:.3g}, since most ops are so much shorter than the whole",
            "draw a picture instead (--svg FILE)",
        )
    name, sizes = headline(timeline.schedule)
    figures = f"makespan {timeline.makespan:g}, bubble {timeline.bubble_share:.1%} of the ranks' time"
    rows = [_row(drawing, grid, rank) for rank in range(len(timeline.spans))]
    return [
        Text(f"{name}, {sizes}: {figures}"),
        *_bands([_ruler(drawing, grid), *rows], grid),
        _key(drawing, any(JOINT in row.plain for row in rows)),
        *_missing(drawing, grid, width),
    ]


def fit(drawing: Chart, width: int) -> Grid:
    """The widest layout that fits: numbers and a gap in one band, numbers in a few, letters in as many as it takes."""
    makespan = drawing.timeline.makespan or 1.0
    label = len(f"rank {len(drawing.timeline.spans) - 1}  ")
    digits = max((len(str(cell.at.op.mb)) for cell in drawing.cells), default=1)
    op = median([cell.end - cell.start for cell in drawing.cells if cell.end > cell.start] or [makespan])
    widest = max(width - label, _LEAST)
    for columns, bands in ((digits + 2, 1), (digits + 1, _BANDS)):
        if makespan / op * columns <= widest // columns * columns * bands:
            return Grid(label, widest // columns * columns, columns / op, True, width)
    numbered = ceil(makespan / op / _BANDS) * (digits + 1)
    return Grid(label, widest, 1 / op, False, label + numbered)


def _bands(rows: list[Text], grid: Grid) -> Iterator[Text]:
    """The rows, broken to the terminal's width."""
    columns = max(len(row) for row in rows) - grid.label
    for start in range(0, max(columns, 1), grid.room):
        if start:
            yield Text()
        for row in rows:
            yield row[: grid.label] + row[grid.label + start : grid.label + start + grid.room]


def _row(drawing: Chart, grid: Grid, rank: int) -> Text:
    row = Text(f"rank {rank}".ljust(grid.label))
    reached = 0
    cells = [cell for cell in drawing.cells if cell.at.rank == rank]
    for number, cell in enumerate(cells):
        start, stop = grid.column(cell.start), grid.column(cell.end)
        row.append(BUBBLE * (start - reached), Style(dim=True))
        joined = number + 1 < len(cells) and cells[number + 1].at.slot == cell.at.slot
        row.append(_cell(drawing, cell, stop - start, grid.numbers, joined), _style(drawing, cell))
        reached = max(reached, stop)
    row.append(BUBBLE * (grid.column(drawing.timeline.makespan) - reached), Style(dim=True))
    return row


def _cell(drawing: Chart, cell: Cell, columns: int, numbers: bool, joined: bool) -> str:
    """An op in so many columns: ``F12``, or ``F`` if the number does not fit, and ``+`` if its slot goes on."""
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
    """The times over the rows, at round numbers that a band has room for."""
    end = max(grid.column(drawing.timeline.makespan), 1)
    line = "time".ljust(grid.label)
    for time in _ticks(drawing.timeline.makespan, grid.scale):
        first, text = grid.column(time), f"{time:g}"
        last = first + len(text) - 1
        if last < end and first // grid.room == last // grid.room:
            line = line.ljust(grid.label + first) + text
    return Text(line.ljust(grid.label + end), Style(dim=True))


def _ticks(makespan: float, scale: float) -> Iterator[float]:
    """Multiples of 1, 2 or 5 times a power of ten, as near to each other as their numbers allow."""
    least = _APART / scale
    power = 10.0 ** floor(log10(least))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least)
    yield from (step * number for number in range(floor(makespan / step) + 1))


def _key(drawing: Chart, joined: bool) -> Text:
    """What the letters mean, in their colours."""
    key = Text()
    for number, name in enumerate(named(drawing.tones)):
        for kind in (F, B, W):
            ground = colour(kind, number, len(drawing.tones))
            key.append(_letter(kind, number), Style(color=ink(ground), bgcolor=ground))
            key.append(f" {NAMES[kind]}  " if number == 0 else " ")
        if name:
            key.append(f"{name}  ")
    key.append(f"{BUBBLE} bubble")
    return key.append(f"  {JOINT} one slot" if joined else "")


def _missing(drawing: Chart, grid: Grid, width: int) -> Iterator[Text]:
    """What did not fit, and where it can be seen."""
    vanished = sum(grid.column(cell.start) == grid.column(cell.end) for cell in drawing.cells)
    if vanished:
        yield Text(f"{vanished} of {len(drawing.cells)} ops are too short to be seen")
    if not grid.numbers:
        yield Text(f"microbatch numbers need {grid.wanted} columns, and there are {width}")
    if vanished or not grid.numbers:
        yield Text("to see more: --svg FILE or --png FILE, or `dualpipe simulate --trace FILE`")
