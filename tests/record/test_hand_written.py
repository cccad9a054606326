"""Programs written by hand, correct or with a fault that ``dualpipe prove`` finds in the recording."""

import json

import pytest

from dualpipe.schedule import B, F, Op, Schedule, W, show_slot
from dualpipe.schedule.generate import one_f_one_b
from dualpipe.schedule.text import loads
from proofs.prove import prove
from tests.record.run import command, forked, python


def text(schedule: Schedule, rank: int) -> str:
    return " ".join(map(show_slot, schedule.programs[rank]))


def verdicts(schedule: Schedule) -> dict[str, str]:
    return {name: check["verdict"] for name, check in prove(schedule).as_json()["checks"].items()}


def story(schedule: Schedule, check: str) -> str:
    return prove(schedule).as_json()["checks"][check]["story"]


def test_one_f_one_b_is_recorded_as_it_is_written():
    recording = forked(3, "one_f_one_b.py", 4)
    schedule = recording.schedule
    assert text(schedule, 0) == (
        "0F0> 0SF0>@1 0F1> 0SF1>@1 0F2> 0SF2>@1+0RB0>@1 0B0>+0W0> 0F3> 0SF3>@1+0RB1>@1 0B1>+0W1> "
        "0RB2>@1 0B2>+0W2> 0RB3>@1 0B3>+0W3>"
    )
    assert text(schedule, 2) == (
        "2RF0>@1 2F0> 2B0>+2W0> 2SB0>@1 2RF1>@1 2F1> 2B1>+2W1> 2SB1>@1 "
        "2RF2>@1 2F2> 2B2>+2W2> 2SB2>@1 2RF3>@1 2F3> 2B3>+2W3> 2SB3>@1"
    )
    compute = frozenset({F, B, W})
    assert schedule.only(compute).programs == one_f_one_b(3, 4).only(compute).programs
    assert set(verdicts(schedule).values()) == {"proved", "skipped"}
    assert recording.ended == (True, True, True)
    assert recording.notes == ()


def test_messages_posted_one_by_one_would_hang_on_nccl_although_gloo_delivers_them():
    """Every rank posts its send before its receive; the recorded run ends, and NCCL would run neither."""
    recording = forked(3, "one_f_one_b.py", 4, "one by one")
    assert text(recording.schedule, 0).startswith("0F0> 0SF0>@1 0F1> 0SF1>@1 0F2> 0SF2>@1 0RB0>@1 0B0>+0W0>")
    assert recording.ended == (True, True, True)
    models = prove(recording.schedule).checks["deadlock"].models
    found = {name: result.verdict.word for name, result in models.items()}
    assert found == {"blocking": "refuted", "eager": "proved", "edge": "proved"}


def test_weight_gradients_deferred_to_the_end_of_a_gpipe_are_recorded_there():
    schedule = forked(3, "gpipe.py", 3, 1).schedule
    assert text(schedule, 1) == (
        "1RF0>@0 1F0> 1SF0>@2 1RF1>@0 1F1> 1SF1>@2 1RF2>@0 1F2> 1SF2>@2 "
        "1RB0>@2 1B0> 1SB0>@0 1RB1>@2 1B1> 1SB1>@0 1RB2>@2 1B2> 1SB2>@0 1W0> 1W1> 1W2>"
    )
    assert set(verdicts(schedule).values()) == {"proved", "skipped"}


def test_two_sends_swapped_are_refuted():
    schedule = forked(3, "one_f_one_b.py", 4, "swapped").schedule
    assert text(schedule, 0).startswith("0F0> 0F1> 0SF1>@1 0SF0>@1 0F2> 0SF2>@1+0RB0>@1 0B0>+0W0>")
    assert verdicts(schedule)["messages"] == "refuted"
    assert "rank 0 expects the gradient of microbatch 0" in story(schedule, "messages")


def test_a_gradient_that_no_rank_receives_is_refuted_and_the_program_ended():
    recording = forked(3, "one_f_one_b.py", 4, "deaf", stall=2.0, check=False)
    assert Op(B, next(iter(recording.schedule.routes)), 0, 3) in {placed.op for placed in recording.schedule}
    found = verdicts(recording.schedule)
    assert (found["order"], found["messages"], found["deadlock"]) == ("refuted", "refuted", "refuted")
    assert "(1SB3>@0) as message 4 to rank 0, which receives only 3" in story(recording.schedule, "messages")


def test_a_hang_is_ended_recorded_and_refuted():
    recording = forked(3, "one_f_one_b.py", 4, "wait first", stall=2.0)
    assert recording.ended == (False, False, False)
    assert [text(recording.schedule, rank).split()[-1] for rank in range(3)] == ["0SF2>@1", "1SF1>@2", "2SB0>@1"]
    assert verdicts(recording.schedule)["deadlock"] == "refuted"


def test_an_unmatched_receive_is_named_as_the_next_expected_op_and_noted():
    recording = forked(3, "one_f_one_b.py", 4, "mute", stall=2.0, check=False)
    assert text(recording.schedule, 0).endswith("0RB3>@1")
    (note,) = recording.notes
    assert "rank 0: the receive from rank 1 at" in note
    assert "one_f_one_b.py:" in note
    assert note.endswith("was matched by no send; it is named 0RB3>@1, the next op that its rank expects")
    assert verdicts(recording.schedule)["deadlock"] == "refuted"


def test_the_command_writes_the_file_proves_it_and_reports_a_hang(tmp_path):
    file = tmp_path / "recorded.txt"
    words = ["-P", 2, "--stall", 3, "--output", file, "--prove", "--json"]
    result = command(*words, *python("one_f_one_b.py", 3, "wait first"))
    assert result.returncode == 1, result.stderr
    recorded = json.loads(result.stdout)
    assert recorded["exit_codes"] == [None, None]
    assert recorded["ended"] == [False, False]
    assert recorded["proof"]["verdict"] == "refuted"
    assert "every rank had been waiting for messages for 3 s" in result.stderr
    assert loads(file.read_text()) == loads(recorded["schedule"])


@pytest.mark.long
def test_one_of_several_training_steps_is_written():
    result = command("-P", 2, "--step", 2, *python("gpipe.py", 2, 3))
    assert result.returncode == 0, result.stderr
    assert "# step 2 of 3" in result.stdout
    assert loads(result.stdout) == forked(2, "gpipe.py", 2, 1).schedule


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-P", "2", "--", "no-such-program"], "what follows -- is a command: no-such-program: No such file"),
        (["--", "true"], "calls torch.distributed.init_process_group in Python: no process called it"),
    ],
)
def test_a_command_without_ranks_is_bad_input(words, message):
    result = command(*words)
    assert result.returncode == 2
    assert message in result.stderr
