"""The report: the JSON object, the exit code, the text, and whole stories."""

import json

import pytest

from dualpipe.schedule import Op, Placed, Schedule
from dualpipe.schedule.generate import dualpipe, one_f_one_b, zb1p
from dualpipe.schedule.text import loads
from proofs.findings import Live, Mismatch
from proofs.prefix import closed, cut
from proofs.prove import CHECKS, prove
from proofs.verdict import ExitCode, Proved, Refuted, Skipped, Unknown, overall, worst
from proofs.waivers import WITHOUT
from tests.mutations import drop, swap
from tests.proofs.faults import both_sides_send_first, two_sends_of_a_batch_swapped


def lines_below(schedule, check, **options) -> list[str]:
    """The lines under a check in the text of the report."""
    lines = prove(schedule, **options).text().split("\n")
    start = next(number for number, line in enumerate(lines) if line.startswith(f"  {check} "))
    story = []
    for line in lines[start + 1 :]:
        if not line.startswith("      "):
            break
        story.append(line[6:])
    return story


def test_the_story_of_a_deadlock():
    assert lines_below(both_sides_send_first(), "deadlock") == [
        "rank 0 waits in slot 3 (0SF1>) until rank 1 receives the activation of microbatch 1 of lane > "
        "(stage 0 to stage 1); the receive that matches it is in slot 4 (1RF1>) there, and rank 1 gets no further than "
        "slot 3",
        "rank 1 waits in slot 3 (1SB0>) until rank 0 receives the gradient of microbatch 0 of lane > "
        "(stage 1 to stage 0); the receive that matches it is in slot 4 (0RB0>) there, and rank 0 gets no further than "
        "slot 3",
        "so ranks 0 and 1 wait for each other and none of them can go on (blocking messages)",
        "the first slots are enough to see it: 5 of rank 0, 5 of rank 1",
        "proved with eager and edge messages",
    ]


def test_the_story_of_a_mismatch():
    assert lines_below(two_sends_of_a_batch_swapped(), "messages") == [
        "rank 1 expects the activation of microbatch 3 of lane > (stage 0 to stage 1) in slot 13 (1RF3>), but the next "
        "message from rank 0 is the gradient of microbatch 1 of lane < (stage 3 to stage 2), sent in slot 13 (3SB1<)",
        "messages carry no tag, so the rank cannot tell them apart: the run would hang, or finish with wrong gradients",
        "the first slots are enough to see it: 14 of rank 0, 14 of rank 1",
    ]


def test_the_story_of_too_much_memory():
    assert lines_below(dualpipe(4, 8), "memory", max_activations=4) == [
        "rank 1 holds 5 live activations in slot 8, but may hold only 4 (given); live in that slot:",
        "  stage 1 of lane >, waiting for B: microbatches 0, 1, 2",
        "  stage 2 of lane <, waiting for B: microbatches 0, 1",
        "the first slots are enough to see it: 9 of rank 1",
    ]


def out_of_microbatch_order():
    """ZB1P whose last rank runs its last two weight gradients the other way round."""
    return swap(zb1p(2, 4), 1, 15)


def test_a_waived_check_is_made_and_does_not_count_and_the_verdict_says_so():
    report = prove(out_of_microbatch_order(), waive=["accumulation"])
    assert (report.verdict, report.exit_code) == ("proved", ExitCode.PROVED)
    assert report.text().startswith("zb1p on 2 ranks: proved but for accumulation (waived)\n")
    assert "waived: gradients are not added in microbatch order, so they are not bitwise those of the plain loop" in (
        report.text()
    )
    shown = report.as_json()
    assert (shown["verdict"], shown["waived"]) == ("proved", ["accumulation"])
    assert shown["checks"]["accumulation"]["verdict"] == "refuted"
    assert "waived" not in shown["checks"]["order"]


def test_a_waiver_leaves_every_other_check_and_a_check_that_holds_alone():
    assert prove(out_of_microbatch_order(), waive=["memory"]).verdict == "refuted"
    holds = prove(zb1p(2, 4), waive=CHECKS)
    assert holds.as_json() | {"checks": {}} == prove(zb1p(2, 4)).as_json() | {"checks": {}}


