"""Programs that hang or fail: every unmatched message is in the file, however early it was posted."""

import re
from threading import Thread

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dualpipe.record import RecordError
from dualpipe.record.child.log import call_path
from dualpipe.testing import record_ranks
from proofs.prove import prove
from tests.record.two_ranks import PLAIN, SHAPE, receive, text, train

STALL = 0.3


def refuted(recording) -> set[str]:
    checks = prove(recording.schedule).as_json()["checks"]
    return {name for name, check in checks.items() if check["verdict"] == "refuted"}


def test_an_extra_receive_at_the_end_is_in_the_file():
    def body(rank):
        train(rank, nn.Linear(4, 4))
        if rank == 1:
            receive(0)

    recording = record_ranks(2, body, check=False)
    assert (text(recording, 0), text(recording, 1)) == (PLAIN[0], PLAIN[1] + " 1RF2>@0")
    assert {"messages", "deadlock"} <= refuted(recording)
    assert recording.ended == (True, False)
    assert recording.caveats == ("rank 1 did not finish",)


def test_the_place_of_a_message_includes_the_callers_of_the_helpers_that_post_it():
    def passing_on(function):
        def wrapper(*args, **kwargs):
            return function(*args, **kwargs)

        return wrapper

    def fetch(*sources, **options):
        return [passing_on(passing_on(receive))(source, **options) for source in sources]

    def body(rank):
        train(rank, nn.Linear(4, 4), microbatches=1)
        if rank == 1:
            passing_on(passing_on(fetch))(0)

    (note,) = record_ranks(2, body, check=False).notes
    lines = {f.__name__: f.__code__.co_firstlineno for f in (receive, fetch, body)}
    helper, here = "two_ranks.py", "test_cut_short.py"
    path = f"{helper}:{lines['receive'] + 2} (called at {here}:{lines['fetch'] + 1}, {here}:{lines['body'] + 3})"
    assert path in re.sub(r"/\S*/", "", note)


def test_a_wrapper_is_named_if_it_is_the_only_caller():
    places = []

    def post():
        places.append(call_path())

    def wrapper(*args, **kwargs):
        post(*args, **kwargs)

    thread = Thread(target=wrapper)
    thread.start()
    thread.join(10)
    lines = [f.__code__.co_firstlineno + 1 for f in (post, wrapper)]
    assert re.sub(r"/\S*/", "", places[0]) == "test_cut_short.py:{} (called at test_cut_short.py:{})".format(*lines)


def test_a_send_that_no_rank_receives_is_in_the_file():
    def body(rank):
        train(rank, nn.Linear(4, 4))
        if rank == 0:
            dist.isend(torch.zeros(3), 1)

    recording = record_ranks(2, body)
    assert text(recording, 0) == PLAIN[0] + " 0SF2>@1"
    assert "messages" in refuted(recording)
    assert "the send to rank 1 at" in recording.notes[0]
    assert recording.notes[0].endswith(
        "was matched by no receive; it is named 0SF2>@1, the next op that its rank expects"
    )


def test_a_tensor_sent_twice_in_a_row_is_two_messages():
    def body(rank):
        def send(tensor, peer):
            works = [dist.isend(tensor, peer) for _ in range(1 + (rank == 1))]
            works[0].wait()

        train(rank, nn.Linear(4, 4), microbatches=1, send=send)

    recording = record_ranks(2, body)
    assert text(recording, 1) == "1RF0>@0 1F0> 1B0>+1W0> 1SB0>@0 1SB0>@0"
    assert "messages" in refuted(recording)


@pytest.mark.parametrize("fails", [False, True])
def test_an_unmatched_message_between_ranks_without_a_common_boundary(fails):
    """It is an error, but a program that failed is recorded without the message."""

    def body(rank):
        if rank < 2:
            train(rank, nn.Linear(4, 4))
        if rank == 0:
            work = dist.isend(torch.zeros(3), 2)
        dist.barrier()
        if fails and rank == 0:
            work.wait()

    if not fails:
        with pytest.raises(RecordError, match=r"the send to rank 2 at .*test_cut_short.py:\d+ has none, and"):
            record_ranks(3, body)
        return
    recording = record_ranks(3, body, check=False, stall=STALL)
    assert (text(recording, 0), text(recording, 1), text(recording, 2)) == (
        f"{PLAIN[0]} 0AR>@0",
        f"{PLAIN[1]} 1AR>@0",
        "0AR>@0",
    )
    assert "rank 0: the send to rank 2 at " in recording.notes[0]
    assert recording.caveats[-1] == "1 unmatched message between ranks without neighbouring stages is left out"


