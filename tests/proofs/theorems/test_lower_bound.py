"""No schedule ends before the bound: schedules that run keep the axioms, and some of them reach it."""

from dataclasses import replace
from itertools import pairwise

import pytest

from dualpipe.schedule import B, F, Op, W
from dualpipe.schedule.generate import PLANS, generate
from dualpipe.timeline.simulate import simulate
from dualpipe.timeline.timeline import Timeline
from proofs.theorems import prove
from proofs.theorems.instance import plans_at
from proofs.theorems.lower_bound import AXIOMS, lower_bound
from proofs.theorems.obligation import QUESTION_SECONDS, discharge
from proofs.verdict import Refuted
from tests.proofs.theorems.cases import FAMILIES

REACHED = {"zb1p", "dualpipe-late-tail", "dualpipe-late-all", "dualpipev-late-tail", "dualpipev-late-all"}
"""The schedules that end at the bound of their family, if messages are awaited by what needs them."""


def failures(family, axioms=AXIOMS):
    return discharge(lower_bound(family, axioms), QUESTION_SECONDS).failures


def with_bound(family, difference):
    return replace(family, bounds=replace(family.bounds, least=family.bounds.least + difference))


@pytest.mark.parametrize("name", FAMILIES)
def test_no_axiom_can_be_left_out_and_no_larger_bound_is_proved(name):
    family = FAMILIES[name]
    assert failures(family) == ()
    for axiom in AXIOMS:
        assert failures(family, AXIOMS - {axiom}), axiom
    result = prove(with_bound(family, 1), "lower bound", set())
    assert isinstance(result.verdict, Refuted)
    assert result.counterexample.obligation.startswith("F of chunk 0")


@pytest.mark.parametrize("name", FAMILIES)
def test_the_bound_is_reached_by_a_schedule_that_is_said_to_be_optimal_and_by_no_other(name):
    """So a bound that is larger by one is false."""
    family = FAMILIES[name]
    for size in ((4, 8), (6, 14), (8, 16)):
        plan = PLANS[name](*size, 0)
        least = family.bounds.least.at(plan.sizes)
        for blocking in (False, True):
            makespan = simulate(generate(name, *size), blocking=blocking).makespan
            assert makespan >= least
            assert (makespan == least) == (name in REACHED and not blocking)


def test_a_makespan_at_the_lower_bound_is_optimal_once_that_is_proved():
    for name, is_optimal in (("1f1b", False), ("zb1p", True)):
        proved = {"totals", "messages", "order", "lower bound"}
        result = prove(FAMILIES[name], "makespan at use", proved)
        assert result.optimal is result.as_json()["optimal"] is is_optimal
        assert ("which is optimal: no schedule with these assumptions is shorter" in result.text) is is_optimal
        assert not prove(FAMILIES[name], "makespan at use", proved - {"lower bound"}).optimal


@pytest.mark.parametrize("name", FAMILIES)
def test_there_is_a_deepest_rank_at_every_size(name):
    family = FAMILIES[name]
    least = 2 if name.startswith("dualpipe") else 1
    for ranks in range(2, 41, 2):
        plans = plans_at(family, ranks, least * ranks)
        values = [family.values(plan.sizes, "") for plan in plans]
        domains = [rank.domain for rank in family.deepest]
        deepest = [at for at in values if any(all(each.holds(at) for each in domain) for domain in domains)]
        assert deepest
        for plan in plans:
            assert [stage.at(plan.sizes) for stage in family.stages] == [chunk.stage for chunk in plan.chunks]


def starts(timeline: Timeline) -> dict[Op, float]:
    """The start of each op; those of one slot run one after the other."""
    return {op: span.start + k for spans in timeline.spans for span in spans for k, op in enumerate(span.ops)}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("blocking", [False, True])
def test_the_axioms_hold_in_a_schedule_that_runs(name, blocking):
    schedule = generate(name, 4, 8)
    start = starts(simulate(schedule, blocking=blocking))
    for op, at in start.items():
        if op.kind is F:
            before = Op(F, op.lane, op.stage - 1, op.mb)
            assert at >= (start[before] + 1 if op.stage else 0)
        elif op.kind in (B, W):
            assert at >= start[op._replace(kind=F if op.kind is B else B)] + 1
    for program in schedule.programs:
        computes = sorted(start[op] for slot in program for op in slot if op.kind in (F, B, W))
        assert all(after >= now + 1 for now, after in pairwise(computes))
        assert len(computes) == 3 * len(FAMILIES[name].chunks) * 8 // len(schedule.lanes)
