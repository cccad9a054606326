"""Collectives: what a group's members must agree on, by both methods and under every model."""

from dataclasses import replace
from itertools import pairwise

import pytest

from dualpipe.schedule import Kind, Op, ScheduleError
from dualpipe.schedule.generate import LateW, generate, with_late_w
from dualpipe.schedule.text import dumps, loads
from proofs.models import BLOCKING, MODELS
from proofs.prefix import cut
from proofs.prove import prove
from proofs.story import tell
from proofs.verdict import Refuted

GPIPE = """\
lane > 0 1
group 0: 0 1
group 1: 0 1
rank 0: 0US> 0F0> 0AA0> 0SF0> 0RB0> 0B0>+0W0> 0RG> 0AR>@0 0AR>@1 0RS>
rank 1: 1US> 1RF0> 1F0> 1AA0> 1B0>+1W0> 1SB0> 1RG> 1AR>@0 1AR>@1 1RS>
"""
"""Two communicators of both ranks: one for tied embeddings, one for the norm of the gradients."""

V = """\
lane > 0 1
lane < 1 0
group 0: 0 1
rank 0: 0F0> 0SF0>+1RF0< 1F0< 1B0<+1W0< 1SB0<+0RB0> 0B0>+0W0> 0RG>@0 1RG<@0
rank 1: 0F0< 0SF0<+1RF0> 1F0> 1B0>+1W0> 1SB0>+0RB0< 0B0<+0W0< 0RG<@0 1RG>@0
"""
"""DualPipe on two ranks with one microbatch a lane, whose replicas are summed on one communicator."""


def refuted(text):
    """The checks that are refuted, with their stories."""
    report = prove(loads(text))
    return {name: tell(result.finding) for name, result in report.checks.items() if isinstance(result.verdict, Refuted)}


@pytest.mark.parametrize("text", [GPIPE, V])
def test_members_that_join_in_one_order_are_proved_under_every_model(text):
    report = prove(loads(text))
    assert report.verdict == "proved", report.text()
    assert set(report.checks["deadlock"].models) == set(map(str, MODELS))
    assert dumps(loads(text)) == text


def balanced_in_each_forward(schedule):
    """DualPipe with a collective over both replicas of a stage after each forward, on a communicator of its own."""
    groups = tuple(tuple(sorted({rank, schedule.ranks - 1 - rank})) for rank in range(schedule.ranks))
    programs = []
    for program in schedule.programs:
        slots = []
        for slot in program:
            slots.append(slot)
            slots += [(Op(Kind.AA, op.lane, op.stage, op.mb, op.stage),) for op in slot if op.kind is Kind.F]
        programs.append(tuple(slots))
    return replace(schedule, programs=tuple(programs), groups=groups)


@pytest.mark.parametrize("late_w", LateW)
def test_both_replicas_of_a_stage_can_meet_in_each_forward_of_dualpipe(late_w):
    """As with Megatron's global_aux_loss; opposite ranks are mirror images, so they meet in one order."""
    schedule = balanced_in_each_forward(generate(with_late_w("dualpipe", late_w), 4, 10))
    assert refuted(dumps(schedule)) == {}
    last = schedule.programs[-1]
    joined = [number for number, slot in enumerate(last) if slot[0].kind is Kind.AA]
    one, other = next(pair for pair in pairwise(joined) if last[pair[0]][0].peer != last[pair[1]][0].peer)
    swapped = list(last)
    swapped[one], swapped[other] = last[other], last[one]
    found = refuted(dumps(replace(schedule, programs=(*schedule.programs[:-1], tuple(swapped)))))
    assert "deadlock" in found


def test_two_communicators_in_different_orders_are_a_wait_cycle():
    """Megatron-LM 1810: ranks launch the collectives of two streams in different orders."""
    found = refuted(GPIPE.replace("1AR>@0 1AR>@1", "1AR>@1 1AR>@0"))
    assert list(found) == ["deadlock"]
    assert found["deadlock"].split("\n") == [
        "rank 0 waits in slot 7 (0AR>@0) until rank 1 joins the all-reduce of stage 0 of lane > in group 0, which is "
        "in slot 8 (1AR>@0) there, and rank 1 gets no further than slot 7",
        "rank 1 waits in slot 7 (1AR>@1) until rank 0 joins the all-reduce of stage 1 of lane > in group 1, which is "
        "in slot 8 (0AR>@1) there, and rank 0 gets no further than slot 7",
        "so ranks 0 and 1 wait for each other and none of them can go on (blocking messages)",
    ]


