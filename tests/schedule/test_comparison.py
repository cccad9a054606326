"""Schedules side by side: one model, one unit of time and of memory, and the best under limits.

F = B = W = 1 of a share, 1/4 of the model, on 4 ranks with 16 microbatches:

dualpipe-late-tail   2 whole stages a rank   3M + P/2 - 1   = 49
zbv                  2 half stages           3M + (P-1)/2   = 49.5
dualpipe             2 whole stages          3M + P - 2     = 50
zb1p                 1 whole stage           3M + P - 1     = 51
1f1b                 1 whole stage           3(M + P - 1)   = 57
"""

from functools import cache

import pytest

from dualpipe.errors import RuleError
from dualpipe.schedule.generate import NAMES, generate
from dualpipe.schedule.text import dumps, loads
from dualpipe.timeline.comparison import Absent, Candidate, Limits, Sizes, candidate, parse_sizes, rank
from dualpipe.timeline.ranking_text import describe
from dualpipe.timeline.timeline import Costs
from proofs.memory import peak_bytes

P, M = 4, 16
SIZES = Sizes(B=8, W=3, weights=100)


@cache
def candidates(costs=None, sizes=None):
    return [candidate(name, generate(name, P, M), costs or Costs(), sizes) for name in NAMES]


def names(found):
    return [each.name for each in found]


def test_makespans_are_those_of_the_published_formulas():
    makespans = {each.name: each.timeline.makespan for each in candidates()}
    assert makespans == {
        "dualpipe-late-tail": 49,
        "dualpipe-late-all": 49,
        "zbv": 49.5,
        "dualpipev-late-tail": 49.5,
        "dualpipev-late-all": 49.5,
        "dualpipe": 50,
        "zb1p": 51,
        "dualpipev": 51,
        "interleaved": 52.5,
        "1f1b": 57,
    }


def test_each_schedule_does_the_same_work_on_every_rank():
    for each in candidates(Costs(F=1, B=1.5, W=0.7)):
        assert each.timeline.busy == pytest.approx([M * (1 + 1.5 + 0.7)] * P), each.name


def test_only_dualpipe_holds_the_parameters_twice():
    assert {each.name for each in candidates() if each.parameters == (2,) * P} == {
        name for name in NAMES if name.partition("-")[0] == "dualpipe"
    }
    assert all(each.parameters == (1,) * P for each in candidates() if each.name.partition("-")[0] != "dualpipe")


def test_live_microbatches_are_counted_in_shares():
    peaks = {each.name: max(each.activations) for each in candidates() if "late" not in each.name}
    assert peaks == {"dualpipe": 5, "dualpipev": 4.5, "1f1b": 4, "zb1p": 4, "zbv": 4, "interleaved": 5.5}


def test_the_activations_in_bytes_are_those_that_the_prover_counts():
    for each in candidates(sizes=SIZES):
        schedule = each.timeline.schedule
        of_stage = [[each.share * size] * schedule.stages for size in (SIZES.B, SIZES.W)]
        assert each.activation_bytes == tuple(peak.total for peak in peak_bytes(schedule, *of_stage)), each.name
        weights = [100 * held for held in each.parameters]
        assert each.bytes == tuple(sum(both) for both in zip(each.activation_bytes, weights, strict=True))


def test_memory_over_time_begins_and_ends_with_nothing():
    for each in candidates():
        for number in range(P):
            levels = each.memory(number)
            assert (levels[0].level, levels[-1].level) == (0, 0)
            assert [level.time for level in levels] == sorted(level.time for level in levels)
            assert max(level for _, level in levels) == each.activations[number]


def test_twice_as_many_stages_send_twice_as_many_messages_and_one_more():
    messages = {each.name: each.messages for each in candidates()}
    assert messages["dualpipe"] == messages["1f1b"] == 2 * M * (P - 1)
    assert messages["zbv"] == messages["dualpipev"] == 2 * M * 2 * (P - 1)
    assert messages["interleaved"] == 2 * M * (2 * P - 1)


def test_the_best_is_the_fastest_and_of_equals_the_one_that_holds_least():
    assert names(rank(candidates(), Limits()).best) == ["dualpipe-late-tail", "dualpipe-late-all"]
    in_the_shade = [each for each in candidates() if each.name not in ("dualpipe-late-tail", "dualpipe-late-all")]
    assert names(rank(in_the_shade, Limits()).best) == ["zbv", "dualpipev-late-tail", "dualpipev-late-all"]


