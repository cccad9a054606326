"""torch's own ScheduleDualPipeV, recorded as it runs: its computations are those of its table, and it is proved."""

import pytest

from dualpipe.schedule import COMPUTE
from dualpipe.schedule.text import loads
from proofs.prove import prove
from tests.record.run import command, forked, python
from tests.schedule import torch_tables


def by_the_table(ranks: int, microbatches: int) -> list[list[str]]:
    """The computations of torch's table, one by one: torch runs an overlapped pair as one after the other.

    Of stage 0 torch puts B off until its W (nobody waits for that B), and does both in one.
    """

    def ops(action) -> list[str]:
        if action.sub_actions:
            return [op for part in action.sub_actions for op in ops(part)]
        stage, kind, mb = action.stage_index, action.computation_type.value, action.microbatch_index
        if kind == "B" or (stage == 0 and kind == "W"):
            return [f"{stage}B{mb}>", f"{stage}W{mb}>"]
        return [] if stage == 0 and kind == "I" else [f"{stage}{'B' if kind == 'I' else kind}{mb}>"]

    table = torch_tables.order("dualpipev", ranks, microbatches)
    return [[op for action in table[rank] if action for op in ops(action)] for rank in range(ranks)]


@pytest.mark.parametrize(("ranks", "microbatches"), [(2, 4), (2, 7), (3, 6), (4, 10)])
def test_dualpipev_of_torch_computes_by_its_table_and_is_proved(ranks, microbatches):
    recording = forked(ranks, "torch_dualpipev.py", microbatches)
    schedule = recording.schedule
    assert schedule.routes == {">": (*range(ranks), *reversed(range(ranks)))}
    computed = [[str(op) for slot in program for op in slot] for program in schedule.only(COMPUTE).programs]
    assert computed == by_the_table(ranks, microbatches)
    assert prove(schedule).as_json()["verdict"] == "proved"
    said = " ".join(recording.notes)
    assert "exchange nothing" in said, "torch tries the shapes first"
    assert "control data" in said, "it tells them to the next stage"
    assert "messages still in flight" in said, "it waits for a message where it needs it"


@pytest.mark.long
def test_dualpipev_of_torch_is_recorded_and_proved_by_the_command(tmp_path):
    file = tmp_path / "recorded.txt"
    result = command("-P", 2, "-o", file, "--prove", *python("torch_dualpipev.py", 4))
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("recorded on 2 ranks: proved")
    assert loads(file.read_text()) == forked(2, "torch_dualpipev.py", 4).schedule
