"""Live activations: the published bounds, exact peaks, and bytes."""

import pytest

from dualpipe.schedule import Schedule
from dualpipe.schedule.generate import dualpipe, dualpipev, generate, interleaved, one_f_one_b, zb1p, zbv
from dualpipe.schedule.text import loads
from proofs import smt
from proofs.memory import Bound, BoundError, bound_of, peak_activations, peak_bytes, settled_bytes, within
from proofs.prove import prove
from proofs.story import live_lines, tell
from proofs.verdict import Proved, Refuted, Skipped
from reference.ledger import Ledger
from tests.mutations import mutants
from tests.reference.trials import decoder

SIZES = [("dualpipe", 2, 4), ("dualpipe", 6, 14), ("dualpipev", 3, 8), ("1f1b", 5, 5), ("1f1b", 4, 9), ("zb1p", 4, 8)]


@pytest.mark.parametrize(("ranks", "microbatches"), [(2, 4), (4, 8), (4, 20), (8, 16), (10, 24)])
def test_every_rank_of_dualpipe_holds_one_more_than_there_are_ranks(ranks, microbatches):
    assert peak_activations(dualpipe(ranks, microbatches)) == (ranks + 1,) * ranks


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6])
def test_every_rank_of_dualpipev_holds_one_more_than_there_are_stages(ranks):
    assert peak_activations(dualpipev(ranks, 2 * ranks + 3)) == (2 * ranks + 1,) * ranks


def test_the_ranks_of_1f1b_hold_fewer_towards_the_end_and_those_of_zb1p_all_as_many():
    assert peak_activations(one_f_one_b(4, 8)) == (4, 3, 2, 1)
    assert peak_activations(zb1p(4, 8)) == (4, 4, 4, 4)


@pytest.mark.parametrize("ranks", [2, 3, 4, 6])
def test_zbv_and_interleaved_1f1b_reach_their_published_bounds_and_no_more(ranks):
    assert peak_activations(zbv(ranks, 3 * ranks)) == (2 * ranks,) * ranks
    peaks = peak_activations(interleaved(ranks, 3 * ranks))
    assert peaks == tuple(3 * ranks - 1 - 2 * rank for rank in range(ranks))
    for schedule in (zbv(ranks, 3 * ranks), interleaved(ranks, 3 * ranks)):
        assert max(peak_activations(schedule)) == max(bound_of(schedule).per_rank)


def test_only_the_name_decides_the_published_bound():
    bounds = {name: bound_of(generate(name, 4, 8)) for name in ("dualpipe", "dualpipev", "1f1b", "zb1p")}
    assert {name: bound.per_rank for name, bound in bounds.items()} == {
        "dualpipe": (5, 5, 5, 5),
        "dualpipev": (9, 9, 9, 9),
        "1f1b": (4, 3, 2, 1),
        "zb1p": (4, 4, 4, 4),
    }
    borrowed = Schedule(dualpipev(4, 8).routes, dualpipev(4, 8).programs, "dualpipe")
    assert isinstance(prove(borrowed).checks["memory"].verdict, Refuted)


def test_1f1b_in_the_other_direction_has_the_bounds_of_its_stages():
    text = "schedule 1f1b\nlane < 1 0\nrank 0: 1RF0< 1F0< 1B0<+1W0< 1SB0<\nrank 1: 0F0< 0SF0<+0RB0< 0B0<+0W0<\n"
    assert bound_of(loads(text)).per_rank == (1, 1)


@pytest.mark.parametrize(("name", "ranks", "microbatches"), SIZES)
def test_both_methods_find_the_same_peak(name, ranks, microbatches):
    schedule = generate(name, ranks, microbatches)
    for subject in (schedule, *(mutant.schedule for mutant in mutants(schedule, 17, seed=3))):
        peaks = peak_activations(subject)
        enough, too_few = Bound(peaks, "peaks"), Bound(tuple(peak - 1 for peak in peaks), "one fewer")
        for verdict in (within(subject, enough), smt.verdict(smt.memory(subject, enough))):
            assert isinstance(verdict, Proved)
        for verdict in (within(subject, too_few), smt.verdict(smt.memory(subject, too_few))):
            assert isinstance(verdict, Refuted)


def test_a_given_bound_overrides_the_published_one():
    assert prove(dualpipe(4, 8), max_activations=5).verdict == "proved"
    assert prove(dualpipe(4, 8), max_activations=4).verdict == "refuted"
    assert prove(one_f_one_b(4, 8), max_activations=4).verdict == "proved"
    with pytest.raises(BoundError, match="0 or more: got -1"):
        prove(dualpipe(4, 8), max_activations=-1)