@pytest.mark.parametrize("check", CHECKS)
def test_every_check_has_words_for_what_is_open_without_it(check):
    assert WITHOUT[check]


def test_the_finding_is_in_the_json_beside_its_story():
    shown = prove(two_sends_of_a_batch_swapped()).as_json()["checks"]["messages"]
    assert shown["finding"] == {
        "fault": "mismatch",
        "send": {"rank": 0, "slot": 13, "op": "3SB1<"},
        "receive": {"rank": 1, "slot": 13, "op": "1RF3>"},
        "nth": 4,
    }
    assert shown["story"].startswith("rank 1 expects")
    assert shown["prefix"] == [14, 14, 0, 0]
    assert shown["core"]


def test_the_object_is_json_and_has_the_keys_of_the_format():
    schedule = dualpipe(4, 8)
    shown = json.loads(json.dumps(prove(schedule).as_json()))
    assert list(shown) == ["schedule", "ranks", "verdict", "checks", "peak_activations"]
    assert (shown["schedule"], shown["ranks"], shown["verdict"]) == ("dualpipe", 4, "proved")
    assert tuple(shown["checks"]) == CHECKS
    assert shown["peak_activations"] == [5, 5, 5, 5]
    for check in shown["checks"].values():
        assert check["verdict"] == "proved"
        assert set(check["methods"]) == {"graph", "z3"}
        assert check["seconds"] == pytest.approx(sum(check["methods"].values()), abs=1e-3)
    json.dumps(prove(two_sends_of_a_batch_swapped()).as_json())
    json.dumps(prove(both_sides_send_first(), max_activations=0).as_json())


def test_a_label_names_the_schedule_in_the_report():
    assert prove(dualpipe(2, 4), label="mine.txt").as_json()["schedule"] == "mine.txt"
    assert prove(dualpipe(2, 4)).text().startswith("dualpipe on 2 ranks: proved\n")


def test_without_z3_the_report_has_one_method():
    shown = prove(dualpipe(2, 4), smt=False).as_json()
    assert {tuple(check["methods"]) for check in shown["checks"].values()} == {("graph",)}


def test_every_check_runs_although_an_earlier_one_fails():
    schedule = one_f_one_b(2, 4)
    faulty = drop(schedule, 1, len(schedule.programs[1]) - 1, 0)
    words = {name: result.verdict.word for name, result in prove(faulty).checks.items()}
    assert words == dict.fromkeys(CHECKS, "proved") | {"messages": "refuted", "deadlock": "refuted"}


@pytest.mark.parametrize(
    ("verdicts", "code"),
    [
        ([Proved(), Proved()], ExitCode.PROVED),
        ([Proved(), Skipped("no bound")], ExitCode.PROVED),
        ([Unknown("timeout"), Proved()], ExitCode.UNKNOWN),
        ([Unknown("timeout"), Refuted(None)], ExitCode.REFUTED),
    ],
)
def test_the_verdict_of_a_schedule_is_that_of_its_worst_check(verdicts, code):
    assert overall(verdicts) == code


def test_bad_input_is_the_worst_exit_code_then_refuted_then_unknown():
    assert [worst(codes) for codes in ([0, 3], [0, 3, 1], [0, 3, 1, 2], [])] == [3, 1, 2, 0]
    assert list(map(int, ExitCode)) == [0, 1, 2, 3]


def test_the_prefix_shows_the_fault_alone():
    schedule = both_sides_send_first()
    result = prove(schedule).checks["deadlock"]
    short = cut(schedule, result.prefix)
    assert [len(program) for program in short.programs] == [5, 5]
    assert prove(short).checks["deadlock"].verdict.finding == result.verdict.finding


