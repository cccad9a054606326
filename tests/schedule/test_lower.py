"""Messages for an order that has none: matched on every channel, and free of deadlock where every slot blocks."""

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dualpipe.schedule import COMPUTE, DOWN, RB, RECEIVES, RF, SB, SF, UP, B, F, Op, Schedule, W
from dualpipe.schedule.generate import PLANS, generate
from dualpipe.schedule.lower import OrderError, lower
from dualpipe.schedule.text import dumps, loads
from dualpipe.schedule.torch_table import load_csv
from dualpipe.timeline.simulate import simulate
from tests.schedule import torch_tables
from tests.schedule.rendezvous import mismatches, stuck, unordered

SIZES = [(2, 4), (4, 8), (4, 12), (6, 14), (8, 16)]


def check(lowered: Schedule, order: Schedule) -> None:
    """The computes are those of the order, and the messages are right."""
    assert lowered.only(COMPUTE) == order
    assert mismatches(lowered) == []
    assert unordered(lowered) == []
    assert stuck(lowered) == {}
    simulate(lowered, blocking=True)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", PLANS)
def test_named_schedules(name, size):
    order = generate(name, *size).only(COMPUTE)
    check(lower(order), order)


@pytest.mark.parametrize("name", torch_tables.CLASSES)
def test_tables_of_torch(name):
    lowered = load_csv(torch_tables.path(name))
    check(lowered, lowered.only(COMPUTE))


@st.composite
def orders(draw):
    """Any complete order that can be run: computes picked at random among those whose needs are over."""
    ranks, stages, microbatches = draw(st.integers(1, 4)), draw(st.integers(1, 5)), draw(st.integers(1, 4))
    lanes = draw(st.sampled_from([(UP,), (UP, DOWN)]))
    routes = {lane: tuple(draw(st.integers(0, ranks - 1)) for _ in range(stages)) for lane in lanes}
    pick = random.Random(draw(st.integers(0, 10**6)))
    empty = Schedule(routes, ((),) * ranks)
    left = [
        Op(kind, lane, s, mb)
        for kind in (F, B, W)
        for lane in lanes
        for s in range(stages)
        for mb in range(microbatches)
    ]
    over: set[Op] = set()
    programs: list[list] = [[] for _ in range(ranks)]

    def ready(op: Op) -> bool:
        before = {Op(F, op.lane, op.stage - 1, op.mb)} if op.kind is F and op.stage else set()
        if op.kind is B:
            before = {Op(F, op.lane, op.stage, op.mb)}
            before |= {Op(B, op.lane, op.stage + 1, op.mb)} if op.stage < stages - 1 else set()
        if op.kind is W:
            before = {Op(B, op.lane, op.stage, op.mb)}
        return before <= over

    while left:
        op = pick.choice([op for op in left if ready(op)])
        slot = (op, op._replace(kind=W)) if op.kind is B and pick.random() < 0.5 else (op,)
        programs[empty.rank_of(op)].append(slot)
        over.update(slot)
        left = [op for op in left if op not in over]
    return replace(empty, programs=tuple(map(tuple, programs)))


@given(orders())
def test_any_order_that_can_be_run(order):
    check(lower(order), order)


def test_a_message_stands_right_where_its_producer_ends():
    order = loads("lane > 0 1\nrank 0: 0F0> 0F1> 0B0>+0W0>\nrank 1: 1F0> 1B0>+1W0>")
    assert dumps(lower(order)).splitlines()[1:] == [
        "rank 0: 0F0> 0SF0> 0F1> 0RB0> 0B0>+0W0>",
        "rank 1: 1RF0> 1F0> 1B0>+1W0> 1SB0>",
    ]


def test_neighbouring_messages_are_one_slot_and_nothing_is_sent_at_a_turn():
    order = loads("lane > 0 1 1 0\nrank 0: 0F0> 0F1> 3F0>\nrank 1: 1F0> 2F0>")
    assert dumps(lower(order)).splitlines()[1:] == [
        "rank 0: 0F0> 0SF0> 0F1> 3RF0> 3F0>",
        "rank 1: 1RF0> 1F0> 2F0> 2SF0>",
    ]


def test_an_order_need_not_be_complete():
    assert dumps(lower(loads("lane > 0 1\nrank 0: 0F0>\nrank 1:"))) == "lane > 0 1\nrank 0: 0F0>\nrank 1:\n"


