"""Times are found for tables that nobody wrote times for: each proves itself with its own bound, or is not proved."""

from typing import NamedTuple

import pytest

from dualpipe.schedule.generate import (
    MIDDLE,
    MIDDLE_ALL,
    ONE_F_ONE_B,
    OUTER,
    OUTER_ALL,
    OUTER_TAIL,
    ZB1P,
    LateW,
)
from dualpipe.schedule.phase_table import Affine, Row, symbol, vary
from dualpipe.timeline.simulate import simulate
from proofs.theorems import THEOREMS, finder, prove
from proofs.theorems.deadlock import Waiting, waits
from proofs.theorems.family import Family
from proofs.theorems.finder import Guess, Timetable, Untimed, fit, sampled_sizes, timetable
from proofs.theorems.instance import schedule_at
from proofs.theorems.obligation import QUESTION_SECONDS, discharge
from proofs.theorems.one_lane import one_f_one_b, zb1p
from proofs.theorems.prove import NOT_REACHED
from proofs.theorems.sample import Compute, Sample, sample
from proofs.theorems.two_way import dualpipe, dualpipev
from proofs.verdict import Proved, Refuted, Unknown
from tests.proofs.theorems.cases import BY_NAME, FAMILIES

N, H, h, P, M, r = map(symbol, ("N", "H", "h", "P", "M", "r"))


class Varied(NamedTuple):
    """A table that somebody else could write, and the bounds that it proves of itself.

    ``bound`` holds where messages block and ``at_use`` where what needs them awaits them.  Either is empty if the
    schedule deadlocks then.
    """

    what: str
    family: Family
    bound: str
    at_use: str


def in_1f1b(steady: str) -> Family:
    """1F1B with another steady state, written out so that its bound is the same whatever becomes of the named table."""
    return one_f_one_b(
        (
            Row("1 warm-up", P - r - 1, "RF0 F0 SF0"),
            Row("2 receive ahead", 1, "RF0"),
            Row("2 one forward, one backward", M - P + r, steady),
            Row("2 last", 1, "F0 SF0 RB0 B0+W0 SB0"),
            Row("3 cooldown", P - r - 1, "RB0 B0+W0 SB0"),
        )
    )


def in_zb1p(steady: str, cooldown: str) -> Family:
    """ZB1P with another steady state and cooldown."""
    return zb1p(
        (
            Row("1 warm-up", P - r - 1, "RF0 F0 SF0"),
            Row("2 receive ahead", 1, "RF0"),
            Row("2 weights deferred", r, "F0 SF0 RB0 B0 SB0 RF0"),
            Row("3 one of each", M - P, steady),
            Row("3 last", 1, "F0 SF0 RB0 B0 SB0 W"),
            Row("4 cooldown", P - r - 1, cooldown),
            Row("5 weights", r, "W"),
        )
    )


VARIED = [
    Varied("1f1b: activations sent after B", in_1f1b("F0 RB0 B0+W0 SF0 SB0 RF0"), "5M + 3P - 5", "5M + 3P - 5"),
    Varied("1f1b: B and W apart", in_1f1b("F0 SF0 RB0 B0 W0 SB0 RF0"), "3M + 3P - 3", "3M + 3P - 3"),
    Varied(
        "zb1p: W before the gradient is sent, cooldown",
        in_zb1p("F0 SF0 RB0 B0 SB0 RF0 W", "RB0 B0 W SB0"),
        "3M + 3P - 3",
        "3M + 2P - 2",
    ),
    Varied(  # shorter, as messages block: the W runs while the partner is awaited
        "zb1p: W before the gradient is sent, steady state",
        in_zb1p("F0 SF0 RB0 B0 W SB0 RF0", "RB0 B0 SB0 W"),
        "3M + P - 1",
        "3M + P - 1",
    ),
]
W_LAST_IN_COOLDOWN = vary(OUTER, Row("7 cooldown", N - h - 1, "RB0 B0 SB0 W"))
NO_OVERLAP_AT_THE_END = vary(OUTER, Row("5 forwards end", N - h - 1, "B1+W1 SB1 RF1 RB0 F1 SF1 B0+W0 SB0 RB1"))
FULL_BACKWARDS = vary(OUTER_TAIL, Row("5 forwards end", N - h - 1, "B1+W1 SB1 RF1 RB0 F1+B0 SF1 SB0 RB1 W"))
APART = Row("4 overlapped", H - 2 * N + h, "F1 SF1 B0 SB0 RF0 RB1 W F0 SF0 B1 SB1 RF1 RB0 W")
TWO_WAY = [
    Varied("dualpipe: W last in the cooldown", dualpipe(outer=W_LAST_IN_COOLDOWN), "3M + P - 1", "3M + P - 1"),
    Varied("dualpipev: W last in the cooldown", dualpipev(outer=W_LAST_IN_COOLDOWN), "6M + 2P - 1", "6M + 2P - 1"),
    Varied(
        "dualpipe: no overlap where the forwards end",
        dualpipe(outer=NO_OVERLAP_AT_THE_END),
        "3M + 3P/2 - 3",
        "3M + P/2",
    ),
    Varied(  # the lower bound also where messages block, which late W as it is does not reach
        "dualpipe-late-tail: B1 and W1 together where the forwards end",
        dualpipe(outer=FULL_BACKWARDS, late_w=LateW.tail),
        "3M + P/2 - 1",
        "3M + P/2 - 1",
    ),
    Varied(  # F and B of a pair wait for each other across the middle if their messages block
        "dualpipe-late-all: no overlap at all",
        dualpipe(outer=vary(OUTER_ALL, APART), middle=vary(MIDDLE_ALL, APART), late_w=LateW.all),
        "",
        "3M + P/2 - 1",
    ),
]
RULES = {"makespan": Waiting.BLOCKING, "makespan at use": Waiting.AT_USE}
SHALLOW = one_f_one_b(
    vary(
        ONE_F_ONE_B,
        Row("1 warm-up", 0, "RF0 F0 SF0"),
        Row("2 one forward, one backward", M - 1, "F0 SF0 RB0 B0+W0 SB0 RF0"),
        Row("3 cooldown", 0, "RB0 B0+W0 SB0"),
    )
)
"""One microbatch at a time passes the ranks: correct, and the makespan grows with the product of P and M."""


