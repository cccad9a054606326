"""Receives too many and too few, in a comparison with another schedule: counted by their place among the computes."""

import pytest

from dualpipe.schedule import MESSAGES, RB, RF, SF, UP, Failure, Op, Placed, Schedule, W
from dualpipe.schedule.generate import dualpipe, one_f_one_b
from dualpipe.schedule.observed import Event, Guess, Observed, What
from dualpipe.schedule.text import loads
from proofs.against import Aspect, compare
from proofs.departure_story import text
from tests.mutations import move, reorder, with_program
from tests.proofs.test_against import GPIPE, stories


def shifted(schedule, rank, slot, lane, cut=None):
    """One more receive of an activation in front of a slot; each is used for the microbatch before.

    With ``cut`` the rank's program ends after so many slots.
    """
    program = schedule.programs[rank]
    taken = [op for each in program for op in each if op.kind is RF and op.lane is lane]
    number = sum(op in taken for each in program[:slot] for op in each)
    later = [tuple(op._replace(mb=op.mb + (op in taken)) for op in each) for each in program[slot:]]
    return with_program(schedule, rank, [*program[:slot], (taken[0]._replace(mb=number),), *later][:cut])


@pytest.mark.parametrize("cut", [None, 20])
def test_a_receive_too_many_is_named_where_it_is_posted_though_the_names_of_all_later_ones_shift(cut):
    """A middle rank of DualPipe posts a receive before a forward that has its input already."""
    there = dualpipe(4, 10)
    found = stories(shifted(there, 1, 8, UP, cut), there, Aspect.MESSAGES)
    assert found == {
        1: (
            "rank 1 posts one receive from rank 0 more than dualpipe: 1RF3> in slot 8, after 2F1<",
            "is it posted once too often? Then all later messages in that direction between the two ranks meet the "
            "wrong partners.",
        )
    }


@pytest.mark.parametrize(("there", "slot"), [(one_f_one_b(2, 4), 4), (loads(GPIPE), 3)])
def test_a_receive_too_many_is_named_where_it_is_posted_though_all_names_of_the_direction_are_alike(there, slot):
    (story, _) = stories(shifted(there, 1, slot, UP), there, Aspect.MESSAGES)[1]
    assert story.startswith("rank 1 posts one receive from rank 0 more than ")
    assert f"in slot {slot}, after 1" in story


def ended(program, of_kind):
    """Rank 1's program of DualPipe, ended by a failure.

    One function posts all messages; its caller is another one for each of the kinds ``of_kind``, by the place of the
    post.  The names of the messages of the last slot are guesses.
    """
    there = dualpipe(4, 10)
    posts = [
        Placed(1, number, position, op)
        for number, slot in enumerate(program)
        for position, op in enumerate(slot)
        if op.kind in MESSAGES
    ]
    events = [
        Event(What.POST, at, None, f"p2p.py:9 (called at comm.py:{of_kind(at)}, train.py:{30 + at.slot})")
        for at in posts
    ]
    guesses = [Guess(at, ()) for at in posts if at.slot == len(program) - 2]
    programs = [program if rank == 1 else own for rank, own in enumerate(there.programs)]
    failures = [Failure(1, "raised RuntimeError at train.py:70")]
    observed = Observed([(), events, (), ()], guesses)
    return Schedule(there.routes, programs, failures=failures, observed=observed), there


def test_a_receive_too_many_is_named_by_its_line_where_a_program_ended_and_no_name_differs():
    """The function for activations posts a receive before that for the gradient, which gets the next activation."""
    program = list(dualpipe(4, 10).programs[1][:11])
    send, gradient = program[9]
    program[9:] = [(send, gradient, Op(RF, UP, 1, 3)), program[10][:1]]
    here, there = ended(program, lambda at: 80 if at.slot == 9 and at.position == 2 else 70 + (at.op.kind is SF))
    found = compare(here, there, "dualpipe")
    assert [each.aspect for each in found.departures if each.rank == 1] == [Aspect.ORDER, Aspect.MESSAGES]
    assert stories(here, there, Aspect.MESSAGES)[1] == (
        "rank 1 posts one receive from rank 0 more than dualpipe: 2RB0< (a guess) in slot 9, after 1F2>",
        "is it posted once too often, or only posted earlier than in dualpipe? In the first case all later messages in "
        "that direction between the two ranks meet the wrong partners, and the names of the messages that follow on "
        "this channel may be shifted by one.",
    )
    assert "at p2p.py:9 (called at comm.py:70, train.py:39)\n" in text(found)


def test_a_missing_receive_is_named_by_its_place_where_a_program_ended():
    program = list(dualpipe(4, 10).programs[1][:8])
    program[6] = tuple(op for op in program[6] if op.task != (UP, 1, 2))
    here, there = ended(program, lambda _: 70)
    found = compare(here, there, "dualpipe")
    assert [each.aspect for each in found.departures if each.rank == 1] == [Aspect.ORDER, Aspect.MESSAGES]
    (story, meaning_of) = stories(here, there, Aspect.MESSAGES)[1]
    assert story == (
        "rank 1 posts one receive from rank 0 fewer than dualpipe: none between 1F1> and 2F1<, where dualpipe has "
        "1RF2> in its slot 6"
    )
    assert meaning_of.startswith("is it left out, or only posted later than in dualpipe? In the first case all later")
    assert "what it posts there: 1SF1> at p2p.py:9 (called at comm.py:70, train.py:36), 2RF1< at p2p.py:9" in text(
        found
    )


def test_a_receive_from_the_wrong_peer_is_not_one_too_many():
    program = list(dualpipe(4, 10).programs[1][:11])
    send, _ = program[9]
    program[9:] = [(send, Op(RB, UP, 1, 0)), (Op(W, UP, 1, 0),)]
    here, there = ended(program, lambda _: 70)
    story, question = stories(here, there, Aspect.MESSAGES)[1]
    first = "rank 1 posts one receive from rank 2 more than dualpipe: 1RB0> (a guess) in slot 9, after 1F2>"
    assert story.startswith(first)
    assert question == "does it name the wrong peer? There dualpipe has 2RB0< for rank 0, which this rank lacks."


def test_receives_that_are_posted_earlier_are_not_too_many():
    there = dualpipe(4, 10)
    swapped = reorder(move(there, 1, 13, 12), 1, 12, 1, 0, 2, 3)
    assert "posts" not in stories(swapped, there, Aspect.MESSAGES)[1][0]