def greedy(order: Schedule) -> Schedule:
    """Before each compute one batch: send what was just produced, receive what comes next.  This is the wrong rule."""
    programs = []
    for program in order.programs:
        slots, sends = [], []
        for slot in program:
            receives = [need for op in slot for need in order.needs(op) if need.kind in RECEIVES]
            if sends or receives:
                slots.append((*sends, *receives))
            slots.append(slot)
            made = [op._replace(kind=SF if op.kind is F else SB) for op in slot if op.kind is not W]
            sends = [send for send in made if order.crosses(send)]
        programs.append((*slots, tuple(sends)) if sends else tuple(slots))
    return replace(order, programs=tuple(programs))


@pytest.mark.parametrize("name", torch_tables.CLASSES)
def test_the_greedy_rule_hangs_on_the_tables_of_torch(name):
    """The control of the checks above, and the reason for the total order."""
    assert stuck(greedy(load_csv(torch_tables.path(name)).only(COMPUTE)))


@pytest.mark.parametrize("name", torch_tables.CLASSES)
def test_two_messages_swapped_are_seen(name):
    lowered = load_csv(torch_tables.path(name))
    program = list(lowered.programs[1])
    first, second = [n for n, slot in enumerate(program) if slot[0].kind is RF or slot[0].kind is RB][:2]
    program[first], program[second] = program[second], program[first]
    swapped = replace(lowered, programs=(lowered.programs[0], tuple(program), *lowered.programs[2:]))
    assert mismatches(swapped)
    assert unordered(swapped)


IMPOSSIBLE = {
    "later on the same rank": (
        "lane > 0 1\nrank 0: 0B0> 0F0>\nrank 1: 1F0> 1B0>",
        "rank 0 stops in slot 0: 0B0> needs 0F0>, which it runs later, in slot 1, "
        "rank 1 stops in slot 0: 1F0> needs 0F0>, which is in slot 1 of rank 0",
    ),
    "nobody runs it": (
        "lane > 0 1\nrank 0: 0F0> 0B0>\nrank 1: 1F0>",
        "rank 0 stops in slot 1: 0B0> needs 1B0>, which no rank runs",
    ),
    "two ranks wait for each other": (
        "lane > 0 1\nlane < 1 0\nrank 0: 1F0< 0F0>\nrank 1: 1F0> 0F0<",
        "rank 0 stops in slot 0: 1F0< needs 0F0<, which is in slot 1 of rank 1, "
        "rank 1 stops in slot 0: 1F0> needs 0F0>, which is in slot 1 of rank 0",
    ),
    "the wrong way round within a slot": (
        "lane > 0\nrank 0: 0F0> 0W0>+0B0>",
        "rank 0 stops in slot 1: 0W0> needs 0B0>, which it runs later, in slot 1",
    ),
}


@pytest.mark.parametrize("what", IMPOSSIBLE)
def test_an_order_that_cannot_be_run_names_where_each_rank_stops(what):
    text, got = IMPOSSIBLE[what]
    with pytest.raises(OrderError) as error:
        lower(loads(text))
    assert error.value.got == got
    assert error.value.at == error.value.blocked[0].at


def test_of_many_ranks_that_stop_a_few_are_told():
    ranks = range(20)
    text = f"lane > {' '.join(map(str, ranks))}\n" + "\n".join(f"rank {r}: {r}F0>" if r else "rank 0:" for r in ranks)
    with pytest.raises(OrderError, match=r"rank 8 stops in slot 0: 8F0> .*, and so do 11 more ranks;") as error:
        lower(loads(text))
    assert len(error.value.blocked) == 19


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "lane > 0 1\nrank 0: 0F0> 0SF0>\nrank 1:",
            "messages are added to an order that has none: slot 1 of rank 0 has 0SF0>",
        ),
        ("lane > 0 1\nrank 0: 0F0>\nrank 1: 0F1>", "rank 1 runs 0F1>, and stage 0 of lane > is on rank 0"),
        ("lane > 0\nrank 0: 0F0> 0F0>", "a compute runs once: rank 0 runs 0F0> twice"),
    ],
)
def test_what_is_no_order_of_computes_is_refused(text, message):
    with pytest.raises(OrderError) as error:
        lower(loads(text))
    assert message in str(error.value)
