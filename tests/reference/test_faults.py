"""A faulty schedule ends with an error that names what each rank waits for, or the op that cannot run."""

import random

import pytest
import torch
from torch import nn

from dualpipe.schedule import MESSAGES, RB, RF, UP, Op, Schedule
from dualpipe.schedule.generate import generate
from dualpipe.schedule.text import dumps, loads
from reference.data import Batch
from reference.fault import Awaited, Deadlock, Misstep, Waiting
from tests.reference.trials import SGD, Trial, change_slot, decoder, matches, toy, with_program, without

#   rank 0   0F0> 0SF0>                   0RB0> 0B0>+0W0>
#   rank 1             1RF0> 1F0> 1B0>+1W0> 1SB0>
SOUND = """
lane > 0 1
rank 0: 0F0> 0SF0> 0RB0> 0B0>+0W0>
rank 1: 1RF0> 1F0> 1B0>+1W0> 1SB0>
"""


def run(text, **options):
    trial = decoder(loads(SOUND), steps=1)
    return trial.run(loads(text), **options)


def test_the_correct_schedule_runs():
    schedule = loads(SOUND)
    assert matches(schedule, decoder(schedule, steps=1).truth(), run(SOUND, blocking=True))


@pytest.mark.parametrize("blocking", [False, True])
def test_a_missing_send_ends_at_once_and_names_what_each_rank_waits_for(blocking):
    with pytest.raises(Deadlock) as stuck:
        run(SOUND.replace("1B0>+1W0> 1SB0>", "1B0>+1W0>"), blocking=blocking)
    # 0SF0> is matched, 0RB0> never is; in both models rank 0 stops here
    slot, op = (2, Op(RB, UP, 0, 0)) if blocking else (3, loads(SOUND).programs[0][3][0])
    assert stuck.value.waiting == (Waiting(0, slot, op, (Awaited(2, Op(RB, UP, 0, 0), 1),)),)
    assert f"rank 0, at {op} of slot {slot}, waits for 0RB0> from rank 1" in str(stuck.value)


def test_a_send_without_a_receiver_blocks_its_rank_at_its_end():
    with pytest.raises(Deadlock) as stuck:
        run("lane > 0 1\nrank 0: 0F0> 0SF0>\nrank 1:")
    assert str(stuck.value.waiting[0]) == "rank 0, at its end, waits for 0SF0> to rank 1"


CROSSED = """
lane > 0 1
rank 0: 0F0> 0F1> 0SF0> 0SF1> 0RB0> 0B0>+0W0> 0RB1> 0B1>+0W1>
rank 1: 1RF0> 1F0> 1B0>+1W0> 1SB0> 1RF1> 1F1> 1B1>+1W1> 1SB1>
"""


def test_a_schedule_may_hang_when_blocking_and_run_otherwise():
    #   rank 0  SF0 SF1      rank 0 does not reach RB0 until rank 1 has received SF1,
    #   rank 1  SB0 RF1      and rank 1 does not reach RF1 until rank 0 has received SB0
    schedule = loads(CROSSED)
    trial = decoder(schedule, steps=1)
    assert matches(schedule, trial.truth(), trial.run(schedule))
    with pytest.raises(Deadlock) as stuck:
        trial.run(schedule, blocking=True)
    assert [str(waiting) for waiting in stuck.value.waiting] == [
        "rank 0, at 0SF1> of slot 3, waits for 0SF1> to rank 1",
        "rank 1, at 1SB0> of slot 3, waits for 1SB0> to rank 0",
    ]


MISSTEPS = {
    "W before its B": ("0B0>+0W0>", "0W0>+0B0>", 0, 3, "0B0> has not been run"),
    "W from nothing": ("rank 0: 0F0>", "rank 0: 0W0> 0F0>", 0, 0, "0B0> has not been run"),
    "B before its F": ("1F0> 1B0>+1W0>", "1B0> 1F0> 1W0>", 1, 1, "1F0> has not been run"),
    "B before the receive of its gradient": ("0RB0> 0B0>+0W0>", "0B0> 0RB0> 0W0>", 0, 2, "0RB0> has not been posted"),
    "F before the receive of its input": ("1RF0> 1F0>", "1F0> 1RF0>", 1, 0, "1RF0> has not been posted"),
    "F without any receive": ("1RF0> 1F0>", "1F0>", 1, 0, "1RF0> has not been posted"),
    "a send before its F": ("0F0> 0SF0>", "0SF0> 0F0>", 0, 0, "0F0> has not been run"),
    "a gradient sent before its B": ("1B0>+1W0> 1SB0>", "1SB0> 1B0>+1W0>", 1, 2, "1B0> has not been run"),
    "F twice": ("rank 0: 0F0>", "rank 0: 0F0>+0F0>", 0, 0, "it has run already"),
    "B twice": ("1B0>+1W0>", "1B0>+1B0>+1W0>", 1, 2, "it has run already"),
    "another rank's stage": ("rank 0: 0F0>", "rank 0: 1F0>", 0, 0, "rank 1 holds it"),
    "another rank's message": ("rank 0: 0F0>", "rank 0: 1RF0>", 0, 0, "rank 1 holds it"),
    "a microbatch that is not in the data": ("rank 0: 0F0>", "rank 0: 0F7>", 0, 0, "lane > has 1"),
    "a message to oneself": ("0SF0>", "0SF0>@0", 0, 1, "its peer is rank 0 of 2"),
    "a message to a rank that does not exist": ("0SF0>", "0SF0>@9", 0, 1, "its peer is rank 9 of 2"),
    "a send beyond the end": ("1SB0>", "1SF0>", 1, 3, "the lane ends here"),
    "a named send beyond the end": ("1SB0>", "1SF0>@0", 1, 3, "the lane ends here"),
    "a receive before the beginning": ("0RB0>", "0RF0>", 0, 2, "the lane ends here"),
    "a named receive before the beginning": ("0RB0>", "0RF0>@1", 0, 2, "the lane ends here"),
    "a named receive beyond the end": ("1RF0>", "1RB0>@0", 1, 0, "the lane ends here"),
    "a gradient that no stage has": ("0B0>+0W0>", "0B0>+0W0> 0SB0>@1", 0, 4, "the lane ends here"),
}


