"""Our DualPipe is what DeepSeek's ``step()`` issues: op by op and batch by batch, in posting order, with its peers."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from dualpipe.generate import PLANS, dualpipe
from dualpipe.schedule import MESSAGES, Schedule, show_slot
from dualpipe.table import Row, expand, vary
from tests.schedule import upstream

RECORDER = Path(__file__).parent / "deepseek_recorder.py"
SIZES = [(ranks, microbatches) for ranks in range(2, 17, 2) for microbatches in range(2 * ranks, 2 * ranks + 17, 2)]

Size = tuple[int, int]
Text = tuple[str, ...]


@pytest.fixture(scope="module")
def recorded() -> dict[Size, Text]:
    """For every size the slots of each rank, as their code issues them."""
    try:
        folder = upstream.folder()
    except upstream.Unreachable as reason:
        pytest.skip(f"{reason}; with it: our order equals that of DeepSeek's step() at {len(SIZES)} sizes")
    result = subprocess.run(
        [sys.executable, str(RECORDER), *(f"{ranks}:{microbatches}" for ranks, microbatches in SIZES)],
        env={**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr.splitlines()[-1] == f"from {folder.resolve() / 'dualpipe'}"
    programs: dict[Size, list[str]] = {}
    for line in result.stdout.splitlines():
        place, _, slots = line.partition(": ")
        ranks, microbatches, rank = map(int, place.split())
        programs.setdefault((ranks, microbatches), []).append(slots)
        assert len(programs[ranks, microbatches]) == rank + 1
    return {size: tuple(slots) for size, slots in programs.items()}


def text(schedule: Schedule) -> Text:
    """The slots of each rank, every message with its peer."""
    return tuple(
        " ".join(
            show_slot(tuple(op._replace(peer=schedule.peer(op)) if op.kind in MESSAGES else op for op in slot))
            for slot in program
        )
        for program in schedule.programs
    )


def test_every_size_is_recorded(recorded):
    assert list(recorded) == SIZES
    assert len(SIZES) == 72
    assert all(len(programs) == ranks for (ranks, _), programs in recorded.items())


@pytest.mark.parametrize("ranks", range(2, 17, 2))
def test_order_is_that_of_deepseek(recorded, ranks):
    for size in SIZES:
        if size[0] == ranks:
            assert text(dualpipe(*size)) == recorded[size], size


def swap_messages(schedule: Schedule, rank: int) -> Schedule:
    """The first batch of two or more messages of a rank, with the first two the other way round."""
    program = list(schedule.programs[rank])
    number = next(number for number, slot in enumerate(program) if len(slot) > 1 and slot[0].kind in MESSAGES)
    first, second, *rest = program[number]
    program[number] = (second, first, *rest)
    programs = list(schedule.programs)
    programs[rank] = tuple(program)
    return replace(schedule, programs=tuple(programs))


@pytest.mark.parametrize("rank", range(4))
def test_two_messages_swapped_in_one_batch_are_another_order(recorded, rank):
    assert text(swap_messages(dualpipe(4, 8), rank)) != recorded[4, 8]


def test_a_message_to_another_peer_is_another_order(recorded):
    schedule = dualpipe(4, 8)
    (compute, message, *rest) = schedule.programs[0]
    redirected = (compute, tuple(op._replace(peer=3) for op in message), *rest)
    assert text(replace(schedule, programs=(redirected, *schedule.programs[1:]))) != recorded[4, 8]


FAULTS = {
    "a W too early": Row("7 cool down", PLANS["dualpipe"](8, 16, 0).table[-2].count, "RB0 B0 W SB0"),
    "two sends of the main phase swapped": Row(
        "4 overlapped",
        next(row.count for row in PLANS["dualpipe"](8, 16, 0).table if row.name == "4 overlapped"),
        "RF0 RB1 F0+B1+W1 SB1 SF0 RF1 RB0 F1+B0+W0 SF1 SB0",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_table_is_another_order(recorded, fault):
    plan = PLANS["dualpipe"](8, 18, 1)
    faulty = expand(vary(plan.table, FAULTS[fault]), plan.sizes, plan.chunks, plan.routes)
    schedule = dualpipe(8, 18)
    mutant = replace(schedule, programs=(schedule.programs[0], faulty, *schedule.programs[2:]))
    assert text(mutant) != recorded[8, 18]