def test_without_a_bound_the_peak_is_only_reported():
    nameless = Schedule(zb1p(3, 4).routes, zb1p(3, 4).programs)
    report = prove(nameless)
    assert isinstance(report.checks["memory"].verdict, Skipped)
    assert report.verdict == "proved"
    assert report.as_json()["peak_activations"] == [3, 3, 3]
    assert "published" in report.as_json()["checks"]["memory"]["reason"]


def test_the_story_lists_the_live_microbatches():
    verdict = prove(zb1p(2, 4), max_activations=1).checks["memory"].verdict
    assert tell(verdict.finding).split("\n") == [
        "rank 0 holds 2 live activations in slot 2, but may hold only 1 (given); live in that slot:",
        "  stage 0 of lane >, waiting for B: microbatches 0, 1",
    ]


# rank 0   F0 F1 . . B0 . W0 B1 W1      a microbatch holds 10 bytes until its B, then 3 until its W
BYTES = """
lane > 0 1
rank 0: 0F0> 0SF0> 0F1> 0SF1>+0RB0> 0B0> 0W0> 0RB1> 0B1>+0W1>
rank 1: 1RF0> 1F0> 1B0>+1W0> 1SB0>+1RF1> 1F1> 1B1>+1W1> 1SB1>
"""


def test_a_split_backward_holds_the_bytes_of_b_and_of_w_while_its_b_runs():
    here, there = peak_bytes(loads(BYTES), (10, 100), (3, 50))
    # two activations and, in the slot of 0B0>, the bytes that it leaves to 0W0>
    assert (here.total, here.slot) == (10 + 10 + 3, 4)
    assert live_lines(tuple(held.what for held in here.held)) == [
        "  stage 0 of lane >, waiting for B: microbatches 0, 1",
        "  stage 0 of lane >, waiting for W: microbatch 0",
    ]
    # rank 1 runs full backwards, which leave nothing to W
    assert (there.total, there.slot) == (100, 1)


def test_with_one_byte_per_microbatch_the_peak_in_bytes_is_the_peak_in_microbatches():
    for name, ranks, microbatches in SIZES:
        schedule = generate(name, ranks, microbatches)
        whole = [1] * schedule.stages
        # no bytes are held for W here, so the peak can be lower than the count but never higher
        totals = [peak.total for peak in peak_bytes(schedule, whole, [0] * schedule.stages)]
        assert all(total <= peak for total, peak in zip(totals, peak_activations(schedule), strict=True))
        assert name != "1f1b" or totals == list(peak_activations(schedule))


def test_a_heavy_stage_makes_the_ranks_that_hold_it_heavy():
    schedule = dualpipe(4, 8)
    peaks = peak_bytes(schedule, (1000, 10, 10, 10), (0, 0, 0, 0))
    assert [peak.total > 1000 for peak in peaks] == [True, False, False, True]
    report = prove(schedule, bytes_per_stage=((1000, 10, 10, 10), (0, 0, 0, 0))).as_json()
    assert [peak["bytes"] for peak in report["peak_bytes"]] == [peak.total for peak in peaks]
    assert sum(held["bytes"] for held in report["peak_bytes"][0]["live"]) == peaks[0].total


def test_sizes_that_do_not_fit_the_stages_are_rejected():
    for for_b, for_w in (((1, 2), (1, 2, 3)), ((1, 2, 3), (1, -2, 3)), ((), ())):
        with pytest.raises(BoundError, match="for each of the 3 stages"):
            peak_bytes(zb1p(3, 3), for_b, for_w)


@pytest.mark.parametrize("name", ["dualpipe", "dualpipev", "1f1b", "zb1p"])
def test_fake_ranks_measure_the_settled_bytes_of_the_schedule(name):
    schedule = generate(name, 2, 8)
    ledger = Ledger(schedule.ranks)
    decoder(schedule, steps=1).run(schedule, ledger=ledger)
    sizes = {stage: footprint for (_, stage), footprint in ledger.footprints.items()}
    for_b, for_w = zip(*(sizes[stage] for stage in range(schedule.stages)), strict=True)
    measured = tuple(peak.settled_bytes for peak in ledger.peaks)
    assert settled_bytes(schedule, for_b, for_w) == measured
    # fewer bytes are held for W than for B here, so the count by slots, which allocates first, is never less
    counted = [peak.total for peak in peak_bytes(schedule, for_b, for_w)]
    assert all(most <= total for most, total in zip(measured, counted, strict=True))


def test_a_rank_that_computes_nothing_holds_nothing():
    idle = loads("lane > 0\nrank 0: 0F0> 0B0>+0W0>\nrank 1:\n")
    assert peak_activations(idle) == (1, 0)
    assert peak_bytes(idle, [7], [1])[1].slot is None
