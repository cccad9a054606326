"""The experiment of docs/explanation/soundness.md on a small sample, and faults that it must find."""

from dataclasses import replace
from functools import cache, partial
from itertools import pairwise
from random import Random

import pytest

from dualpipe.schedule import SENDS, F, Kind, Op
from dualpipe.schedule.generate import generate
from proofs import search, smt
from proofs.models import eager
from proofs.prove import prove
from proofs.verdict import Proved, Refuted
from tests.mutations import drop, split_all
from tests.soundness.claims import CLAIMS, Observation, commutes, contradictions, defer_receives, observe
from tests.soundness.experiment import broken_claims, describe, sample, tables
from tests.soundness.mutants import Mutant, backwards_out_of_turn, mutants, named
from tests.soundness.runs import Ending, Outcome, on_fakes, on_processes

COUNT = 40


@cache
def observed() -> tuple[Observation, ...]:
    small = (mutant for mutant in mutants(4 * COUNT, seed=5) if mutant.schedule.stages < 6)
    return tuple(observe(mutant) for mutant, _ in zip(small, range(COUNT), strict=False))


def mutant(schedule, fault="planted"):
    return Mutant(0, "by hand", (fault,), schedule)


def test_no_run_contradicts_a_verdict():
    assert [describe(*broken) for broken in broken_claims(observed())] == []


def test_every_claim_about_fake_ranks_applies_to_some_schedule():
    unused = [claim.text for claim in CLAIMS if not any(map(claim.applies, observed()))]
    assert [text for text in unused if not text.startswith("processes")] == []


def test_every_ending_occurs():
    assert {run.ending for o in observed() for run in o.fakes.values()} == {
        Ending.EQUAL,
        Ending.DIFFERENT,
        Ending.HUNG,
        Ending.REFUSED,
    }


def test_mutants_differ_from_each_other_and_from_the_named_schedules():
    found = [mutant.schedule.programs for mutant in mutants(100, seed=1)]
    assert len({*found, *(schedule.programs for _, schedule in named())}) == 100 + len(list(named()))


def test_mutants_repeat_for_a_seed():
    assert mutants(20, seed=3) == mutants(20, seed=3) != mutants(20, seed=4)


# A prover that is wrong.


def always(verdict):
    """A prover that gives every check the same verdict."""

    def lie(schedule, **options):
        report = prove(schedule, **options)
        checks = {
            name: replace(
                result, verdict=verdict, models={m: replace(r, verdict=verdict) for m, r in result.models.items()}
            )
            for name, result in report.checks.items()
        }
        return replace(report, checks=checks)

    return lie


def blind(monkeypatch, check):
    """Break both methods of one check."""
    for module in (search, smt):
        monkeypatch.setattr(module, check, partial(_find_nothing, getattr(module, check)))


def _find_nothing(original, schedule):
    return original(generate("1f1b", 2, 2))


def test_a_prover_that_always_says_proved_is_caught():
    faulty = mutant(drop(generate("1f1b", 2, 4), 0, 0, 0))
    assert CLAIMS[0] in contradictions(observe(faulty, always(Proved())))


def test_a_prover_that_always_says_refuted_is_caught():
    assert contradictions(observe(mutant(generate("1f1b", 2, 4)), always(Refuted(None))))


@pytest.mark.parametrize("check", ["complete", "order", "messages", "accumulation"])
def test_a_check_that_finds_nothing_is_caught(check, monkeypatch):
    only = [
        o.mutant
        for o in observed()
        if [c for c in ("complete", "order", "messages", "deadlock", "accumulation") if o.refuted(c)] == [check]
        and not o.repeats
        and not (check == "accumulation" and commutes(o.mutant.schedule))
    ]
    assert only, f"no mutant for which {check} alone is refuted"
    blind(monkeypatch, check)
    assert CLAIMS[0] in contradictions(observe(only[0]))


# Runs that are wrong.


