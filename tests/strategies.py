"""Schedules for hypothesis."""

from hypothesis import strategies as st

from dualpipe.schedule import COMPUTE, DOWN, MESSAGES, UP, Op, Schedule

NAMES = st.text(st.characters(exclude_categories=("C", "Z"), exclude_characters="#"), max_size=8)
NUMBERS = st.integers(0, 12) | st.integers(0, 999_999_999)


@st.composite
def schedules(draw, max_ranks=4, max_stages=5):
    """Any value that is a schedule, whether or not it makes sense: any lanes and placement, peers of any rank."""
    ranks = draw(st.integers(1, max_ranks))
    stages = draw(st.integers(1, max_stages))
    lanes = draw(st.sampled_from([(UP,), (DOWN,), (UP, DOWN), (DOWN, UP)]))
    route = st.tuples(*[st.integers(0, ranks - 1)] * stages)
    stage = st.integers(0, stages - 1)
    lane = st.sampled_from(lanes)
    compute = st.builds(Op, st.sampled_from(sorted(COMPUTE)), lane, stage, NUMBERS, st.none())
    message = st.builds(Op, st.sampled_from(sorted(MESSAGES)), lane, stage, NUMBERS, st.none() | NUMBERS)
    slot = st.lists(compute, min_size=1, max_size=4) | st.lists(message, min_size=1, max_size=4)
    program = st.lists(slot.map(tuple), max_size=6).map(tuple)
    return Schedule(
        {lane: draw(route) for lane in lanes},
        draw(st.tuples(*[program] * ranks)),
        draw(NAMES),
    )
