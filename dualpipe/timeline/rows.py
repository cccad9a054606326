"""The rows of ranks in a figure: the cells of a timeline with frames, bubbles and numbers, and their axes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from dualpipe.schedule import B, F, Kind, W
from dualpipe.timeline.chart import Cell, Chart, Tone, tone
from dualpipe.timeline.palette import INK, LIGHT, colour, ink

POINTS = 72.0
"""Points in an inch."""
FRAME = 1.1
"""Points: the line of a frame, thinner where frames are narrow."""
_GAP = 0.12
"""The part of a row that stays empty."""
_LARGEST, _SMALLEST, _DIGIT, _FILL = 8.5, 4.0, 0.64, 0.9
"""Numbers in the cells: sizes in points, the width of a digit over its size, how much of a cell they may fill."""
_INSET = 0.35
"""Points: what is left free at either end of a cell."""


class Look(NamedTuple):
    """What the cells of one colour have in common."""

    kind: Kind
    tone: Tone


def paint(axes: Axes, drawing: Chart, point: float) -> int:
    """Draw a timeline into axes with a row of height 1 for each rank; return how many numbers had no room.

    ``point`` is the time that a point is wide.
    """
    _gaps(axes, drawing)
    _cells(axes, drawing, _INSET * point)
    _frames(axes, drawing, point)
    return _numbers(axes, drawing, point)


def _rectangle(rank: int, start: float, end: float) -> list[tuple[float, float]]:
    top, bottom = rank - 0.5 + _GAP / 2, rank + 0.5 - _GAP / 2
    return [(start, bottom), (start, top), (end, top), (end, bottom)]


def _gaps(axes: Axes, drawing: Chart) -> None:
    areas = [_rectangle(*gap) for gap in drawing.gaps]
    axes.add_collection(
        PolyCollection(
            areas,
            facecolors=LIGHT.faint,
            edgecolors=LIGHT.hatch,
            linewidths=0,
            hatch="/////",
            gid="bubble",
            clip_on=False,
        ),
        autolim=False,
    )


def _cells(axes: Axes, drawing: Chart, inset: float) -> None:
    """The ops, a collection for each colour.  B and W of a full backward touch."""
    joined = {w.at for w in drawing.wholes.values()}
    areas: dict[Look, list[list[tuple[float, float]]]] = {
        Look(kind, key): [] for kind in (F, B, W) for key in drawing.tones
    }
    for cell in drawing.cells:
        free = min(inset, (cell.end - cell.start) / 10)
        start = cell.start + (0.0 if cell.at in joined else free)
        end = cell.end - (0.0 if cell.at in drawing.wholes else free)
        areas[_look(drawing, cell)].append(_rectangle(cell.at.rank, start, end))
    for look, rectangles in areas.items():
        paint = shade(drawing, look)
        gid = f"{look.kind}{look.tone.lane}{look.tone.chunk}"
        collection = PolyCollection(rectangles, facecolors=paint, linewidths=0, gid=gid, clip_on=False)
        axes.add_collection(collection, autolim=False)


def _frames(axes: Axes, drawing: Chart, point: float) -> None:
    areas = [_rectangle(*frame) for frame in drawing.frames]
    widths = [min(FRAME, (frame.end - frame.start) / point / 15) for frame in drawing.frames]
    axes.add_collection(
        PolyCollection(
            areas, facecolors="none", edgecolors=INK, linewidths=widths, gid="overlap", zorder=3, clip_on=False
        ),
        autolim=False,
    )


def _numbers(axes: Axes, drawing: Chart, point: float) -> int:
    """Write the microbatches' numbers into the cells; return in how many there was no room.

    A number is as large as its cell allows for the longest of the schedule, so that equal cells look alike.
    """
    digits = max((len(str(cell.at.op.mb)) for cell in drawing.cells), default=1)
    left_out = 0
    for cell in drawing.cells:
        size = min((cell.end - cell.start) / point * _FILL / (_DIGIT * digits), _LARGEST)
        if size < _SMALLEST:
            left_out += 1
            continue
        axes.text(
            (cell.start + cell.end) / 2,
            cell.at.rank,
            str(cell.at.op.mb),
            size=size,
            color=ink(shade(drawing, _look(drawing, cell))),
            ha="center",
            va="center_baseline",
            zorder=4,
        )
    return left_out


def scale(axes: Axes, ranks: int, makespan: float) -> None:
    """Label the rows with their ranks, and the time from 0 to the makespan."""
    axes.set_xlim(0, makespan)
    axes.set_ylim(ranks - 0.5, -0.5)
    axes.set_yticks(range(ranks), [f"rank {rank}" for rank in range(ranks)], size=8, color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=12, steps=[1, 2, 5, 10]))
    axes.tick_params(axis="x", labelsize=7, length=3, colors=INK)
    axes.tick_params(axis="y", length=0, pad=5)
    axes.set_xlabel("time", size=7.5, color=INK, loc="right", labelpad=1)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(LIGHT.hatch)


def legend(
    figure: Figure, handles: Sequence[Patch | Line2D], columns: int, corner: tuple[float, float], size: float
) -> None:
    """A legend without a frame, in letters of ``size`` points; its lower left corner is at a part of the figure."""
    figure.legend(
        handles=handles,
        ncols=columns,
        loc="lower left",
        bbox_to_anchor=corner,
        frameon=False,
        fontsize=size,
        labelcolor=INK,
        borderpad=0,
        borderaxespad=0,
        handlelength=1.4,
        handleheight=0.9,
        handletextpad=0.5,
        columnspacing=1.6,
        labelspacing=0.45,
    )


def _look(drawing: Chart, cell: Cell) -> Look:
    return Look(cell.at.op.kind, tone(drawing.timeline.schedule, cell.at.op))


def shade(drawing: Chart, look: Look) -> str:
    """The colour of a look."""
    return colour(look.kind, list(drawing.tones).index(look.tone), len(drawing.tones))
