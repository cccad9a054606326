"""The drawing of a timeline: a cell an op, frames, gaps and tones.

rank 0   | 0F0> |......| 0B0> 0W0> |           a slot's time is divided among its ops; .. is a gap
"""

from collections import Counter

import pytest

from dualpipe.schedule import COMPUTE, DOWN, UP, B, F, W
from dualpipe.schedule.generate import generate
from dualpipe.schedule.text import loads
from dualpipe.timeline.chart import Tone, chart, named, tones
from dualpipe.timeline.simulate import simulate
from dualpipe.timeline.summary import parse_costs
from tests.pictures.cases import TIMELINES


@pytest.fixture(params=TIMELINES)
def timeline(request):
    return TIMELINES[request.param]


def test_every_compute_op_has_one_cell(timeline):
    computes = [placed for placed in timeline.schedule if placed.op.kind in COMPUTE]
    assert [cell.at for cell in chart(timeline).cells] == computes


def test_cells_and_gaps_fill_each_rank_from_0_to_the_makespan(timeline):
    drawing = chart(timeline)
    for rank in range(timeline.schedule.ranks):
        cells = [(cell.start, cell.end) for cell in drawing.cells if cell.at.rank == rank]
        gaps = [(gap.start, gap.end) for gap in drawing.gaps if gap.rank == rank]
        reached = 0.0
        for start, end in sorted(cells + gaps):
            assert start == pytest.approx(reached)
            assert end >= start
            reached = end
        assert reached == pytest.approx(timeline.makespan)
        assert sum(end - start for start, end in gaps) == pytest.approx(timeline.bubble[rank])


def test_the_ops_of_a_slot_share_its_time_by_cost():
    schedule = loads("lane > 0\nlane < 0\nrank 0: 0F0> 0F0<+0B0>+0W0> 0B0<+0W0<\n")
    cells = chart(simulate(schedule, parse_costs("F=1,B=2,W=1,FB=2"))).cells
    assert [(str(cell.at.op), cell.start, cell.end) for cell in cells] == [
        ("0F0>", 0, 1),
        ("0F0<", 1, 1.5),
        ("0B0>", 1.5, 2.5),
        ("0W0>", 2.5, 3),
        ("0B0<", 3, 5),
        ("0W0<", 5, 6),
    ]


def test_a_full_backward_with_a_cost_of_its_own_keeps_the_share_of_b_and_w():
    cells = chart(simulate(loads("lane > 0\nrank 0: 0F0> 0B0>+0W0>\n"), parse_costs("F=1,B=2,W=1,BW=6"))).cells
    assert [(cell.start, cell.end) for cell in cells] == [(0, 1), (1, 5), (5, 7)]


def test_what_overlaps_is_framed_and_what_does_not_is_not():
    timeline = TIMELINES["dualpipe"]
    overlapping = [
        (rank, number)
        for rank, program in enumerate(timeline.schedule.programs)
        for number, slot in enumerate(program)
        if {F, B} <= {op.kind for op in slot}
    ]
    frames = chart(timeline).frames
    assert len(frames) == len(overlapping) > 10
    assert {frame.end - frame.start for frame in frames} == {3}
    assert chart(TIMELINES["zb1p"]).frames == ()


def test_a_full_backward_joins_its_w_and_a_split_one_does_not():
    timeline = TIMELINES["dualpipe"]
    drawing = chart(timeline)
    whole = sum({B, W} <= {op.kind for op in slot} for program in timeline.schedule.programs for slot in program)
    assert len(drawing.wholes) == whole > 10
    for b, w in drawing.wholes.items():
        assert w.at.op == b.op._replace(kind=W)
        assert w.at.slot == b.slot
    assert chart(TIMELINES["zb1p"]).wholes == {}


def test_two_lanes_are_two_tones_and_so_are_the_two_ways_of_a_v():
    assert chart(TIMELINES["dualpipe"]).tones == {Tone(UP, 0): (0, 1, 2, 3), Tone(DOWN, 0): (0, 1, 2, 3)}
    assert chart(TIMELINES["dualpipev"]).tones == {Tone(UP, 0): (0, 1, 2), Tone(UP, 1): (3, 4, 5)}
    assert list(chart(TIMELINES["three chunks per rank"]).tones.values()) == [(0, 1), (2, 3), (4, 5)]
    assert list(chart(TIMELINES["zb1p"]).tones) == [Tone(UP, 0)]


def test_dualpipe_runs_as_much_in_one_tone_as_in_the_other():
    schedule = generate("dualpipe", 4, 8)
    lanes = Counter(cell.at.op.lane for cell in chart(simulate(schedule)).cells)
    assert lanes[UP] == lanes[DOWN] == 3 * 4 * 4


@pytest.mark.parametrize(
    ("routes", "names"),
    [
        ("lane > 0 1", ("",)),
        ("lane > 0 1\nlane < 1 0", ("lane >", "lane <")),
        ("lane > 0 1 1 0", ("stages 0–1", "stages 2–3")),
        ("lane > 0 1 1 0\nlane < 1 0 0 1", [f"lane {lane}, stages {half}" for lane in "><" for half in ("0–1", "2–3")]),
    ],
)
def test_a_tone_is_named_by_what_tells_it_from_the_others(routes, names):
    assert named(tones(loads(f"{routes}\nrank 0:\nrank 1:\n"))) == tuple(names)
