"""Where a schedule departs from another one: the first op of each rank, what the other does there, and why."""

import pytest

from dualpipe.errors import RuleError
from dualpipe.schedule import COMPUTE, MESSAGES, RB, RECEIVES, UP, B, F, Op, Placed, Schedule, W
from dualpipe.schedule.generate import PLANS, dualpipe, dualpipev, generate, one_f_one_b, zb1p
from dualpipe.schedule.observed import Guess, Observed
from dualpipe.schedule.text import loads
from proofs.against import Aspect, compare
from proofs.departure_story import meaning, place, tell, text
from tests.mutations import drop, duplicate, insert, redirect, reorder, split_all, swap, with_program

GPIPE = """\
lane > 0 1
rank 0: 0F0> 0SF0> 0F1> 0SF1> 0RB0> 0B0>+0W0> 0RB1> 0B1>+0W1>
rank 1: 1RF0> 1F0> 1RF1> 1F1> 1B0>+1W0> 1SB0> 1B1>+1W1> 1SB1>
"""


RECORDED = """\
lane > 0 1
rank 0: 0F0> 0F1> 0SF1>@1 0SF0>@1 0RB0>@1 0B0>+0W0> 0RB1>@1 0B1>+0W1>
rank 1: 1RF0>@0 1F0> 1B0>+1W0> 1SB0>@0 1RF1>@0 1F1> 1B1>+1W1> 1SB1>@0
place 1 train.py:12
place 2 train.py:20
events 0: post:0SF1>@1:1
events 1: post:1RF0>@0:2
"""


def stories(here, there, aspect=None):
    """Story and usual cause of the first departure of each rank, of those that count or of one aspect."""
    found = compare(here, there)
    chosen = [each for each in found.departures if (each.counts if aspect is None else each.aspect is aspect)]
    return {each.rank: (tell(each, found), meaning(each, found)) for each in reversed(chosen)}


def text_of(here, there):
    """The whole comparison as text."""
    return text(compare(here, there))


def with_weights_at_once(schedule):
    """Every W in the slot of its B, as when the store for weight gradients is never fed."""
    programs = []
    for program in schedule.programs:
        slots = (tuple(op for op in slot if op.kind is not W) for slot in program)
        programs.append(
            tuple(
                tuple(each for op in slot for each in ((op, Op(W, *op.task)) if op.kind is B else (op,)))
                for slot in slots
                if slot
            )
        )
    return Schedule(schedule.routes, programs, schedule.name)


@pytest.mark.parametrize("name", PLANS)
def test_a_schedule_is_the_same_as_itself_with_or_without_its_peers_written(name):
    schedule = generate(name, 4, 8)
    named = Schedule(
        schedule.routes,
        [
            [[op._replace(peer=schedule.peer(op)) if op.kind in MESSAGES else op for op in slot] for slot in program]
            for program in schedule.programs
        ],
    )
    assert compare(named, schedule).verdict == "same"


def test_where_a_program_failed_the_failure_is_the_cause():
    crash, later = "raised IndexError at train.py:30 during 0B0>", "ended with exit code 1 in a later training step"
    text = RECORDED.replace(" 0B0>+0W0> 0RB1>@1 0B1>+0W1>", " 0B0>").replace(" 1RF1>@0 1F1> 1B1>+1W1> 1SB1>@0", "")
    here, there = loads(f"{text}failure 0: {crash}\nfailure 1: {later}\n"), loads(RECORDED)
    assert stories(here, there)[0][1] == f"the program of this rank ended there: rank 0 {crash}"
    assert stories(here, there)[1][1].startswith("did an error or a wait for a message stop the rank there")
    assert [each.aspect for each in compare(here, there).departures if each.rank == 0] == [Aspect.ORDER]
    short = loads(f"lane > 0 1\nfailure 0: {crash}\nrank 0: 0F0>\nrank 1:\n")
    assert "lane > has 1 microbatch, since the program ended before the others, and in" in text_of(short, there)
    shown = compare(here, there).as_json()["departures"]
    assert f"the program of this rank ended there: rank 0 {crash}" in [each["meaning"] for each in shown]