def test_two_communicators_in_one_slot_have_no_order():
    text = GPIPE.replace("0AR>@0 0AR>@1", "0AR>@0+0AR>@1").replace("1AR>@0 1AR>@1", "1AR>@1+1AR>@0")
    assert refuted(text) == {}


def test_replicas_reduced_in_different_orders_take_one_stage_for_the_other():
    found = refuted(V.replace("0RG<@0 1RG>@0", "1RG>@0 0RG<@0"))
    assert list(found) == ["messages"]
    assert found["messages"].startswith(
        "collective 1 of group 0 is the reduction of the gradients of stage 0 of lane > for rank 0 in slot 6 (0RG>@0) "
        "and the reduction of the gradients of stage 1 of lane > for rank 1 in slot 6 (1RG>@0)"
    )


def test_a_member_that_never_joins_leaves_the_others_waiting():
    found = refuted(GPIPE.replace(" 1AR>@1", ""))
    assert list(found) == ["messages", "deadlock"]
    assert found["messages"] == (
        "rank 0 joins the all-reduce of stage 0 of lane > in group 1 as collective 1 of its group in slot 8 (0AR>@1), "
        "and rank 1, which is a member too, joins only 0"
    )
    assert found["deadlock"].startswith("rank 0 waits forever in slot 8 (0AR>@1) until rank 1 joins the all-reduce")


def test_a_rank_that_is_no_member_joins_nothing():
    found = refuted(GPIPE.replace("group 1: 0 1", "group 1: 0"))
    assert list(found) == ["messages"]
    assert found["messages"] == (
        "rank 1 joins the all-reduce of stage 1 of lane > in group 1 in slot 8 (1AR>@1), and that group has the ranks "
        "0 alone"
    )


def test_a_collective_that_waits_for_a_message_that_waits_for_it_is_a_wait_cycle():
    text = GPIPE.replace("0SF0> 0RB0>", "0AR>@0 0SF0> 0RB0>", 1).replace("1SB0> 1RG>", "1AR>@0 1SB0> 1RG>", 1)
    found = refuted(text)
    assert list(found) == ["deadlock"]
    assert "rank 0 waits in slot 3 (0AR>@0) until rank 1 joins" in found["deadlock"]
    assert "rank 1 waits in slot 1 (1RF0>) until rank 0 sends it" in found["deadlock"]


def test_gradients_reduced_before_the_last_weight_gradient_are_out_of_order():
    text = V.replace("0B0>+0W0> 0RG>@0 1RG<@0", "0B0> 0RG>@0 1RG<@0 0W0>")
    assert refuted(text)["order"] == (
        "rank 0 joins the reduction of the gradients of stage 0 of lane > in group 0 in slot 6 (0RG>@0), but this "
        "needs the weight gradient of microbatch 0 at stage 0 of lane >, which it computes only in slot 8 (0W0>)"
    )
    assert "order" not in refuted(text.replace("0W0>\n", "0W0> 0RG>\n")), "only the last reduction counts"


def test_the_prefix_of_a_wait_cycle_of_collectives_shows_it_too():
    schedule = loads(GPIPE.replace("1AR>@0 1AR>@1", "1AR>@1 1AR>@0"))
    prefix = prove(schedule, models=[BLOCKING]).checks["deadlock"].prefix
    assert prefix == (9, 9)
    again = prove(cut(schedule, prefix), models=[BLOCKING]).checks["deadlock"].verdict
    assert isinstance(again, Refuted)


def test_what_no_group_is_known_of_waits_for_nobody():
    assert refuted(GPIPE.replace(" 1AA0>", "").replace(" 1US>", "")) == {}


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (("group 1: 0 1", "group 1: 0 2"), "group 1 has rank 2"),
        (("group 1: 0 1", "group 1: 1 1"), "group 1 has 1 1"),
        (("group 1: 0 1", "group 2: 0 1"), "no 'group 1:'"),
        (("1AR>@1", "1AR>@2"), "names group 2"),
        (("1RS>", "1RS>@1"), "RS has no group"),
        (("1RS>", "1RS0>"), "'1RS0>'"),
        (("1AA0>", "1AA>"), "'1AA>'"),
        (("1RG> ", "1RG>+1F1> "), "mixes them"),
    ],
)
def test_what_is_no_collective_is_refused_with_its_place(given, says):
    with pytest.raises(ScheduleError, match=says):
        loads(GPIPE.replace(*given))
