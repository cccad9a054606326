"""The models of communication, on the smallest schedules that distinguish them."""

import pytest

from dualpipe.schedule.text import loads
from proofs.deadlock_search import deadlock
from proofs.deadlock_smt import deadlock as deadlock_problem
from proofs.findings import Unmatched, WaitCycle
from proofs.models import BLOCKING, EAGER, EDGE, MODELS, STREAM, ModelError, eager, parse_models
from proofs.prove import prove
from proofs.smt import verdict
from proofs.story import tell
from proofs.verdict import Proved, Refuted


def crossing(sends: int):
    """Both ranks send first, ``sends`` messages each, and receive afterwards."""
    here = " ".join(f"0F{mb}> 0SF{mb}>" for mb in range(sends)) + " " + " ".join(f"1RF{mb}<" for mb in range(sends))
    there = here.replace("<", "^").replace(">", "<").replace("^", ">")
    return loads(f"lane > 0 1\nlane < 1 0\nrank 0: {here}\nrank 1: {there}\n")


def both(schedule, model):
    """The verdict of both methods, which must agree."""
    by_search, by_z3 = deadlock(schedule, model), verdict(deadlock_problem(schedule, model))
    assert type(by_search) is type(by_z3)
    return by_search


def test_senders_that_face_each_other_block():
    found = both(crossing(1), BLOCKING)
    assert isinstance(found.finding, WaitCycle)
    assert [wait.place.rank for wait in found.finding.waits] == [0, 1]


@pytest.mark.parametrize("sends", [1, 2, 3])
def test_a_buffer_for_all_their_messages_unblocks_them_and_a_smaller_one_does_not(sends):
    assert isinstance(both(crossing(sends), eager(sends)), Proved)
    if sends > 1:
        found = both(crossing(sends), eager(sends - 1))
        assert "for room to send rank 1 the activation" in tell(found.finding)
        assert f"({eager(sends - 1)} messages)" in tell(found.finding)


def test_no_buffer_helps_receivers_that_face_each_other_and_computes_that_go_on_do():
    facing = loads("lane > 0 1\nlane < 1 0\nrank 0: 1RF0< 0F0> 0SF0>\nrank 1: 1RF0> 0F0< 0SF0<\n")
    assert all(isinstance(both(facing, model), Refuted) for model in (BLOCKING, EAGER, STREAM, eager(99)))
    assert isinstance(both(facing, EDGE), Proved)


def test_a_message_left_in_the_buffer_is_unmatched():
    alone = loads("lane > 0 1\nrank 0: 0F0> 0SF0>\nrank 1:\n")
    for model in MODELS:
        found = both(alone, model)
        assert isinstance(found.finding, Unmatched)
        assert "rank 1 receives nothing from it" in tell(found.finding)
    assert tell(both(alone, EDGE).finding).startswith("rank 0 posts the send of the activation of microbatch 0")


CONTROLS = {
    # eager has room for both sends; under edge neither send holds up the receive behind it
    "0: 0F0> 0SF0> 1RF0< 1F0< / 1: 0F0< 0SF0< 1RF0> 1F0>": (BLOCKING, {EAGER, EDGE}),
    # two sends each: eager has room for one, and under edge the computes between them go on
    "0: 0F0> 0SF0> 0F1> 0SF1> 1RF0< 1RF1< / 1: 0F0< 0SF0< 0F1< 0SF1< 1RF0> 1RF1>": (EAGER, {eager(2), EDGE}),
    # receives posted ahead: no buffer helps a rank that waits for one; under edge only the F behind it waits
    "0: 1RF0< 0F0> 0SF0> 1F0< / 1: 1RF0> 0F0< 0SF0< 1F0>": (eager(9), {EDGE}),
    # the reduction waits for the send before it to complete, and a send into a buffer has completed at once
    "0: 0F0> 0SF0> 0RG>@0 / 1: 1RG>@0 1RF0>": (EDGE, {EAGER}),
    # F waits for what the other rank sends after its own F: a cycle of computes, which no transport can break
    "0: 1RF0< 1F0< 0F0> 0SF0> / 1: 1RF0> 1F0> 0F0< 0SF0<": (EDGE, set()),
}
"""Two ranks, a model that refutes them, and those that do not."""


