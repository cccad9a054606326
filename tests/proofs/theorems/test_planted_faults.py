"""The second control: a fault planted in a table breaks a named obligation."""

from typing import NamedTuple

import pytest

from dualpipe.schedule.generate import MIDDLE, ONE_F_ONE_B, OUTER, ZB1P
from dualpipe.schedule.phase_table import Row, symbol, vary
from proofs import deadlock_search, search
from proofs.models import BLOCKING
from proofs.theorems import THEOREMS, TableError, prove, prove_all
from proofs.theorems.family import Family
from proofs.theorems.instance import schedule_at
from proofs.theorems.obligation import discharge
from proofs.theorems.one_lane import one_f_one_b, zb1p
from proofs.theorems.prove import TIMED
from proofs.theorems.two_way import dualpipe, dualpipev
from proofs.verdict import Proved, Refuted

N, H, h, odd, P, M, r = map(symbol, ("N", "H", "h", "odd", "P", "M", "r"))


class Fault(NamedTuple):
    what: str
    family: Family
    theorem: str
    obligation: str  # how the name of the obligation that breaks begins


def in_1f1b(*rows: Row) -> Family:
    return one_f_one_b(vary(ONE_F_ONE_B, *rows))


def in_zb1p(*rows: Row) -> Family:
    return zb1p(vary(ZB1P, *rows))


def in_outer(*rows: Row) -> Family:
    return dualpipe(outer=vary(OUTER, *rows))


def in_middle(*rows: Row) -> Family:
    return dualpipe(middle=vary(MIDDLE, *rows))