@pytest.mark.parametrize("fault", MISSTEPS)
@pytest.mark.parametrize("blocking", [False, True])
def test_an_op_that_cannot_run_is_named_with_its_rank_and_slot(fault, blocking):
    old, new, rank, slot, got = MISSTEPS[fault]
    assert old in SOUND
    with pytest.raises(Misstep) as wrong:
        run(SOUND.replace(old, new), blocking=blocking)
    assert (wrong.value.rank, wrong.value.slot) == (rank, slot)
    assert wrong.value.op in [op for part in loads(SOUND.replace(old, new)).programs[rank] for op in part]
    assert f"rank {rank}, slot {slot}, {wrong.value.op}: " in str(wrong.value)
    assert got in str(wrong.value)


def test_a_message_to_the_wrong_rank_blocks_the_right_one():
    schedule = generate("1f1b", 3, 3)
    number = next(n for n, slot in enumerate(schedule.programs[0]) if slot[0].kind in MESSAGES)
    (send,) = schedule.programs[0][number]
    spoiled = change_slot(schedule, 0, number, (send._replace(peer=2),))
    with pytest.raises(Deadlock) as stuck:
        toy(schedule).run(spoiled)
    story = {waiting.rank: waiting for waiting in stuck.value.waiting}
    assert Awaited(number, send._replace(peer=2), 2) in story[0].awaited or story[0].slot < len(schedule.programs[0])
    assert any(awaited.peer == 0 for awaited in story[1].awaited)


def test_a_message_of_another_shape_than_its_receiver_expects_is_rejected():
    # stage 1 widens its input, so its input and its output differ in shape
    schedule = loads("""
        lane > 0 1 2
        rank 0: 0F0> 0SF0> 0RB0> 0B0>+0W0>
        rank 1: 1RF0> 1F0> 1SF0> 1RB0> 1B0>+1W0> 1SB0>@2
        rank 2: 2RF0> 2F0> 2B0>+2W0> 2SB0>@1 2RF0>@1
    """)
    stages = [nn.Linear(4, 4), nn.Linear(4, 8), nn.Linear(8, 4)]
    trial = Trial(stages, [[[Batch(torch.ones(2, 4), torch.ones(2, 4))]]], nn.functional.mse_loss, SGD)
    with pytest.raises(
        Misstep, match=r"expects float32 \[2, 8\], and 1SB0>@2 of rank 1, slot 5, sends float32 \[2, 4\]"
    ):
        trial.run(schedule)


def test_a_message_posted_twice_at_both_ends_is_harmless():
    doubled = SOUND.replace("0SF0>", "0SF0>+0SF0>").replace("1RF0>", "1RF0> 1RF0>")
    schedule = loads(SOUND)
    assert matches(schedule, decoder(schedule, steps=1).truth(), run(doubled))


def test_a_real_schedule_needs_each_of_its_receives():
    schedule = generate("dualpipe", 2, 4)
    trial = toy(schedule)
    for placed in schedule:
        if placed.op.kind in (RF, RB):
            with pytest.raises((Deadlock, Misstep)):
                trial.run(without(schedule, placed.op))


def spoil(schedule: Schedule, chance: random.Random) -> Schedule:
    """One random change: slots or ops are reordered, or an op is dropped, duplicated or misdirected."""
    rank = chance.randrange(schedule.ranks)
    program = list(schedule.programs[rank])
    a, b = chance.randrange(len(program)), chance.randrange(len(program))
    slot = program[a]
    match chance.randrange(6):
        case 0:
            program[a], program[b] = program[b], program[a]
        case 1:
            program.insert(b, program.pop(a))
        case 2:
            program[a] = tuple(chance.sample(slot, len(slot)))
        case 3:
            program[a] = tuple(chance.sample(slot, len(slot) - 1))
        case 4:
            program[a] = (*slot, chance.choice(slot))
        case _ if slot[0].kind in MESSAGES:
            program[a] = tuple(op._replace(peer=chance.randrange(schedule.ranks + 1)) for op in slot)
    return with_program(schedule, rank, program)


@pytest.mark.parametrize("name", ["dualpipe", "dualpipev", "zb1p"])
def test_every_random_change_has_one_outcome_whatever_the_seed(name):
    # ... and a schedule that finishes with blocking messages finishes without, with the same bits.
    sound = generate(name, 2, 4)
    trial = toy(sound)
    truth = trial.truth()
    chance = random.Random(name)
    outcomes = {"equal": 0, "different": 0, Deadlock: 0, Misstep: 0}

    def outcome(schedule, **options):
        try:
            found = trial.run(schedule, **options)
        except (Deadlock, Misstep) as error:
            return type(error)
        return "equal" if matches(sound, truth, found) else "different"

    for _ in range(40):
        spoiled = spoil(spoil(sound, chance) if chance.random() < 0.3 else sound, chance)
        found = outcome(spoiled)
        outcomes[found] += 1
        assert outcome(spoiled, seed=chance.random()) == found, dumps(spoiled)
        blocked = outcome(spoiled, blocking=True)
        if blocked in ("equal", "different"):
            assert blocked == found, dumps(spoiled)
    assert all(outcomes.values()), outcomes
