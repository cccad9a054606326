"""Programs that crash, hang before any data crosses, or end with an exit code: there is always a recording."""

import os
import re
import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dualpipe.record import RecordError, assemble
from dualpipe.record.events import read
from dualpipe.record.lanes import parse
from dualpipe.schedule import DOWN, UP
from dualpipe.schedule.text import dumps, loads
from dualpipe.testing import record_ranks
from proofs.prove import prove
from tests.record.logs import Rank, lines
from tests.record.two_ranks import SHAPE, receive, text, train

STALL = 0.3


class Faulty(nn.Module):
    """Raises in its forward, or in its backward, when it is called for the second time."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.layer, self.where, self.calls = nn.Linear(4, 4), where, 0

    def forward(self, x):
        self.calls += 1
        y = self.layer(x)
        if self.calls == 2 and self.where == "the forward":
            raise IndexError("a bug # of the\nprogram")
        if self.calls == 2 and self.where == "the backward":
            y.register_hook(self.fail)
        return y

    def fail(self, gradient):
        raise IndexError("a bug")


def first_failure(recording) -> str:
    return str(recording.schedule.failures[0])


@pytest.mark.parametrize(
    ("where", "during", "ends"),
    [("the forward", "1F1>", "1RF1>@0 1F1>"), ("the backward", "1B1>", "1RF1>@0 1F1> 1B1>")],
)
def test_an_error_is_the_first_thing_said_and_its_op_the_ranks_last(where, during, ends):
    recording = record_ranks(2, lambda rank: train(rank, Faulty(where if rank else "")), check=False, stall=20)
    assert first_failure(recording).startswith("rank 1 raised IndexError at ")
    assert f" during {during}: a bug" in first_failure(recording)
    assert text(recording, 1).endswith(ends)
    assert loads(dumps(recording.schedule)) == recording.schedule
    report = prove(recording.schedule, smt=False)
    assert report.text().splitlines()[0] == first_failure(recording)
    assert report.as_json()["failures"][0]["rank"] == 1
    assert report.as_json()["checks"]["complete"]["may_follow_from"] == first_failure(recording)
    assert "this may be a consequence of the failure: rank 1 ended early" in report.text()


def test_an_error_of_a_backward_from_an_output_that_was_freed_says_where():
    """Megatron frees an output after its send; then its backward must be run by the engine itself."""

    def body(rank):
        if rank:
            train(rank, nn.Linear(4, 4))
            return
        y = nn.Linear(4, 4)(torch.randn(SHAPE))
        dist.send(y.detach(), 1)
        y.data = torch.empty(1)
        torch.autograd.backward(y, receive(1))

    failed = first_failure(record_ranks(2, body, check=False, stall=STALL))
    assert re.search(
        r" during 0B0>, whose output was freed \(its \.data replaced\) at \S+\.py:\d+ \(does the backward allow for "
        r"that, as Megatron's does with deallocate_pipeline_outputs\?\): Mismatch in",
        failed,
    )


def test_an_error_because_a_received_tensor_requires_no_gradient_names_its_receive():
    def body(rank):
        if rank == 0:
            train(rank, nn.Linear(4, 4))
        x = receive(0)
        nn.Linear(4, 4)(x)
        x.retain_grad()

    failed = first_failure(record_ranks(2, body, check=False, stall=STALL))
    posted = r"of what it received as 1RF0>@0, posted at \S+two_ranks\.py:\d+ \(called at \S+test_failures\.py:\d+\)"
    assert re.search(rf" after 1F0>, {posted}, without requires_grad_\(\): can't retain_grad", failed), failed


def test_an_error_of_a_rank_whose_peer_has_failed_says_so():
    recording = record_ranks(2, lambda rank: train(rank, Faulty("the forward" if rank else "")), check=False)
    assert "during 0RB1>@1 (a guess), after rank 1 had failed" in str(recording.schedule.failures[1])


def test_an_error_because_the_peer_has_ended_is_a_hang():
    """gloo closes the connection; on NCCL the rank would wait."""

    def body(rank):
        train(rank, nn.Linear(4, 4))
        if rank == 0:
            receive(1)

    recording = record_ranks(2, body, check=False, timeout=20)
    (failure,) = recording.schedule.failures
    assert str(failure).startswith("rank 0 waited for 0RB2>@1, posted at ")
    assert failure.is_hang
    assert "may_follow_from" not in prove(recording.schedule, smt=False).as_json()["checks"]["messages"]


def test_every_rank_that_waits_for_one_that_has_ended_hangs():
    def body(rank):
        if rank < 2:
            train(rank, nn.Linear(4, 4))
        if rank != 1:
            receive(1)

    recording = record_ranks(3, body, check=False, timeout=20)
    assert [str(failure).partition(", posted")[0] for failure in recording.schedule.failures] == [
        "rank 0 waited for 0RB2>@1",
        "rank 2 waited for 2RF0>@1",
    ]
    assert all(str(failure).endswith(", until rank 1 had ended") for failure in recording.schedule.failures)


def test_an_error_before_any_op_is_recorded():
    def body(rank):
        raise LookupError

    recording = record_ranks(2, body, check=False)
    assert [failure.rank for failure in recording.schedule.failures] in ([0, 1], [1, 0])
    assert "raised LookupError at " in first_failure(recording)
    assert first_failure(recording).endswith(" before its first op")
    assert [text(recording, rank) for rank in range(2)] == ["", ""]
    assert prove(recording.schedule, smt=False).verdict == "refuted"


def test_a_program_that_cannot_be_named_is_recorded_if_it_failed():
    """A stage that is no module: with a program that ends well this is an error."""

    def body(rank):
        weight = torch.randn(4, 4, requires_grad=True)
        train(rank, (lambda x: x @ weight) if rank == 0 else nn.Linear(4, 4))
        raise LookupError("at the end")

    recording = record_ranks(2, body, check=False)
    assert "raised LookupError at " in first_failure(recording)
    assert recording.caveats[0].startswith("no op is written: a stage's activation is the output of a torch.nn.Module")


def waits_first(rank: int) -> None:
    """DualPipe on four ranks, each of which first waits for a message that its peer never sends."""
    stages = nn.Linear(4, 4), nn.Linear(4, 4)
    if rank in (0, 3):
        stages[0](torch.randn(SHAPE))
    receive({0: 1, 1: 0, 2: 3, 3: 2}[rank])


def test_a_hang_before_any_data_has_crossed_is_recorded_with_the_given_lanes():
    recording = record_ranks(4, waits_first, stall=STALL, lanes=["0 1 2 3", "3 2 1 0"])
    assert recording.schedule.routes == {UP: (0, 1, 2, 3), DOWN: (3, 2, 1, 0)}
    assert [text(recording, rank) for rank in (0, 3)] == ["0F0> 0RB0>@1", "0F0< 0RB0<@2"]
    assert [len(recording.schedule.programs[rank]) for rank in (1, 2)] == [1, 1], "a receive that is named by a guess"
    assert "guess" not in " ".join(recording.caveats)
    assert first_failure(recording).startswith("rank 0 waited for 0RB0>@1, posted at ")
    report = prove(recording.schedule, smt=False).as_json()
    assert report["checks"]["deadlock"]["verdict"] == "refuted"
    assert "may_follow_from" not in report["checks"]["deadlock"]
    assert report["checks"]["complete"]["may_follow_from"] == first_failure(recording)


def test_without_the_lanes_they_are_guessed_and_the_recording_says_so():
    recording = record_ranks(4, waits_first, stall=STALL)
    assert recording.schedule.routes == {UP: (0, 1, 2, 3), DOWN: (3, 2, 1, 0)}
    assert "the ranks of the lanes are a guess (> 0 1 2 3 and < 3 2 1 0)" in recording.caveats[0]


def both_stages(rank: int) -> tuple[Rank, Rank]:
    """Two ranks that hold a stage of each lane; rank 0 calls that of lane < first, as rank 1 does that of lane >."""
    ranks = Rank(0), Rank(1)
    ranks[0].forward(module=rank)
    ranks[0].receive(1)
    ranks[1].receive(0)
    return ranks


@pytest.mark.parametrize(("given", "first"), [(("0.0 1", "1 0.1"), "0F0> 0RB0>"), (("0.1 1", "1 0.0"), "1F0< 0RB0>")])
def test_the_module_of_a_stage_is_given_by_its_number(given, first):
    logs = [read(number, rank.events) for number, rank in enumerate(both_stages(0))]
    assert lines(assemble(logs, lanes=parse(given)))[0].startswith(first.split()[0])


@pytest.mark.parametrize(
    ("given", "error"),
    [
        (["0 1", "1 0", "0 1"], "for one lane or two"),
        (["0 x"], "for one lane or two"),
        (["0 1", "1"], "both lanes run the same model"),
        (["0.1 0.1"], "two stages are two modules"),
    ],
)
def test_lanes_that_are_none_are_refused(given, error):
    with pytest.raises(RecordError, match=error):
        parse(given)


def test_a_lane_with_a_rank_that_does_not_exist_is_refused():
    with pytest.raises(RecordError, match="rank 7 of 2"):
        assemble([read(rank, []) for rank in range(2)], lanes=parse(["0 7"]))


def test_exit_codes_are_the_last_word():
    one, two = Rank(0), Rank(1)
    f = one.forward()
    one.send(1, "F", f)
    two.forward(two.receive(0))
    one.end()
    logs = [read(number, rank.events) for number, rank in enumerate((one, two))]
    said = {
        codes: [str(f) for f in assemble(logs, codes=codes).schedule.failures] for codes in ((0, 0), (3, -9), (0, None))
    }
    assert said == {
        (0, 0): [],
        (3, -9): ["rank 0 ended with exit code 3 after 0SF0>@1", "rank 1 was killed by signal 9 (SIGKILL) after 1F0>"],
        (0, None): ["rank 1 waited for 1RF0>@0, posted at rank1.py:0, until it was stopped"],
    }


@pytest.mark.parametrize(("code", "says"), [(None, ""), (-9, ", after rank 1 had failed")])
def test_a_rank_that_still_ran_had_not_failed_before_another_one(code, says):
    one, two = Rank(0), Rank(1)
    one.send(1, "F", one.forward())
    one.receive(1)
    two.forward(two.receive(0))
    two.receive(0)
    text = "[/src/gloo/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:902. This is typically caused by it."
    raised = {"error": "RuntimeError", "text": text, "during": ["M", [1]], "time": 5.0, "place": "a.py:1"}
    one.events.append({"event": "raised", "at": "a.py:1", **raised})
    assembled = assemble([read(number, rank.events) for number, rank in enumerate((one, two))], codes=(1, code))
    failures = sorted(assembled.schedule.failures)
    assert [failure.rank for failure in assembled.schedule.failures] == ([0, 1] if code is None else [1, 0])
    says += ": Connection closed by peer [127.0.0.1]:902"
    assert str(failures[0]) == f"rank 0 raised RuntimeError at a.py:1 during 0RB0>@1 (a guess){says}"


def two_steps() -> tuple[Rank, Rank]:
    """A step that ends well, and the beginning of another one, in which rank 0 waits for a gradient."""
    one, two = Rank(0), Rank(1)
    for last in (False, True):
        f = one.forward()
        one.send(1, "F", f)
        received = two.receive(0)
        if not last:
            g = two.forward(received)
            two.backward(g)
            two.send(0, "B", g)
        gradient = one.receive(1)
        if not last:
            one.backward(f, gradient)
            one.step()
            two.step()
    return one, two


def test_a_failure_after_the_recorded_step_says_so_and_explains_nothing_in_it():
    logs = [read(number, rank.events) for number, rank in enumerate(two_steps())]
    first, second = assemble(logs, codes=(None, 3)), assemble(logs, step=2, codes=(None, 3))
    assert [str(failure) for failure in first.schedule.failures] == [
        "rank 1 ended with exit code 3 in a later training step",
        "rank 0 waited for a message from rank 1, posted at rank0.py:13 in a later training step, until it was stopped",
    ]
    assert lines(first) == ["0F0> 0SF0> 0RB0> 0B0>+0W0>", "1RF0> 1F0> 1B0>+1W0> 1SB0>"]
    assert str(second.schedule.failures[0]) == "rank 1 ended with exit code 3 after 1RF0>@0"
    assert first.as_json()["failures"][0] == {"rank": 1, "what": "ended with exit code 3 in a later training step"}
    checks = prove(first.schedule, smt=False).as_json()["checks"]
    assert {check["verdict"] for check in checks.values()} <= {"proved", "skipped"}


def test_a_tensor_read_too_early_is_found_although_the_program_fails_later():
    """And a plain run is not made of a rank that failed."""

    def body(rank):
        stage = Faulty("the backward" if rank else "")
        for _ in range(2):
            x = torch.zeros(SHAPE, requires_grad=rank == 0)
            if rank:
                work = dist.irecv(x, 0)
                y = stage(x.requires_grad_())
                work.wait()
                y.sum().backward()
                dist.send(x.grad, 0)
            else:
                y = stage(x)
                dist.send(y.detach(), 1)
                y.backward(receive(1))

    recording = record_ranks(2, body, check=False, compare=True)
    assert " during 1B1>: a bug" in first_failure(recording)
    report = prove(recording.schedule, smt=False).as_json()["checks"]
    assert "reads the tensor of the activation of microbatch 0" in report["buffers"]["story"]
    assert "may_follow_from" not in report["buffers"]
    assert recording.comparison.chunks[1].unknown == (
        "it made no plain run: no forward was observed, or the rank did not end its step",
    )
    assert recording.comparison.verdict != "equal"


def test_a_comparison_without_any_op_is_not_equal():
    def body(rank):
        raise LookupError

    recording = record_ranks(2, body, check=False, compare=True)
    assert recording.comparison.verdict == "unknown"


def test_a_rank_that_ends_without_a_word_is_recorded():
    def body(rank):
        train(rank, nn.Linear(4, 4))
        dist.barrier()
        if rank == 1:
            sys.stdout.flush()
            os._exit(0)

    recording = record_ranks(2, body, check=False)
    assert first_failure(recording).startswith("rank 1 did not finish; it was stopped after 1AR>@0, last seen at ")
