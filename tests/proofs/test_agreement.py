"""Both methods give the same answer: ``prove`` raises if plain search and Z3 differ."""

import pytest
from hypothesis import HealthCheck, given, settings

from dualpipe.schedule.generate import dualpipe, dualpipev, one_f_one_b, zb1p
from proofs.deadlock_search import deadlock
from proofs.deadlock_smt import deadlock as deadlock_problem
from proofs.models import BLOCKING, MODELS, STREAM, eager
from proofs.prefix import cut
from proofs.prove import CHECKS, DisagreementError, MethodsDisagreeError, Result, prove, settle, under_all
from proofs.smt import verdict
from proofs.verdict import Proved, Refuted, Skipped, Unknown
from tests.mutations import MUTATIONS, mutants, mutated
from tests.strategies import schedules

SUBJECTS = {
    "dualpipe 2": dualpipe(2, 4),
    "dualpipe 4": dualpipe(4, 8),
    "dualpipev 2": dualpipev(2, 4),
    "1f1b 4": one_f_one_b(4, 6),
    "zb1p 4": zb1p(4, 6),
}
EVERY = [*MODELS, eager(2), STREAM]


@pytest.mark.parametrize("name", SUBJECTS)
def test_both_methods_agree_on_two_mutants_of_every_kind_under_every_model(name):
    planted = mutants(SUBJECTS[name], 2 * len(MUTATIONS), seed=1)
    words = {prove(mutant.schedule, models=EVERY).verdict for mutant in planted}
    assert words == {"proved", "refuted"}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(schedules())
def test_any_schedule_value_gets_a_verdict_and_no_traceback(schedule):
    report = prove(schedule)
    assert set(report.checks) == set(CHECKS)
    assert report.text()
    assert report.as_json()["verdict"] in {"proved", "refuted"}


@settings(max_examples=150, deadline=None)
@given(mutated(dualpipe(4, 8)))
def test_a_schedule_without_deadlock_under_a_model_has_none_under_a_more_lenient_one(mutant):
    blocking, eager1, edge, eager2, _ = (type(deadlock(mutant.schedule, model)) for model in EVERY)
    assert blocking is Refuted or eager1 is Proved
    assert eager1 is Refuted or eager2 is Proved
    assert eager2 is Refuted or edge is Proved


@settings(max_examples=40, deadline=None)
@given(mutated(dualpipe(4, 8)))
def test_one_communicator_gives_the_verdict_of_blocking(mutant):
    """Z3 decides ``stream`` by its definition; docs/explanation/semantics.md has the proof."""
    assert type(verdict(deadlock_problem(mutant.schedule, STREAM))) is type(deadlock(mutant.schedule, BLOCKING))


@settings(max_examples=60, deadline=None)
@given(mutated(dualpipe(4, 8)))
def test_the_prefix_of_a_refuted_check_is_refuted_by_the_same_check(mutant):
    for name, result in prove(mutant.schedule, smt=False).checks.items():
        if result.prefix is not None:
            again = prove(cut(mutant.schedule, result.prefix), smt=False).checks[name].verdict
            assert isinstance(again, Refuted)
            assert type(again.finding) is type(result.verdict.finding)


def test_a_disagreement_is_a_crash_with_both_answers():
    with pytest.raises(MethodsDisagreeError, match=r"deadlock: plain search says Proved\(\), Z3 says Refuted") as crash:
        settle("deadlock", Proved(), Refuted(None, ("0SF0> waits for itself",)))
    assert (crash.value.by_graph, crash.value.by_z3) == (Proved(), Refuted(None))
    with pytest.raises(MethodsDisagreeError):
        settle("order", Refuted(None), Proved())


def test_the_earlier_name_of_a_disagreement_still_works():
    assert DisagreementError is MethodsDisagreeError


def test_a_solver_that_gives_up_proves_nothing_and_withdraws_no_refutation():
    given_up = Unknown("Z3 gave up: timeout")
    assert settle("order", Proved(), given_up) == given_up
    assert settle("order", Refuted(None), given_up) == Refuted(None)


def test_unknown_under_one_model_is_not_proved_by_another():
    proved, unknown = Result(Proved(), {}), Result(Unknown("Z3 gave up"), {})
    refuted = Result(Refuted(None, ("why",)), {}, prefix=(1,))
    for results in ([proved, unknown], [unknown, proved]):
        assert under_all({str(n): r for n, r in enumerate(results)}).verdict == unknown.verdict
    for results in ([unknown, refuted, proved], [refuted, unknown]):
        found = under_all({str(n): r for n, r in enumerate(results)})
        assert (found.verdict, found.prefix) == (refuted.verdict, (1,))
    assert under_all({"0": proved}).verdict == Proved()
    assert isinstance(under_all({}).verdict, Skipped)


def test_a_solver_out_of_time_makes_the_report_unknown():
    report = prove(dualpipe(16, 64), timeout_s=0.001)
    assert report.verdict == "unknown"
    assert report.exit_code == 3
    assert report.checks["order"].as_json()["reason"].startswith("Z3 gave up")


def test_a_method_that_misses_a_fault_is_a_disagreement(monkeypatch):
    monkeypatch.setattr("proofs.search.order", lambda schedule: Proved())
    early = next(m for m in mutants(SUBJECTS["zb1p 4"], 200, seed=2) if m.name == "early B")
    with pytest.raises(MethodsDisagreeError, match="order"):
        prove(early.schedule)
