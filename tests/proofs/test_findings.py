"""Every class of finding has a story, JSON, marks on the page and, unless something is missing, a prefix."""

import json
from dataclasses import dataclass
from typing import get_args

import pytest

from dualpipe.cli.page import marks
from dualpipe.schedule import UP, Kind, Op, Placed
from dualpipe.schedule.observed import What
from dualpipe.schedule.text import loads
from proofs import findings
from proofs.fault import Fault, Place
from proofs.findings import Finding, Live, Wait
from proofs.models import BLOCKING
from proofs.prefix import smallest_prefix
from proofs.story import tell

SCHEDULE = loads("lane > 0 1\nrank 0: 0F0> 0SF0> 0RB0> 0B0>+0W0>\nrank 1: 1RF0> 1F0> 1B0>+1W0> 1SB0>\n")
SEND, RECEIVE = Placed(0, 1, 0, Op(Kind.SF, UP, 0, 0)), Placed(1, 0, 0, Op(Kind.RF, UP, 1, 0))
FORWARD, BACKWARD = Placed(0, 0, 0, Op(Kind.F, UP, 0, 0)), Placed(0, 3, 0, Op(Kind.B, UP, 0, 0))

TOGETHER, REDUCTION = Placed(0, 0, 0, Op(Kind.AA, UP, 0, 0, 0)), Placed(1, 0, 0, Op(Kind.RG, UP, 1, 0, 0))

# a finding, how many slots of each rank show it, and the rank and slot of each of its marks
EXAMPLES = [
    (findings.Empty(), None, []),
    (findings.Missing(Op(Kind.W, UP, 0, 0), 0, 0), None, [(0, 3)]),
    (findings.Repeated(FORWARD, BACKWARD), (4, 0), [(0, 3)]),
    (findings.Stray(FORWARD, 1), (1, 0), [(0, 0)]),
    (findings.TooEarly(FORWARD, BACKWARD.op, BACKWARD), (1, 0), [(0, 0)]),
    (findings.NoPeer(SEND, None, 2, 0, None), (2, 0), [(0, 1)]),
    (findings.NotNeighbour(SEND, 1, 0, 1), (2, 0), [(0, 1)]),
    (findings.Mismatch(SEND, RECEIVE, 0), (2, 1), [(1, 0), (1, 0)]),
    (findings.LeftOver(SEND, 1, 0, 0), None, [(0, 1)]),
    (findings.SentTwice(SEND, SEND), (2, 0), [(0, 1)]),
    (findings.NotMember(TOGETHER, (1,)), (1, 0), [(0, 0)]),
    (findings.Mismatch(TOGETHER, REDUCTION, 0), (1, 1), [(1, 0)]),
    (findings.LeftOver(TOGETHER, 1, 0, 0), None, [(0, 0)]),
    (findings.WaitCycle(BLOCKING, (Wait(SEND, RECEIVE), Wait(RECEIVE, SEND))), (2, 1), [(0, 1), (1, 0)]),
    (findings.Unmatched(BLOCKING, SEND, 1, 0, 0, True), (2, 1), [(0, 1)]),
    (findings.Unmatched(BLOCKING, TOGETHER, 1, 0, 0), (1, 0), [(0, 0)]),
    (findings.OverBound(0, 2, (Live(FORWARD.op, Kind.B),), 0, "given"), (3, 0), [(0, 2), (0, 0)]),
    (findings.OutOfOrder(FORWARD, BACKWARD), (4, 0), [(0, 3)]),
    (findings.TouchedInFlight(SEND, What.FREE, FORWARD.op, "a:1", "a:2", None), None, [(0, 1), (0, 0)]),
    (findings.Overwritten(RECEIVE, Op(Kind.F, UP, 1, 0), None, "a:1", "a:2", "a:3"), None, [(1, 0)]),
]


def test_there_is_an_example_of_every_class():
    assert {type(finding) for finding, _, _ in EXAMPLES} == set(get_args(Finding))


@pytest.mark.parametrize(("finding", "prefix", "marked"), EXAMPLES, ids=lambda value: getattr(value, "fault", ""))
def test_a_finding_has_a_story_json_a_prefix_and_marks(finding, prefix, marked):
    assert tell(finding)
    assert json.loads(json.dumps(finding.as_json()))["fault"] == finding.fault
    assert smallest_prefix(SCHEDULE, finding) == prefix
    assert [(mark.rank, mark.slot) for mark in marks(finding, SCHEDULE)] == marked


def test_a_new_class_of_finding_cannot_leave_out_its_places():
    class Forgotten(Fault):
        check, fault = "order", "forgotten"

    with pytest.raises(TypeError, match="places"):
        Forgotten()


def test_a_new_class_of_finding_gets_a_prefix_and_fails_without_a_story_and_marks():
    @dataclass(frozen=True)
    class New(Fault):
        check, fault = "order", "new"
        at: Placed

        def places(self):
            return (Place(self.at.rank, self.at.slot, self.at.op, target=RECEIVE),)

    assert smallest_prefix(SCHEDULE, New(BACKWARD)) == (4, 1)
    with pytest.raises(AssertionError, match="unreachable"):
        tell(New(BACKWARD))
    with pytest.raises(AssertionError, match="unreachable"):
        marks(New(BACKWARD), SCHEDULE)
