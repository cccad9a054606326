"""The first control: at each size the obligations are exactly what the expanded schedule asks for."""

from collections import Counter

import pytest

from proofs.theorems import THEOREMS, families
from proofs.theorems.instance import instances, solutions
from proofs.theorems.constraint import at_least, equal
from proofs.theorems.prove import theorems_of
from dualpipe.table import symbol
from tests.proofs.theorems import expected

SIZES = {
    "1f1b": [(ranks, microbatches) for ranks in range(1, 8) for microbatches in range(ranks, ranks + 4)],
    "zb1p": [(ranks, microbatches) for ranks in range(1, 8) for microbatches in range(ranks, ranks + 4)],
    "dualpipe": [(ranks, 2 * ranks + more) for ranks in range(2, 13, 2) for more in (0, 2, 6)],
    "dualpipev": [(ranks, 2 * ranks + more) for ranks in range(1, 7) for more in (0, 1, 4)],
}
FAMILIES = {family.name: family for family in families()}
EXACT = ("totals", "messages", "order", "deadlock", "live", "queue", "memory", "pending", "accumulation")
CASES = [(name, theorem) for name, family in FAMILIES.items() for theorem in theorems_of(family) if theorem in EXACT]


@pytest.mark.parametrize(("name", "theorem"), CASES)
def test_obligations_are_exactly_the_constraints_of_the_expanded_schedule(name, theorem):
    family = FAMILIES[name]
    obligations = list(THEOREMS[theorem].obligations(family))
    for ranks, microbatches in SIZES[name]:
        found = Counter((where, fact) for where, fact, _ in instances(family, obligations, ranks, microbatches))
        wanted = getattr(expected, theorem)(expected.World(name, ranks, microbatches))
        if theorem == "deadlock":  # several messages between two batches ask for the same thing
            found = Counter(found.keys())
        assert found == wanted, f"{ranks} ranks, {microbatches} microbatches"


@pytest.mark.parametrize("name", FAMILIES)
def test_every_theorem_but_the_makespan_is_compared(name):
    assert {theorem for family, theorem in CASES if family == name} | {"makespan"} == set(theorems_of(FAMILIES[name]))


@pytest.mark.parametrize("name", FAMILIES)
def test_obligations_that_Z3_proved_hold_in_plain_arithmetic(name):
    family = FAMILIES[name]
    for theorem in theorems_of(family):
        obligations = list(THEOREMS[theorem].obligations(family))
        for ranks, microbatches in SIZES[name][::4]:
            assert all(instance.holds for instance in instances(family, obligations, ranks, microbatches))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_obligation_that_arises_at_all_arises_at_a_compared_size(name):
    """So the comparison leaves no case unseen that Z3 was asked about."""
    ...


def test_a_dropped_obligation_is_noticed():
    family = FAMILIES["1f1b"]
    obligations = list(THEOREMS["messages"].obligations(family))
    wanted = expected.messages(expected.World("1f1b", 4, 8))
    kept = [obligation for obligation in obligations if "3 cool down" not in obligation.name]
    assert Counter(i[:2] for i in instances(family, obligations, 4, 8)) == wanted
    assert Counter(i[:2] for i in instances(family, kept, 4, 8)) != wanted


def test_solutions_are_all_values_within_the_constraints():
    i, j, n = symbol("i"), symbol("j"), symbol("n")
    given = (at_least(i, 0), at_least(n, i + 1), at_least(j, 0), at_least(n, j + 1), equal(2 * i, j + 1))
    assert [(v["i"], v["j"]) for v in solutions(given, {"n": 5})] == [(1, 1), (2, 3)]
    assert not list(solutions(given, {"n": 1}))