STEADY = "2 one forward, one backward"
LATE_W = in_zb1p(
    Row("3 one of each", M - P, "F0 SF0 RB0 B0 SB0 RF0"),
    Row("5 weights", M - P + r, "W"),
)
W_OVERTAKES = in_zb1p(Row("3 one of each", M - P, "F0 SF0 RB0 B0+W0 SB0 RF0"))
DEEPER = in_1f1b(
    Row("1 warm-up", P - r, "RF0 F0 SF0"),
    Row(STEADY, M - P + r - 1, "F0 SF0 RB0 B0+W0 SB0 RF0"),
    Row("3 cooldown", P - r, "RB0 B0+W0 SB0"),
)
LATER_W_OF_THE_FIRST_HALF = in_outer(
    Row("6 full", (h + odd) // 2, "B1 SB1 RB0 B0+W0 SB0 RB1"),
    Row("8 weights", h + 1 + (h + odd) // 2, "W"),
)
W_DEFERRED_IN_THE_MAIN_LOOP = in_outer(
    Row("4 overlapped", H - 2 * N + h, "F1+B0+W0 SF1 SB0 RF0 RB1 F0+B1 SF0 SB1 RF1 RB0"),
    Row("8 weights", H - 2 * N + 2 * h + 1, "W"),
)
GRADIENT_AWAITED_IN_WARM_UP = in_1f1b(
    Row("1 warm-up", P - r - 1, "RF0 RB0 F0 SF0"),
    Row("3 cooldown", P - r - 1, "B0+W0 SB0"),
)
ONE_AT_A_TIME = in_1f1b(
    Row("1 warm-up", 0, "RF0 F0 SF0"),
    Row(STEADY, M - 1, "F0 RB0 B0+W0 SF0 SB0 RF0"),
    Row("2 last", 1, "F0 RB0 B0+W0 SF0 SB0"),
    Row("3 cooldown", 0, "RB0 B0+W0 SB0"),
)
FAULTS = [
    Fault("a warm-up too long", in_1f1b(Row("1 warm-up", P - r, "RF0 F0 SF0")), "totals", "all F0 of rank"),
    Fault("a phase of length -1", DEEPER, "totals", f"row '{STEADY}'"),
    Fault("W without its B", in_1f1b(Row("3 cooldown", P - r - 1, "RB0 W0 B0 SB0")), "totals", "W0 in row '3 cool"),
    Fault("a send left out", in_1f1b(Row("2 last", 1, "F0 RB0 B0+W0 SB0")), "messages", "none is left over, down"),
    Fault("B before its gradient", in_1f1b(Row("2 last", 1, "F0 SF0 B0+W0 RB0 SB0")), "order", "B0 in row '2 last'"),
    Fault("sent before computed", in_1f1b(Row("2 last", 1, "SF0 F0 RB0 B0+W0 SB0")), "order", "SF0 in row '2 last'"),
    Fault("a gradient awaited in warm-up", GRADIENT_AWAITED_IN_WARM_UP, "deadlock", "F0 in row '1 warm-up' of rank 0"),
    Fault("sent after B", ONE_AT_A_TIME, "makespan at use", "B0+W0 in row '2 one forward, one backward' of rank 0"),
    Fault("one more in flight", DEEPER, "live", "live at F0"),
    Fault("one more in flight", DEEPER, "memory", "live at F0"),
    Fault("W from an empty queue", in_zb1p(Row("3 last", 1, "F0 SF0 W RB0 B0 SB0")), "queue", "W in row '3 last'"),
    Fault("a W never run", in_zb1p(Row("5 weights", r - 1, "W")), "queue", "every pending W"),
    Fault("every W waits to the end", LATE_W, "pending", "pending W at B0 in row '3 one"),
    Fault("every W waits to the end", LATE_W, "memory", "live at F0 in row '3 one"),
    Fault("a W overtakes those that wait", W_OVERTAKES, "accumulation", "W0 in row '3 one"),
    Fault(
        "two sends swapped in the main loop",
        in_outer(Row("4 overlapped", H - 2 * N + h, "F1+B0+W0 SF1 SB0 RF0 RB1 F0+B1+W1 SB1 SF0 RF1 RB0")),
        "messages",
        "SB1 in row '4 overlapped'",
    ),
    Fault(
        "two sends swapped in the middle",
        in_middle(Row("4 overlapped", H - 2 * N + h, "F1+B0+W0 SB0 SF1 RF0 RB1 F0+B1+W1 SF0 SB1 RF1 RB0")),
        "messages",
        "SB0 in row '4 overlapped'",
    ),
    Fault(
        "a receive too early in the middle",
        in_middle(Row("4 first", 1, "F0 SF1 RB1 RB0 B1+W1 SF0 SB1 RF1")),
        "deadlock",
        "B1+W1 in row '4 first' of rank 0",
    ),
    Fault(
        "a receive too early in the main loop",
        in_middle(Row("4 overlapped", H - 2 * N + h, "F1+B0+W0 SF1 SB0 RF0 RB1 RF1 F0+B1+W1 SF0 SB1 RB0")),
        "deadlock",
        "F0+B1+W1 in row '4 overlapped' of rank 0",
    ),
    Fault(
        "B before its gradient",
        in_outer(Row("3 first backwards", N - h - 1, "B1 RB1 SB1 RF1 W F1 SF1")),
        "order",
        "B1 in row '3 first backwards'",
    ),
    Fault(
        "W before its B",
        in_outer(Row("3 first backwards", N - h - 1, "RB1 W B1 SB1 RF1 F1 SF1")),
        "queue",
        "W in row '3 first backwards'",
    ),
    Fault("a phase too long", in_outer(Row("7 cooldown", N - h, "W RB0 B0 SB0")), "totals", "all B0 of outer"),
    Fault("a W never run", in_middle(Row("8 weights", h, "W")), "queue", "every pending W of middle"),
    Fault("W deferred too soon", LATER_W_OF_THE_FIRST_HALF, "pending", "pending W at B"),
    Fault("W deferred too soon", LATER_W_OF_THE_FIRST_HALF, "accumulation", "W1 in row '6 turn'"),
    Fault("every W1 waits to the end", W_DEFERRED_IN_THE_MAIN_LOOP, "memory", "live at F0 in row '4 overlapped'"),
    Fault(
        "a W overtakes those that wait",
        in_outer(Row("6 split", (h - odd) // 2, "RB1 B1 SB1 RB0 B0+W0 SB0"), Row("8 weights", N, "W")),
        "accumulation",
        "W0 in row '6 split'",
    ),
    Fault(
        "the turn before the lane comes to it",
        dualpipev(middle=vary(MIDDLE, Row("2 other lane enters", h, "F1 SF1 RF0 RF1 F0 SF0"))),
        "order",
        "F1 in row '2 other lane enters'",
    ),
    Fault(
        "two sends swapped where the lane turns",
        dualpipev(middle=vary(MIDDLE, Row("4 overlapped", H - 2 * N + h, "F1+B0+W0 SB0 SF1 RF0 RB1 F0+B1+W1"))),
        "messages",
        "SB0 in row '4 overlapped'",
    ),
]


@pytest.mark.parametrize("fault", FAULTS, ids=[f"{f.family.name}: {f.what}: {f.theorem}" for f in FAULTS])
def test_a_planted_fault_breaks_a_named_obligation(fault):
    if fault.theorem in TIMED:  # there the obligations are about times, and a table that deadlocks has none
        result = prove(fault.family, fault.theorem, set(THEOREMS))
        assert isinstance(result.verdict, Refuted)
        assert result.counterexample.obligation.startswith(fault.obligation)
        return
    named = [o for o in THEOREMS[fault.theorem].obligations(fault.family) if o.name.startswith(fault.obligation)]
    broken = discharge(named, timeout=10).failures
    assert broken
    assert all(failure.values is not None for failure in broken)


@pytest.mark.parametrize("theorem", THEOREMS)
def test_every_theorem_has_a_fault_planted_against_it(theorem):
    elsewhere = {"makespan": "test_times", "lower bound": "test_lower_bound"}
    assert theorem in elsewhere or any(fault.theorem == theorem for fault in FAULTS)


def verdicts(family: Family) -> dict:
    return {result.name.partition(": ")[2]: result for result in prove_all(of=[family])}


def test_a_counterexample_is_one_size_and_one_place():
    swapped = in_outer(Row("4 overlapped", H - 2 * N + h, "F1+B0+W0 SF1 SB0 RF0 RB1 F0+B1+W1 SB1 SF0 RF1 RB0"))
    result = prove(swapped, "messages", {"totals"})
    assert isinstance(result.verdict, Refuted)
    found = result.counterexample
    assert found is not None
    assert (found.ranks % 2, found.microbatches % 2) == (0, 0)
    assert found.ranks <= 8
    assert result.as_json()["counterexample"] == found.as_json()
    assert isinstance(search.messages(schedule_at(swapped, found.ranks, found.microbatches)), Refuted)


def test_a_deadlock_is_refuted_by_running_into_it():
    result = verdicts(GRADIENT_AWAITED_IN_WARM_UP)["deadlock"]
    assert isinstance(result.verdict, Refuted)
    assert result.verdict.finding is not None


def test_a_theorem_whose_premise_fails_is_not_proved():
    results = verdicts(in_1f1b(Row("1 warm-up", P - r, "RF0 F0 SF0")))
    assert isinstance(results["totals"].verdict, Refuted)
    proved = [name for name, result in results.items() if isinstance(result.verdict, Proved)]
    assert proved == ["lower bound"]  # which is not about the table


@pytest.mark.long
def test_a_receive_may_be_early_if_no_rank_waits_for_it():
    """Not every change is a fault: the middle rank may post the receive of its first gradient before a forward."""
    early = in_middle(Row("4 first", 1, "RB1 F0 SF1 B1+W1 SF0 SB1 RF1 RB0"))
    for theorem in ("totals", "messages", "order", "deadlock"):
        assert isinstance(prove(early, theorem, {"totals"}).verdict, Proved)
    for ranks in (2, 4, 6):
        assert isinstance(deadlock_search.deadlock(schedule_at(early, ranks, 2 * ranks), BLOCKING), Proved)


def test_a_count_that_is_not_whole_is_an_error_of_the_table():
    with pytest.raises(TableError, match="whole at every size"):
        prove_all(of=[in_1f1b(Row("3 cooldown", (P - r - 1) // 2, "RB0 B0+W0 SB0"))])
