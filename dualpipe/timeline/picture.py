"""A timeline as a figure: one row per rank, time to the right, as in the papers on DualPipe and the zero bubble.

::

    dualpipe, 4 ranks, 8 microbatches
    makespan 26, bubble 7.7% of the ranks' time
    rank 0 | 0 | 1 | 2 |///|   ...        a colour for each kind and tone, the number of the microbatch,
    rank 1 |///| 0 | 1 |[0 | 0   ]        a frame around what overlaps, hatching where a rank waits
           0           5

The figure is made without pyplot, so nothing of it is global, and the same timeline gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from statistics import median
from typing import Any, Literal, NamedTuple

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from dualpipe.files import write_whole
from dualpipe.schedule import B, F, Kind, W
from dualpipe.timeline.chart import Cell, Chart, Tone, chart, named, tone
from dualpipe.timeline.palette import GROUND, INK, LIGHT, NAMES, colour, ink
from dualpipe.timeline.summary import describe_costs, headline
from dualpipe.timeline.timeline import Timeline

__all__ = ["draw", "render", "write"]

Form = Literal["svg", "png"]

_POINTS = 72.0
"""Points in an inch."""
_CELL, _NARROWEST, _WIDEST = 0.2, 7.0, 26.0
"""Inches: the width of the median op, and the least and the most width of a row."""
_ROW, _GAP = 0.30, 0.12
"""Inches: the height of a rank's row, and how much of it stays empty."""
_LEFT, _RIGHT, _TOP, _BOTTOM, _LEGEND_ROW, _FOOT = 0.72, 0.2, 0.66, 0.52, 0.2, 0.12
"""Inches: the margins around the rows, the height of a row of the legend, and the space below it."""
_LARGEST, _SMALLEST, _DIGIT, _FILL = 8.5, 4.0, 0.64, 0.9
"""Numbers in the cells: sizes in points, a digit's width as a part of its size, how much of a cell they may fill."""
_INSET, _FRAME = 0.35, 1.1
"""Points: the space at either end of a cell; the line of a frame, which is thinner where frames are narrow."""
_DPI = 150


class Look(NamedTuple):
    """What decides the colour of a cell."""

    kind: Kind
    tone: Tone


def draw(timeline: Timeline) -> Figure:
    """The figure of a timeline.

    Every compute op is one rectangle of the ``PolyCollection`` whose gid is its kind and tone, such as ``F>0``; those
    with the gids ``overlap`` and ``bubble`` hold the frames and the waiting times.  The figure grows with the
    schedule up to 26 inches.  Beyond that the numbers in the cells shrink, and where one would need less than 4
    points it is left out, and the caption says how many were.
    """
    drawing = chart(timeline)
    with _style():
        return _figure(drawing)


def write(figure: Figure, path: Path, form: Form) -> None:
    """Write the figure to a file, whole or not at all."""
    write_whole(path, render(figure, form))


def render(figure: Figure, form: Form) -> bytes:
    """The content of the figure's file, which depends on the figure and the version of matplotlib, not on the day."""
    metadata: dict[str, Any] = {"Date": None, "Creator": "dualpipe"} if form == "svg" else {"Software": "dualpipe"}
    content = BytesIO()
    with _style():
        figure.savefig(content, format=form, metadata=metadata, dpi=_DPI)
    return content.getvalue()


@contextmanager
def _style() -> Iterator[None]:
    """matplotlib with its default settings instead of the user's, which are restored afterwards."""
    fonts = {"font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial", "sans-serif"]}
    own = {"svg.hashsalt": "dualpipe", "svg.fonttype": "none", "hatch.linewidth": 0.6, **fonts}
    with style.context(["default", own]):
        yield


