"""What is proved for all sizes, with how many obligations, and what a verdict looks like."""

import json
from pathlib import Path

import pytest
import z3

from ci.golden import COUNTS, Count, read_counts
from dualpipe.schedule.generate import generate
from dualpipe.schedule.phase_table import symbol
from proofs import memory
from proofs.theorems import THEOREMS, families, prove_all
from proofs.theorems.constraint import NEVER, TableError, at_least, below, equal, formula, substitute
from proofs.theorems.one_lane import one_f_one_b
from proofs.theorems.prove import theorems_of
from proofs.verdict import Proved, Unknown
from tests.proofs.theorems.cases import BY_NAME

RECORDED = read_counts((Path(__file__).parents[3] / COUNTS).read_text())


@pytest.mark.parametrize("name", BY_NAME)
def test_every_theorem_is_proved_with_the_recorded_number_of_obligations_and_the_recorded_bound(name, proved):
    """A smaller number means that something is no longer looked at; make golden records it, the gate wants a reason."""
    results = proved.of(name)
    assert [result.text for result in results.values() if not isinstance(result.verdict, Proved)] == []
    recorded = {key: counts for key, counts in RECORDED.items() if key.startswith(f"{name}: ")}
    assert {key: Count.of(result.as_json()) for key, result in results.items()} == recorded
    assert all(result.obligations >= result.non_vacuous > 0 for result in results.values())


def test_the_theorems_of_every_family_are_recorded_and_no_others():
    assert list(RECORDED) == [f"{family.name}: {name}" for family in families() for name in theorems_of(family)]


@pytest.mark.parametrize(("name", "peak"), [("dualpipe", 9), ("dualpipev", 17), ("zb1p", 8)])
def test_the_memory_that_is_proved_as_a_bound_is_reached_on_every_rank(name, peak):
    assert set(memory.peak_activations(generate(name, 8, 20))) == {peak}


def test_a_solver_that_gives_up_proves_nothing(monkeypatch):
    class GivesUp(z3.Solver):
        def check(self, *assumptions):
            return z3.unknown

    monkeypatch.setattr(z3, "SimpleSolver", GivesUp)
    for result in prove_all(of=[one_f_one_b()]):
        assert isinstance(result.verdict, Unknown)
        assert result.counterexample is None
        assert result.text.startswith("unknown: ")


def test_progress_is_reported_before_each_theorem_and_at_the_end():
    calls = []
    results = prove_all(lambda *call: calls.append(call), of=[one_f_one_b()])
    total = len(results)
    assert calls == [*((k, total, result.name) for k, result in enumerate(results)), (total, total, "")]


def test_a_result_is_data_and_one_line(proved):
    result = proved["dualpipe: memory"]
    assert json.loads(json.dumps(result.as_json())) == result.as_json()
    assert result.as_json()["verdict"] == "proved"
    assert result.text.startswith(
        "proved: dualpipe: memory: for all even P >= 2 and all even M >= 2P, live activations"
    )
    assert "\n" not in result.text


def test_premises_come_before_the_theorems_that_assume_them():
    seen = set()
    for name, theorem in THEOREMS.items():
        assert set(theorem.premises) <= seen
        seen.add(name)


def test_a_constraint_means_the_same_to_z3_and_in_plain_arithmetic():
    x, y = symbol("x"), symbol("y")
    for constraint in (at_least(x, y), below(x, y), equal(2 * x, y + 1), at_least(x, 3), NEVER):
        for a in range(-2, 5):
            for b in range(-2, 5):
                solver = z3.SimpleSolver()
                solver.add(formula(constraint), z3.Int("x") == a, z3.Int("y") == b)
                assert (solver.check() == z3.sat) == constraint.holds({"x": a, "y": b})


def test_a_count_is_rounded_only_where_its_parity_is_known():
    h, e, odd = symbol("h"), symbol("e"), symbol("odd")
    assert str(substitute((h + odd) // 2, {"h": 2 * e + odd})) == "+1 e +1 odd"
    with pytest.raises(TableError):
        substitute((h + 1) // 2, {"h": 2 * e + odd})
