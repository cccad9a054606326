"""What changed between two schedules, slot by slot."""

from dualpipe.page import Change, changes
from dualpipe.page.changes import changed_lanes
from dualpipe.schedule import UP, Schedule, show_slot
from dualpipe.schedule.generate import dualpipe, one_f_one_b
from tests.mutations import insert
from tests.proofs.faults import stages_in_a_loop_for_a_v, two_sends_of_a_batch_swapped


def test_a_schedule_does_not_differ_from_itself():
    assert changes(dualpipe(4, 8), dualpipe(4, 8)) == ()


def test_two_swapped_sends_change_one_slot():
    (change,) = changes(dualpipe(4, 8), two_sends_of_a_batch_swapped())
    assert (change.rank, change.before, change.after) == (0, 13, 13)
    assert [show_slot(slot) for slot in change.removed] == ["0SF3>+3SB1<+3RF2<+0RB0>"]
    assert [show_slot(slot) for slot in change.added] == ["3SB1<+0SF3>+3RF2<+0RB0>"]


def test_an_added_slot_does_not_change_those_behind_it():
    before = one_f_one_b(2, 4)
    slot = before.programs[1][0]
    assert changes(before, insert(before, 1, 5, slot)) == (Change(1, 5, (), 5, (slot,)),)


def test_applying_the_changes_gives_the_other_schedule():
    before, after = dualpipe(4, 8), dualpipe(4, 10)
    programs = [list(program) for program in before.programs]
    for change in reversed(changes(before, after)):
        programs[change.rank][change.before : change.before + len(change.removed)] = change.added
    assert tuple(map(tuple, programs)) == after.programs


def test_a_rank_more_is_all_added():
    before, after = one_f_one_b(2, 4), one_f_one_b(3, 4)
    assert changes(before, after)[-1] == Change(2, 0, (), 0, after.programs[2])


def test_another_placement_shows_in_the_lanes():
    loop = stages_in_a_loop_for_a_v()
    v = Schedule({UP: (0, 1, 2, 3, 3, 2, 1, 0)}, loop.programs)
    assert changed_lanes(v, loop) == (("lane > 0 1 2 3 3 2 1 0", "lane > 0 1 2 3 0 1 2 3"),)
    assert changes(v, loop) == ()
