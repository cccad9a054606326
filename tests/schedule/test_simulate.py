"""Timelines drawn by hand, published bubbles and peaks, and schedules that cannot finish."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dualpipe.schedule import COMPUTE, UP, F, Op, Schedule
from dualpipe.schedule.generate import NAMES, dualpipe, dualpipev, generate, one_f_one_b, zb1p
from dualpipe.schedule.text import loads
from dualpipe.timeline.simulate import CostError, Costs, Stuck, Timeline, simulate
from tests.schedule.spans import spans
from tests.strategies import schedules

SIZES = [(2, 4), (2, 10), (4, 8), (4, 16), (6, 12), (8, 16), (8, 32), (16, 32)]
LATE_BACKWARD = Costs(B=2, BW=2)  # B takes as long as the full backward


# time     0    1    2    3    4    5    6    7    8
# rank 0   0F0  0F1  .    .    0B0+0W0   .    .    (0B1+0W1 to 9)
# rank 1   .    1F0  1B0+1W0   1F1  1B1+1W1   .
def test_1f1b_of_two_ranks_as_drawn():
    timeline = simulate(one_f_one_b(2, 2))
    assert spans(timeline, 0) == [("0F0>", 0, 1), ("0F1>", 1, 2), ("0B0>+0W0>", 4, 6), ("0B1>+0W1>", 7, 9)]
    assert spans(timeline, 1) == [("1F0>", 1, 2), ("1B0>+1W0>", 2, 4), ("1F1>", 4, 5), ("1B1>+1W1>", 5, 7)]
    assert timeline.makespan == 9
    assert timeline.busy == (6, 6)
    assert timeline.bubble == (3, 3)
    assert timeline.bubble_share == 6 / 18


PING = loads("lane > 0 1\nrank 0: 0F0> 0SF0> 0F1>\nrank 1: 1RF0> 1F0>")
LATE = loads("lane > 0 1\nlane < 1 0\nrank 0: 0F0> 0SF0> 0F1>\nrank 1: 0F0< 0F1< 0F2< 1RF0> 1F0>")


def test_a_message_is_there_a_latency_after_both_sides_have_posted_it():
    timeline = simulate(PING, Costs(latency=0.5))
    assert spans(timeline, 1) == [("1F0>", 1.5, 2.5)]
    (message,) = timeline.messages
    assert (message.sent, message.awaited, message.completed) == (1, 0, 1.5)
    assert spans(simulate(LATE, Costs(latency=0.5)), 1)[-1] == ("1F0>", 3.5, 4.5)


def test_a_sender_goes_on_unless_its_slots_block():
    assert spans(simulate(LATE), 0) == [("0F0>", 0, 1), ("0F1>", 1, 2)]
    assert spans(simulate(LATE, blocking=True), 0) == [("0F0>", 0, 1), ("0F1>", 3, 4)]


def test_a_message_is_received_no_earlier_than_its_receive_is_posted():
    # sent at 1; rank 1 posts its receive after two computes of its own, at 2
    late = loads("lane > 0 1\nlane < 1 0\nrank 0: 0F0> 0SF0>\nrank 1: 0F0< 0F1< 1RF0> 1F0>\n")
    for way in ({}, {"eager": True}, {"blocking": True}):
        (message,) = simulate(late, **way).messages
        assert (message.sent, message.awaited, message.completed) == (1, 2, 2), way


def test_an_eager_message_sets_out_when_it_is_sent():
    assert spans(simulate(LATE, Costs(latency=0.5), eager=True), 1)[-1] == ("1F0>", 3, 4)
    assert spans(simulate(LATE, Costs(latency=2.5), eager=True), 1)[-1] == ("1F0>", 3.5, 4.5)


def test_a_compute_waits_only_for_what_it_needs():
    schedule = loads("lane > 0 1\nlane < 1 0\nrank 0: 0F0> 0F1> 0F2> 0SF0>\nrank 1: 1RF0> 0F0< 1F0>")
    assert spans(simulate(schedule), 1) == [("0F0<", 0, 1), ("1F0>", 3, 4)]


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_dualpipe_takes_3_m_plus_p_minus_2(size):
    """F = B = W = 1 and no credit for the overlap; the same where every message slot blocks."""
    ranks, microbatches = size
    for blocking in (False, True):
        assert simulate(dualpipe(*size), blocking=blocking).makespan == 3 * microbatches + ranks - 2


@pytest.mark.parametrize("late", ["tail", "all"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_late_w_takes_3_m_plus_half_p_minus_1_and_gains_nothing_where_message_slots_block(size, late):
    ranks, microbatches = size
    schedule = dualpipe(*size, late_w=late)
    assert simulate(schedule).makespan == 3 * microbatches + ranks // 2 - 1
    assert simulate(schedule, blocking=True).makespan == 3 * microbatches + ranks - 2
    assert simulate(dualpipev(*size, late_w=late)).makespan == 6 * microbatches + ranks - 1


@pytest.mark.parametrize("size", [size for size in SIZES if size[0] > 2], ids=str)
def test_dualpipe_whose_b_takes_as_long_as_a_full_backward(size):
    """6H+5N-5, the end of rank 0: with B = 2 the cool-down of B and W apart grows by 3(P/2 - 1) over 3M+P-2."""
    ranks, microbatches = size
    for blocking in (False, True):
        makespan = simulate(dualpipe(*size), LATE_BACKWARD, blocking=blocking).makespan
        assert makespan == 3 * microbatches + 5 * ranks // 2 - 5


@pytest.mark.parametrize(("size", "makespan"), [((4, 16), 51), ((8, 16), 55), ((8, 32), 103), ((16, 64), 207)], ids=str)
def test_zb1p(size, makespan):
    assert simulate(zb1p(*size)).makespan == makespan


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_bubble_of_1f1b_is_p_minus_1_forwards_and_backwards(size):
    """arXiv 2104.04473, section 2.2."""
    costs = Costs(F=1, B=1.25, W=0.5)
    timeline = simulate(one_f_one_b(*size), costs)
    assert timeline.bubble == ((size[0] - 1) * 2.75,) * size[0]


def published_bubble(ranks: int, costs: Costs) -> float:
    """(P/2-1)(F&B + B - 3W), B the full backward: the README of https://github.com/deepseek-ai/DualPipe."""
    overlapped = costs.F + costs.backward if costs.FB is None else costs.FB
    return (ranks / 2 - 1) * (overlapped + costs.backward - 3 * costs.W)


