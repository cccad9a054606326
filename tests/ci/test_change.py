"""A changed schedule as a person reads it."""

from ci.change import ScheduleChange, changes, diff, named_in

BEFORE = """schedule s
lane > 0 1
rank 0: 0F0> 0SF0> 0F1> 0SF1> 0F2> 0SF2> 0RB0> 0B0>
rank 1: 1RF0> 1F0> 1B0> 1SB0>
"""
AFTER = BEFORE.replace("0F1> 0SF1>", "0SF1> 0F1>")


def test_a_rank_is_shown_around_its_difference():
    assert list(diff(BEFORE, AFTER)) == [
        "-rank 0: 0F0> 0SF0> 0F1> 0SF1> 0F2> 0SF2> ...2...",
        "+rank 0: 0F0> 0SF0> 0SF1> 0F1> 0F2> 0SF2> ...2...",
    ]


def test_the_head_and_new_or_removed_ranks_are_shown_whole():
    assert list(diff(BEFORE, BEFORE.replace("lane > 0 1", "lane > 1 0"))) == ["-lane > 0 1", "+lane > 1 0"]
    gone = "\n".join(BEFORE.splitlines()[:-1])
    assert list(diff(BEFORE, gone)) == ["-rank 1: 1RF0> 1F0> 1B0> 1SB0>"]


def test_the_smallest_schedule_comes_first():
    found = changes({"long": BEFORE + "x", "short": "a"}, {"long": BEFORE, "short": "b", "new": "c"})
    assert [(change.name, change.what) for change in found] == [
        ("new", "new"),
        ("short", "changed"),
        ("long", "changed"),
    ]


def test_an_entry_names_the_schedule_or_shows_its_text():
    change = ScheduleChange("s-P2-M3", BEFORE, AFTER)
    assert named_in(change, "- s-P2-M3 sends later.")
    assert named_in(change, "      +rank 0: 0F0> 0SF0> 0SF1> 0F1> 0F2> 0SF2> ...2...".replace("+", ""))
    assert not named_in(change, "- s sends later.")
    assert not named_in(change, "- s-P2-M30 and other-s-P2-M3 send later.")


def test_changed_figures_are_listed():
    before = {"makespan": 12.0, "peak_activations": [3, 3]}
    change = ScheduleChange("s", "a", "b", before, {"makespan": 13.0, "peak_activations": [3, 3]})
    assert change.moved == (("makespan", "12", "13"),)
