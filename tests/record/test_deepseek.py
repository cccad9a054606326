"""A recording of DeepSeek's own package equals our DualPipe: op by op, slot by slot, with all peers."""

import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest

from dualpipe.record import Launch, Recording, assemble, read_folder, run
from dualpipe.schedule import MESSAGES, Schedule
from dualpipe.schedule.generate import PLANS, dualpipe
from dualpipe.schedule.phase_table import Row, expand, vary
from dualpipe.schedule.text import dumps, loads
from proofs.prove import prove
from tests.record import upstream
from tests.record.run import PROGRAMS, command, python

Size = tuple[int, int]
SIZES = [(ranks, 2 * ranks + more) for ranks in (2, 4, 6, 8, 10, 16) for more in (0, 2, 6, 16)]
"""Numbers of ranks whose half is even and odd, and numbers of microbatches whose half is."""


@pytest.fixture(scope="module")
def folder() -> Path:
    try:
        return upstream.folder()
    except upstream.Unreachable as reason:
        pytest.skip(f"{reason}; with it: our order equals that of DeepSeek's step() at {len(SIZES)} sizes")


def record(folder: Path, ranks: int, sizes: list[int]) -> list[Recording]:
    """Record one run of their package on ``ranks`` ranks, with a training step for each number of microbatches."""
    words = (sys.executable, str(PROGRAMS / "deepseek.py"), str(ranks), *map(str, sizes))
    with (
        tempfile.TemporaryDirectory() as scratch,
        mock.patch.dict("os.environ", PYTHONPATH=str(folder)),
        (Path(scratch) / "output").open("w+") as output,
    ):
        events = Path(scratch) / "events"
        events.mkdir()
        end = run(Launch(words, ranks, timeout=140.0), events, output.fileno())
        output.seek(0)
        assert end.succeeded, end.describe() + output.read()
        assert f"rank 0 runs {folder.resolve() / 'dualpipe'}" in Path(output.name).read_text()
        logs, _ = read_folder(events, ranks, 1)
        return [assemble(logs, "dualpipe", step) for step in range(1, len(sizes) + 1)]


def with_peers(schedule: Schedule) -> Schedule:
    """The schedule with the peer of every message written out, as in a recording."""
    programs = tuple(
        tuple(
            tuple(op._replace(peer=schedule.peer(op)) if op.kind in MESSAGES else op for op in slot) for slot in program
        )
        for program in schedule.programs
    )
    return replace(schedule, programs=programs)


@pytest.fixture(scope="module")
def recorded(folder) -> dict[Size, Schedule]:
    return {(4, m): r.schedule for m, r in zip((8, 10), record(folder, 4, [8, 10]), strict=True)}


@pytest.mark.parametrize("microbatches", [8, 10])
def test_the_order_is_deepseeks(recorded, microbatches):
    assert dumps(recorded[4, microbatches]) == dumps(with_peers(dualpipe(4, microbatches)))


@pytest.mark.long
@pytest.mark.parametrize("ranks", sorted({ranks for ranks, _ in SIZES}))
def test_the_order_is_deepseeks_at_every_size(folder, ranks):
    sizes = [microbatches for size, microbatches in SIZES if size == ranks]
    for microbatches, recording in zip(sizes, record(folder, ranks, sizes), strict=True):
        assert dumps(recording.schedule) == dumps(with_peers(dualpipe(ranks, microbatches)))


def test_the_recording_is_proved(recorded):
    assert prove(recorded[4, 8]).as_json()["verdict"] == "proved"


@pytest.mark.long
def test_a_program_that_launches_its_own_ranks_is_recorded_by_the_command(folder):
    result = command(*python("deepseek.py", 2, 4), path=folder)
    assert result.returncode == 0, result.stderr
    assert loads(result.stdout).programs == with_peers(dualpipe(2, 4)).programs
    assert "exchange nothing with other ranks or stages and are left out" in result.stderr, "the reference run"


def swap_messages(schedule: Schedule, rank: int) -> Schedule:
    """The schedule with the first two messages of a rank's first slot of several messages exchanged."""
    program = list(schedule.programs[rank])
    number = next(number for number, slot in enumerate(program) if len(slot) > 1 and slot[0].kind in MESSAGES)
    first, second, *rest = program[number]
    program[number] = (second, first, *rest)
    return replace(schedule, programs=(*schedule.programs[:rank], tuple(program), *schedule.programs[rank + 1 :]))


@pytest.mark.parametrize("rank", range(4))
def test_exchanging_two_messages_of_a_slot_changes_the_order(recorded, rank):
    assert dumps(with_peers(swap_messages(dualpipe(4, 8), rank))) != dumps(recorded[4, 8])


def test_a_message_to_another_peer_changes_the_order(recorded):
    schedule = dualpipe(4, 8)
    compute, message, *rest = schedule.programs[0]
    redirected = (compute, tuple(op._replace(peer=3) for op in message), *rest)
    mutant = with_peers(replace(schedule, programs=(redirected, *schedule.programs[1:])))
    assert dumps(mutant) != dumps(recorded[4, 8])


FAULTS = {
    "a W too early": Row("7 cooldown", PLANS["dualpipe"](4, 10, 0).table[-2].count, "RB0 B0 W SB0"),
    "two sends of the main phase swapped": Row(
        "4 overlapped",
        next(row.count for row in PLANS["dualpipe"](4, 10, 0).table if row.name == "4 overlapped"),
        "RF0 RB1 F0+B1+W1 SB1 SF0 RF1 RB0 F1+B0+W0 SF1 SB0",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_table_changes_the_order(recorded, fault):
    plan = PLANS["dualpipe"](4, 10, 0)
    faulty = expand(vary(plan.table, FAULTS[fault]), plan.sizes, plan.chunks, plan.routes)
    schedule = dualpipe(4, 10)
    mutant = replace(schedule, programs=(faulty, *schedule.programs[1:]))
    assert dumps(with_peers(mutant)) != dumps(recorded[4, 10])
