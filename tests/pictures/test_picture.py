"""The figure: a rectangle an op where the timeline has it, numbers, frames, bubbles; the same bytes every time."""

import subprocess
import sys
from collections import Counter
from dataclasses import replace

import matplotlib as mpl
import pytest
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure

from dualpipe.schedule import COMPUTE, DOWN, UP, B, F, Kind, Op
from dualpipe.schedule.generate import generate
from dualpipe.timeline.chart import chart
from dualpipe.timeline.picture import draw, write
from dualpipe.timeline.simulate import simulate
from dualpipe.timeline.timeline import Span, Timeline
from tests.pictures.cases import TIMELINES


def collections(figure: Figure) -> dict[str, PolyCollection]:
    (axes,) = figure.axes
    return {found.get_gid(): found for found in axes.collections}


Box = tuple[int, float, float]
"""A rank, a start and an end."""
ROOM = 0.06
"""Units of time by which a drawn cell may be shorter than its op at each end, so that neighbours stand apart."""


def drawn(figure: Figure, gid: str) -> list[Box]:
    boxes = [path.get_extents() for path in collections(figure)[gid].get_paths()]
    return [(round((box.y0 + box.y1) / 2), float(box.x0), float(box.x1)) for box in boxes]


def near(a: Box, b: Box) -> bool:
    return a[0] == b[0] and abs(a[1] - b[1]) < ROOM and abs(a[2] - b[2]) < ROOM


def complaints(timeline: Timeline, figure: Figure) -> list[str]:
    """Where the rectangles of a figure are not the ops of a timeline."""
    found = {gid: drawn(figure, gid) for gid in collections(figure) if gid not in ("bubble", "overlap")}
    complaints = []
    for cell in chart(timeline).cells:
        rank, _, _, op = cell.at
        gid = f"{op.kind}{op.lane}{timeline.schedule.routes[op.lane][: op.stage].count(rank)}"
        box = next((box for box in found[gid] if near(box, (rank, cell.start, cell.end))), None)
        if box is None:
            complaints.append(f"missing {op} on rank {rank}")
        else:
            found[gid].remove(box)
    return complaints + [f"extra {gid} on rank {box[0]}" for gid, boxes in found.items() for box in boxes]


@pytest.fixture(params=TIMELINES)
def timeline(request):
    return TIMELINES[request.param]


def test_the_rectangles_are_the_compute_ops_of_the_timeline(timeline):
    figure = draw(timeline)
    assert complaints(timeline, figure) == []
    cells = sum(len(c.get_paths()) for gid, c in collections(figure).items() if gid not in ("bubble", "overlap"))
    assert cells == sum(placed.op.kind in COMPUTE for placed in timeline.schedule)


def test_a_missing_cell_and_one_of_another_kind_lane_or_time_are_noticed():
    timeline = TIMELINES["dualpipe"]
    spans = timeline.spans[0]

    def planted(*own: Span) -> list[str]:
        return complaints(timeline, draw(replace(timeline, spans=(own, *timeline.spans[1:]))))

    assert planted(*spans) == []
    assert planted(*spans[:-1]) == ["missing 0W4> on rank 0"]
    assert spans[0].ops == (Op(F, UP, 0, 0),)
    for kind, lane in ((B, UP), (F, DOWN)):
        other = spans[0]._replace(ops=(Op(kind, lane, 0, 0),))
        assert planted(other, *spans[1:]) == ["missing 0F0> on rank 0", f"extra {kind}{lane}0 on rank 0"]
    late = spans[0]._replace(start=0.2)
    assert planted(late, *spans[1:]) == ["missing 0F0> on rank 0", "extra F>0 on rank 0"]


def test_bubbles_and_frames_are_where_the_timeline_has_them():
    timeline = TIMELINES["dualpipe"]
    figure = draw(timeline)
    bubbles = drawn(figure, "bubble")
    assert sum(end - start for _, start, end in bubbles) == sum(timeline.bubble)
    assert {(1, 0.0, 1.0), (0, 10.0, 11.0)} <= set(bubbles)
    frames = drawn(figure, "overlap")
    overlaps = sum({F, B} <= {op.kind for op in slot} for program in timeline.schedule.programs for slot in program)
    assert len(frames) == overlaps
    assert (0, 7.0, 10.0) in frames


def numbers(figure: Figure) -> Counter[str]:
    return Counter(text.get_text() for text in figure.axes[0].texts)


def test_every_cell_has_the_number_of_its_microbatch():
    timeline = TIMELINES["dualpipe"]
    expected = Counter(str(placed.op.mb) for placed in timeline.schedule if placed.op.kind in COMPUTE)
    assert numbers(draw(timeline)) == expected


def words(figure: Figure) -> list[str]:
    (legend,) = figure.legends
    return [text.get_text() for text in figure.texts] + [text.get_text() for text in legend.get_texts()]


def test_the_caption_tells_name_sizes_makespan_and_bubble_and_the_legend_every_colour():
    said = words(draw(TIMELINES["dualpipe"]))
    assert said[:2] == [
        "dualpipe, 4 ranks, 10 microbatches",
        "makespan 32, bubble 6.2% of the ranks' time; costs F=1,B=1,W=1",
    ]
    names = ["F forward", "B backward", "W weights"]
    assert said[2:] == [f"{name}, lane {lane}" for name in names for lane in "><"] + ["bubble", "F and B overlap"]
    assert "F forward, stages 0–2" in words(draw(TIMELINES["dualpipev"]))
    assert "F forward" in words(draw(TIMELINES["zb1p"]))


def sizes(figure: Figure) -> set[float]:
    return {round(text.get_fontsize(), 2) for text in figure.axes[0].texts}


def test_numbers_shrink_and_are_left_out_where_they_would_be_too_small():
    """At 26 inches a unit of 1f1b's 4 ranks has room for 8.5 points up to some size, then for fewer, then for none."""
    large, small = draw(simulate(generate("1f1b", 4, 8))), draw(simulate(generate("1f1b", 4, 99)))
    assert sizes(large) == {8.5}
    assert 4 <= max(sizes(small)) < 8.5
    none = draw(simulate(generate("1f1b", 2, 300)))
    assert sizes(none) == set()
    assert "; 1800 numbers did not fit" in words(none)[1]


def test_a_figure_is_as_wide_as_its_ops_need_within_limits():
    inches = [draw(simulate(generate("1f1b", 2, m))).get_figwidth() for m in (2, 20, 300)]
    assert inches[0] < inches[1] < inches[2] < 27


def test_the_same_timeline_gives_the_same_bytes_whatever_the_users_settings(tmp_path):
    timeline = TIMELINES["dualpipe"]
    for form in ("svg", "png"):
        write(draw(timeline), tmp_path / "a", form)
        with mpl.rc_context({"svg.fonttype": "path", "font.size": 30, "hatch.linewidth": 5}):
            write(draw(timeline), tmp_path / "b", form)
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
        assert b"dc:date" not in (tmp_path / "a").read_bytes()


def test_drawing_leaves_no_global_state():
    """No pyplot, which keeps figures alive, and no change of matplotlib's settings."""
    before = dict(mpl.rcParams)
    draw(TIMELINES["zb1p"])
    assert dict(mpl.rcParams) == before
    code = "import sys, dualpipe.timeline.picture; print('matplotlib.pyplot' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert ran.stdout.strip() == "False"


def test_the_kinds_are_those_that_compute():
    gids = collections(draw(TIMELINES["dualpipe"])).keys() - {"bubble", "overlap"}
    assert {Kind(gid[0]) for gid in gids} == COMPUTE