def test_a_closed_prefix_has_both_ends_of_each_message():
    schedule = loads("lane > 0 1\nrank 0: 0F0> 0SF0> 0F1>\nrank 1: 1RF0> 1F0>\n")
    assert [closed(schedule, prefix) for prefix in ((1, 0), (2, 0), (0, 1))] == [(1, 0), (2, 1), (2, 1)]


def test_a_finding_is_data():
    send, receive = Placed(0, 1, 0, Op("SF", ">", 0, 3)), Placed(1, 2, 1, Op("RF", ">", 1, 2))
    assert Mismatch(send, receive, 4).as_json()["receive"] == {"rank": 1, "slot": 2, "op": "1RF2>"}
    assert Live(send.op, "B").until == "B"


@pytest.mark.long
def test_both_methods_prove_64_ranks_and_256_microbatches():
    report = prove(dualpipe(64, 256))
    assert report.verdict == "proved"
    assert {tuple(result.seconds) for result in report.checks.values()} == {("graph", "z3")}


def test_a_program_that_failed_is_refuted_whatever_the_checks_find():
    schedule = Schedule(one_f_one_b(2, 4).routes, one_f_one_b(2, 4).programs, failures=[(1, "ended with exit code 3")])
    report = prove(schedule, smt=False)
    assert (report.verdict, report.exit_code) == ("refuted", ExitCode.REFUTED)
    assert report.text().startswith(
        "rank 1 ended with exit code 3\nschedule on 2 ranks: refuted\n  complete      proved"
    )
    assert report.as_json()["failures"] == [{"rank": 1, "what": "ended with exit code 3"}]


@pytest.mark.parametrize(
    ("failure", "check", "follows"),
    [
        ("raised IndexError", "complete", True),
        ("raised IndexError", "messages", True),
        ("raised IndexError", "deadlock", True),
        ("waited for 0RB3>", "complete", True),
        ("waited for 0RB3>", "messages", True),
        ("waited for 0RB3>", "deadlock", True),
        ("raised IndexError at a.py:1 in a later training step", "messages", False),
    ],
)
def test_what_a_rank_left_out_may_follow_from_its_failure(failure, check, follows):
    schedule = one_f_one_b(2, 4)
    programs = [program[: -2 * rank or None] for rank, program in enumerate(schedule.programs)]
    found = prove(Schedule(schedule.routes, programs, failures=[(1, failure)]), smt=False).as_json()["checks"][check]
    assert found["verdict"] == "refuted"
    assert found.get("may_follow_from") == (f"rank 1 {failure}" if follows else None)


FACING = """
lane > 0 1 2
rank 0: 0F0> 0SF0>@1 0F1> 0SF1>@1 0F2> 0SF2>@1
rank 1: 1RF0>@0 1F0> 1SF0>@2 1RF1>@0 1F1> 1SF1>@2
rank 2: 2RF0>@1 2F0> 2B0>+2W0> 2SB0>@1
"""


def test_sends_that_face_each_other_are_the_cause_of_a_hang_and_not_its_victim():
    """Rank 0 waits as well, for a rank that is stuck: neither is its message the fault, nor what rank 1 never posts."""
    schedule = loads(FACING)
    failures = [(rank, f"waited for {op}") for rank, op in enumerate(("0SF2>@1", "1SF1>@2", "2SB0>@1"))]
    hung = Schedule(schedule.routes, schedule.programs, failures=failures)
    checks = prove(hung, smt=False).as_json()["checks"]
    story = checks["deadlock"]["story"].split("\n")
    assert story[0].startswith("rank 1 waits forever in slot 5 (1SF1>@2) to send the activation of microbatch 1")
    assert story[1].startswith("rank 2 gets no further than slot 3 (2SB0>@1), where it waits to send the gradient of")
    assert story[2] == "so ranks 1 and 2 wait for each other, each in a send"
    assert checks["deadlock"]["finding"]["circle"] == [{"rank": 2, "slot": 3, "op": "2SB0>@1"}]
    assert "may_follow_from" not in checks["deadlock"]
    assert checks["messages"]["may_follow_from"].startswith("rank 1 waited for")


