"""Schedules for hypothesis."""

from itertools import product

from hypothesis import strategies as st

from dualpipe.schedule import COLLECTIVES, COMPUTE, DOWN, MESSAGES, UP, WHOLE, Kind, Op, Schedule

NAMES = st.text(st.characters(exclude_categories=("C", "Z"), exclude_characters="#"), max_size=8)
NUMBERS = st.integers(0, 12) | st.integers(0, 999_999_999)


@st.composite
def schedules(draw, max_ranks=4, max_stages=5):
    """Any value that is a schedule, whether or not it makes sense: any lanes, ranks of stages, groups and peers.

    Each op is one choice among all that the schedule can have, since hypothesis takes long to make many choices.
    """
    ranks = draw(st.integers(1, max_ranks))
    stages = draw(st.integers(1, max_stages))
    lanes = draw(st.sampled_from([(UP,), (DOWN,), (UP, DOWN), (DOWN, UP)]))
    route = st.tuples(*[st.integers(0, ranks - 1)] * stages)
    numbers = draw(st.lists(NUMBERS, min_size=1, max_size=4, unique=True))
    groups = draw(st.lists(st.permutations(range(ranks)).flatmap(_some), max_size=2))
    chunks = list(product(lanes, range(stages)))

    def slot(kinds, peers):
        ops = {
            _valid(Op(kind, *chunk, mb, peer)): None for kind, chunk, mb, peer in product(kinds, chunks, numbers, peers)
        }
        return st.lists(st.sampled_from(list(ops)), min_size=1, max_size=4).map(tuple)

    any_slot = (
        slot(sorted(COMPUTE), [None])
        | slot(sorted(MESSAGES), [None, *numbers])
        | slot(sorted(COLLECTIVES), [None, *range(len(groups))])
    )
    program = st.lists(any_slot, max_size=6).map(tuple)
    return Schedule(
        {lane: draw(route) for lane in lanes},
        draw(st.tuples(*[program] * ranks)),
        draw(NAMES),
        groups,
    )


def _some(ranks):
    return st.integers(1, len(ranks)).map(lambda count: tuple(ranks[:count]))


def _valid(op):
    """The op; a collective without what its kind does not have."""
    if op.kind not in COLLECTIVES:
        return op
    return op._replace(mb=0 if op.kind in WHOLE else op.mb, peer=None if op.kind is Kind.RS else op.peer)
