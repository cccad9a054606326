"""Several timelines in one figure, one above the other on one time axis, each with the memory of its ranks below it.

::

    zbv: makespan 24.5, bubble 2.0%            the best first
    rank 0 | 0 | 1 | 2 |///|   ...
    rank 1 |///| 0 | 1 |[0 | 0   ]
    memory  _/¯¯¯\\__/¯¯\\_                       a curve for each rank, at one scale in all schedules
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from dualpipe.schedule import B, F, W
from dualpipe.timeline.chart import chart
from dualpipe.timeline.comparison import Candidate, Ranking
from dualpipe.timeline.palette import GROUND, INK, LIGHT, NAMES, colour
from dualpipe.timeline.picture import styled
from dualpipe.timeline.ranking_text import caption
from dualpipe.timeline.rows import FRAME, POINTS, legend, paint, scale

_CELL, _NARROWEST, _WIDEST = 0.17, 8.0, 26.0
"""Inches: what the median op gets where the figure's width allows, and the limits of the rows' width."""
_ROW, _MEMORY, _TITLE, _BETWEEN = 0.2, 0.55, 0.3, 0.16
"""Inches: a rank's row; the curves of memory; the title of a schedule; what stays free below it."""
_LEFT, _RIGHT, _TOP, _BOTTOM, _LEGEND_ROW, _FOOT = 0.85, 0.2, 0.62, 0.34, 0.17, 0.1
"""Inches: the margins around all schedules, what the legend has for a row, and what stays free below it."""
_WIDE, _THIN = 2.4, 0.8
"""Points: the curves of the first and the last rank, so that one shows below another that covers it."""
_LEGEND_ROWS = 3
_RANKS_NAMED = 16
"""Ranks that the legend names; of more, only the first and the last."""


def draw(ranking: Ranking, heading: str, note: str) -> Figure:
    """The figure of the candidates of a ranking, in its order, under a heading and a note.

    Each timeline is in axes of its own, labelled with its schedule's name; the axes of its memory are labelled with
    that name and ``memory``.  Frames, bubbles and numbers are those of ``dualpipe.timeline.picture``.
    """
    with styled():
        return _figure(ranking, heading, note)


def _figure(ranking: Ranking, heading: str, note: str) -> Figure:
    drawings = [chart(each.timeline) for each in ranking.candidates]
    longest = max((each.timeline.makespan for each in ranking.candidates), default=0.0) or 1.0
    lengths = [cell.end - cell.start for drawing in drawings for cell in drawing.cells if cell.end > cell.start]
    width = min(max(longest / median(lengths or [longest]) * _CELL, _NARROWEST), _WIDEST)
    heights = [len(each.timeline.spans) * _ROW for each in ranking.candidates]
    tones = max((len(drawing.tones) for drawing in drawings), default=1)
    block = _TITLE + _MEMORY + _BETWEEN
    whole = (
        _LEFT + width + _RIGHT,
        _TOP + sum(heights) + block * len(heights) + _BOTTOM + _LEGEND_ROWS * _LEGEND_ROW + _FOOT,
    )
    figure = Figure(figsize=whole, facecolor=GROUND)
    top = whole[1] - _TOP
    most = max((level for each in ranking.candidates for _, level in _levels(each)), default=0.0) or 1.0

    def axes(name: str, bottom: float, height: float) -> Axes:
        area = (_LEFT / whole[0], bottom / whole[1], width / whole[0], height / whole[1])
        return figure.add_axes(area, facecolor=GROUND, label=name)

    for number, (each, drawing, height) in enumerate(zip(ranking.candidates, drawings, heights, strict=True)):
        top -= _TITLE + height
        timeline = axes(each.name, top, height)
        left_out = paint(timeline, drawing, longest / (width * POINTS))
        scale(timeline, len(each.timeline.spans), longest)
        timeline.tick_params(axis="x", bottom=False, labelbottom=False)
        timeline.tick_params(axis="y", labelsize=6.5)
        timeline.set_xlabel("")
        timeline.set_title(_title(ranking, each, left_out), size=8.5, color=INK, loc="left", pad=4)
        top -= _MEMORY
        last = number + 1 == len(heights)
        _memory(axes(f"{each.name} memory", top, _MEMORY), each, longest, most, ranking.limits.activations, last)
        top -= _BETWEEN
    left = _LEFT / whole[0]
    figure.text(left, 1 - 0.26 / whole[1], heading, size=11, weight="bold", color=INK, va="baseline")
    figure.text(left, 1 - 0.46 / whole[1], note, size=8, color=INK, va="baseline")
    _legend(figure, ranking.candidates, tones, any(drawing.frames for drawing in drawings), whole)
    return figure


