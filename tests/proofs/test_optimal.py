"""The least makespan within DualPipe's memory, in the relaxed model of ``proofs.optimal``."""

import json

import pytest

from dualpipe.schedule import UP, B, F, Op, W
from dualpipe.schedule.generate import generate
from dualpipe.timeline.simulate import simulate
from proofs.optimal import OptimalSizeError, broken_rules, dualpipe_takes, optimal
from proofs.verdict import Proved, Unknown


@pytest.mark.parametrize(
    ("ranks", "microbatches", "impossible", "least", "dualpipe"),
    [(2, 4, 11, 12, 12), (2, 6, 17, 18, 18), pytest.param(4, 8, 24, 25, 26, marks=pytest.mark.long)],
)
def test_least_makespan(ranks, microbatches, impossible, least, dualpipe):
    found = optimal(ranks, microbatches)
    assert isinstance(found.verdict, Proved), found.text
    assert (found.impossible, found.least, found.dualpipe) == (impossible, least, dualpipe)
    assert not list(broken_rules(found.timetable, microbatches))
    assert {len(row) for row in found.timetable} == {least}
    assert json.loads(json.dumps(found.as_json())) == found.as_json()


@pytest.mark.parametrize(("ranks", "microbatches"), [(2, 4), (4, 8), (4, 12), (6, 12)])
def test_dualpipe_takes_what_the_simulator_measures(ranks, microbatches):
    assert dualpipe_takes(ranks, microbatches) == simulate(generate("dualpipe", ranks, microbatches)).makespan


def test_a_search_without_time_is_unknown():
    found = optimal(4, 8, timeout_s=0)
    assert isinstance(found.verdict, Unknown)
    assert (found.impossible, found.least) == (None, None)
    assert found.text == "unknown: 4 ranks, 8 microbatches: the solver gave up on 23; DualPipe takes 26"


def test_a_question_that_is_too_large_is_unknown_without_asking_the_solver():
    found = optimal(64, 256)
    assert isinstance(found.verdict, Unknown)
    assert "the question for 767 is too large for the solver" in found.text


def test_a_size_that_dualpipe_does_not_support_is_not_compared():
    assert optimal(2, 2).text == "proved: 2 ranks, 2 microbatches: 6 slots are enough and 5 are not"


def moved(timetable, rank, change):
    rows = list(timetable)
    rows[rank] = tuple(change(list(rows[rank])))
    return tuple(rows)


def test_the_rules_are_checked_without_the_solver():
    timetable = optimal(2, 4).timetable
    assert list(broken_rules(moved(timetable, 0, lambda row: row[1:] + row[:1]), 4))
    assert list(broken_rules(moved(timetable, 0, lambda row: [None, *row[1:]]), 4))
    greedy = tuple(Op(kind, UP, 0, mb) for kind in (F, B, W) for mb in range(4))
    assert "rank 0 holds 4 microbatches in slot 3" in list(broken_rules((greedy, ()), 8))


@pytest.mark.parametrize(("ranks", "microbatches"), [(3, 8), (0, 4), (4, 7), (2, 0)])
def test_a_size_outside_the_model_is_an_error(ranks, microbatches):
    with pytest.raises(OptimalSizeError, match="even numbers"):
        optimal(ranks, microbatches)