@pytest.mark.parametrize("text", CONTROLS)
def test_a_schedule_distinguishes_each_pair_of_models(text):
    refutes, proves = CONTROLS[text]
    here, there = (part.strip().partition(": ")[2] for part in text.split("/"))
    schedule = loads(f"lane > 0 1\nlane < 1 0\ngroup 0: 0 1\nrank 0: {here}\nrank 1: {there}\n")
    assert isinstance(both(schedule, refutes), Refuted)
    assert isinstance(both(schedule, BLOCKING), Refuted)
    for model in proves:
        assert isinstance(both(schedule, model), Proved), str(model)


def test_between_blocking_eager_and_edge_each_model_proves_what_another_one_refutes():
    apart = {(str(proves), str(refutes)) for refutes, all_of in CONTROLS.values() for proves in all_of}
    assert apart >= {("eager", "blocking"), ("edge", "blocking"), ("edge", "eager"), ("eager", "edge")}


def test_under_edge_a_rank_waits_at_the_compute_that_needs_a_receive():
    schedule = loads("lane > 0 1\nlane < 1 0\nrank 0: 1RF0< 0F1> 1F0< 0F0> 0SF0>\nrank 1: 1RF0> 1F0> 0F0< 0SF0<\n")
    found = both(schedule, EDGE)
    assert tell(found.finding).split("\n") == [
        "rank 0 waits in slot 2 (1F0<) until rank 1 sends it the activation of microbatch 0 of lane < (stage 0 to "
        "stage 1); that send is in slot 3 (0SF0<) there, and rank 1 gets no further than slot 1",
        "rank 1 waits in slot 1 (1F0>) until rank 0 sends it the activation of microbatch 0 of lane > (stage 0 to "
        "stage 1); that send is in slot 4 (0SF0>) there, and rank 0 gets no further than slot 2",
        "so ranks 0 and 1 wait for each other and none of them can go on (edge messages)",
    ]


def test_a_proof_names_the_models_that_the_schedule_survives():
    report = prove(crossing(1), models=[EAGER, EDGE], smt=False)
    assert "  deadlock      proved" in report.text()
    assert "      with eager and edge messages\n" in report.text()


def test_a_stream_keeps_the_message_slots_of_a_communicator_in_order():
    # Each rank's first message slot matches only the other's second: computes may go on, message slots may not.
    crossed = loads("lane > 0 1\nlane < 1 0\nrank 0: 1RF0< 0F0> 0SF0>\nrank 1: 1RF0> 0F0< 0SF0<\n")
    batched = loads("lane > 0 1\nlane < 1 0\nrank 0: 0F0> 0SF0>+1RF0<\nrank 1: 0F0< 0SF0<+1RF0>\n")
    assert isinstance(both(crossed, STREAM), Refuted)
    assert isinstance(both(batched, STREAM), Proved)


def test_a_message_to_no_other_rank_is_unmatched():
    for text in ("1RF0>@5", "1RF0>@1", "0RF0>"):
        found = both(loads(f"lane > 0 1\nrank 0: 0F0> 0SF0>\nrank 1: {text}\n"), BLOCKING)
        assert isinstance(found.finding, Unmatched)


def test_deadlock_is_refuted_if_it_is_under_any_chosen_model_and_lists_the_proved_ones():
    report = prove(crossing(1))
    assert report.checks["deadlock"].as_json()["models"]["eager"]["verdict"] == "proved"
    assert "proved with eager and edge messages" in report.text()
    assert isinstance(prove(crossing(1), models=[EAGER]).checks["deadlock"].verdict, Proved)


def test_models_are_named_on_the_command_line():
    assert parse_models("all") == MODELS
    assert parse_models("eager:3") == (eager(3),)
    assert parse_models("stream") == (STREAM,)
    assert parse_models("edge") == (EDGE,)
    for text in ("", "eager:0", "eager:-1", "nccl"):
        with pytest.raises(ModelError):
            parse_models(text)
