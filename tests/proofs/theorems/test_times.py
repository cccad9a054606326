"""Times are found for tables that nobody wrote times for: each proves itself with its own bound, or is not proved."""

from typing import NamedTuple

import pytest

from dualpipe.schedule.generate import MIDDLE, ONE_F_ONE_B, OUTER, ZB1P
from dualpipe.schedule.phase_table import Affine, Row, symbol, vary
from dualpipe.timeline.simulate import simulate
from proofs.theorems import families, finder, prove
from proofs.theorems.deadlock import deadlock
from proofs.theorems.family import Family
from proofs.theorems.finder import Guess, Timetable, Untimed, fit, in_words, sampled_sizes, timetable
from proofs.theorems.instance import instances, schedule_at
from proofs.theorems.obligation import discharge
from proofs.theorems.one_lane import one_f_one_b, zb1p
from proofs.theorems.prove import NOT_REACHED, QUESTION_SECONDS
from proofs.theorems.sample import Compute, sample
from proofs.theorems.two_way import dualpipe, dualpipev
from proofs.verdict import Proved, Refuted, Unknown

N, H, h, P, M, r = map(symbol, ("N", "H", "h", "P", "M", "r"))
FAMILIES = {family.name: family for family in families()}


class Varied(NamedTuple):
    """A table that somebody else could write, and the bound that it proves of itself."""

    what: str
    family: Family
    bound: str

    @property
    def id(self) -> str:
        return f"{self.family.name}: {self.what}"


W_LAST_IN_COOLDOWN = vary(OUTER, Row("7 cooldown", N - h - 1, "RB0 B0 SB0 W"))
NO_OVERLAP_AT_THE_END = vary(OUTER, Row("5 forwards end", N - h - 1, "RB1 B1+W1 SB1 RF1 RB0 F1 SF1 B0+W0 SB0"))
VARIED = [
    Varied(
        "an activation is sent after the next backward",
        one_f_one_b(vary(ONE_F_ONE_B, Row("2 one forward, one backward", M - P + r, "F0 RB0 B0+W0 SF0 SB0 RF0"))),
        "5M + 3P - 5",
    ),
    Varied(
        "W runs before the gradient is sent in the cooldown",
        zb1p(vary(ZB1P, Row("4 cooldown", P - r - 1, "RB0 B0 W SB0"))),
        "3M + 3P - 3",
    ),
    Varied(  # shorter, as messages block: the W runs while the partner is awaited
        "W runs before the gradient is sent in the steady state",
        zb1p(vary(ZB1P, Row("3 one of each", M - P, "F0 SF0 RB0 B0 W SB0 RF0"))),
        "3M + P - 1",
    ),
]
TWO_WAY = [
    Varied("W runs last in the cooldown", dualpipe(outer=W_LAST_IN_COOLDOWN), "3M + P - 1"),
    Varied("W runs last in the cooldown", dualpipev(outer=W_LAST_IN_COOLDOWN), "6M + 2P - 1"),
    Varied("no overlap where the forwards end", dualpipe(outer=NO_OVERLAP_AT_THE_END), "3M + 3P/2 - 3"),
]
SHALLOW = one_f_one_b(
    vary(
        ONE_F_ONE_B,
        Row("1 warm-up", 0, "RF0 F0 SF0"),
        Row("2 one forward, one backward", M - 1, "F0 SF0 RB0 B0+W0 SB0 RF0"),
        Row("3 cooldown", 0, "RB0 B0+W0 SB0"),
    )
)
"""One microbatch at a time passes the ranks: correct, and the makespan grows with the product of P and M."""


def check_bound(family: Family) -> None:
    """Simulate: no size exceeds the bound, and the sampled ones stay below it by as much as the finder says."""
    found = timetable(family, QUESTION_SECONDS)
    assert isinstance(found, Timetable)
    below = {}
    for size in [*found.slack, (6, 14), (8, 32), (12, 24)]:
        end = simulate(schedule_at(family, *size), blocking=True).makespan
        below[size] = found.guess.bound.at(symbols(family, *size)) - end
    assert min(below.values()) >= 0
    assert {size: below[size] for size in found.slack} == found.slack