@pytest.mark.parametrize(
    "ending", [Ending.DIFFERENT, Ending.HUNG, Ending.REFUSED, Ending.BROKEN], ids=lambda ending: ending.value
)
def test_a_proved_schedule_whose_run_is_not_equal_is_caught(ending):
    sound = next(o for o in observed() if CLAIMS[0].applies(o))
    assert contradictions(sound) == []
    for blocking in (False, True):
        assert CLAIMS[0] in contradictions(replace(sound, fakes={**sound.fakes, blocking: Outcome(ending)}))


def test_processes_that_end_differently_than_fake_ranks_are_caught():
    sound = next(o for o in observed() if CLAIMS[0].applies(o))
    assert contradictions(replace(sound, processes={True: Outcome(Ending.DIFFERENT)}))
    stuck = next(o for o in observed() if o.fakes[True].ending is Ending.HUNG)
    assert contradictions(replace(stuck, processes={True: Outcome(Ending.EQUAL)}))


# Findings of the experiment.


def test_backwards_out_of_turn_change_bits_although_every_w_is_in_order():
    """B adds the gradients of norms and embeddings, so `accumulation` has to look at B as well as at W."""
    odd = next(
        changed
        for seed in range(50)
        if (changed := backwards_out_of_turn(generate("zb1p", 4, 6), Random(seed))) and not commutes(changed)
    )
    seen = observe(mutant(odd))
    assert seen.refutes_only_accumulation
    assert {run.ending for run in seen.fakes.values()} == {Ending.DIFFERENT}


def test_a_repeated_message_is_refuted_and_harmless_on_fake_ranks():
    repeated = next(o for o in observed() if o.repeats and not o.refuted("complete", "order", "accumulation"))
    assert {run.ending for run in repeated.fakes.values()} == {Ending.EQUAL}


# The model for runs that do not block.


def test_sends_before_receives_hang_only_where_they_block():
    sends_first = split_all(generate("dualpipe", 2, 4), lambda op: op.kind not in SENDS)
    seen = observe(mutant(sends_first))
    assert seen.refuted("deadlock, blocking")
    assert seen.proved("deadlock, ahead")
    assert seen.fakes == {False: Outcome(Ending.EQUAL), True: Outcome(Ending.HUNG)}


def test_a_receive_is_deferred_to_the_compute_that_needs_it():
    later = defer_receives(generate("1f1b", 2, 2))
    for rank, program in enumerate(later.programs):
        ops = [op for slot in program for op in slot]
        assert sorted(map(str, ops)) == sorted(str(p.op) for p in generate("1f1b", 2, 2) if p.rank == rank)
        for before, op in pairwise(ops):
            if before.kind is Kind.RF:
                assert op == Op(F, before.lane, before.stage, before.mb)


def test_named_schedules_with_deferred_receives_are_free_of_deadlock():
    for _, schedule in named():
        report = prove(defer_receives(schedule), models=(eager(1000),), smt=False)
        assert report.checks["deadlock"].verdict == Proved()


# Processes.


def test_processes_and_fake_ranks_agree_on_a_correct_and_on_a_hanging_schedule():
    sound = generate("dualpipe", 2, 4)
    assert on_processes(sound, blocking=True) == on_fakes(sound, blocking=True) == Outcome(Ending.EQUAL)
    stuck = split_all(sound, lambda op: op.kind not in SENDS)
    assert on_processes(stuck, blocking=False).ending is Ending.EQUAL
    assert on_processes(stuck, blocking=True).ending is Ending.FAILED


def test_the_sample_for_processes_has_the_rare_endings():
    chosen = sample(observed(), 20, seed=0)
    assert len(chosen) == 20
    assert {o.fakes[True].ending for o in chosen} >= {Ending.EQUAL, Ending.DIFFERENT, Ending.HUNG, Ending.REFUSED}


def test_the_tables_count_every_schedule():
    printed = tables(observed(), ())
    rows = [line.split(" | ") for line in printed.split("\n\n")[1].splitlines()[2:]]
    assert sum(int(row[1]) for row in rows) == COUNT