def four_ranks(rank: int, early: bool) -> None:
    """The warm-up of 1F1B on four ranks; with ``early`` rank 2 waits for a gradient before it has computed anything."""
    stage = nn.Linear(4, 4)
    x = torch.randn(SHAPE)
    if rank:
        x = receive(rank - 1).requires_grad_()
    if early and rank == 2:
        receive(3)
    y = stage(x)
    if rank < 3:
        dist.send(y.detach(), rank + 1)
        y.backward(receive(rank + 1))
    else:
        y.sum().backward()
    if rank:
        dist.send(x.grad, rank - 1)


def test_a_deadlock_before_the_first_forward_of_a_stage():
    """Rank 2 receives rank 1's message but runs no forward; rank 3 has received nothing."""
    recording = record_ranks(4, lambda rank: four_ranks(rank, early=True), stall=STALL)
    assert recording.schedule.routes == {">": (0, 1, 2, 3)}
    assert [text(recording, rank) for rank in range(4)] == [
        "0F0> 0SF0>@1 0RB0>@1",
        "1RF0>@0 1F0> 1SF0>@2 1RB0>@2",
        "2RF0>@1 2RB0>@3",
        "3RF0>@2",
    ]
    assert "deadlock" in refuted(recording)
    assert "rank 2 ran no forward of lane >; that it holds stage 2 is concluded from the messages" in recording.notes[0]


def test_a_deadlock_before_the_first_message():
    def body(rank):
        stage = nn.Linear(4, 4)
        if rank == 0:
            y = stage(torch.randn(SHAPE))
            gradient = receive(1)
            dist.send(y.detach(), 1)
            y.backward(gradient)
        else:
            x = receive(0).requires_grad_()
            stage(x).sum().backward()
            dist.send(x.grad, 0)

    recording = record_ranks(2, body, stall=STALL)
    assert (text(recording, 0), text(recording, 1)) == ("0F0> 0RB0>@1", "1RF0>@0")
    assert "deadlock" in refuted(recording)


@pytest.mark.parametrize("ranks", [2, 3])
def test_an_error_between_a_receive_and_the_first_forward(ranks):
    def body(rank):
        stage = nn.Linear(4, 4)
        if rank == 0:
            dist.send(stage(torch.randn(SHAPE)).detach(), 1)
            receive(1)
        elif rank == 1:
            receive(0)
            raise LookupError
        else:
            receive(1)

    recording = record_ranks(ranks, body, check=False, stall=STALL)
    assert recording.schedule.routes == {">": tuple(range(ranks))}
    assert [text(recording, rank) for rank in range(ranks)][:2] == ["0F0> 0SF0>@1 0RB0>@1", "1RF0>@0 1F0>"]
    assert recording.ended[1] is False
    assert re.fullmatch(
        r"rank 1 raised LookupError at .*test_cut_short.py:\d+ during 1F0>", str(recording.schedule.failures[0])
    )


def test_a_warm_up_that_hangs_in_both_lanes():
    """Ranks 0 and 3 both start a lane, and rank 1 waits for a gradient first."""

    def body(rank):
        stages = {up: nn.Linear(4, 4) for up in (True, False)}
        if rank in (0, 3):
            dist.send(stages[rank == 0](torch.randn(SHAPE)).detach(), 1 if rank == 0 else 2)
            receive(1 if rank == 0 else 2)
        elif rank == 1:
            dist.send(stages[True](receive(0)).detach(), 2)
            receive(2)
        else:
            received = receive(3)
            receive(1)
            stages[False](received)
            receive(1)

    recording = record_ranks(4, body, stall=STALL)
    assert recording.schedule.routes == {">": (0, 1, 2, 3), "<": (3, 2, 1, 0)}
    assert "deadlock" in refuted(recording)


def test_a_loss_for_the_log_is_left_out_and_noted():
    def body(rank):
        stage, losses = nn.Linear(4, 4), []

        def last(x):
            losses.append(stage(x).square())
            return losses[-1]

        train(rank, stage if rank == 0 else last)
        if rank == 1:
            dist.send(losses[0].sum().detach(), 0)
            dist.send(sum(losses).sum().detach(), 0)
        else:
            dist.recv(torch.empty(()), 1)
            dist.recv(torch.empty(()), 1)

    recording = record_ranks(2, body)
    assert (text(recording, 0), text(recording, 1)) == PLAIN
    assert "an end of the pipeline sends at" in recording.notes[0]
    assert recording.caveats == ("4 message ends are left out as control data",)
