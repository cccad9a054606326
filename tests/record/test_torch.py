"""Recordings of torch's own schedules have the computations of their tables, and are proved."""

import pytest

from dualpipe.schedule import COMPUTE
from dualpipe.schedule.generate import generate
from dualpipe.schedule.text import loads
from proofs.prove import prove
from proofs.verdict import Refuted
from tests.record.run import command, forked, python
from tests.schedule import torch_tables


def by_the_table(name: str, ranks: int, microbatches: int) -> list[list[str]]:
    """The computations of torch's table, one by one, since torch runs an F&B pair one after the other.

    In stage 0 torch defers B, which no rank waits for, to its W and runs both together.
    """

    def ops(action) -> list[str]:
        if action.sub_actions:
            return [op for part in action.sub_actions for op in ops(part)]
        stage, kind, mb = action.stage_index, action.computation_type.value, action.microbatch_index
        if kind == "B" or (stage == 0 and kind == "W"):
            return [f"{stage}B{mb}>", f"{stage}W{mb}>"]
        return [] if stage == 0 and kind == "I" else [f"{stage}{'B' if kind == 'I' else kind}{mb}>"]

    table = torch_tables.order(name, ranks, microbatches)
    return [[op for action in table[rank] if action for op in ops(action)] for rank in range(ranks)]


def computed(schedule) -> list[list[str]]:
    """The computations of each rank, one by one."""
    return [[str(op) for slot in program for op in slot] for program in schedule.only(COMPUTE).programs]


@pytest.mark.parametrize(("ranks", "microbatches"), [(2, 4), (2, 7), (3, 6), (4, 10)])
def test_torchs_dualpipev_has_the_computations_of_its_table_and_is_proved(ranks, microbatches):
    recording = forked(ranks, "torch_schedule.py", "DualPipeV", microbatches)
    schedule = recording.schedule
    assert schedule.routes == {">": (*range(ranks), *reversed(range(ranks)))}
    assert computed(schedule) == by_the_table("dualpipev", ranks, microbatches)
    assert prove(schedule).as_json()["verdict"] == "proved"
    notes = " ".join(recording.notes)
    assert "exchange nothing" in notes, "torch first runs the stages for their shapes"
    assert "control data" in notes, "it sends the shapes to the next stage"
    assert "messages still in flight" in notes, "it waits for a message where it needs it"


@pytest.mark.long
@pytest.mark.parametrize("name", ["Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble", "ZBVZeroBubble"])
def test_torchs_schedules_with_residual_stages_have_the_computations_of_their_tables(name):
    table = {"InterleavedZeroBubble": "interleavedzb", "ZBVZeroBubble": "zbv"}.get(name, name.lower())
    recording = forked(2, "torch_schedule.py", name, 4, "residual")
    schedule = recording.schedule
    assert all("control data" in caveat for caveat in recording.caveats), "the weight gradients are all found"
    assert computed(schedule) == by_the_table(table, 2, 4)
    checks = prove(schedule, smt=False).checks
    refuted = [check for check, result in checks.items() if isinstance(result.verdict, Refuted)]
    assert refuted == (["accumulation"] if name == "LoopedBFS" else []), "LoopedBFS runs its backwards in reverse"


@pytest.mark.long
@pytest.mark.parametrize("name", ["GPipe", "1F1B"])
def test_torchs_schedules_of_one_stage_a_rank_are_proved(name):
    schedule = forked(2, "torch_schedule.py", name, 4, "residual").schedule
    assert schedule.routes == {">": (0, 1)}
    assert not any(isinstance(result.verdict, Refuted) for result in prove(schedule, smt=False).checks.values())
    if name == "1F1B":
        assert computed(schedule) == computed(generate("1f1b", 2, 4))


@pytest.mark.long
def test_torchs_dualpipev_is_recorded_and_proved_by_the_command(tmp_path):
    file = tmp_path / "recorded.txt"
    result = command("-P", 2, "-o", file, "--prove", *python("torch_schedule.py", "DualPipeV", 4))
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("recorded on 2 ranks: proved")
    assert loads(file.read_text()) == forked(2, "torch_schedule.py", "DualPipeV", 4).schedule