def check_bound(family: Family, waiting: Waiting) -> None:
    """Simulate: no size exceeds the bound, and the sampled ones stay below it by as much as the finder says."""
    found = timetable(family, QUESTION_SECONDS, waiting)
    assert isinstance(found, Timetable)
    below = {}
    for size in [*found.slack, (6, 14), (8, 32), (12, 24)]:
        end = simulate(schedule_at(family, *size), blocking=waiting is Waiting.BLOCKING).makespan
        below[size] = found.guess.bound.at(symbols(family, *size)) - end
    assert min(below.values()) >= 0
    assert {size: below[size] for size in found.slack} == found.slack


def symbols(family: Family, ranks: int, microbatches: int) -> dict[str, int]:
    half = family.world[0].terms.get("N", 1)  # of the lanes, which share the ranks
    return {"P": ranks, "M": microbatches, "N": ranks // half, "H": microbatches // half}


@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize("rule", RULES)
def test_no_named_schedule_takes_longer_than_the_bound_that_is_proved_of_it(name, rule, proved):
    family = FAMILIES[name]
    guess = timetable(family, QUESTION_SECONDS, RULES[rule]).guess
    assert proved[f"{name}: {rule}"].bound.removesuffix(NOT_REACHED) == family.in_words(guess.bound)
    check_bound(family, RULES[rule])


@pytest.mark.parametrize("name", BY_NAME)
def test_no_bound_is_below_the_lower_bound_and_late_w_is_optimal_at_use(name, proved):
    least = proved[f"{name}: lower bound"].bound
    optimal = [rule for rule in RULES if proved[f"{name}: {rule}"].optimal]
    assert optimal == (["makespan at use"] if "-late-" in name or name == "zb1p" else [])
    assert all(proved[f"{name}: {rule}"].bound == least for rule in optimal)


def proves_itself(varied: Varied) -> None:
    """The theorems about times hold, and the bounds are the table's own, unless the schedule deadlocks."""
    assert isinstance(prove(varied.family, "deadlock", {*THEOREMS}).verdict, Proved if varied.bound else Refuted)
    for rule, bound in (("makespan", varied.bound), ("makespan at use", varied.at_use)):
        if not bound:
            continue
        result = prove(varied.family, rule, {*THEOREMS})
        assert result.reason == ""
        assert isinstance(result.verdict, Proved)
        assert result.bound == bound
        assert f"the step ends by {bound}" in result.text
        check_bound(varied.family, RULES[rule])


@pytest.mark.parametrize(
    "varied",
    [*VARIED, *(pytest.param(varied, marks=pytest.mark.long) for varied in TWO_WAY)],
    ids=[varied.what for varied in VARIED + TWO_WAY],
)
def test_a_correct_change_of_a_table_proves_itself_with_bounds_of_its_own(varied):
    proves_itself(varied)


def test_the_times_of_a_varied_two_way_table_fit_sizes_that_were_not_sampled():
    """The guess alone, in plain arithmetic: what Z3 makes of it for every size takes longer."""
    family = TWO_WAY[0].family
    guess = fit(family, [sample(family, *size) for size in (*sampled_sizes(family), (12, 24))])
    assert isinstance(guess, Guess)
    check_waits(guess, sample(family, 14, 28))


def check_waits(guess: Guess, one: Sample) -> None:
    def start(compute: Compute) -> int:
        form = guess.times[compute.kind, compute.row, compute.number]
        return form.at({**dict(compute.values), "i": compute.iteration})

    for earlier, later in one.waits:
        assert start(later) >= (start(earlier) + earlier.duration if earlier else 0)


def test_a_table_without_affine_times_is_unknown():
    """What is correct is never refuted; the last guess that failed is shown."""
    reasons = {
        "deadlock": "no affine times found",
        "makespan": "rests on deadlock",
        "makespan at use": "no affine times found",
    }
    for name, reason in reasons.items():
        result = prove(SHALLOW, name, {"totals", "queue", "messages", "order"})
        assert isinstance(result.verdict, Unknown)
        assert reason in result.reason
    assert prove(SHALLOW, "deadlock", {"totals"}).counterexample is not None
    assert prove(SHALLOW, "makespan at use", {*THEOREMS}).counterexample is not None
    assert isinstance(prove(SHALLOW, "messages", {"totals"}).verdict, Proved)


@pytest.mark.parametrize(
    ("limit", "value", "reason"),
    [("_LARGEST", 1, "none fit"), ("_SECONDS", 0.0, "the integer program gave up: Time limit reached")],
)
def test_an_integer_program_without_a_solution_is_unknown_with_its_reason(monkeypatch, limit, value, reason):
    monkeypatch.setattr(finder, limit, value)
    result = prove(one_f_one_b(), "deadlock", {"totals"})
    assert isinstance(result.verdict, Unknown)
    assert result.reason.startswith(f"no affine times for 15 sizes up to 5 ranks and 9 microbatches: {reason}")


def test_a_w_that_no_size_has_leaves_the_times_unknown():
    empty = zb1p(vary(ZB1P, Row("3 last", 1, "F0 SF0 W RB0 B0 SB0")))
    result = prove(empty, "deadlock", {"totals"})
    assert isinstance(result.verdict, Unknown)
    assert "has no schedule for 1 rank and 1 microbatch" in result.reason


@pytest.mark.parametrize("name", ["1f1b", "zb1p"])
@pytest.mark.parametrize("waiting", Waiting)
def test_a_start_that_is_one_too_early_fails_to_be_proved(name, waiting):
    """In whichever row: each is waited for by another one, or waits for another one."""
    family = FAMILIES[name]
    guess = timetable(family, QUESTION_SECONDS, waiting).guess
    for key, start in guess.times.items():
        failures = discharge(waits(family, {**guess.times, key: start - 1}, waiting), QUESTION_SECONDS).failures
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
    found = timetable(one_f_one_b(), QUESTION_SECONDS)
    assert isinstance(found, Timetable)
    assert len(found.slack) > 2
    assert found.guess.bound == timetable(FAMILIES["1f1b"], QUESTION_SECONDS).guess.bound


def test_a_size_that_is_too_large_is_not_sampled(monkeypatch):
    """Nor is one where the guess was to fit, which would come back forever."""
    monkeypatch.setattr(finder, "sampled_sizes", lambda family: iter([(1, 1)]))
    monkeypatch.setattr(finder, "_MOST", 1)
    found = timetable(one_f_one_b(), QUESTION_SECONDS)
    assert isinstance(found, Untimed)
    assert found.reason.endswith("the guess after 1 sampled sizes fails")
    assert found.proof.failures[0].values is not None


@pytest.mark.parametrize("name", BY_NAME)
@pytest.mark.parametrize("waiting", Waiting)
def test_the_waits_and_the_makespan_of_a_sample_are_right(name, waiting):
    """Times that Z3 proved fit the waits, and the longest path of waits is what a simulation takes."""
    family = FAMILIES[name]
    one = sample(family, 6, 14, waiting)
    check_waits(timetable(family, QUESTION_SECONDS, waiting).guess, one)
    blocking = waiting is Waiting.BLOCKING
    assert one.makespan == simulate(schedule_at(family, 6, 14), blocking=blocking).makespan


def test_a_cycle_of_waits_is_found_in_the_sample_and_named():
    crossed = dualpipe(middle=vary(MIDDLE, Row("4 first", 1, "F0 SF1 RB1 RB0 B1+W1 SF0 SB1 RF1")))
    found = timetable(crossed, QUESTION_SECONDS)
    assert isinstance(found, Untimed)
    assert found.deadlocked is not None
    assert "of rank 0, iteration 0, waits for" in found.reason
    result = prove(crossed, "deadlock", {"totals"})
    assert isinstance(result.verdict, Refuted)
    assert (result.counterexample.ranks, result.counterexample.microbatches) == (2, 4)


def test_a_bound_is_written_in_ranks_and_microbatches():
    two, one = FAMILIES["dualpipe"], FAMILIES["1f1b"]
    assert two.in_words(6 * H + 2 * N - 2) == "3M + P - 2"
    assert two.in_words(6 * H + N - 1) == "3M + P/2 - 1"
    assert two.in_words(2 * H - 3 * N) == "M - 3P/2"
    assert one.in_words(3 * M + 1) == "3M + 1"
    assert one.in_words(-M + 2 * P) == "-M + 2P"
    assert one.in_words(Affine({})) == "0"
