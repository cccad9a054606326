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
from typing import Any, Literal

from matplotlib import style
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from dualpipe.files import write_whole
from dualpipe.schedule import B, F, W
from dualpipe.timeline.chart import Chart, chart, named
from dualpipe.timeline.palette import GROUND, INK, LIGHT, NAMES
from dualpipe.timeline.rows import FRAME, POINTS, Look, legend, paint, scale, shade
from dualpipe.timeline.summary import describe_costs, headline
from dualpipe.timeline.timeline import Timeline

__all__ = ["draw", "render", "write"]

Form = Literal["svg", "png"]

_CELL, _NARROWEST, _WIDEST = 0.2, 7.0, 26.0
"""Inches: the width of the median op, and the least and the most width of a row."""
_ROW = 0.30
"""Inches: the height of a rank's row."""
_LEFT, _RIGHT, _TOP, _BOTTOM, _LEGEND_ROW, _FOOT = 0.72, 0.2, 0.66, 0.52, 0.2, 0.12
"""Inches: the margins around the rows, the height of a row of the legend, and the space below it."""
_DPI = 150


def draw(timeline: Timeline) -> Figure:
    """The figure of a timeline.

    Every compute op is one rectangle of the ``PolyCollection`` whose gid is its kind and tone, such as ``F>0``; those
    with the gids ``overlap`` and ``bubble`` hold the frames and the waiting times.  The figure grows with the
    schedule up to 26 inches.  Beyond that the numbers in the cells shrink, and where one would need less than 4
    points it is left out, and the caption says how many were.
    """
    drawing = chart(timeline)
    with styled():
        return _figure(drawing)


def write(figure: Figure, path: Path, form: Form) -> None:
    """Write the figure to a file, whole or not at all."""
    write_whole(path, render(figure, form))


def render(figure: Figure, form: Form) -> bytes:
    """The content of the figure's file, which depends on the figure and the version of matplotlib, not on the day."""
    metadata: dict[str, Any] = {"Date": None, "Creator": "dualpipe"} if form == "svg" else {"Software": "dualpipe"}
    content = BytesIO()
    with styled():
        figure.savefig(content, format=form, metadata=metadata, dpi=_DPI)
    return content.getvalue()


@contextmanager
def styled() -> Iterator[None]:
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
    point = makespan / (width * POINTS)
    left_out = paint(axes, drawing, point)
    scale(axes, ranks, makespan)
    _caption(figure, drawing, left_out, whole)
    _legend(figure, drawing, whole)
    return figure


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
        Patch(facecolor=shade(drawing, Look(kind, key)), label=", ".join(filter(None, (f"{kind} {NAMES[kind]}", name))))
        for kind in (F, B, W)
        for key, name in zip(drawing.tones, named(drawing.tones), strict=True)
    ]
    marks = [Patch(facecolor=LIGHT.faint, edgecolor=LIGHT.hatch, linewidth=0, hatch="/////", label="bubble")]
    if drawing.frames:
        marks.append(Patch(facecolor="none", edgecolor=INK, linewidth=FRAME, label="F and B overlap"))
    columns = 3 + -(-len(marks) // rows)
    blanks = [Patch(visible=False, label=" ")] * (columns * rows - len(handles) - len(marks))
    legend(figure, [*handles, *marks, *blanks], columns, ((_LEFT - 0.06) / whole[0], _FOOT / whole[1]), 8)
