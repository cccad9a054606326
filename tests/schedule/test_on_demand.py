"""Programs that are generated when they are asked for: the same value as programs generated at once."""

import pickle
from unittest.mock import patch

import pytest

from dualpipe.schedule import UP, ScheduleError
from dualpipe.schedule import generate as generated
from dualpipe.schedule.generate import dualpipe, generate, one_f_one_b
from dualpipe.schedule.on_demand import OnDemand
from dualpipe.schedule.phase_table import Row, vary

AT_ONCE = dualpipe(4, 8)


@pytest.fixture
def on_demand(monkeypatch):
    """A schedule of four ranks whose programs are generated when they are asked for, and no two are held."""
    monkeypatch.setattr("dualpipe.schedule.generate.MOST_AT_ONCE", 0)
    monkeypatch.setattr("dualpipe.schedule.on_demand.MOST_HELD", 1)
    return generate("dualpipe", 4, 8)


def test_programs_on_demand_are_those_generated_at_once(on_demand):
    at_once = AT_ONCE
    assert type(at_once.programs) is tuple
    assert type(on_demand.programs) is OnDemand
    assert on_demand == at_once
    assert at_once == on_demand
    assert hash(on_demand) == hash(at_once)
    assert on_demand != dualpipe(4, 10)
    assert (on_demand.ranks, on_demand.microbatches) == (4, at_once.microbatches)
    assert on_demand.programs[-1] == at_once.programs[3]
    assert on_demand.programs[1:3] == at_once.programs[1:3]
    assert pickle.loads(pickle.dumps(on_demand)) == at_once
    with pytest.raises(IndexError):
        on_demand.programs[4]


def test_one_rank_is_generated_without_the_others_and_no_more_is_held_than_allowed():
    made = []

    def program(rank):
        made.append(rank)
        return one_f_one_b(4, 8).programs[rank]

    programs = OnDemand(4, program, {UP: 8})
    assert programs[2] is programs[2]
    assert made == [2]
    with patch("dualpipe.schedule.on_demand.MOST_HELD", 2 * sum(map(len, programs[2]))):
        list(programs)
        assert len(programs._held) == 2


def test_a_faulty_table_is_refused_when_a_program_is_generated(monkeypatch, on_demand):
    mixed = vary(generated.OUTER, Row("8 weights", 1, "W+SF0"))
    monkeypatch.setitem(generated.TWO_WAY, generated.LateW.none, generated.TwoWay(mixed, mixed))
    with pytest.raises(ScheduleError, match="all compute, all messages"):
        generate("dualpipe", 4, 8).programs[0]
