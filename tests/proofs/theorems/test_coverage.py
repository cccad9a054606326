"""The first control: at each size the obligations are exactly the constraints of the expanded schedule."""

from collections import Counter

import pytest

from dualpipe.schedule.phase_table import symbol
from proofs.theorems import THEOREMS
from proofs.theorems.constraint import at_least, equal
from proofs.theorems.instance import instances, solutions
from proofs.theorems.prove import theorems_of
from tests.proofs.theorems import expected
from tests.proofs.theorems.cases import FAMILIES, each_family

ONE_LANE = [(ranks, microbatches) for ranks in range(1, 8) for microbatches in range(ranks, ranks + 4)]
TWO_WAY = [
    *((1, 2), (1, 3), (1, 5), (2, 4), (2, 6), (2, 9)),
    *((3, 7), (4, 11), (5, 10), (7, 14), (8, 16), (9, 18), (10, 20)),
]
WITHOUT = ("lower bound", "makespan")
"""Theorems that are not about a constraint of the expanded schedule for each case."""
CASES = [
    each_family(name, theorem)
    for name, family in FAMILIES.items()
    for theorem in theorems_of(family)
    if theorem not in WITHOUT
]


def sizes(name):
    if name in ("1f1b", "zb1p"):
        return ONE_LANE
    lanes = 1 if name.startswith("dualpipev") else 2
    return [(lanes * ranks, lanes * microbatches) for ranks, microbatches in TWO_WAY]


@pytest.mark.parametrize(("name", "theorem"), CASES)
def test_obligations_are_exactly_the_constraints_of_the_expanded_schedule(name, theorem, proved):
    """None missing, none extra; each holds; and every case that Z3 finds possible is among those compared."""
    family = FAMILIES[name]
    obligations = list(THEOREMS[theorem].obligations(family))
    seen = set()
    for ranks, microbatches in sizes(name):
        arising = list(instances(family, obligations, ranks, microbatches))
        found = Counter((instance.ranks, instance.fact) for instance in arising)
        if theorem == "deadlock":  # several messages between two slots give the same constraint
            found = Counter(found.keys())
        found = Counter({key: count for key, count in found.items() if key[1][0] != "end"})
        wanted = getattr(expected, theorem.replace(" ", "_"))(expected.World(name, ranks, microbatches))
        assert found == wanted, (ranks, microbatches)
        assert all(instance.holds for instance in arising)
        seen |= {id(instance.obligation) for instance in arising}
    assert len(seen) == proved[f"{name}: {theorem}"].non_vacuous


def test_a_dropped_obligation_is_noticed():
    family = FAMILIES["1f1b"]
    obligations = list(THEOREMS["messages"].obligations(family))
    wanted = expected.messages(expected.World("1f1b", 4, 8))
    kept = [obligation for obligation in obligations if "3 cooldown" not in obligation.name]
    assert Counter(i[:2] for i in instances(family, obligations, 4, 8)) == wanted
    assert Counter(i[:2] for i in instances(family, kept, 4, 8)) != wanted


def test_solutions_are_all_values_within_the_constraints():
    i, j, n = symbol("i"), symbol("j"), symbol("n")
    given = (at_least(i, 0), at_least(n, i + 1), at_least(j, 0), at_least(n, j + 1), equal(2 * i, j + 1))
    assert [(v["i"], v["j"]) for v in solutions(given, {"n": 5})] == [(1, 1), (2, 3)]
    assert not list(solutions(given, {"n": 1}))
