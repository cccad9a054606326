"""The obligations as SMT-LIB: a second solver reads them and gives the same answers as Z3."""

import cvc5
import pytest
import z3

from dualpipe.schedule.generate import dualpipe, one_f_one_b
from proofs.difference import Contradiction, Fact, Link, Problem, decide, joined
from proofs.models import MODELS
from proofs.prove import problems, smtlib
from proofs.z3child import Edge, minimal
from tests.mutations import mutants
from tests.proofs.faults import FAULTS

ANSWERS = {"sat", "unsat"}


def by_cvc5(text: str) -> list[str]:
    solver = cvc5.Solver(cvc5.TermManager())
    parser = cvc5.InputParser(solver)
    parser.setStringInput(cvc5.InputLanguage.SMT_LIB_2_6, text, "obligations")
    answers = []
    while not (command := parser.nextCommand()).isNull():
        answers += command.invoke(solver, parser.getSymbolManager()).split()
    assert set(answers) <= ANSWERS, answers
    return answers


def by_z3(schedule, model) -> list[str]:
    return ["sat" if decide(problem) is None else "unsat" for problem in problems(schedule, model)]


@pytest.mark.parametrize("model", MODELS, ids=str)
def test_cvc5_proves_what_z3_proves(model):
    assert by_cvc5(smtlib(dualpipe(4, 8), model)) == by_z3(dualpipe(4, 8), model) == ["sat"] * 6


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.title)
def test_cvc5_refutes_the_planted_faults_check_by_check_as_z3_does(fault):
    answers = by_cvc5(smtlib(fault.plant(), MODELS[0]))
    assert answers == by_z3(fault.plant(), MODELS[0])
    assert "unsat" in answers


def test_cvc5_agrees_on_mutants():
    for mutant in mutants(one_f_one_b(3, 4), 17, seed=5):
        for model in MODELS:
            assert by_cvc5(smtlib(mutant.schedule, model)) == by_z3(mutant.schedule, model), mutant.name


def test_every_fact_has_a_name_and_a_comment_in_words():
    text = smtlib(dualpipe(2, 4), MODELS[0])
    facts = [line for line in text.splitlines() if line.startswith("(assert")]
    assert all(" :named f" in line and ") ; " in line for line in facts)
    assert "; 0SF0> in slot 1 of rank 0 ends after rank 1 reaches 1RF0> in slot 1" in text
    assert text.count("(check-sat)") == 6
    z3.Solver().from_string(text.replace("(check-sat)", ""))


def test_a_core_is_one_cycle_without_superfluous_facts():
    # a -> b -> c -> a adds up to 1; the facts about d and the weaker one from a to b do not belong to it
    problem = Problem("cycle")
    a, b, c, d = map(problem.variable, "abcd")
    problem.later(a, b, "a to b", gap=1)
    problem.later(b, d, "b to d", gap=5)
    problem.later(b, c, "b to c", gap=2)
    problem.later(d, a, "d to a", gap=-9)
    problem.later(a, b, "a to b, weaker", gap=0)
    problem.later(c, a, "c to a", gap=-2)
    answer = decide(problem)
    assert isinstance(answer, Contradiction)
    assert sorted(map(str, answer.core)) == ["a to b", "b to c", "c to a"]
    every = [Edge(*fact[:3], number) for number, fact in enumerate(problem.facts)]
    assert sorted(edge.number for edge in minimal(every, deadline=float("inf"))) == [0, 2, 5]
    assert minimal(every, deadline=0) == []


def test_the_core_of_a_wait_cycle_is_joined_into_fewer_facts():
    fault = next(fault for fault in FAULTS if "ring" in fault.title)
    problem = problems(fault.plant(), MODELS[0])[3]
    answer = decide(problem)
    assert isinstance(answer, Contradiction)
    lines = list(map(str, joined(answer.core)))
    assert sum("ends after" in line for line in lines) >= 2
    assert len(lines) <= len(answer.core)
    assert sum(fact.gap for fact in answer.core) > 0


def test_consecutive_links_are_joined():
    text = Link("rank {0} reaches slot {2} after slot {1}")
    row = (Fact(0, 1, 1, (text, 3, 4, 6)), Fact(1, 2, 1, (text, 3, 6, 9)), Fact(2, 0, -1, ("back",)))
    assert list(map(str, joined(row))) == ["back", "rank 3 reaches slot 9 after slot 4"]
