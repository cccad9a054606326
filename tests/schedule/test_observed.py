"""The lines of a schedule file for what was observed when a program ran it."""

import pytest

from dualpipe.schedule import Op, Placed, Schedule
from dualpipe.schedule.observed import Event, Guess, Observed, What
from dualpipe.schedule.text import ScheduleSyntaxError, dumps, loads

PLAIN = """\
lane > 0 1
rank 0: 0F0> 0SF0> 0RB0>@1+0RB0>@1 0B0>+0W0>
rank 1: 1RF0> 1F0> 1B0>+1W0> 1SB0>
"""
OBSERVED = """\
place 1 a b.py:1 (called at c.py:2)
place 2 c%23.py:3
events 0: post:0SF0>:1 write:0SF0>:-:2 wait:0SF0>:2 post:0RB0>@1:1 post:0RB0>@1/2:1
guesses 0: 0RB0>@1/2:1RF1<@1
events 1: post:1RF0>:2 read:1RF0>:1F0>:1 wait:1RF0>:2 keep:1RF0>:1F0>:1 drop:1RF0>:1F0>:2
"""
TEXT = PLAIN.replace(" 0 1\n", " 0 1\nlane < 1 0\n", 1) + OBSERVED


def test_the_lines_are_read_and_printed_back():
    schedule = loads(TEXT)
    assert dumps(schedule, observed=True) == TEXT
    assert dumps(schedule) == TEXT.partition("place")[0]
    assert loads(dumps(schedule, observed=True)).observed == schedule.observed


def test_events_name_messages_by_their_place_in_the_programs():
    observed = loads(TEXT).observed
    first, *_, last = observed.events[0]
    second = Placed(0, 2, 1, Op("RB", ">", 0, 0, 1))
    assert first == Event(What.POST, Placed(0, 1, 0, Op("SF", ">", 0, 0)), None, "a b.py:1 (called at c.py:2)")
    assert (last.message, observed.place(second), observed.guesses) == (
        second,
        first.place,
        {second: (Op("RF", "<", 1, 1, 1),)},
    )
    assert observed.events[0][2].place == "c#.py:3"


def test_what_was_observed_takes_no_part_in_comparisons():
    schedule = loads(TEXT)
    bare = Schedule(schedule.routes, schedule.programs)
    assert schedule == bare
    assert hash(schedule) == hash(bare)
    assert not bare.observed
    assert "events" not in dumps(bare, observed=True)


def test_an_empty_observation_has_no_lines():
    schedule = loads(PLAIN)
    again = Schedule(
        schedule.routes,
        schedule.programs,
        observed=Observed([[], []], [Guess(Placed(0, 1, 0, Op("SF", ">", 0, 0)), ())]),
    )
    assert dumps(again, observed=True) == PLAIN + "guesses 0: 0SF0>\n"


@pytest.mark.parametrize(
    ("line", "column", "found"),
    [
        ("events 2: post:0SF0>:1", 1, "'events 2: post:0SF0>:1'"),
        ("events: post:0SF0>:1", 1, "'events:'"),
        ("place one a.py", 1, "'place one a.py'"),
        ("events 0: posts:0SF0>:1", 11, "'posts:0SF0>:1'"),
        ("events 0: post:0SF0>:0F0>:1", 11, "'post:0SF0>:0F0>:1'"),
        ("events 0: post:0SF1>:1", 11, "'0SF1>'"),
        ("events 0: post:0SF0>/2:1", 11, "'0SF0>/2'"),
        ("events 0: post:0SF0>:9", 11, "'9'"),
        ("events 0: read:0SF0>:now:1", 11, "'now'"),
        ("guesses 1: 0SF0>", 12, "'0SF0>'"),
    ],
)
def test_an_error_gives_line_and_column(line, column, found):
    with pytest.raises(ScheduleSyntaxError) as error:
        loads(f"{PLAIN}place 1 a.py:1\n{line}\n")
    assert (error.value.line, error.value.column, error.value.found) == (5, column, found)
