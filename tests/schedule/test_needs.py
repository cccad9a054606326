"""``needs`` and its neighbours: the one copy of the dependency rule.

UP   rank 0 -> rank 1 -> rank 2      DOWN   rank 2 -> rank 1 -> rank 0      V   rank 0 -> rank 1
                                                                                     <-  (turn)
"""

import pytest
from hypothesis import given

from dualpipe.schedule import DOWN, MESSAGES, RB, RECEIVES, RF, SB, SENDS, SF, UP, B, F, Op, Schedule, W
from dualpipe.schedule.generate import NAMES, generate
from dualpipe.schedule.text import loads
from tests.strategies import schedules

TWO_LANES = Schedule({UP: (0, 1, 2), DOWN: (2, 1, 0)}, ((), (), ()))
V = Schedule({UP: (0, 1, 1, 0)}, ((), ()))
ALONE = Schedule({UP: (0,)}, ((),))


def op(text: str) -> Op:
    """The op of a text, on lanes deep enough for any of these."""
    ((slot,),) = loads(f"lane > 0 0 0 0\nlane < 0 0 0 0\nrank 0: {text}").programs
    return slot[0]


def needs(schedule: Schedule, text: str) -> str:
    return " ".join(map(str, schedule.needs(op(text))))


@pytest.mark.parametrize("lane", "><")
def test_every_kind_in_the_middle_of_a_lane(lane):
    def rule(what: str) -> str:
        return needs(TWO_LANES, f"{what}{lane}").replace(lane, "")

    assert rule("1F5") == "1RF5"
    assert rule("1SF5") == "1F5"
    assert rule("1B5") == "1F5 1RB5"
    assert rule("1SB5") == "1B5"
    assert rule("1W5") == "1B5"
    assert rule("1RF5") == "0SF5"
    assert rule("1RB5") == "2SB5"


@pytest.mark.parametrize("lane", "><")
def test_the_ends_of_a_lane(lane):
    assert needs(TWO_LANES, f"0F5{lane}") == ""
    assert needs(TWO_LANES, f"2B5{lane}") == f"2F5{lane}"
    assert needs(TWO_LANES, f"0RF5{lane}") == ""
    assert needs(TWO_LANES, f"2RB5{lane}") == ""


def test_at_the_turn_of_a_v_no_message_is_needed():
    assert needs(V, "1F5>") == "1RF5>"
    assert needs(V, "2F5>") == "1F5>"
    assert needs(V, "3F5>") == "3RF5>"
    assert needs(V, "2B5>") == "2F5> 2RB5>"
    assert needs(V, "1B5>") == "1F5> 2B5>"
    assert needs(V, "0B5>") == "0F5> 0RB5>"


def test_a_rank_alone_needs_nobody():
    assert [needs(ALONE, text) for text in ("0F0>", "0B0>", "0W0>")] == ["", "0F0>", "0B0>"]


def test_no_lane_needs_the_other():
    for kind in (F, B, W, SF, RF, SB, RB):
        for stage in range(3):
            assert all(need.lane is DOWN for need in TWO_LANES.needs(Op(kind, DOWN, stage, 0)))


@pytest.mark.parametrize(
    ("text", "peer"),
    [("1SF0>", 2), ("1RF0>", 0), ("1SB0>", 0), ("1RB0>", 2), ("1SF0<", 0), ("1RF0<", 2), ("1SB0<", 2), ("1RB0<", 0)],
)
def test_a_message_goes_to_the_neighbour_unless_it_names_a_peer(text, peer):
    assert TWO_LANES.peer(op(text)) == TWO_LANES.neighbour(op(text)) == peer
    assert TWO_LANES.peer(op(f"{text}@7")) == 7
    assert TWO_LANES.neighbour(op(f"{text}@7")) == peer


def test_beyond_a_lane_and_at_a_turn_no_message_crosses():
    assert [TWO_LANES.crosses(op(text)) for text in ("2SF0>", "0RF0>", "0SB0>", "2RB0>")] == [False] * 4
    assert [V.crosses(op(text)) for text in ("0SF0>", "1SF0>", "2SF0>", "3SF0>")] == [True, False, True, False]
    assert TWO_LANES.neighbour(op("2SF0>")) is None


@given(schedules())
def test_a_need_is_on_the_ops_own_rank_except_where_a_message_crosses(schedule):
    for placed in schedule:
        for need in schedule.needs(placed.op):
            if placed.op.kind in RECEIVES:
                assert need.kind in SENDS
                assert schedule.rank_of(need) == schedule.neighbour(placed.op)
            else:
                assert schedule.rank_of(need) == schedule.rank_of(placed.op)
            assert (need.lane, need.mb, need.peer) == (placed.op.lane, placed.op.mb, None)


@pytest.mark.parametrize("name", NAMES)
def test_whatever_a_named_schedule_needs_is_in_it_once_and_every_message_is_needed(name):
    schedule = generate(name, 4, 12)
    ops = [placed.op for placed in schedule]
    needed = {need for op in ops for need in schedule.needs(op)}
    assert len(set(ops)) == len(ops)
    assert needed <= set(ops)
    assert {op for op in ops if op.kind in MESSAGES} <= needed


@pytest.mark.parametrize("name", NAMES)
def test_every_stage_runs_every_microbatch(name):
    schedule = generate(name, 4, 12)
    for lane, route in schedule.routes.items():
        count = 12 // len(schedule.routes)
        assert schedule.microbatches[lane] == count
        for kind in (F, B, W):
            ran = {(p.op.stage, p.op.mb) for p in schedule if p.op.kind is kind and p.op.lane is lane}
            assert ran == {(stage, mb) for stage in range(len(route)) for mb in range(count)}
    assert all(schedule.rank_of(placed.op) == placed.rank for placed in schedule)
