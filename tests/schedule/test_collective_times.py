"""When collectives begin and end in a simulated timeline, and what waits for them."""

import pytest

from dualpipe.schedule.text import loads
from dualpipe.timeline.simulate import Costs, Stuck, Timeline, simulate
from tests.schedule.spans import spans

GROUPS = "lane > 0 1\ngroup 0: 0 1\ngroup 1: 0 1\n"


def collectives(timeline: Timeline) -> dict[str, tuple[float, float, float]]:
    """When each member posted its collective, when all had, and when it ended, by rank and op."""
    return {f"{c.at.rank} {c.at.op}": (c.posted, c.began, c.ended) for c in timeline.collectives}


# time     0    1    2    3    4    5    6
# rank 0   0F0  AA joins   0F1       .         AA ends at 6: all members have joined at 4
# rank 1   0F0< 0F1< 0F2< 0F3< AA joins
def test_all_members_of_a_collective_wait_for_each_other_and_computes_run_beside_it():
    text = "rank 0: 0F0> 0AA0>@0 0F1> 0B0>\nrank 1: 0F0< 0F1< 0F2< 0F3< 0AA0<@0\n"
    timeline = simulate(loads(f"lane > 0\nlane < 1\ngroup 0: 0 1\n{text}"), Costs(AA=2))
    assert collectives(timeline) == {"0 0AA0>@0": (1, 4, 6), "1 0AA0<@0": (4, 4, 6)}
    assert spans(timeline, 0) == [("0F0>", 0, 1), ("0F1>", 1, 2), ("0B0>", 6, 7)], "only B0 needs the all-to-all of 0"
    assert timeline.makespan == 7


def test_a_compute_waits_for_the_unshard_of_its_stage_and_not_for_a_reduction():
    text = "lane > 0\nrank 0: 0US> 0F0> 0RS> 0RG> 0F1>\n"
    timeline = simulate(loads(text), Costs(US=3, RS=1, RG=5))
    assert spans(timeline, 0) == [("0F0>", 3, 4), ("0F1>", 4, 5)]
    assert collectives(timeline) == {"0 0US>": (0, 0, 3), "0 0RS>": (4, 4, 5), "0 0RG>": (5, 5, 10)}
    assert timeline.makespan == 10


def test_the_next_message_waits_for_a_collective_and_so_does_the_next_collective():
    text = f"{GROUPS}rank 0: 0F0> 0AR>@0 0SF0> 0AR>@1\nrank 1: 1AR>@0 1RF0> 1AR>@1 1F0>\n"
    timeline = simulate(loads(text), Costs(AR=2))
    assert [(m.sent, m.awaited, m.completed) for m in timeline.messages] == [(3, 3, 3)]
    assert collectives(timeline)["1 1AR>@1"] == (3, 3, 5)
    assert spans(timeline, 1) == [("1F0>", 3, 4)]


def test_collectives_of_one_slot_run_at_the_same_time_and_blocking_waits_for_them():
    text = "lane > 0\nrank 0: 0RG>+0AR> 0F0>\n"
    for blocking, start in ((False, 0), (True, 4)):
        timeline = simulate(loads(text), Costs(RG=3, AR=4), blocking=blocking)
        assert spans(timeline, 0) == [("0F0>", start, start + 1)]
        assert timeline.makespan == max(4, start + 1)


def test_half_stages_have_half_of_a_collective():
    assert Costs(AA=2, US=4, latency=3).times(0.5).numbers == Costs(0.5, 0.5, 0.5, latency=3, AA=1, US=2).numbers


@pytest.mark.parametrize(
    ("program", "waits"),
    [
        ("1F0>", ["rank 0 in slot 1 waits for rank 1 to join 0AR>@0"]),
        (
            "1AR>@1 1AR>@0",
            [
                "rank 0 in slot 1 waits for rank 1 to join 0AR>@0",
                "rank 1 in slot 1 waits for rank 0 to join 1AR>@1",
            ],
        ),
    ],
)
def test_a_collective_that_a_member_does_not_reach_is_stuck(program, waits):
    with pytest.raises(Stuck) as stuck:
        simulate(loads(f"{GROUPS}rank 0: 0AR>@0 0AR>@1\nrank 1: {program}\n"))
    assert [*map(str, stuck.value.waits)][: len(waits)] == waits


def test_a_rank_outside_a_group_joins_alone():
    text = "lane > 0\nlane < 1\ngroup 0: 1\nrank 0: 0AR>@0 0F0>\nrank 1: 0F0<\n"
    assert collectives(simulate(loads(text), Costs(AR=1))) == {"0 0AR>@0": (0, 0, 1)}
