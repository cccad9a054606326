"""The check ``buffers``: what a recorded program does to the memory of its messages."""

import random
from functools import partial

import pytest

from dualpipe.schedule import Op, Placed, Schedule
from dualpipe.schedule.observed import Event, Observed, What
from dualpipe.schedule.text import loads
from proofs import buffers_search, buffers_smt
from proofs.against import compare
from proofs.departure_story import text
from proofs.findings import Overwritten, TouchedInFlight
from proofs.models import BLOCKING
from proofs.prove import CHECKS, problems, prove, run_check
from proofs.verdict import Proved, Refuted

# rank 0   F0 F1 B0 B1    both receives of rank 1 are from one buffer in the last two cases of FAULTS
# rank 1   F0 B0 F1 B1
GPIPE = """\
lane > 0 1
rank 0: 0F0> 0SF0> 0F1> 0SF1> 0RB0> 0B0>+0W0> 0RB1> 0B1>+0W1>
rank 1: 1RF0> 1F0> 1RF1> 1F1> 1B0>+1W0> 1SB0> 1B1>+1W1> 1SB1>
place 1 comm.py:1 (called at train.py:1)
place 2 train.py:2
place 3 train.py:3
"""
RIGHT = (
    "events 1: post:1RF0>:1 wait:1RF0>:1 keep:1RF0>:1F0>:2 drop:1RF0>:1F0>:3 "
    "post:1RF1>:1 write:1RF0>:1RF1>:1 wait:1RF1>:1"
)

