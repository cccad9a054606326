"""A proof on the page: findings become marks, checks a table, and ``dualpipe prove --html`` writes it."""

import re

import pytest

from dualpipe.cli.page import comparison, counterexamples
from dualpipe.page import Page, render
from dualpipe.schedule import RF, UP, Op, Schedule
from dualpipe.schedule.generate import dualpipe, one_f_one_b
from dualpipe.schedule.text import dumps
from proofs.prove import prove
from tests.cli.conftest import run as run
from tests.page import reading
from tests.production.cases import without
from tests.proofs.faults import (
    FAULTS,
    a_receive_nobody_consumes,
    a_ring_sends_before_it_receives,
    two_sends_of_a_batch_swapped,
    weight_gradient_stored_and_never_run,
)


def found(schedule, check, **options):
    report = prove(schedule, smt=False, **options)
    return next(one for one in counterexamples(report, schedule) if one.title == check)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.title)
def test_every_refuted_check_points_into_the_timeline(fault):
    schedule = fault.plant()
    report = prove(schedule, smt=False)
    section = comparison(report, schedule)
    refuted = [name for name, result in report.checks.items() if result.verdict.word == "refuted"]
    assert [one.title for one in section.counterexamples] == refuted
    assert all(one.marks for one in section.counterexamples)
    reading.tree(render(Page("faults", "refuted", (section,))))


def test_how_a_program_failed_is_the_first_table():
    schedule = one_f_one_b(2, 4)
    failed = Schedule(schedule.routes, schedule.programs, failures=[(1, "raised IndexError at a.py:3")])
    section = comparison(prove(failed, smt=False), failed)
    assert (section.verdict, section.tables[0].rows) == ("refuted", (("1", "raised IndexError at a.py:3"),))
    assert "raised IndexError at a.py:3" in render(Page("failed", "refuted", (section,)))
    assert len(comparison(prove(schedule, smt=False), schedule).tables) == 1


def test_a_circle_has_an_arrow_for_each_wait():
    marks = found(a_ring_sends_before_it_receives(), "deadlock").marks
    assert [(mark.rank, mark.peer_rank) for mark in marks] == [(0, 1), (1, 2), (2, 3), (3, 0)]
    assert (marks[0].op, marks[0].peer_op) == ("0SF3>", "1RF3>")
    assert all(mark.sentence.startswith(f"rank {mark.rank} waits in slot {mark.slot}") for mark in marks)


def test_a_mismatch_shows_what_is_got_and_what_was_meant():
    gets, wanted = found(two_sends_of_a_batch_swapped(), "messages").marks
    assert (gets.op, gets.peer_op) == ("1RF3>", "3SB1<")
    assert (wanted.op, wanted.peer_op) == ("1RF3>", "0SF3>")


def test_a_message_that_never_meets_points_at_the_rank_that_never_sends_it():
    mark, further = found(a_receive_nobody_consumes(), "deadlock").marks
    assert (mark.rank, mark.op, mark.peer_rank, mark.peer_slot) == (1, "1RF8>", 0, None)
    assert (further.rank, further.op) == (0, "0RB5>"), "where the rank that never sends it waits"


def test_a_missing_op_points_at_the_last_work_of_its_microbatch():
    (mark,) = found(weight_gradient_stored_and_never_run(), "complete").marks
    assert (mark.rank, mark.op) == (3, "3B7>")


def test_too_much_memory_points_at_the_slot_and_at_all_that_is_live():
    slot, *live = found(dualpipe(4, 8), "memory", max_activations=4).marks
    assert slot.op == ""
    assert len(live) == 5
    assert {mark.rank for mark in live} == {slot.rank}


def test_a_deadlock_is_drawn_with_messages_that_block():
    ring = a_ring_sends_before_it_receives()
    assert comparison(prove(ring, smt=False), ring).blocking
    assert not comparison(prove(dualpipe(2, 4), smt=False), dualpipe(2, 4)).blocking


@pytest.fixture
def files(tmp_path):
    schedules = {"good": dualpipe(2, 4), "wrong": without(one_f_one_b(2, 2), 1, Op(RF, UP, 1, 1))}
    for name, schedule in schedules.items():
        (tmp_path / f"{name}.txt").write_text(dumps(schedule))
    (tmp_path / "bad.txt").write_text("lane > 0\nrank 0: 0X\n")
    return tmp_path


def test_prove_writes_the_page_of_one_schedule(run, files):
    target = files / "page.html"
    assert run("prove", files / "wrong.txt", "--html", target).code == 1
    text = target.read_text(encoding="utf-8")
    reading.tree(text)
    (section,) = reading.data(text)
    printed = {one["title"]: one["story"] for one in section["counterexamples"]}
    assert printed["order"].startswith("rank 1 runs the forward of microbatch 1 at stage 1 of lane > in slot 4 (1F1>)")
    assert '<span class="badge refuted">refuted</span>' in text


def test_prove_writes_all_schedules_into_one_page_and_says_what_could_not_be_read(run, files):
    target = files / "page.html"
    result = run("prove", files / "good.txt", files / "bad.txt", files / "wrong.txt", "--html", target, "--json")
    assert result.code == 2
    assert len(result.out.splitlines()) == 3
    text = target.read_text(encoding="utf-8")
    assert "1 proved, 1 bad input, 1 refuted" in text
    assert "bad.txt:2:9" in text
    assert re.findall(r'<h2 id="s\d-name">([^<]*)', text)[::2] == ["dualpipe", "1f1b"]
    assert [len(section["drawings"]) for section in reading.data(text)] == [1, 0, 1]