def test_late_w_is_not_the_best_where_the_overlap_of_w_pays_more():
    ranking = rank(candidates(Costs(W=1.4, FB=0.7 * 3.4)), Limits())
    assert "late" not in ranking.best[0].name
    assert ranking.best[0].name.startswith("dualpipe")


def test_limits_of_memory_leave_out_what_holds_more():
    assert names(rank(candidates(), Limits(activations=4.5)).best)[0] == "zbv"
    assert names(rank(candidates(sizes=SIZES), Limits(bytes=142)).best)[0] == "zbv"
    none = rank(candidates(sizes=SIZES), Limits(bytes=100))
    assert none.best == ()
    assert describe(none).endswith("\nbest: none of them fits")
    assert "dualpipe holds 240 bytes, and 100 are allowed\n" in describe(none)


def test_bytes_cannot_be_limited_without_sizes():
    with pytest.raises(RuleError, match="--max-bytes needs the sizes: got no --bytes; add"):
        rank(candidates(), Limits(bytes=1))


def test_a_schedule_that_gets_stuck_is_absent_with_the_reason():
    text = "lane > 0 1\nrank 0: 0F0> 0SF0>+0RB0> 0B0>+0W0>\nrank 1: 1RF0> 1F0> 1B0>+1W0>\n"
    stuck = candidate("mine", loads(text), Costs())
    assert isinstance(stuck, Absent)
    assert stuck.reason.startswith("it gets stuck: rank 0 in slot 1 waits for rank 1 to post the partner of ")
    assert stuck.story.startswith(
        "every rank must reach its end and every message must have a partner: rank 0 in slot 1"
    )
    assert f"mine: {stuck.reason}" in describe(rank([*candidates(), stuck], Limits()))
    assert rank([stuck], Limits()).best == ()


@pytest.mark.parametrize(
    ("change", "op"), [("left out", "3W15>"), ("twice", "0F0>")], ids=["a W left out", "a forward twice"]
)
def test_a_schedule_that_does_other_work_is_not_compared(change, op):
    text = dumps(generate("1f1b", P, M))
    changed = text.replace("+3W15>", "") if change == "left out" else text.replace("0F0> ", "0F0> 0F0> ")
    found = candidate("mine", loads(changed), Costs())
    assert found == Absent("mine", f"it does not run {op} exactly once, so it is not compared (see `dualpipe prove`)")


def test_a_stage_is_its_part_of_a_share_whatever_their_number():
    three = loads("lane > 0 0 0\nrank 0: 0F0> 1F0> 2F0> 2B0>+2W0> 1B0>+1W0> 0B0>+0W0>\n")
    found = candidate("three", three, Costs(F=3, B=3, W=3, latency=7))
    assert isinstance(found, Candidate)
    assert (found.timeline.makespan, found.parameters, found.activations) == (9, (1,), (1,))
    assert found.timeline.costs.latency == 7


def test_a_message_takes_its_latency_from_when_it_is_sent():
    """1F1B's rank 1 posts the receive of microbatch 1 at 7, and it was sent at 2: with a latency of 3 it is there.

    rank 0   F0 0..1   F1 1..2                          B0+W0 10..12   B1+W1 13..15
    rank 1                      F0 4..5   B0+W0 5..7    F1 7..8   B1+W1 8..10
    """
    found = candidate("1f1b", generate("1f1b", 2, 2), Costs(latency=3))
    assert found.timeline.makespan == 15


def test_slices_of_the_model_are_dealt_to_stages_by_their_depth():
    """Two slices, the second three times as heavy: rank 1 of 1F1B has it, each rank of a V has half of both."""
    slices = (Costs(1, 1, 1), Costs(3, 3, 3))
    costs = Costs(2, 2, 2, stages=slices)
    busy = {name: candidate(name, generate(name, 2, 4), costs).timeline.busy for name in ("1f1b", "zbv", "interleaved")}
    assert busy == {"1f1b": (4 * 3, 4 * 9), "zbv": (4 * 6, 4 * 6), "interleaved": (4 * 6, 4 * 6)}
    three = candidate("1f1b", generate("1f1b", 3, 3), costs)
    assert [stage.F for stage in three.timeline.costs.stages] == pytest.approx([1, 2, 3])


@pytest.mark.parametrize("text", ["B=1", "W=1", "B=-1,W=1", "B=1,W=nan", "B=1,W=1,weights=inf"])
def test_sizes_without_b_or_w_or_out_of_range_are_refused(text):
    with pytest.raises(RuleError, match="--bytes gives B and W"):
        parse_sizes(text)


def test_sizes_are_read():
    assert parse_sizes("B=8,W=3,weights=100") == SIZES
