"""The compiled program of a rank, held against the schedule: it gives the same file, and reads what the ops need."""

from __future__ import annotations

import pytest

from dualpipe.runtime.echoes import find_echoes
from dualpipe.runtime.program import Program, compile_program
from dualpipe.schedule import RB, RF, SB, SF, UP, B, F, Op, Schedule, W
from dualpipe.schedule.generate import generate
from dualpipe.schedule.text import dumps, loads
from tests.production.cases import rewrite, without

SCHEDULES = [
    generate(name, ranks, microbatches)
    for name, ranks, microbatches in (
        ("dualpipe", 4, 10),
        ("dualpipe-late-tail", 6, 14),
        ("dualpipev", 3, 7),
        ("zbv", 4, 8),
        ("interleaved", 2, 6),
        ("zb1p", 3, 6),
        ("1f1b", 1, 3),
    )
]


def named(schedule: Schedule) -> str:
    return f"{schedule.name}-{schedule.ranks}"


def compiled(schedule: Schedule, forward_only: bool = False) -> list[Program]:
    return [compile_program(schedule, rank, forward_only) for rank in range(schedule.ranks)]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=named)
def test_a_compiled_program_printed_back_is_the_same_file(schedule):
    slots = [program.slots for program in compiled(schedule)]
    assert dumps(Schedule(schedule.routes, slots, schedule.name)) == dumps(schedule)
    forwards = schedule.only(frozenset({F, SF, RF}))
    slots = [program.slots for program in compiled(schedule, forward_only=True)]
    assert dumps(Schedule(schedule.routes, slots, schedule.name)) == dumps(forwards)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=named)
def test_every_register_is_written_by_what_its_reader_needs_and_read_once(schedule):
    for program in compiled(schedule):
        held: dict[int, Op] = {}
        for step in program.steps:
            assert not step.fault
            reads, writes = [], []
            for post in step.posts:
                assert post.peer == schedule.peer(post.op)
                assert post.label == str(post.op)
                if post.sends:
                    (need,) = schedule.needs(post.op)
                    assert post.producer == need
                    reads.append((post.register, need))
                else:
                    writes.append((post.register, post.op))
            if step.kind in (F, B):
                outside = [need for need in schedule.needs(step.op) if need.task != step.task or need.kind in (RF, RB)]
                assert (step.source >= 0) == bool(outside)
                reads += [(step.source, need) for need in outside]
                assert step.received == any(need.kind in (RF, RB) for need in outside)
                if step.kind is F:
                    writes.append((step.live, step.op))
                else:
                    reads.append((step.live, Op(F, *step.task)))
                if step.target >= 0:
                    writes.append((step.target, step.op))
                assert (step.target < 0) == (
                    schedule.is_last(step.op) if step.kind is F else schedule.is_first(step.op)
                )
                assert step.last == schedule.is_last(step.op)
            for register, need in reads:
                assert held.pop(register) == need
            for register, op in writes:
                assert register not in held
                held[register] = op
        assert not held
        assert not program.left


@pytest.mark.parametrize("schedule", SCHEDULES, ids=named)
def test_an_echo_was_posted_after_the_compute_that_needed_what_it_echoes(schedule):
    """By the ranks' own orders; and each send is echoed at most once."""
    at = {(rank, op): n for rank, slots in enumerate(schedule.programs) for n, slot in enumerate(slots) for op in slot}
    for rank in range(schedule.ranks):
        echoed = []
        for receive, producers in find_echoes(schedule, rank).items():
            answer = next(need for need in schedule.needs(receive))
            peer = schedule.rank_of(answer)
            for producer in producers:
                stage = producer.stage + (1 if producer.kind is F else -1)
                user = Op(producer.kind, producer.lane, stage, producer.mb)
                assert schedule.rank_of(user) == peer
                assert at[peer, user] < at[peer, answer]
                echoed.append(producer)
        assert len(echoed) == len(set(echoed))


def test_sends_without_an_echo_are_as_many_for_a_long_step_as_for_a_short_one():
    def unechoed(microbatches: int) -> list[int]:
        schedule = generate("dualpipe", 4, microbatches)
        echoes = [sum(map(len, find_echoes(schedule, rank).values())) for rank in range(4)]
        sends = [sum(op.kind in (SF, SB) for slot in program for op in slot) for program in schedule.programs]
        return [sent - known for sent, known in zip(sends, echoes, strict=True)]

    assert unechoed(8) == unechoed(64)
    assert max(unechoed(64)) <= 8


ONE, TWO = generate("zb1p", 2, 3), generate("zb1p", 1, 2)

FAULTS = {
    "an F twice": (
        rewrite(TWO, 0, lambda slot: [slot, slot] if slot == (Op(F, UP, 0, 1),) else [slot]),
        "0F1> has run",
    ),
    "a B without its F": (without(TWO, 0, Op(F, UP, 0, 1)), "its F has not run, or 0B1> already has"),
    "a receive left out": (without(ONE, 0, Op(RB, UP, 0, 1)), "it needs 0RB1>, which has not been posted"),
    "a send of nothing": (without(ONE, 0, Op(F, UP, 0, 2)), "0SF2> needs 0F2>, which has not run or was used already"),
    "a receive twice": (
        rewrite(ONE, 0, lambda slot: [slot, (Op(RB, UP, 0, 0),)] if Op(RB, UP, 0, 0) in slot else [slot]),
        "0RB0> has been posted already",
    ),
    "a message to itself": (
        rewrite(ONE, 0, lambda slot: [tuple(op._replace(peer=0) if op.kind is SF else op for op in slot)]),
        "has no other rank to go to: its peer would be 0",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_op_that_cannot_run_has_the_reason(fault):
    schedule, text = FAULTS[fault]
    first = next(step for step in compile_program(schedule, 0).steps if step.fault)
    assert text in first.fault


def test_what_no_op_uses_is_listed():
    left = compile_program(without(ONE, 0, Op(SF, UP, 0, 2)), 0).left
    assert "the output of 0F2> was not used" in left
    whole = loads("schedule s\nlane > 0 1\nrank 0: 0F0> 0SF0> 0RB0>\nrank 1: 1RF0> 1F0> 1B0>+1W0> 1SB0>\n")
    assert compile_program(whole, 0).left == ("what 0RB0> receives was not used", "0F0> has no backward")
    weights = [step for step in compile_program(whole, 1).steps if step.kind is W]
    assert [step.full for step in weights] == [True]
    assert not any(step.full for step in compile_program(TWO, 0).steps if step.kind is B and step.op.mb)