def test_an_unfed_store_shows_as_a_weight_gradient_that_the_other_schedule_defers():
    found = stories(with_weights_at_once(dualpipe(4, 8)), dualpipe(4, 8), Aspect.WEIGHTS)
    assert found[1] == (
        "rank 1 runs 2W3< in slot 22 before 1B3>, which dualpipe runs first: dualpipe defers 2W3< to its slot 26",
        "does the backward put weight gradients into the store? If it adds them at once, nothing is left to defer.",
    )
    assert sorted(found) == [1, 2]


def test_a_weight_gradient_in_the_slot_of_its_backward_does_not_come_from_a_store():
    there = dualpipe(4, 10)
    (*rest, _) = there.programs[1]
    at = next(number for number, slot in enumerate(rest) if Op(B, UP, 1, 4) in slot)
    here = with_program(there, 1, [*rest[:at], (Op(B, UP, 1, 4), Op(W, UP, 1, 4)), *rest[at + 1 :]])
    story, cause = stories(here, there, Aspect.WEIGHTS)[1]
    assert story.endswith("there dualpipe runs 2W4<, which this rank runs in slot 30")
    assert (
        cause == "does the backward put this weight gradient into the store, and is what the store has run at the end?"
    )


def test_ops_issued_together_have_no_order_so_that_an_overlapped_pair_may_run_one_after_the_other():
    schedule = dualpipe(4, 8)
    split = [[part for slot in program for part in _forward_apart(slot)] for program in schedule.programs]
    apart = Schedule(schedule.routes, split)
    found = compare(apart, dualpipe(4, 8))
    assert found.verdict == "same but for slots"
    assert {each.aspect for each in found.departures} == {Aspect.SLOTS}
    assert "--together" in text(found)
    assert compare(dualpipe(4, 8), apart).verdict == "same but for slots"


def test_departures_come_before_differences_in_slots_of_any_rank():
    there = dualpipe(4, 8).only(COMPUTE)
    here = with_program(there, 0, [part for slot in there.programs[0] for part in _forward_apart(slot)])
    found = compare(swap(here, 3, 0), there).departures
    assert [(each.rank, each.aspect) for each in found] == [(3, Aspect.ORDER), (0, Aspect.SLOTS)]


def _forward_apart(slot):
    forwards = tuple(op for op in slot if op.kind is F)
    return [part for part in (tuple(op for op in slot if op not in forwards), forwards) if part]


def test_messages_posted_one_by_one_are_no_departure_but_are_reported():
    found = compare(split_all(dualpipe(4, 8), key=lambda op: op.kind in RECEIVES), dualpipe(4, 8))
    assert (found.verdict, found.exit_code) == ("same but for slots", 0)
    assert "rank 0 has 3SB0< as its slot 9, and dualpipe has 3SB0<+3RF1<" in text(found)
    assert "one by one" in text(found)


def order_of_gpipe(*slots):
    return loads(GPIPE.replace("0F0> 0SF0> 0F1> 0SF1> 0RB0> 0B0>+0W0> 0RB1> 0B1>+0W1>", " ".join(slots)))


