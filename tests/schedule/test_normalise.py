"""Programs built in Python: whatever the types of the parts, a schedule holds plain ones or is refused."""

import json
from enum import Enum, IntEnum, StrEnum

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dualpipe.errors import RuleError
from dualpipe.schedule import DOWN, UP, F, Kind, Lane, Op, Schedule, ScheduleError
from dualpipe.schedule.generate import generate
from dualpipe.schedule.text import as_json, dumps, loads
from dualpipe.timeline.perfetto import of_timeline
from dualpipe.timeline.simulate import simulate
from dualpipe.timeline.summary import summarise
from proofs.prove import prove


class Word(str):
    __slots__ = ()

    def __str__(self):
        return "something else"


class Count(int):
    def __str__(self):
        raise ValueError("no text")

    __repr__ = __str__


class Rank(IntEnum):
    ZERO, ONE = 0, 1


class Way(StrEnum):
    UP = ">"


class Step(str, Enum):  # noqa: UP042 - how it was written before StrEnum
    F = "F"


class Record(tuple):
    __slots__ = ()


ZERO = [0, numpy.int64(0), numpy.uint8(0), numpy.array(0), Count(0), Rank.ZERO]
NO_NUMBER = [True, numpy.bool_(True), 0.0, numpy.float64(0), "0", None, -1, 10**9, -(10**5000), 10**5000, object()]


@pytest.mark.parametrize("zero", ZERO, ids=lambda zero: type(zero).__name__)
def test_integers_of_any_type_become_int(zero):
    schedule = Schedule({UP: [zero]}, [[[Op(F, UP, zero, zero)]]])
    assert schedule == loads("lane > 0\nrank 0: 0F0>\n")
    assert {type(number) for number in (*schedule.routes[UP], *schedule.programs[0][0][0][2:4])} == {int}
    assert type(schedule.microbatches[UP]) is int


@pytest.mark.parametrize("kind", ["F", Word("F"), Step.F])
@pytest.mark.parametrize("lane", [">", Word(">"), Way.UP])
def test_kinds_and_lanes_given_as_text_become_kind_and_lane(kind, lane):
    op = Schedule({lane: (0,)}, (((Op(kind, lane, 0, 0),),),)).programs[0][0][0]
    assert (type(op.kind), type(op.lane), str(op)) == (Kind, Lane, "0F0>")


@pytest.mark.parametrize("several", [list, tuple, Record, iter, lambda items: (item for item in items)])
def test_any_ordered_iterable_becomes_a_tuple(several):
    schedule = Schedule({UP: several([0])}, several([several([several([several(["F", UP, 0, 0])])])]))
    assert schedule == loads("lane > 0\nrank 0: 0F0>\n")
    assert type(schedule.programs[0][0]) is tuple


def test_a_change_of_what_a_schedule_was_made_from_does_not_change_it():
    routes, programs = {UP: [0]}, [[[Op(F, UP, 0, 0)]]]
    schedule = Schedule(routes, programs)
    routes[DOWN] = [0]
    programs[0].append([Op(F, UP, 0, 1)])
    assert schedule == loads("lane > 0\nrank 0: 0F0>\n")


def test_plain_programs_are_kept_and_not_copied():
    programs = generate("dualpipe", 4, 8).programs
    assert Schedule(generate("dualpipe", 4, 8).routes, programs).programs is programs


@pytest.mark.parametrize("number", NO_NUMBER, ids=lambda number: type(number).__name__)
def test_what_is_no_number_of_a_schedule_is_refused(number):
    with pytest.raises(ScheduleError):
        Schedule({UP: (number,)}, (((Op(F, UP, 0, 0),),),))
    for at in range(2 if number is None else 3):
        with pytest.raises(ScheduleError):
            Schedule({UP: (0,)}, (((Op(Kind.SF, UP, *((0, 0, number), (0, number), (number, 0))[-1 - at]),),),))


@pytest.mark.parametrize(
    ("routes", "programs", "name", "message"),
    [
        ({UP: (0,)}, ((Op(F, UP, 0, 0),),), "", r"got the single op .*write \(op,\)"),
        ({UP: (0,)}, (({Op(F, UP, 0, 0)},),), "", "a slot is a sequence of ops: got .*set"),
        ({UP: (0,)}, {0: ()}, "", "one program for each rank: got .*dict"),
        ({UP: (0,)}, "0F0>", "", "one program for each rank: got '0F0>' of type str"),
        ({UP: (0,)}, ((("0F0>",),),), "", "an op is Op"),
        ({UP: (0,)}, (((("F", UP, 0),),),), "", "an op has a kind, lane, stage, mb"),
        (
            {UP: (0,)},
            ((((1, UP, 0, 0),),),),
            "",
            "a kind is one of F B W SF RF SB RB AA AR US RS RG: got 1 of type int",
        ),
        ({UP: (0,)}, (((("X", UP, 0, 0),),),), "", "a kind is one of"),
        ({UP: (0,)}, (((("F", "^", 0, 0),),),), "", "a lane is one of > <"),
        ({"up": (0,)}, ((),), "", "a lane is one of > <"),
        ({UP: 0}, ((),), "", "a lane's route is a sequence of ranks: got 0 of type int"),
        ([(UP, (0,))], ((),), "", "routes are a mapping"),
        ({UP: (0,)}, ((),), None, "name is a str: got None"),
        ({UP: (0,)}, ((),), b"mine", "name is a str"),
    ],
)
def test_another_type_is_refused_with_what_was_given(routes, programs, name, message):
    with pytest.raises(ScheduleError, match=message):
        Schedule(routes, programs, name)


def test_failures_are_pairs_of_a_rank_and_a_text():
    schedule = Schedule({UP: (0,)}, ((),), failures=[[numpy.int64(0), "raised"]])
    assert schedule.failures == ((0, "raised"),)
    assert type(schedule.failures[0].rank) is int
    for wrong in ([0], [(0,)], [(0, 1)], {0: "raised"}, [("0", "raised")], [(True, "raised")], [(1, "raised")], None):
        with pytest.raises(ScheduleError):
            Schedule({UP: (0,)}, ((),), failures=wrong)


def disguised(schedule, draw):
    """The schedule's parts, some of them of another type, now and then a wrong one."""
    odd = st.sampled_from([*ZERO, *NO_NUMBER, "F", ">", (), {}])

    def number(value):
        sort = draw(st.integers(0, 40))
        return draw(odd) if sort == 0 else (numpy.int32(value), Count(value), value)[sort % 3]

    def sequence(items):
        return draw(st.sampled_from([list, tuple, iter, Record]))(items)

    def op(given):
        fields = [Word(given.kind), str(given.lane), number(given.stage), number(given.mb), given.peer]
        return draw(st.sampled_from([sequence, lambda fields: Op(*fields)]))(fields)

    routes = {str(lane): sequence(map(number, route)) for lane, route in schedule.routes.items()}
    return routes, sequence(
        [sequence([sequence([op(each) for each in slot]) for slot in program]) for program in schedule.programs]
    )


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_schedule_of_any_parts_is_refused_or_good_for_everything(data):
    original = generate(data.draw(st.sampled_from(["1f1b", "zb1p"])), 2, 2)
    try:
        schedule = Schedule(*disguised(original, data.draw))
    except RuleError:
        return
    assert loads(dumps(schedule)) == schedule
    assert json.loads(json.dumps(as_json(schedule)))["ranks"] == 2
    json.dumps(prove(schedule, smt=False).as_json())
    try:
        timeline = simulate(schedule)
    except RuleError:
        return
    json.dumps([summarise(timeline), of_timeline(timeline)])
