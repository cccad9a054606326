"""What the page carries is the schedule: its text, its simulated times, its needs and its messages."""

import pytest

from dualpipe.errors import RuleError
from dualpipe.page import Mark
from dualpipe.page.drawing import drawing, marked, run
from dualpipe.schedule import RF, UP, F, Op, Schedule, show_slot
from dualpipe.schedule.generate import NAMES, dualpipe, generate, one_f_one_b
from dualpipe.timeline.timeline import Costs
from tests.mutations import drop
from tests.page import reading
from tests.proofs.faults import FAULTS, place, receives_and_sends_not_coalesced, two_sends_of_a_batch_swapped

UNEVEN = Costs(F=1.1, B=1.37, W=0.71, FB=2.9, latency=0.05)


@pytest.mark.parametrize("costs", [Costs(), UNEVEN], ids=["even", "uneven"])
@pytest.mark.parametrize("name", NAMES)
def test_slots_and_times_are_those_of_the_simulation(name, costs):
    schedule = generate(name, 4, 8)
    ran = run(schedule, costs, blocking=False)
    shown = drawing(ran)
    assert reading.slots(shown) == [[show_slot(slot) for slot in program] for program in schedule.programs]
    for row, simulated in zip(reading.spans(shown), ran.timeline.spans, strict=True):
        assert [start for start, _ in row] == pytest.approx([span.start for span in simulated], abs=1e-4)
        assert [end for _, end in row] == pytest.approx([span.end for span in simulated], abs=1e-4)
    assert shown["stuck"] is None
    assert shown["reached"] == [len(program) for program in schedule.programs]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.title)
def test_needs_are_those_of_the_schedule(fault):
    schedule = fault.plant()
    ops = [at.op.bare for at in schedule]
    for number, told in reading.needs(drawing(run(schedule, Costs(), blocking=False)), schedule):
        wanted = schedule.needs(ops[number])
        shown = [word[1:] if isinstance(word, str) else str(ops[word]) for word in told]
        assert shown == list(map(str, wanted))
        assert all((f"?{need}" in told) == (need not in ops) for need in wanted)


def test_of_a_repeated_op_the_one_just_before_is_what_is_needed():
    good = one_f_one_b(1, 1)
    (slot, behind) = good.programs[0]
    twice = Schedule(good.routes, ((slot, slot, behind),))
    told = dict(reading.needs(drawing(run(twice, Costs(), blocking=False)), twice))
    assert told[2] == [1], "the backward needs the second of the two forwards"


def test_messages_meet_as_they_did_in_the_simulation():
    schedule = two_sends_of_a_batch_swapped()
    ops = [at.op for at in schedule]
    meets = drawing(run(schedule, Costs(), blocking=False))["meets"]
    pairs = [(ops[send], ops[receive]) for send, receive in zip(meets[::2], meets[1::2], strict=True)]
    wrong = [str(receive) for send, receive in pairs if schedule.needs(receive) != (send,)]
    assert wrong == ["1RF3>", "2RB1<"]


def test_peers_are_told_for_every_message():
    schedule = dualpipe(2, 4)
    told = drawing(run(schedule, Costs(), blocking=False))["peers"]
    assert told == [1 - at.rank for at in schedule if len(at.op.kind) == 2]


def test_a_deadlock_is_drawn_as_far_as_it_gets():
    """Rank 2 stands in slot 5 for a gradient of rank 3, which stands in slot 3 for an activation of rank 2."""
    schedule = receives_and_sends_not_coalesced()
    ran = run(schedule, Costs(), blocking=True)
    shown = drawing(ran)
    assert shown["reached"] == [7, 8, 5, 3] == [len(spans) for spans in ran.timeline.spans]
    assert shown["stuck"] == 6
    assert len(shown["waits"]) == 4
    ops = [str(at.op) for at in schedule]
    assert [ops[number] for number, _ in shown["waits"]] == ["0RB0>", "1RB0>", "2RB0>", "3RF1>"]
    for rank, row in enumerate(reading.spans(shown)):
        assert len(row) == len(schedule.programs[rank]), "what is never reached is drawn too"
        stands = shown["reached"][rank]
        assert row[stands][1] == pytest.approx(shown["line"]), "a rank stands where it is until the line"
        assert all(start > shown["line"] for start, _ in row[stands + 1 :])


def test_an_op_without_its_need_stops_its_rank():
    good = one_f_one_b(2, 2)
    schedule = drop(good, *place(good, Op(RF, UP, 1, 0)))
    shown = drawing(run(schedule, Costs(), blocking=False))
    assert shown["reached"][1] == 0
    assert any("cannot begin 1F0>" in reason for _, reason in shown["waits"])


def test_a_rank_without_slots_and_a_schedule_without_ops_are_drawn():
    idle = Schedule({UP: (0,)}, (((Op(F, UP, 0, 0),),), ()))
    assert drawing(run(idle, Costs(), blocking=False))["programs"] == ["0F0>", ""]
    empty = Schedule({UP: (0,)}, ((),))
    assert drawing(run(empty, Costs(), blocking=False))["needs"] == ""


def test_a_mark_names_an_op_or_a_whole_slot():
    schedule = dualpipe(2, 4)
    ops = list(schedule)
    slot = next(at for at in ops if len(schedule.programs[at.rank][at.slot]) == 3)
    whole = marked(schedule, Mark(slot.rank, slot.slot, "", "a slot"))
    assert [ops[number].op for number in whole["at"]] == list(schedule.programs[slot.rank][slot.slot])
    one = marked(schedule, Mark(slot.rank, slot.slot, str(slot.op), "an op", 1, 0, ""))
    assert [ops[number] for number in one["at"]] == [slot]
    assert [ops[number][:2] for number in one["to"]] == [(1, 0)]
    assert marked(schedule, Mark(0, 0, "", "never", peer_rank=1)) == {
        "sentence": "never",
        "at": [0],
        "to": [],
        "peer": 1,
    }


@pytest.mark.parametrize(
    "mark", [Mark(2, 0, "", ""), Mark(0, 999, "", ""), Mark(0, 0, "0F1>", ""), Mark(-1, 0, "", "")]
)
def test_a_mark_beside_the_schedule_is_an_error(mark):
    with pytest.raises(RuleError, match="a mark"):
        marked(dualpipe(2, 4), mark)