PLANTED = {
    "a warm-up too long": (
        lambda: (loads(GPIPE), one_f_one_b(2, 2)),
        (
            1,
            "rank 1 runs 1F1> in slot 3, which 1f1b runs in its slot 4; there 1f1b runs 1B0>",
        ),
        "too many forwards before its first backward",
    ),
    "a warm-up too short": (
        lambda: (one_f_one_b(2, 2), loads(GPIPE)),
        (
            1,
            "rank 1 runs 1B0> in slot 2, which the other schedule runs in its slot 4; there ",
        ),
        "too few forwards",
    ),
    "a loop one iteration short": (
        lambda: (order_of_gpipe("0F0>", "0SF0>", "0F1>", "0SF1>", "0RB0>", "0B0>+0W0>", "0RB1>"), loads(GPIPE)),
        (0, "rank 0 never runs 0B1>, which the other schedule runs in its slot 7"),
        "one iteration short",
    ),
    "an op issued twice": (
        lambda: (duplicate(zb1p(4, 8), 1, 1, 0), zb1p(4, 8)),
        (1, "rank 1 runs 1F0> in slot 1 once more than zb1p"),
        "issued twice",
    ),
    "the two chunks of a rank exchanged": (
        lambda: (swap(dualpipe(4, 8).only(COMPUTE), 1, 2), dualpipe(4, 8).only(COMPUTE)),
        (1, "rank 1 runs 2F1< in slot 2, which dualpipe runs in its slot 3; there dualpipe runs 1F1>"),
        "two chunks exchanged",
    ),
    "a microbatch too early": (
        lambda: (swap(one_f_one_b(4, 8).only(COMPUTE), 0, 0), one_f_one_b(4, 8).only(COMPUTE)),
        (0, "rank 0 runs 0F1> in slot 0"),
        "does each chunk count its microbatches separately",
    ),
    "a weight gradient never run": (
        lambda: (drop(zb1p(2, 4), 1, 15, 0), zb1p(2, 4)),
        (1, "rank 1 runs 1W3> in slot 15, which zb1p runs in its slot 16; there zb1p runs 1W2>"),
        "never run",
    ),
    "a message to another rank": (
        lambda: (redirect(dualpipe(4, 8), 1, 2, 0, 3), dualpipe(4, 8)),
        (1, "rank 1 sends 1SF0>@3 in slot 2 to rank 3, and dualpipe to rank 2"),
        "holds the next or the previous stage",
    ),
    "a send left out": (
        lambda: (drop(dualpipe(4, 8), 0, 1, 0), dualpipe(4, 8)),
        (0, "rank 0 sends 0SF1> in slot 2, which dualpipe sends in its slot 3; there dualpipe sends 0SF0>"),
        "is 0SF0> left out?",
    ),
    "a receive too many": (
        lambda: (duplicate(dualpipe(4, 8), 1, 0, 0), dualpipe(4, 8)),
        (1, "rank 1 receives 1RF0> in slot 0 once more than dualpipe"),
        "once too often",
    ),
    "a receive too many at the end": (
        lambda: (insert(one_f_one_b(2, 2), 1, 8, (Op("RF", UP, 1, 2),)), one_f_one_b(2, 2)),
        (1, "rank 1 posts one receive from rank 0 more than 1f1b: 1RF2> in slot 7, after 1B1>"),
        "once too often",
    ),
    "two sends of a batch swapped": (
        lambda: (reorder(dualpipe(4, 8), 0, 13, 1, 0), dualpipe(4, 8)),
        (0, "rank 0 sends 3SB1< in slot 13 before 0SF3>, and dualpipe after it"),
        "in another order",
    ),
}


@pytest.mark.parametrize("what", PLANTED)
def test_a_planted_fault_departs_at_its_op_with_its_usual_cause(what):
    plant, story, cause = PLANTED[what]
    found = stories(*plant())
    rank, says = story
    assert found[rank][0].startswith(says)
    assert cause in found[rank][1]


def test_what_follows_a_departure_in_the_order_is_not_reported_again():
    gpipe, other = loads(GPIPE), one_f_one_b(2, 2)
    aspects = [(each.rank, each.aspect) for each in compare(gpipe, other).departures]
    assert (1, Aspect.ORDER) in aspects
    assert (1, Aspect.MESSAGES) not in aspects


def test_stages_on_other_ranks_are_all_that_is_reported():
    found = compare(one_f_one_b(4, 8), dualpipe(4, 8))
    assert (found.verdict, found.departures) == ("departs", ())
    assert "stage 0 of lane < is on rank 3" not in text(found)
    assert "there is no stage 0 of lane <, which dualpipe has on rank 3" in text(found)
    assert "the orders of the ranks were not compared" in text(found)