def _title(ranking: Ranking, each: Candidate, left_out: int) -> str:
    return caption(ranking, each) + (f", {left_out} numbers have no room" if left_out else "")


def _levels(each: Candidate) -> list[tuple[float, float]]:
    return [level for rank in range(len(each.timeline.spans)) for level in each.memory(rank)]


def _memory(axes: Axes, each: Candidate, longest: float, most: float, limit: float | None, last: bool) -> None:
    """A curve for each rank."""
    ranks = len(each.timeline.spans)
    for rank in range(ranks):
        curve = dict(
            each.memory(rank)
        )  # the last level of each time: a release and the allocation after it are one step
        place = rank / max(ranks - 1, 1)
        (line,) = axes.plot(list(curve), list(curve.values()), drawstyle="steps-post", gid=f"rank {rank}")
        line.set(color=_of_rank(rank, ranks), linewidth=_WIDE + (_THIN - _WIDE) * place)
    if limit is not None and each.sizes is None:
        axes.axhline(limit, color=INK, linewidth=0.8, linestyle="--", gid="limit")
    axes.set_xlim(0, longest)
    axes.set_ylim(0, most * 1.08)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=12, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=3, integer=each.sizes is None))
    axes.tick_params(axis="both", labelsize=6.5, length=2.5, colors=INK, labelbottom=last)
    axes.set_ylabel("bytes" if each.sizes else "live", size=6.5, color=INK, labelpad=2)
    if last:
        axes.set_xlabel("time", size=7.5, color=INK, loc="right", labelpad=1)
    axes.grid(axis="x", color=LIGHT.hatch, linewidth=0.4)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("bottom", "left"):
        axes.spines[side].set_color(LIGHT.hatch)


def _of_rank(rank: int, ranks: int) -> tuple[float, float, float, float]:
    return colormaps["viridis"](0.9 * rank / max(ranks - 1, 1))


def _legend(
    figure: Figure, candidates: Sequence[Candidate], tones: int, framed: bool, whole: tuple[float, float]
) -> None:
    """Kinds and tones, marks, then the curves' ranks."""
    which = ("lane > or first stage", "lane < or second stage")
    handles: list[Patch | Line2D] = [
        Patch(
            facecolor=colour(kind, tone, tones),
            label=f"{kind} {NAMES[kind]}" + (f", {which[tone]}" if tones == len(which) else ""),
        )
        for tone in range(tones)
        for kind in (F, B, W)
    ]
    marks: list[Patch | Line2D] = [
        Patch(facecolor=LIGHT.faint, edgecolor=LIGHT.hatch, linewidth=0, hatch="/////", label="bubble")
    ]
    if framed:
        marks.append(Patch(facecolor="none", edgecolor=INK, linewidth=FRAME, label="F and B overlap"))
    ranks = len(candidates[0].timeline.spans) if candidates else 0
    shown = range(ranks) if ranks <= _RANKS_NAMED else (0, ranks - 1)
    lines = [Line2D([], [], color=_of_rank(rank, ranks), label=f"rank {rank}") for rank in shown]
    blanks = [Patch(visible=False, label=" ")] * (-(len(handles) + len(marks)) % _LEGEND_ROWS)
    every = [*handles, *marks, *blanks, *lines]
    corner = ((_LEFT - 0.06) / whole[0], _FOOT / whole[1])
    legend(figure, every, -(-len(every) // _LEGEND_ROWS), corner, 7.5)
