"""Every planted fault of order or of messages is refuted by the named checks, with its story."""

import pytest

from dualpipe.schedule.generate import SizeError, dualpipe, dualpipev, one_f_one_b, zb1p
from proofs.prove import prove
from proofs.story import tell
from proofs.verdict import Refuted
from tests.proofs.faults import FAULTS, a_ring_sends_before_it_receives, ring, two_sends_of_a_batch_swapped


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.title)
def test_the_named_checks_refute_the_fault_with_its_story(fault):
    report = prove(fault.plant())
    for check in fault.checks:
        assert isinstance(report.checks[check].verdict, Refuted), check
    assert fault.matches(tell(report.checks[fault.checks[0]].verdict.finding))


def test_without_the_faults_the_same_schedules_are_proved():
    for schedule in (dualpipe(4, 8), dualpipe(2, 8), dualpipev(4, 8), one_f_one_b(4, 8), zb1p(4, 8), ring(4)):
        assert prove(schedule).verdict == "proved"


def test_two_swapped_sends_do_not_hang_so_that_a_search_for_deadlocks_alone_misses_them():
    checks = prove(two_sends_of_a_batch_swapped()).checks
    refuted = [name for name, result in checks.items() if isinstance(result.verdict, Refuted)]
    assert refuted == ["messages"]


def test_a_ring_of_any_size_stops_with_every_rank_waiting_for_the_next():
    waits = prove(a_ring_sends_before_it_receives()).checks["deadlock"].verdict.finding.waits
    assert [(wait.place.rank, wait.partner.rank) for wait in waits] == [(0, 1), (1, 2), (2, 3), (3, 0)]


def test_fewer_microbatches_than_stages_are_turned_away_before_there_is_a_schedule():
    with pytest.raises(SizeError, match="at least as many microbatches as ranks: got 3"):
        one_f_one_b(4, 3)
    with pytest.raises(SizeError, match="at least two microbatches per rank: got 6"):
        dualpipe(4, 6)