def _figure(drawing: Chart) -> Figure:
    timeline = drawing.timeline
    ranks, makespan = len(timeline.spans), timeline.makespan or 1.0
    typical = median([cell.end - cell.start for cell in drawing.cells if cell.end > cell.start] or [makespan])
    width = min(max(makespan / typical * _CELL, _NARROWEST), _WIDEST)
    height, key = ranks * _ROW, max(len(drawing.tones), 1) * _LEGEND_ROW
    whole = (_LEFT + width + _RIGHT, _TOP + height + _BOTTOM + key)
    figure = Figure(figsize=whole, facecolor=GROUND)
    axes = figure.add_axes(
        (_LEFT / whole[0], (_BOTTOM + key) / whole[1], width / whole[0], height / whole[1]), facecolor=GROUND
    )
    point = makespan / (width * _POINTS)
    _gaps(axes, drawing)
    _cells(axes, drawing, _INSET * point)
    _frames(axes, drawing, point)
    left_out = _numbers(axes, drawing, point)
    _axes(axes, ranks, makespan)
    _caption(figure, drawing, left_out, whole)
    _legend(figure, drawing, whole)
    return figure


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
        paint = _colour(drawing, look)
        gid = f"{look.kind}{look.tone.lane}{look.tone.chunk}"
        collection = PolyCollection(rectangles, facecolors=paint, linewidths=0, gid=gid, clip_on=False)
        axes.add_collection(collection, autolim=False)


def _frames(axes: Axes, drawing: Chart, point: float) -> None:
    areas = [_rectangle(*frame) for frame in drawing.frames]
    widths = [min(_FRAME, (frame.end - frame.start) / point / 15) for frame in drawing.frames]
    axes.add_collection(
        PolyCollection(
            areas, facecolors="none", edgecolors=INK, linewidths=widths, gid="overlap", zorder=3, clip_on=False
        ),
        autolim=False,
    )


def _numbers(axes: Axes, drawing: Chart, point: float) -> int:
    """Write the microbatches' numbers into the cells; return how many did not fit.

    Cells of equal width have numbers of equal size: the one at which the schedule's longest number would fit.
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
            color=ink(_colour(drawing, _look(drawing, cell))),
            ha="center",
            va="center_baseline",
            zorder=4,
        )
    return left_out


def _axes(axes: Axes, ranks: int, makespan: float) -> None:
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


def _caption(figure: Figure, drawing: Chart, left_out: int, whole: tuple[float, float]) -> None:
    timeline = drawing.timeline
    name, sizes = headline(timeline.schedule)
    figures = f"makespan {timeline.makespan:g}, bubble {timeline.bubble_share:.1%} of the ranks' time; "
    figures += f"costs {describe_costs(timeline.costs)}"
    if left_out:
        figures += f"; {left_out} numbers did not fit"
    left = _LEFT / whole[0]
    figure.text(left, 1 - 0.26 / whole[1], f"{name}, {sizes}", size=11, weight="bold", color=INK, va="baseline")
    figure.text(left, 1 - 0.48 / whole[1], figures, size=8, color=INK, va="baseline")


def _legend(figure: Figure, drawing: Chart, whole: tuple[float, float]) -> None:
    """A row for each tone with its three colours; the frame and the hatching come in a fourth column."""
    rows = max(len(drawing.tones), 1)
    handles = [
        Patch(
            facecolor=_colour(drawing, Look(kind, key)), label=", ".join(filter(None, (f"{kind} {NAMES[kind]}", name)))
        )
        for kind in (F, B, W)
        for key, name in zip(drawing.tones, named(drawing.tones), strict=True)
    ]
    marks = [Patch(facecolor=LIGHT.faint, edgecolor=LIGHT.hatch, linewidth=0, hatch="/////", label="bubble")]
    if drawing.frames:
        marks.append(Patch(facecolor="none", edgecolor=INK, linewidth=_FRAME, label="F and B overlap"))
    columns = 3 + -(-len(marks) // rows)
    blanks = [Patch(visible=False, label=" ")] * (columns * rows - len(handles) - len(marks))
    figure.legend(
        handles=[*handles, *marks, *blanks],
        ncols=columns,
        loc="lower left",
        bbox_to_anchor=((_LEFT - 0.06) / whole[0], _FOOT / whole[1]),
        frameon=False,
        fontsize=8,
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


def _colour(drawing: Chart, look: Look) -> str:
    return colour(look.kind, list(drawing.tones).index(look.tone), len(drawing.tones))
