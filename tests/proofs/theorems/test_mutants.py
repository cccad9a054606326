"""Theorems against plain search: what is proved for every size must hold at each size, on generated mutants.

mutant of the table -> theorems -> proved      -> the expanded schedule passes the same check at every small size
                                -> refuted     -> it fails it at the size of the counterexample
"""

from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice

import pytest

from dualpipe.schedule import Schedule
from dualpipe.schedule.generate import ONE_F_ONE_B, ZB1P
from dualpipe.schedule.phase_table import Row, Table, vary
from proofs import deadlock_search, memory, search
from proofs.models import BLOCKING
from proofs.theorems import prove_all
from proofs.theorems.family import Family
from proofs.theorems.instance import schedule_at
from proofs.theorems.one_lane import one_f_one_b, zb1p
from proofs.verdict import Proved, Refuted, Verdict

SIZES = [(ranks, microbatches) for ranks in range(1, 5) for microbatches in range(ranks, ranks + 3)]

CHECKS: dict[str, tuple[frozenset[str], Callable[[Schedule], Verdict]]] = {
    "complete": (frozenset({"totals", "queue"}), search.complete),
    "order": (frozenset({"order", "queue"}), search.order),
    "messages": (frozenset({"messages"}), search.messages),
    "deadlock": (frozenset({"deadlock"}), lambda schedule: deadlock_search.deadlock(schedule, BLOCKING)),
    "memory": (frozenset({"memory"}), lambda schedule: memory.within(schedule, memory.bound_of(schedule))),
    "accumulation": (frozenset({"accumulation"}), search.accumulation),
}
"""For each check on one schedule the theorems that together claim it for all sizes."""

REFUTED_BY = {
    "totals": ("complete", "order", "messages"),
    "queue": ("complete", "order"),
    "order": ("order",),
    "messages": ("messages",),
    "deadlock": ("deadlock",),
    "memory": ("memory",),
    "accumulation": ("accumulation",),
}
"""For each theorem the checks of which at least one must fail if it is refuted."""


def mutants(table: Table) -> Iterator[Table]:
    """Two neighbouring steps of a row swapped; one step left out; one repeated."""
    for row in table:
        steps = row.body.split()
        for k in range(len(steps)):
            swapped = [*steps[:k], *reversed(steps[k : k + 2]), *steps[k + 2 :]]
            for body in (swapped, steps[:k] + steps[k + 1 :], steps[: k + 1] + steps[k:]):
                if body and body != steps:
                    yield vary(table, Row(row.name, row.count, " ".join(body)))


def expanded(family: Family, ranks: int, microbatches: int) -> Schedule | None:
    """The schedule, or ``None`` if the mutant takes a W from an empty queue or names a microbatch before the first."""
    try:
        return schedule_at(family, ranks, microbatches)
    except (IndexError, KeyError):
        return None


@pytest.mark.long
@pytest.mark.parametrize(
    ("family", "table", "every"), [(one_f_one_b, ONE_F_ONE_B, 1), (zb1p, ZB1P, 3)], ids=["1f1b", "zb1p"]
)
def test_theorems_about_mutants_agree_with_plain_search(family, table, every):
    count: Counter[str] = Counter()
    for mutant in islice(mutants(table), None, None, every):
        subject = family(mutant)
        results = {result.name.partition(": ")[2]: result for result in prove_all(of=[subject])}
        proved = {name for name, result in results.items() if isinstance(result.verdict, Proved)}
        schedules = [expanded(subject, *size) for size in SIZES]
        assert all(schedules) or not {"totals", "queue"} <= proved
        for theorems, check in CHECKS.values():
            if theorems <= proved:
                assert all(isinstance(check(schedule), Proved) for schedule in schedules if schedule), mutant
                count["proved"] += 1
        for name, checks in REFUTED_BY.items():
            if isinstance(results[name].verdict, Refuted):
                found = results[name].counterexample
                schedule = expanded(subject, found.ranks, found.microbatches)
                fails = not schedule or any(isinstance(CHECKS[check][1](schedule), Refuted) for check in checks)
                assert fails, (mutant, results[name].text)
                count["refuted"] += 1
    assert min(count["proved"], count["refuted"]) >= 20, count