EXACT = [Costs(), Costs(W=0.5), Costs(F=2, B=2, W=1), Costs(FB=2.5), Costs(F=2, B=2, W=2, FB=5)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("costs", EXACT, ids=str)
def test_published_bubble_of_dualpipe_is_exact_where_b_takes_as_long_as_f_and_w_no_longer(size, costs):
    assert max(simulate(dualpipe(*size), costs).bubble) == published_bubble(size[0], costs)


@pytest.mark.parametrize("size", [size for size in SIZES if size[0] > 2], ids=str)
def test_published_bubble_of_dualpipe_is_off_elsewhere(size):
    """It says too much where B takes longer than F, and too little where W does."""
    longer_b, longer_w = Costs(B=1.5), Costs(W=1.5)
    assert max(simulate(dualpipe(*size), longer_b).bubble) < published_bubble(size[0], longer_b)
    assert max(simulate(dualpipe(*size), longer_w).bubble) > published_bubble(size[0], longer_w)


LATENCY = [
    # ranks, microbatches, blocking batches, waits at use, waits at use and eager messages; latency F/2
    (4, 8, 32, 31.5, 30.5),
    (4, 16, 60, 59.5, 57.5),
    (8, 32, 124, 122.5, 121),
]


@pytest.mark.parametrize(("ranks", "microbatches", "blocking", "at_use", "eager"), LATENCY)
def test_latency_costs_less_the_less_is_waited_for(ranks, microbatches, blocking, at_use, eager):
    schedule, costs = dualpipe(ranks, microbatches), Costs(latency=0.5)
    assert simulate(schedule, costs, blocking=True).makespan == blocking
    assert simulate(schedule, costs).makespan == at_use
    assert simulate(schedule, costs, eager=True).makespan == eager


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_peak_activations(size):
    ranks = size[0]
    assert simulate(dualpipe(*size)).peak_activations == (ranks + 1,) * ranks
    assert simulate(dualpipev(*size)).peak_activations == (2 * ranks + 1,) * ranks
    assert simulate(one_f_one_b(*size)).peak_activations == tuple(range(ranks, 0, -1))
    assert simulate(zb1p(*size)).peak_activations == (ranks,) * ranks


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_pending_w(size):
    ranks = size[0]
    assert simulate(dualpipe(*size)).peak_pending_w == tuple(min(r, ranks - 1 - r) + 1 for r in range(ranks))
    assert simulate(dualpipev(*size)).peak_pending_w == tuple(range(1, ranks + 1))
    assert simulate(one_f_one_b(*size)).peak_pending_w == (0,) * ranks
    assert simulate(zb1p(*size)).peak_pending_w == tuple(range(1, ranks + 1))


def test_inside_a_slot_what_is_allocated_counts_before_what_is_released():
    timeline = simulate(loads("lane > 0\nrank 0: 0F0> 0F1>+0B0>+0W0> 0B1> 0F2> 0B2>+0W1> 0W2>"))
    assert timeline.peak_activations == (2,)
    assert timeline.peak_pending_w == (2,)


@given(
    st.sampled_from([generate(name, 4, 8) for name in NAMES]),
    st.builds(Costs, *[st.floats(0, 10)] * 3, st.none() | st.floats(0, 10), st.none(), st.floats(0, 3)),
    st.booleans(),
)
def test_a_timeline_keeps_every_rule(schedule, costs, blocking):
    timeline = simulate(schedule, costs, blocking=blocking)
    over = {}
    for found in timeline.spans:
        assert all(a.end <= b.start for a, b in pairwise(found))
        assert tuple(span.ops for span in found) == schedule.programs[timeline.spans.index(found)]
        over |= {op: span.end for span in found for op in span.ops}
    there = {message.receive.op: message.completed for message in timeline.messages}
    for found in timeline.spans:
        for span in (span for span in found if span.ops[0].kind in COMPUTE):
            for need in {need for op in span.ops for need in schedule.needs(op)} - set(span.ops):
                assert there.get(need, over[need]) <= span.start
    for message in timeline.messages:
        assert message.completed == max(message.sent, message.awaited) + costs.latency
        assert schedule.needs(message.receive.op) == (message.send.op,)
    assert simulate(schedule, costs, eager=True).makespan <= simulate(schedule, costs).makespan
    assert simulate(schedule, costs).makespan <= simulate(schedule, costs, blocking=True).makespan


def slot_cost(costs: Costs, text: str) -> float:
    schedule = loads(f"lane > 0\nlane < 0\nrank 0: {text}")
    return costs.slot(schedule.programs[0][0])


def test_what_a_slot_costs():
    costs = Costs(F=1, B=2, W=3)
    assert [slot_cost(costs, text) for text in ("0F0>", "0B0>", "0W0>")] == [1, 2, 3]
    assert slot_cost(costs, "0B0>+0W0>") == 5
    assert slot_cost(costs, "0F0<+0B0>+0W0>") == 6


def test_a_full_backward_may_cost_less_than_its_parts():
    costs = Costs(F=1, B=2, W=1, BW=2)
    assert slot_cost(costs, "0B0>+0W0>") == 2
    assert slot_cost(costs, "0B1>+0W0>") == 3  # another microbatch's W: no full backward
    assert slot_cost(costs, "0F0<+0B0>+0W0>") == 3


def test_an_overlapped_slot_has_its_credit_also_where_w_is_left_for_later():
    costs = Costs(F=1, B=1, W=2, FB=3)
    assert slot_cost(costs, "0F0<+0B0>+0W0>") == 3
    assert slot_cost(costs, "0F0<+0B0>") == 1.5
    assert slot_cost(costs, "0B0>+0W0>") == 3


def test_each_stage_may_have_costs_of_its_own():
    costs = Costs(stages=(Costs(1, 2, 3), Costs(10, 20, 30, BW=40)), FB=2.4, latency=0.5)
    schedule = loads("lane > 0 1\nrank 0: 0F0> 0SF0>+0RB0> 0B0> 0W0>\nrank 1: 1RF0> 1F0> 1B0>+1W0> 1SB0>")
    timeline = simulate(schedule, costs)
    assert timeline.busy == (1 + 2 + 3, 10 + 40)
    assert timeline.makespan == 1 + 0.5 + 10 + 40 + 0.5 + 2 + 3
    assert costs.times(2).of(Op(F, UP, 1, 0)).backward == 80
    overlapped = loads("lane > 0 0\nrank 0: 0F0> 1F0> 1B0>+1W0>+0F1>").programs[0][-1]
    assert costs.slot(overlapped) == (40 + 1) * 2.4 / 3


def test_costs_of_single_stages_are_given_for_each_stage():
    with pytest.raises(CostError, match=r"given for each stage: got 1 for 4 stages; give one for each"):
        simulate(one_f_one_b(4, 8), Costs(stages=(Costs(),)))


@pytest.mark.parametrize(
    "bad", [{"F": -1}, {"W": math.nan}, {"latency": math.inf}, {"F": 1e308}, {"F": 0, "B": 0, "W": 0, "FB": 1}]
)
def test_a_cost_that_cannot_be_is_refused(bad):
    with pytest.raises(CostError, match=r"a cost must be a number from 0 to 1e\+100|FB needs computes that take time"):
        Costs(**bad)


BOTH_SEND_FIRST = """lane > 0 1
lane < 1 0
rank 0: 0F0> 0SF0> 1RF0< 1F0<
rank 1: 0F0< 0SF0< 1RF0> 1F0>"""


def test_both_sending_first_hangs_only_where_slots_block():
    assert simulate(loads(BOTH_SEND_FIRST)).makespan == 2
    with pytest.raises(Stuck) as error:
        simulate(loads(BOTH_SEND_FIRST), blocking=True)
    assert error.value.got == (
        "rank 0 in slot 1 waits for rank 1 to post the partner of 0SF0>, "
        "rank 1 in slot 1 waits for rank 0 to post the partner of 0SF0<"
    )


STUCK = {
    "a send that nobody receives": (
        "lane > 0 1\nrank 0: 0F0> 0SF0>\nrank 1:",
        "rank 0 in slot 1 waits for rank 1 to post the partner of 0SF0>",
    ),
    "a receive that nobody sends": (
        "lane > 0 1\nrank 0:\nrank 1: 1RF0> 1F0>",
        "rank 1 in slot 0 waits for rank 0 to post the partner of 1RF0>",
    ),
    "a message beyond the lane": (
        "lane > 0\nrank 0: 0F0> 0SF0>",
        "rank 0 in slot 1 waits for the partner of 0SF0>, and there is no rank at the other end",
    ),
    "a message to a rank that is not there": (
        "lane > 0 1\nrank 0: 0F0> 0SF0>@9\nrank 1:",
        "rank 0 in slot 1 waits for the partner of 0SF0>@9, and there is no rank at the other end",
    ),
    "a compute before its receive": (
        "lane > 0 1\nrank 0: 0F0> 0SF0>\nrank 1: 1F0> 1RF0>",
        "rank 0 in slot 1 waits for rank 1 to post the partner of 0SF0>, "
        "rank 1 in slot 0 cannot begin 1F0>: 1RF0> has not run before it",
    ),
    "a send before its compute": (
        "lane > 0 1\nrank 0: 0SF0> 0F0>\nrank 1:",
        "rank 0 in slot 0 cannot begin 0SF0>: 0F0> has not run before it",
    ),
    "W before B": ("lane > 0\nrank 0: 0F0> 0W0>", "rank 0 in slot 1 cannot begin 0W0>: 0B0> has not run before it"),
}


@pytest.mark.parametrize("what", STUCK)
@pytest.mark.parametrize("blocking", [False, True])
def test_a_schedule_that_cannot_finish_says_who_waits_for_what(what, blocking):
    text, got = STUCK[what]
    with pytest.raises(Stuck) as error:
        simulate(loads(text), blocking=blocking)
    assert error.value.got == got
    assert len(error.value.waits) == got.count("rank 0 in") + got.count("rank 1 in")


def test_messages_meet_in_posting_order_whatever_they_carry():
    """Two sends swapped: the run finishes, and each receive has the other's payload."""
    text = "lane > 0 1\nrank 0: 0F0> 0F1> 0SF1>+0SF0>\nrank 1: 1RF0>+1RF1> 1F0> 1F1>"
    met = [(str(message.send.op), str(message.receive.op)) for message in simulate(loads(text)).messages]
    assert met == [("0SF1>", "1RF0>"), ("0SF0>", "1RF1>")]


@given(schedules(), st.booleans())
def test_any_schedule_has_a_timeline_or_is_stuck(schedule, blocking):
    try:
        result = simulate(schedule, blocking=blocking)
    except Stuck as stuck:
        result = stuck
    assert isinstance(result, Timeline) or result.waits


def test_nothing_to_do_takes_no_time():
    timeline = simulate(Schedule({">": (0,)}, ((),)))
    assert (timeline.makespan, timeline.bubble_share, timeline.peak_activations) == (0, 0, (0,))