def test_another_size_is_named_first_and_explains_the_ops_that_are_too_many():
    found = compare(one_f_one_b(2, 4), one_f_one_b(2, 2))
    assert "lane > has 4 microbatches, and in 1f1b 2" in text(found)
    assert "more microbatches than the schedule that it is compared with" in text(found)


def test_schedules_of_different_numbers_of_ranks_are_not_compared():
    with pytest.raises(RuleError, match="the schedule has 2 and dualpipev has 4"):
        compare(one_f_one_b(2, 4), dualpipev(4, 8))


def test_a_recorded_program_is_shown_where_it_departs():
    recorded = loads(RECORDED)
    found = compare(recorded, loads(GPIPE))
    places = {each.aspect: place(each, found) for each in found.departures if each.rank == 0}
    assert places[Aspect.MESSAGES] == "at train.py:12"
    assert "at train.py:12" in text(found)
    (order,) = [each for each in found.departures if each.rank == 1]
    assert place(order, found) == "after 1RF0>@0, which is posted at train.py:20"
    assert place(compare(loads(GPIPE), one_f_one_b(2, 2)).departures[0], compare(loads(GPIPE), recorded)) == ""


REDUCED = """\
lane > 0 1
group 0: 0 1
group 1: 0 1
rank 0: 0F0> 0SF0>+0RB0> 0B0>+0W0> 0AR>@0 0AR>@1
rank 1: 1RF0> 1F0> 1B0>+1W0> 1SB0> 1AR>@0 1AR>@1
"""


def test_collectives_in_another_order_of_groups_depart():
    """Megatron-LM 1810: a rank launches the collectives of two communicators in another order."""
    found = compare(loads(REDUCED.replace("0AR>@0 0AR>@1", "0AR>@1 0AR>@0")), loads(REDUCED), "theirs")
    assert found.verdict == "departs"
    assert [each.aspect for each in found.departures] == [Aspect.COLLECTIVES]
    assert tell(found.departures[0], found) == (
        "rank 0 launches 0AR>@1 in slot 3, which theirs launches in its slot 4; there theirs launches 0AR>@0, "
        "which this rank launches in slot 4"
    )
    assert meaning(found.departures[0], found).startswith("are collectives launched from several streams or threads")


def test_a_collective_that_is_left_out_departs():
    found = stories(loads(REDUCED.replace(" 1AR>@1", "")), loads(REDUCED))
    assert found == {
        1: (
            "rank 1 never launches 1AR>@1, which the other schedule launches in its slot 5",
            "does a member of the group leave a collective out, or launch one too many?",
        )
    }


def test_a_collective_elsewhere_among_the_computes_is_another_slot():
    found = compare(loads(REDUCED.replace("0B0>+0W0> 0AR>@0", "0AR>@0 0B0>+0W0>")), loads(REDUCED))
    assert found.verdict == "same but for slots"
    assert meaning(found.departures[0], found) == "is a collective launched earlier or later?"


def test_with_a_schedule_that_has_none_collectives_are_not_compared_and_the_report_says_so():
    ours = loads(REDUCED)
    found = compare(ours, ours.only(COMPUTE | MESSAGES), "theirs")
    assert (found.verdict, found.as_json()["collectives_compared"]) == ("same", False)
    assert "collectives were not compared, since theirs has none" in text(found)
    assert "since the schedule has none" in text(compare(ours.only(COMPUTE | MESSAGES), ours, "theirs"))


def test_a_receive_whose_name_is_a_guess_does_not_depart():
    there = one_f_one_b(2, 4)
    wrong = with_program(there, 0, (*there.programs[0][:3], (Op(RB, UP, 0, 1),)))
    assert Aspect.MESSAGES in {each.aspect for each in compare(wrong, there).departures}
    guess = Guess(Placed(0, 3, 0, wrong.programs[0][3][0]), (Op(RB, UP, 0, 0),))
    guessed = Schedule(wrong.routes, wrong.programs, observed=Observed([(), ()], [guess]))
    assert {each.aspect for each in compare(guessed, there).departures} == {Aspect.ORDER, Aspect.SLOTS}
