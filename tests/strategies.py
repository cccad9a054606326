"""Schedules for hypothesis."""

from hypothesis import strategies as st

from dualpipe.schedule import COLLECTIVES, COMPUTE, DOWN, MESSAGES, UP, WHOLE, Kind, Op, Schedule

NAMES = st.text(st.characters(exclude_categories=("C", "Z"), exclude_characters="#"), max_size=8)
NUMBERS = st.integers(0, 12) | st.integers(0, 999_999_999)


@st.composite
def schedules(draw, max_ranks=4, max_stages=5):
    """Any value that is a schedule, whether or not it makes sense: any lanes, ranks of stages, groups and peers."""
    ranks = draw(st.integers(1, max_ranks))
    stages = draw(st.integers(1, max_stages))
    lanes = draw(st.sampled_from([(UP,), (DOWN,), (UP, DOWN), (DOWN, UP)]))
    route = st.tuples(*[st.integers(0, ranks - 1)] * stages)
    stage = st.integers(0, stages - 1)
    lane = st.sampled_from(lanes)
    compute = st.builds(Op, st.sampled_from(sorted(COMPUTE)), lane, stage, NUMBERS, st.none())
    message = st.builds(Op, st.sampled_from(sorted(MESSAGES)), lane, stage, NUMBERS, st.none() | NUMBERS)
    groups = draw(st.lists(st.permutations(range(ranks)).flatmap(_some), max_size=2))
    number = st.none() | st.integers(0, len(groups) - 1) if groups else st.none()
    collective = st.builds(Op, st.sampled_from(sorted(COLLECTIVES)), lane, stage, NUMBERS, number).map(_valid)
    slot = st.lists(compute | message | collective, min_size=1, max_size=4).map(_of_one_sort)
    program = st.lists(slot.map(tuple), max_size=6).map(tuple)
    return Schedule(
        {lane: draw(route) for lane in lanes},
        draw(st.tuples(*[program] * ranks)),
        draw(NAMES),
        groups,
    )


def _some(ranks):
    return st.integers(1, len(ranks)).map(lambda count: tuple(ranks[:count]))


def _valid(op):
    """A collective without what its kind does not have."""
    return op._replace(mb=0 if op.kind in WHOLE else op.mb, peer=None if op.kind is Kind.RS else op.peer)


def _of_one_sort(ops):
    """The ops of the sort of the first one."""
    sort = next(kinds for kinds in (COMPUTE, MESSAGES, COLLECTIVES) if ops[0].kind in kinds)
    return [op for op in ops if op.kind in sort]
