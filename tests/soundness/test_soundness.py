"""The experiment of docs/explanation/soundness.md on a small sample, and faults that it must find."""

from dataclasses import replace
from functools import cache, partial
from random import Random

import pytest

from dualpipe.schedule import SENDS
from dualpipe.schedule.generate import generate
from proofs import search, smt
from proofs.models import STREAM, parse_models
from proofs.prove import prove
from proofs.verdict import Proved, Refuted
from tests.mutations import drop, split_all
from tests.soundness.claims import CLAIMS, PROCESSES, Observation, commutes, contradictions, observe
from tests.soundness.experiment import broken_claims, describe, sample, tables
from tests.soundness.mutants import Mutant, backwards_out_of_turn, mutants, named
from tests.soundness.runs import QUEUES, Ending, Outcome, on_processes

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
    for mode in ("blocking", "edge"):
        assert CLAIMS[0] in contradictions(replace(sound, fakes={**sound.fakes, mode: Outcome(ending)}))


def test_processes_that_end_differently_than_fake_ranks_are_caught():
    sound = next(o for o in observed() if CLAIMS[0].applies(o))
    assert contradictions(replace(sound, processes={"blocking": Outcome(Ending.DIFFERENT)}))
    stuck = next(o for o in observed() if o.fakes["blocking"].ending is Ending.HUNG)
    assert contradictions(replace(stuck, processes={"blocking": Outcome(Ending.EQUAL)}))


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


def sends_first():
    """Every rank posts its sends before its receives, each message by itself."""
    return split_all(generate("dualpipe", 2, 4), lambda op: op.kind not in SENDS)


def receives_first():
    return split_all(generate("dualpipe", 2, 4), lambda op: op.kind in SENDS)


def test_sends_before_receives_hang_only_where_they_block():
    seen = observe(mutant(sends_first()))
    assert seen.refuted("deadlock, blocking")
    assert seen.proved("deadlock, edge")
    assert seen.fakes == {"edge": Outcome(Ending.EQUAL), "blocking": Outcome(Ending.HUNG)}


# Processes.


FACING = split_all(generate("1f1b", 2, 4), lambda op: op.kind not in SENDS)
"""Both ranks send before they receive, one message at most: room for it in a buffer helps."""


def agrees(schedule, run, word):
    """Whether the verdict under a run's model is this one, and the run on processes ends as it says."""
    verdict = prove(schedule, models=parse_models(PROCESSES[run]), smt=False).checks["deadlock"].verdict.word
    return verdict == word and on_processes(schedule, run).ending is ENDS[word]


ENDS = {"proved": Ending.EQUAL, "refuted": Ending.FAILED}


@pytest.mark.parametrize(("run", "word"), list(zip(QUEUES, ("proved", "refuted", "proved"), strict=True)))
def test_ranks_that_face_each_other_hang_on_the_transport_of_a_model_exactly_if_it_has_a_deadlock(run, word):
    assert agrees(FACING, run, word)


@pytest.mark.long
@pytest.mark.parametrize("run", PROCESSES)
def test_processes_end_exactly_as_the_model_of_their_transport_says(run):
    """In one slot nothing waits; receives first, only computes that go on help."""
    assert agrees(generate("dualpipe", 2, 4), run, "proved")
    assert agrees(receives_first(), run, "proved" if PROCESSES[run] == "edge" else "refuted")


def test_a_transport_that_waits_for_more_than_its_model_is_caught(monkeypatch):
    """One queue for all messages, under the name of edge."""
    monkeypatch.setitem(QUEUES, "edge on queues", STREAM)
    ran = {"edge on queues": on_processes(sends_first(), "edge on queues")}
    assert ran == {"edge on queues": Outcome(Ending.FAILED, ran["edge on queues"].what)}
    assert contradictions(replace(observe(mutant(sends_first())), processes=ran))


def test_the_sample_for_processes_has_the_rare_endings():
    chosen = sample(observed(), 20, seed=0)
    assert len(chosen) == 20
    assert {o.fakes["blocking"].ending for o in chosen} >= {Ending.EQUAL, Ending.DIFFERENT, Ending.HUNG, Ending.REFUSED}


def test_the_tables_count_every_schedule():
    printed = tables(observed(), ())
    rows = [line.split(" | ") for line in printed.split("\n\n")[1].splitlines()[2:]]
    assert sum(int(row[1]) for row in rows) == COUNT