def symbols(family: Family, ranks: int, microbatches: int) -> dict[str, int]:
    half = 2 if family.name == "dualpipe" else 1
    return {"P": ranks, "M": microbatches, "N": ranks // half, "H": microbatches // half}


@pytest.mark.parametrize("family", families(), ids=FAMILIES)
def test_no_named_schedule_takes_longer_than_the_bound_that_is_proved_of_it(family, proved):
    guess = timetable(family, QUESTION_SECONDS).guess
    assert proved[f"{family.name}: makespan"].bound.removesuffix(NOT_REACHED) == in_words(family, guess.bound)
    check_bound(family)


def proves_itself(varied: Varied) -> None:
    results = {name: prove(varied.family, name, {"totals", "queue", "deadlock"}) for name in ("deadlock", "makespan")}
    assert [result.reason for result in results.values()] == ["", ""]
    assert all(isinstance(result.verdict, Proved) for result in results.values())
    assert results["makespan"].bound.removesuffix(NOT_REACHED) == varied.bound
    assert f"the step ends by {varied.bound}" in results["makespan"].text
    check_bound(varied.family)


@pytest.mark.parametrize("varied", VARIED, ids=[varied.id for varied in VARIED])
def test_a_correct_change_of_a_table_proves_itself_with_a_bound_of_its_own(varied):
    proves_itself(varied)


@pytest.mark.long
@pytest.mark.parametrize("varied", TWO_WAY, ids=[varied.id for varied in TWO_WAY])
def test_a_correct_change_of_a_two_way_table_proves_itself_with_a_bound_of_its_own(varied):
    proves_itself(varied)


def test_the_times_of_a_varied_two_way_table_fit_sizes_that_were_not_sampled():
    """The guess alone, in plain arithmetic: what Z3 makes of it for every size takes longer."""
    family = TWO_WAY[0].family
    guess = fit(family, [sample(family, *size) for size in sampled_sizes(family)])
    assert isinstance(guess, Guess)
    assert in_words(family, guess.bound) == TWO_WAY[0].bound
    obligations = list(deadlock(family, guess.times))
    assert all(one.holds for one in instances(family, obligations, 14, 28))


def test_a_table_without_affine_times_is_unknown():
    """What is correct is never refuted; the last guess that failed is shown."""
    for name, reason in (("deadlock", "no times found that are affine"), ("makespan", "rests on deadlock")):
        result = prove(SHALLOW, name, {"totals", "queue"})
        assert isinstance(result.verdict, Unknown)
        assert reason in result.reason
    assert prove(SHALLOW, "deadlock", {"totals"}).counterexample is not None
    assert isinstance(prove(SHALLOW, "messages", {"totals"}).verdict, Proved)


def test_a_w_that_no_size_has_leaves_the_times_unknown():
    empty = zb1p(vary(ZB1P, Row("3 last", 1, "F0 SF0 W RB0 B0 SB0")))
    result = prove(empty, "deadlock", {"totals"})
    assert isinstance(result.verdict, Unknown)
    assert "has no schedule for 1 rank and 1 microbatch" in result.reason


@pytest.mark.parametrize("name", ["1f1b", "zb1p"])
def test_a_start_that_is_one_too_early_fails_to_be_proved(name):
    """In whichever row: each is waited for by another one, or waits for another one."""
    family = FAMILIES[name]
    guess = timetable(family, QUESTION_SECONDS).guess
    for key, start in guess.times.items():
        failures = discharge(deadlock(family, {**guess.times, key: start - 1}), QUESTION_SECONDS).failures
        assert failures, key
        assert failures[0].values is not None


@pytest.mark.parametrize(
    "wrong",
    [
        lambda guess: guess._replace(bound=guess.bound - 1),
        lambda guess: guess._replace(times=guess.times | {("rank", "2 last", 1): Affine({})}),
        lambda guess: guess._replace(times={}),
    ],
    ids=["a bound too small", "one compute at time 0", "everything at time 0"],
)
def test_a_wrong_guess_can_only_fail_to_be_proved(monkeypatch, wrong):
    monkeypatch.setattr(finder, "fit", lambda family, samples: wrong(fit(family, samples)))
    subject = one_f_one_b()
    found = timetable(subject, QUESTION_SECONDS)
    assert isinstance(found, Untimed)
    assert found.proof.failures
    assert isinstance(prove(subject, "deadlock", {"totals"}).verdict, Unknown)
    assert isinstance(prove(subject, "makespan", {"totals", "deadlock"}).verdict, Unknown)


def test_a_guess_that_a_larger_size_refutes_is_made_again_with_that_size(monkeypatch):
    """Fitted to one rank alone, the first guess knows nothing of neighbours."""
    monkeypatch.setattr(finder, "sampled_sizes", lambda family: iter([(1, 1), (1, 2)]))
    found = timetable(subject := one_f_one_b(), QUESTION_SECONDS)
    assert isinstance(found, Timetable)
    assert len(found.slack) > 2
    assert in_words(subject, found.guess.bound) == "3M + 3P - 3"


@pytest.mark.parametrize("name", FAMILIES)
def test_the_waits_of_a_sample_are_those_of_the_obligations(name):
    """Two derivations: the finder reads the expanded schedule, the proof the table with its sizes open."""
    family = FAMILIES[name]
    ranks, microbatches = list(sampled_sizes(family))[-1]
    one = sample(family, ranks, microbatches)
    guess = timetable(family, QUESTION_SECONDS).guess
    times = {wait.later: start(guess, wait.later) for wait in one.waits}
    for earlier, later in one.waits:
        assert times[later] >= (times[earlier] + earlier.duration if earlier else 0)
    assert one.makespan == simulate(schedule_at(family, ranks, microbatches), blocking=True).makespan


def start(guess: Guess, compute: Compute) -> int:
    form = guess.times[compute.kind, compute.row, compute.number]
    return form.at({**dict(compute.values), "i": compute.iteration})


def test_a_cycle_of_waits_is_found_in_the_sample_and_named():
    crossed = dualpipe(middle=vary(MIDDLE, Row("4 first", 1, "F0 SF1 RB1 RB0 B1+W1 SF0 SB1 RF1 F1+B0+W0 SF1 SB0")))
    found = timetable(crossed, QUESTION_SECONDS)
    assert isinstance(found, Untimed)
    assert found.deadlocked is not None
    assert "of rank 0, iteration 0, waits for" in found.reason
    result = prove(crossed, "deadlock", {"totals"})
    assert isinstance(result.verdict, Refuted)
    assert (result.counterexample.ranks, result.counterexample.microbatches) == (2, 4)


def test_a_bound_is_written_in_ranks_and_microbatches():
    two, one = FAMILIES["dualpipe"], FAMILIES["1f1b"]
    assert in_words(two, 6 * H + 2 * N - 2) == "3M + P - 2"
    assert in_words(two, 6 * H + N - 1) == "3M + P/2 - 1"
    assert in_words(two, 2 * H - 3 * N) == "M - 3P/2"
    assert in_words(one, 3 * M + 1) == "3M + 1"
    assert in_words(one, -M + 2 * P) == "-M + 2P"
    assert in_words(one, Affine({})) == "0"