FAULTS = {
    "a receive that is read before its wait": (
        "events 1: post:1RF0>:1 read:1RF0>:1F0>:2 wait:1RF0>:3",
        "rank 1 reads the tensor of the activation of microbatch 0 of lane > (stage 0 to stage 1) in 1F0> while the "
        "message in slot 0 (1RF0>) is in flight\nposted at comm.py:1 (called at train.py:1)\nread at train.py:2\n"
        "waited for at train.py:3\nthe message may not have arrived",
    ),
    "a receive that is never waited for": (
        "events 1: post:1RF0>:1 read:1RF0>:1F0>:2",
        "read at train.py:2\nnever waited for\n",
    ),
    "a sent tensor that is written to": (
        "events 0: post:0SF0>:1 write:0SF0>:0F1>:2 wait:0SF0>:3",
        "rank 0 writes to the tensor of the activation of microbatch 0 of lane > (stage 0 to stage 1) in 0F1> while",
    ),
    "a sent tensor that is freed": (
        "events 0: post:0SF0>:1 free:0SF0>:-:2 wait:0SF0>:3",
        "freed or resized at train.py:2\nwaited for at train.py:3\nwhat is sent may be what is in that memory later",
    ),
    "two receives in flight into one buffer": (
        "events 1: post:1RF0>:1 post:1RF1>:2 write:1RF0>:1RF1>:2 wait:1RF0>:3 wait:1RF1>:3",
        "rank 1 receives 1RF1> into the tensor of the activation of microbatch 0 of lane > (stage 0 to stage 1) while "
        "the message in slot 0 (1RF0>) is in flight\nposted at comm.py:1 (called at train.py:1)\nthe other, 1RF1>, "
        "posted at train.py:2\nwaited for at train.py:3\nthe one that arrives last is in that memory in the end",
    ),
    "a send of what is being received": (
        "events 1: post:1RF0>:1 post:1SB0>:2 read:1RF0>:1SB0>:2 wait:1RF0>:3 wait:1SB0>:3",
        "rank 1 sends, as 1SB0>, the tensor of the activation of microbatch 0",
    ),
    "one of two tensors of a message": (
        "events 1: post:1RF0>:1 post:1RF0>:1 wait:1RF0>:2 read:1RF0>:1F0>:2 wait:1RF0>:3",
        "rank 1 reads the tensor of",
    ),
    "a received tensor that is overwritten before its backward": (
        "events 1: post:1RF0>:1 wait:1RF0>:1 keep:1RF0>:1F0>:2 post:1RF1>:3 write:1RF0>:1RF1>:3 wait:1RF1>:3 "
        "drop:1RF0>:1F0>:2",
        "rank 1 receives the activation of microbatch 1 of lane > (stage 0 to stage 1) (1RF1>) into the memory of the "
        "activation of microbatch 0 of lane > (stage 0 to stage 1), received in slot 0 (1RF0>), at train.py:3\n"
        "the graph of 1F0>, made at train.py:2, still needs that memory: its backward at train.py:2 computes wrong",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_both_methods_refute_the_fault_and_the_story_has_its_lines(fault):
    events, story = FAULTS[fault]
    checked = prove(loads(GPIPE + events)).checks["buffers"]
    assert isinstance(checked.verdict, Refuted)
    assert checked.verdict.core
    assert story in checked.as_json()["story"]


SHARED = (
    "events 1: post:1RF0>:1 wait:1RF0>:1 keep:1RF0>:1F0>:2 post:1RF1>:1 write:1RF0>:1RF1>:1 post:1RF2>:2 "
    "write:1RF1>:1RF2>:2 wait:1RF1>:3 wait:1RF2>:3 drop:1RF0>:1F0>:3"
)
"""1RF0> is overwritten by a receive that shares the memory with a third one."""


def test_memory_that_two_receives_share_is_reported_first_since_it_may_make_names_wrong():
    shared = loads(GPIPE.replace("1RF1>", "1RF2>+1RF1>").replace("0SF1>", "0SF1>+0SF2>") + SHARED)
    report = prove(shared, smt=False)
    assert report.as_json()["checks"]["buffers"]["story"].startswith("rank 1 receives 1RF2> into the tensor of")
    first, second = report.text().splitlines()[:2]
    assert first.endswith(": refuted")
    assert second.startswith("  names of messages may be wrong, and with them what the other checks say: a receive is ")
    assert "and rank 1 had two receives in flight into the same memory at a time (see buffers)" in second
    assert report.as_json()["doubts"] == [second.strip()]
    overwritten = prove(
        loads(GPIPE + FAULTS["a received tensor that is overwritten before its backward"][0]), smt=False
    )
    assert (overwritten.verdict, overwritten.doubts) == ("refuted", ())


def test_names_of_receives_that_share_memory_do_not_depart_from_another_schedule():
    ordered = GPIPE.replace(" 1F0> 1RF1>", "+1RF1> 1F0>").split("place")[0]
    exchanged = ordered.replace("1RF0>+1RF1>", "1RF1>+1RF0>") + GPIPE[GPIPE.index("place") :]
    apart = "events 1: post:1RF1>:1 post:1RF0>:2 wait:1RF1>:3 wait:1RF0>:3"
    assert compare(loads(exchanged + apart), loads(ordered)).verdict == "departs"
    found = compare(loads(exchanged + apart.replace(" wait:1RF1>", " write:1RF1>:1RF0>:2 wait:1RF1>")), loads(ordered))
    assert found.verdict == "same"
    assert "the names of 2 receives were not compared, since another receive was in flight into the same" in text(found)


def test_a_wait_in_time_and_a_buffer_used_again_after_the_backward_are_proved():
    for events in (
        RIGHT,
        "events 0: post:0SF0>:1 wait:0SF0>:1 write:0SF0>:0F1>:2 free:0SF0>:-:2",
        "events 0: post:0SF0>:1 read:0SF0>:0F1>:2 wait:0SF0>:1",
        "events 1: post:1RF0>:1 wait:1RF0>:1 keep:1RF0>:1F0>:2 write:1RF0>:1RF1>:3",
    ):
        report = prove(loads(GPIPE + events))
        assert isinstance(report.checks["buffers"].verdict, Proved), events
        assert report.verdict == "proved"


def test_the_check_is_of_recorded_schedules_only():
    assert tuple(prove(loads(GPIPE)).checks) == CHECKS
    assert tuple(prove(loads(GPIPE + RIGHT)).checks) == (*CHECKS, "buffers")
    assert [problem.title for problem in problems(loads(GPIPE + RIGHT), BLOCKING)][-1] == "buffers"


def test_both_methods_agree_on_any_events():
    """``run_check`` raises if they differ."""
    plain, draw = loads(GPIPE), random.Random(1)
    messages = [Placed(1, 0, 0, Op("RF", ">", 1, 0)), Placed(1, 5, 0, Op("SB", ">", 1, 0))]
    kinds, found = [*What, What.WAIT, What.WRITE, What.KEEP, What.DROP], set()
    for _ in range(300):
        drawn = [(draw.choice(kinds), draw.choice(messages), draw.randrange(2)) for _ in range(draw.randrange(1, 10))]
        events = [Event(what, message, Op("F", ">", 1, mb), "a.py:1") for what, message, mb in drawn]
        schedule = Schedule(plain.routes, plain.programs, observed=Observed([[], events]))
        methods = (partial(method.buffers, schedule) for method in (buffers_search, buffers_smt))
        finding = run_check(schedule, "buffers", *methods).finding
        found.add(Proved if finding is None else type(finding))
    assert found == {Proved, TouchedInFlight, Overwritten}
