"""The numbers that plain search reads: of a schedule at once, or rank by rank."""

import tracemalloc

import pytest

from dualpipe.schedule.generate import dualpipe, generate
from dualpipe.schedule.on_demand import OnDemand
from dualpipe.schedule.text import loads
from proofs import search
from proofs.prove import prove
from proofs.table import table_of
from proofs.verdict import Proved

WITH_PEERS = """\
lane > 0 1
group 0: 0 1
rank 0: 0F0> 0SF0>@1 0RB0> 0B0>+0W0> 0AR>@0
rank 1: 1RF0>@0 1F0> 1B0>+1W0> 1SB0> 1AR>@0
"""


def test_every_op_is_found_again_by_its_number():
    for schedule in (dualpipe(4, 8), loads(WITH_PEERS)):
        table = table_of(schedule)
        found = [table.placed(rank, number) for rank, row in table.rows() for number in range(len(row.keys))]
        assert found == list(schedule)


def test_the_checks_of_a_schedule_that_is_never_held_as_a_whole_are_those_of_the_schedule(monkeypatch):
    at_once = dualpipe(4, 8)
    monkeypatch.setattr("dualpipe.schedule.generate.MOST_AT_ONCE", 0)
    monkeypatch.setattr("dualpipe.schedule.on_demand.MOST_HELD", 1)
    monkeypatch.setattr("proofs.table._MOST_HELD", 0)
    on_demand = generate("dualpipe", 4, 8)
    assert type(on_demand.programs) is OnDemand
    given, expected = (prove(schedule, smt=False).as_json() for schedule in (on_demand, at_once))
    assert given["verdict"] == expected["verdict"] == "proved"
    assert given["peak_activations"] == expected["peak_activations"]
    assert table_of(on_demand)._held == {}


@pytest.mark.parametrize("check", [search.complete, search.messages])
def test_a_check_holds_what_it_knows_of_a_few_ranks_at_a_time(check):
    schedule = dualpipe(32, 128)
    table = table_of(schedule)
    ops = sum(len(row.keys) for _, row in table.rows())
    tracemalloc.start()
    try:
        assert check(schedule) == Proved()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 15 * ops
