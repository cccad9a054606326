"""The schedule file: printing then parsing is the identity, and no text is answered with a traceback."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dualpipe.schedule import DOWN, RB, RF, SB, SF, UP, B, F, Op, Schedule, ScheduleError, W, printable
from dualpipe.schedule.generate import NAMES, generate
from dualpipe.schedule.on_demand import OnDemand
from dualpipe.schedule.text import ScheduleSyntaxError, as_json, dumps, fingerprints, load, loads
from tests.schedule.hostile import is_schedule_or_points_into, outcome
from tests.strategies import schedules


@given(schedules())
def test_a_printed_schedule_parses_to_itself(schedule):
    assert loads(dumps(schedule)) == schedule


@given(schedules())
def test_what_is_parsed_prints_as_it_was(schedule):
    assert dumps(loads(dumps(schedule))) == dumps(schedule)


@pytest.mark.parametrize("name", NAMES)
def test_named_schedules_parse_to_themselves(name):
    assert loads(dumps(generate(name, 6, 18))) == generate(name, 6, 18)


def test_an_op_prints_in_world_coordinates():
    assert str(Op(F, UP, stage=2, mb=3)) == "2F3>"
    assert str(Op(SF, DOWN, stage=2, mb=30, peer=3)) == "2SF30<@3"


def test_every_part_of_the_form_is_read():
    text = """
        # rank lines may stand before the lanes, and in any order
        rank 1: 1RF0>+0SF0<@0   # two messages, one that names its peer
        rank 0 : 0F0>+1B0<+1W0< 1SB0< 0RB0>
        schedule odd-name
        lane < 1 0
        lane > 0 1
    """
    assert loads(text) == Schedule(
        {UP: (0, 1), DOWN: (1, 0)},
        (
            (
                (Op(F, UP, 0, 0), Op(B, DOWN, 1, 0), Op(W, DOWN, 1, 0)),
                (Op(SB, DOWN, 1, 0),),
                (Op(RB, UP, 0, 0),),
            ),
            ((Op(RF, UP, 1, 0), Op(SF, DOWN, 0, 0, peer=0)),),
        ),
        "odd-name",
    )


def test_the_failures_of_a_recorded_program_are_read_and_printed():
    text = "failure 1: raised IndexError at a b.py:11 during 1F1>: 2: x\nlane > 0 1\nrank 0: 0F0>\nrank 1:\n"
    schedule = loads(text)
    assert [str(failure) for failure in schedule.failures] == [
        "rank 1 raised IndexError at a b.py:11 during 1F1>: 2: x"
    ]
    assert dumps(schedule) == text
    assert as_json(schedule)["failures"] == [{"rank": 1, "what": "raised IndexError at a b.py:11 during 1F1>: 2: x"}]
    assert schedule != loads(text.replace("2: x", "3: x"))
    with pytest.raises(ScheduleError, match="one printable line without #"):
        Schedule({UP: (0,)}, ((),), failures=[(0, "raised #")])
    assert printable(" a # of\nthe " + "x" * 600) == "a of the " + "x" * 490 + "…"


WHOLE = """\
schedule recorded
failure 1: raised IndexError at train.py:11 during 1B0>: list index out of range
failure 0: waited for 0RB0>@1, posted at train.py:8, until it was stopped
lane > 0 1
lane < 1 0
group 0: 0 1
rank 0: 0F0> 0SF0>@1 0RB0>@1 0RG>@0
rank 1: 1RF0>@0 1F0> 1B0>
place 1 train.py:8 (called at train.py:20)
events 0: post:0SF0>@1:1 wait:0SF0>@1:1 post:0RB0>@1:1
guesses 0: 0RB0>@1:1RF0<@1
events 1: post:1RF0>@0:1 wait:1RF0>@0:1 keep:1RF0>@0:1F0>:1
"""
"""A file of a recorded program that failed, with every kind of line."""


def test_every_kind_of_line_is_read_and_printed_back():
    schedule = loads(WHOLE)
    assert dumps(schedule, observed=True) == WHOLE
    assert loads(dumps(schedule)) == schedule
    shuffled = loads("\n".join(reversed(WHOLE.splitlines())))
    assert (shuffled.failures[::-1], shuffled.observed.guesses) == (schedule.failures, schedule.observed.guesses)
    assert as_json(schedule)["groups"] == [[0, 1]]
    assert [failure["rank"] for failure in as_json(schedule)["failures"]] == [1, 0]


def test_a_schedule_with_failures_is_another_one_and_stays_one_that_failed():
    schedule = loads(WHOLE)
    ended_well = Schedule(schedule.routes, schedule.programs, schedule.name, schedule.groups)
    assert schedule != ended_well
    assert schedule.only(frozenset({F})).failures == schedule.failures


def test_line_ends_of_other_systems_are_read():
    assert loads("lane > 0\r\nrank 0: 0F0>\r\n") == loads("lane > 0\nrank 0: 0F0>\n")


def test_equal_schedules_have_one_text_however_their_lanes_were_listed():
    one = Schedule({UP: (0,), DOWN: (0,)}, ((),))
    other = Schedule({DOWN: (0,), UP: (0,)}, ((),))
    assert one == other
    assert dumps(one) == dumps(other)
    assert fingerprints(one, 0) == fingerprints(other, 0)


def test_ranks_compare_the_size_the_lanes_and_the_programs_of_those_that_exchange_messages():
    schedule = generate("dualpipe", 4, 8)
    programs = list(schedule.programs)
    programs[3] = programs[3][1:]
    changed = Schedule(schedule.routes, programs, schedule.name)
    reverse = Schedule({lane: route[::-1] for lane, route in schedule.routes.items()}, schedule.programs, schedule.name)
    found = [fingerprints(schedule, rank) for rank in range(4)]
    assert "program of rank 3" not in found[1]
    assert fingerprints(changed, 1) == found[1]
    for rank in (2, 3):
        differing = dict(found[rank].items() ^ fingerprints(changed, rank).items())
        assert list(differing) == ["program of rank 3"]
    assert found[0].items() ^ fingerprints(reverse, 0).items() >= {
        ("placement of stages", found[0]["placement of stages"])
    }
    assert found[0]["schedule"] == "dualpipe of 4 ranks, microbatches 4+4"


def test_a_rank_of_a_large_schedule_generates_only_the_programs_that_it_compares():
    schedule = generate("dualpipe", 128, 256)
    assert isinstance(schedule.programs, OnDemand)
    fingerprints(schedule, 5)
    assert set(schedule.programs._held) == {4, 5, 6}


BAD = {
    # what is wrong: (text, line, column, what the message says of it)
    "a failure without a text": ("lane > 0\nrank 0:\nfailure 0:", 3, 1, "'failure N: TEXT'"),
    "a failure of no rank": ("lane > 0\nrank 0:\nfailure 1: raised", 3, 1, "rank 1, which has no program"),
    "empty": ("", 1, 1, "no lane"),
    "only a comment": ("# lane > 0\n", 2, 1, "no lane"),
    "unknown line": ("lane > 0\nrnak 0: 0F0>", 2, 1, "'rnak'"),
    "rank without a space": ("lane > 0\nrank0: 0F0>", 2, 1, "'rank0:'"),
    "schedule without name": ("schedule\nlane > 0", 1, 9, "nothing"),
    "schedule with two names": ("schedule a b\nlane > 0", 1, 12, "'b'"),
    "two schedule lines": ("schedule a\nschedule b\nlane > 0", 2, 1, "a second 'schedule' line"),
    "a name that hides something": ("schedule a\u200bb\nlane > 0", 1, 10, "one printable word"),
    "lane without direction": ("lane", 1, 5, "nothing"),
    "lane with a wrong direction": ("lane  ^ 0", 1, 7, "'^'"),
    "lane without ranks": ("lane >\nrank 0:", 1, 7, "no ranks"),
    "lane twice": ("lane > 0\nlane > 0", 2, 6, "lane > a second time"),
    "lane with a word for a rank": ("lane > 0 x 2", 1, 10, "'x'"),
    "lane with a negative rank": ("lane > 0 -1", 1, 10, "'-1'"),
    "lane with a rank too large to be": ("lane > 0 1000000000", 1, 10, "'1000000000'"),
    "lane to a rank that has no line": ("lane > 0 1\nrank 0:\n", 1, 10, "stage 1 on rank 1"),
    "first of two lanes to such a rank": ("lane > 0 5\nlane < 0 0\nrank 0:", 1, 10, "stage 1 on rank 5"),
    "lanes of different depth": ("lane > 0 0\nlane < 0\nrank 0:", 2, 8, "lane > has 2 stages and lane < has 1"),
    "rank without number": ("lane > 0\nrank : 0F0>", 2, 6, "': 0F0>'"),
    "rank and nothing more": ("lane > 0\nrank", 2, 5, "nothing"),
    "rank without colon": ("lane > 0\nrank 0 0F0>", 2, 8, "'0F0>'"),
    "rank number too large to be": ("lane > 0\nrank 1000000000: 0F0>", 2, 6, "'1000000000: 0F0>'"),
    "rank twice": ("lane > 0\nrank 0:\nrank 0:", 3, 6, "rank 0 a second time"),
    "rank left out": ("lane > 0\nrank 0:\nrank 2:", 3, 1, "no 'rank 1:'"),
    "op without lane": ("lane > 0\nrank 0: 0F0> 0F1", 2, 14, "'0F1'"),
    "op of an unknown kind": ("lane > 0\nrank 0: 0X0>", 2, 9, "'0X0>'"),
    "op without stage": ("lane > 0\nrank 0: F0>", 2, 9, "'F0>'"),
    "op with more after it": ("lane > 0\nrank 0: 0F0>>", 2, 9, "'0F0>>'"),
    "op with digits of another script": ("lane > 0\nrank 0: ٠F0>", 2, 9, "'٠F0>'"),
    "op with a number too large to be": ("lane > 0\nrank 0: 0F1234567890>", 2, 9, "'0F1234567890>'"),
    "slot that ends in +": ("lane > 0\nrank 0: 0F0>+", 2, 14, "nothing"),
    "slot with a hole": ("lane > 0\nrank 0: 0F0>++0B0>", 2, 14, "nothing"),
    "stage that is not there": ("lane > 0\nrank 0: 0F0> 0F0>+1B0>", 2, 19, "1B0> names stage 1"),
    "lane that is not there": ("lane > 0\nrank 0: 0F0<", 2, 9, "0F0< names lane <"),
    "compute with a peer": ("lane > 0\nrank 0: 0F0>@0", 2, 9, "0F0>@0 is compute"),
    "compute and message in one slot": ("lane > 0 0\nrank 0: 0F0> 0B0>+0SF0>", 2, 14, "0B0>+0SF0> mixes them"),
}


@pytest.mark.parametrize("what", BAD)
def test_an_error_says_where_it_is_and_what_is_there(what):
    text, line, column, says = BAD[what]
    with pytest.raises(ScheduleSyntaxError) as error:
        loads(text, "my.txt")
    assert (error.value.line, error.value.column) == (line, column)
    assert str(error.value).startswith(f"my.txt:{line}:{column}: found ")
    assert says in str(error.value)
    assert "; expected " in str(error.value)


def test_an_error_reads_as_a_sentence():
    with pytest.raises(ScheduleSyntaxError) as error:
        loads("lane > 0 0\nrank 0: 0F0>+0SF0>", "my.txt")
    assert str(error.value) == (
        "my.txt:2:9: found that 0F0>+0SF0> mixes them; "
        "expected that a slot is all compute, all messages or all collectives (put a space between them)"
    )


def test_a_long_word_is_shortened():
    with pytest.raises(ScheduleSyntaxError, match=re.escape("x" * 39 + "…")):
        loads("x" * 10_000)


def test_a_file_that_is_not_text_is_pointed_at(tmp_path):
    path = tmp_path / "bad.txt"
    path.write_bytes("# Zäune\nlane > 0 \xff".encode("latin-1").replace(b"\xe4", "ä".encode()))
    with pytest.raises(ScheduleSyntaxError, match=re.escape(f"{path}:2:10: found byte 0xff; expected UTF-8 text")):
        load(path)


ALPHABET = st.text(st.sampled_from("schedulelanerank><+@#:0123456789FBWSR \n\t\r\x00"), max_size=80)
LINES = st.lists(
    st.sampled_from(
        ["lane > 0 1", "lane < 1 0", "lane > 9", "rank 0:", "rank 1: 0F0>", "rank 0: 0F0>+0SF0>", "rank 1: 5F0<", "# x"]
    ),
    max_size=6,
).map("\n".join)


@given(st.text() | ALPHABET | LINES)
def test_any_text_is_a_schedule_or_an_error_with_its_place(text):
    result = outcome(loads, text)
    assert is_schedule_or_points_into(text, result)
    assert not isinstance(result, Schedule) or loads(dumps(result)) == result


@given(data=st.data(), schedule=schedules())
def test_a_schedule_with_one_character_changed_is_a_schedule_or_an_error(data, schedule):
    text = dumps(schedule)
    at = data.draw(st.integers(0, len(text) - 1))
    changed = text[:at] + data.draw(st.text(max_size=1)) + text[at + 1 :]
    assert is_schedule_or_points_into(changed, outcome(loads, changed))


@given(st.binary(max_size=80))
def test_any_bytes_are_a_schedule_or_an_error(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "any.txt"
    path.write_bytes(data)
    assert isinstance(outcome(load, path), Schedule | ScheduleSyntaxError)


VALUES = {
    "no lane": ({}, ((),), ""),
    "a lane without stages": ({UP: ()}, ((),), ""),
    "a rank that is not there": ({UP: (0, 1)}, ((),), ""),
    "a negative rank": ({UP: (-1,)}, ((),), ""),
    "lanes of different depth": ({UP: (0,), DOWN: (0, 0)}, ((),), ""),
    "an empty slot": ({UP: (0,)}, (((),),), ""),
    "a negative microbatch": ({UP: (0,)}, (((Op(F, UP, 0, -1),),),), ""),
    "a microbatch too large to print": ({UP: (0,)}, (((Op(F, UP, 0, 10**9),),),), ""),
    "a negative stage": ({UP: (0,)}, (((Op(F, UP, -1, 0),),),), ""),
    "a negative peer": ({UP: (0,)}, (((Op(RF, UP, 0, 0, -1),),),), ""),
    "a name of two words": ({UP: (0,)}, ((),), "two words"),
    "a name with a comment": ({UP: (0,)}, ((),), "a#b"),
    "a name that no file can hold": ({UP: (0,)}, ((),), "\ud800"),
}


@pytest.mark.parametrize("what", VALUES)
def test_a_value_that_could_not_be_printed_is_no_schedule(what):
    with pytest.raises(ScheduleError):
        Schedule(*VALUES[what])