def test_of_several_messages_without_a_partner_the_one_for_a_rank_that_goes_on_is_told():
    text = FACING.replace(" 2SB0>@1", "").replace("2RF0>@1 2F0> 2B0>+2W0>", "2RF0>@1 2F0>")
    finding = prove(loads(text), smt=False).as_json()["checks"]["deadlock"]["finding"]
    assert (finding["place"]["rank"], finding["peer"], finding["circle"]) == (1, 2, [])


SENT_AGAIN = """
lane > 0 1
rank 0: 0F0> 0SF0>@1 0F1> 0SF0>@1 0RB0>@1 0B0>+0W0> 0RB1>@1 0B1>+0W1>
rank 1: 1RF0>@0 1F0> 1RF0>@0 1F0> 1B0>+1W0> 1SB0>@0 1B0>+1W0> 1SB0>@0
"""


def test_a_tensor_that_is_sent_in_place_of_another_is_named_and_not_what_follows_from_it():
    checks = prove(loads(SENT_AGAIN), smt=False).as_json()["checks"]
    for check in ("complete", "messages"):
        (remark,) = [line for line in checks[check]["story"].split("\n") if "more than once" in line]
        assert remark.startswith("rank 0 sends 0SF0> more than once, again in slot 3, and never sends 0SF1>: does it")


def test_nothing_follows_from_a_failure_after_the_recorded_step():
    schedule = one_f_one_b(2, 4)
    failed = [(1, "raised IndexError at a.py:1 in a later training step")]
    report = prove(Schedule(schedule.routes, [schedule.programs[0], ()], failures=failed), smt=False)
    assert report.verdict == "refuted"
    assert not any("may_follow_from" in check for check in report.as_json()["checks"].values())


@pytest.mark.parametrize("check", ["messages", "deadlock"])
def test_a_collective_that_is_never_joined_may_follow_from_a_failure(check):
    text = "failure 1: raised\nlane > 0 1\ngroup 0: 0 1\nrank 0: 0F0> 0SF0> 0AR>@0\nrank 1: 1RF0> 1F0>"
    assert prove(loads(text), smt=False).as_json()["checks"][check]["may_follow_from"] == "rank 1 raised"


CRASHED = """\
failure 1: raised IndexError at train.py:3 during 1B0>
lane > 0 1
rank 0: 0F0> 0SF0> 0RB0> 0B0>+0W0>
rank 1: 1RF0> 1F0> 1B0>
place 1 train.py:1
place 2 train.py:2
events 1: post:1RF0>:1 read:1RF0>:1F0>:2
"""
"""Reads a tensor that it never waits for, then fails."""


def test_memory_that_was_touched_too_early_is_refuted_beside_a_failure_and_does_not_follow_from_it():
    report = prove(loads(CRASHED), waive=["deadlock"])
    checks = report.as_json()["checks"]
    assert checks["buffers"]["finding"]["fault"] == "touched in flight"
    follow = [name for name, check in checks.items() if "may_follow_from" in check]
    assert follow == ["complete", "messages", "deadlock"]
    assert list(report.as_json())[:4] == ["schedule", "ranks", "verdict", "failures"]
    first, second, *_ = report.text().splitlines()
    assert first == "rank 1 raised IndexError at train.py:3 during 1B0>"
    assert second == "schedule on 2 ranks: refuted, with deadlock waived"


def test_a_failure_counts_though_every_check_that_fails_is_waived():
    report = prove(loads(CRASHED), smt=False, waive=[*CHECKS, "buffers"])
    assert (report.verdict, report.exit_code) == ("refuted", ExitCode.REFUTED)
    assert report.as_json()["waived"] == ["complete", "messages", "deadlock", "buffers"]


def test_a_fault_that_is_no_absence_does_not_follow_from_a_failure():
    schedule = two_sends_of_a_batch_swapped()
    failed = Schedule(schedule.routes, schedule.programs, failures=[(1, "raised IndexError")])
    assert "may_follow_from" not in prove(failed, smt=False).as_json()["checks"]["messages"]
