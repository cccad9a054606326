"""What a recorded program does to the memory of its messages: read, written, freed or used again too early."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dualpipe.record.child.buffers import Buffers
from dualpipe.record.child.freed import Freed
from dualpipe.record.child.marks import NONE, Table
from dualpipe.record.child.regions import region_of
from dualpipe.testing import record_ranks
from proofs.buffers_search import buffers, faults
from proofs.story import tell
from proofs.verdict import Proved, Refuted
from tests.record.logs import Rank, recorded
from tests.record.two_ranks import SHAPE, assert_plain, receive, text, train


def stories(recording, rank: int) -> dict[int, str]:
    """The story of the first fault of every microbatch whose messages are touched too early."""
    found = {
        fault.message.op.mb: tell(fault) for fault in reversed(list(faults(recording.schedule.observed.events[rank])))
    }
    assert isinstance(buffers(recording.schedule), Refuted if found else Proved)
    return found


EARLY = "freed before the post"
SENDS = {
    "replaced": (lambda y: setattr(y, "data", torch.empty(1)), "frees or resizes"),
    "resized": (lambda y: y.untyped_storage().resize_(0), "frees or resizes"),
    "set": (lambda y: y.set_(torch.empty(1)), "frees or resizes"),
    "written": (lambda y: y.fill_(7.0), "writes to"),
    "written through a view": (lambda y: torch.mul(y[0], 7, out=y[1]), "writes to"),
    "read": (lambda y: float(y.sum()), "proved"),
    "viewed": (lambda y: y.detach().view(-1), "proved"),
    EARLY: (lambda y: setattr(y, "data", torch.empty(1)), "frees or resizes"),
    f"{EARLY}, which is detached": (lambda y: setattr(y, "data", torch.empty(1)), "frees or resizes"),
}
"""What is done to the tensor in flight; what arrives is what was sent."""


def test_a_sent_tensor_may_be_read_but_not_changed_before_its_wait():
    """Rank 1 posts its receive only when the tensor has been touched, so gloo moves the data after that."""

    def body(rank):
        stage = nn.Linear(4, 4)
        for how, (touch, _) in SENDS.items():
            if rank == 0:
                y = stage(torch.randn(SHAPE))
                sent = y.detach().clone()
                if how.endswith("detached"):
                    touch(sent)
                    sent = sent.detach()
                operation = dist.P2POp(dist.isend, sent, 1)
                if how == EARLY:
                    touch(sent)
                (work,) = dist.batch_isend_irecv([operation])
                if not how.startswith(EARLY):
                    touch(sent)
                dist.barrier()
                work.wait()
                y.backward(receive(1))
            else:
                dist.barrier()
                x = receive(0)
                x = torch.ones(SHAPE) if how.startswith(EARLY) else x  # one element has arrived
                assert bool((x != 7).all() and x.isfinite().all() and x.count_nonzero()), x
                stage(x.requires_grad_()).square().sum().backward()
                dist.send(x.grad, 0)

    found = stories(record_ranks(2, body), 0)
    for mb, (how, (_, says)) in enumerate(SENDS.items()):
        assert (mb in found) == (says != "proved"), how
        if mb in found:
            first, posted, touched, waited, _ = found[mb].splitlines()
            assert first.startswith(f"rank 0 {says} the tensor of the activation of microbatch {mb} of lane >"), how
            assert all("test_buffers.py:" in line for line in (posted, touched, waited))
            assert waited.startswith("waited for at ")


def exchange(rank) -> None:
    """GPipe of two microbatches for each of ``RECEIVES``, which makes rank 1's input from a buffer."""
    stage = nn.Linear(4, 4)
    for prepare in RECEIVES:
        buffer, kept = torch.zeros(SHAPE), []
        for _ in range(2):
            if rank == 0:
                y = stage(torch.randn(SHAPE))
                dist.send(y.detach(), 1)
                kept.append((None, y))
            else:
                x, run = prepare(buffer, dist.irecv)
                kept.append((x, run(stage)))
        for x, y in kept:
            if rank == 0:
                y.backward(receive(1))
            else:
                y.sum().backward()
                dist.send(x.grad, 0)


def unwaited(buffer, post):
    x = torch.zeros(SHAPE)
    work = post(x, 0)
    x.requires_grad_()

    def run(stage):
        y = stage(x)
        work.wait()
        return y

    return x, run


def one_buffer(buffer, post):
    post(buffer, 0).wait()
    x = buffer.detach().requires_grad_()
    return x, lambda stage: stage(x)


def copied(buffer, post):
    post(buffer, 0).wait()
    x = buffer.clone().requires_grad_()
    return x, lambda stage: stage(x)


def recomputed(buffer, post):
    post(buffer, 0).wait()
    x = buffer.detach().requires_grad_()
    return x, lambda stage: torch.utils.checkpoint.checkpoint(stage, x, use_reentrant=False)


RECEIVES = {
    unwaited: "in 1F0> while the message in slot ",
    one_buffer: "receives the activation of microbatch 3 of lane > (stage 0 to stage 1) (1RF3>@0) into the memory",
    recomputed: "\nthe graph of 1F4>, made at ",
    copied: "",
}
"""The story of the first of two microbatches that are received in that way."""


def test_a_received_tensor_is_read_after_its_wait_and_kept_until_its_backward():
    found = stories(record_ranks(2, exchange), 1)
    assert sorted(found) == [0, 1, 2, 4]
    for mb, (prepare, says) in zip(range(0, 8, 2), RECEIVES.items(), strict=True):
        assert says in found.get(mb, ""), prepare


def test_a_buffer_may_be_used_again_after_the_backward():
    def body(rank):
        buffer = torch.empty(SHAPE)

        def into_the_buffer(peer):
            dist.recv(buffer, peer)
            return buffer.detach()

        stage = nn.Linear(4, 4)
        for _ in range(2):
            if rank == 0:
                y = stage(torch.randn(SHAPE))
                dist.send(y.detach(), 1)
                y.backward(into_the_buffer(1))
            else:
                x = into_the_buffer(0).requires_grad_()
                stage(x).square().sum().backward()
                dist.send(x.grad, 0)

    recording = record_ranks(2, body)
    assert_plain(recording)
    assert stories(recording, 1) == {}
    touched = [event.what for event in recording.schedule.observed.events[1] if event.message.op.mb == 0]
    assert touched == ["post", "wait", "keep", "drop", "post", "wait", "write"]


@pytest.mark.parametrize(
    "touch",
    [
        lambda held, tensor: held.operator(torch.ops.aten.fill_.Scalar, (tensor, 0.0), {}, None),
        lambda held, tensor: held.replaced(tensor, torch.empty(1), None),
        lambda held, tensor: held.posted(9, False, tensor, tensor, None),
    ],
    ids=["operator", "replaced", "posted"],
)
def test_messages_may_complete_in_another_thread_while_a_touch_is_looked_for(touch):
    """The other thread is played by the log: it completes both messages when the first access is written down."""
    written = []

    def write(event, **fields):
        written.append((event, fields["what"], fields["message"]))
        held.completed([0, 1])

    held, tensor = Buffers(write, Freed(Table())), torch.zeros(4)
    for number in (0, 1):
        held.posted(number, True, tensor, tensor.clone(), None)
    touch(held, tensor)
    assert [message for _, _, message in written] == [0, 1]


def test_a_message_may_arrive_in_another_thread_while_memory_is_received_into():
    """As above; the other thread finds that an earlier message's memory is gone."""
    held, tensor = Buffers(lambda *_, **__: held._received.clear(), Freed(Table())), torch.zeros(4)
    for number in (0, 1):
        held.posted(number, False, tensor, tensor, None)
        held.completed([number])
    held._kept |= {1}
    held.posted(2, False, tensor, tensor, None)
    assert held._received == {}


@pytest.mark.parametrize("send", [False, True])
def test_a_receive_into_the_memory_of_a_message_in_flight_is_written_down_after_a_write_of_the_program(send):
    written = []
    held = Buffers(lambda _, **fields: written.append((fields["what"], fields["posted"])), Freed(Table()))
    tensor = torch.zeros(4)
    held.posted(0, send, tensor, tensor.clone(), None)
    held.operator(torch.ops.aten.fill_.Scalar, (tensor, 0.0), {}, None)
    held.posted(1, False, tensor[2:], tensor[2:], None)
    assert written == [("write", None), ("write", 1)]


def test_both_receives_that_share_memory_have_the_lines_that_made_them_and_not_that_of_their_batch():
    one, two = Rank(0), Rank(1)
    one.post(*(("send", 1, "F", one.forward()) for _ in range(2)))
    first, second = two.post(("receive", 0, "", None), ("receive", 0, "", None), wait=False)
    for line, message in enumerate(two.events[-1]["messages"], start=7):
        message["at"] = f"p2p.py:{line}"
    two._write("access", what="write", message=first, posted=second, by=[])
    two._write("wait", messages=[first, second], own=True)
    for message in (first, second):
        two.backward(two.forward(message))
    story = stories(recorded(one, two), 1)[0].splitlines()
    assert story[1:3] == ["posted at p2p.py:7", "the other, 1RF1>@0, posted at p2p.py:8"]


PARTS = {
    "rows": (lambda t: t[0], lambda t: t[1], False),
    "a row and the rest": (lambda t: t[1], lambda t: t[2:], False),
    "columns": (lambda t: t[:, :2], lambda t: t[:, 2:], False),
    "a row and the columns beside it": (lambda t: t[1, 0], lambda t: t[:, 1:], False),
    "every other row of a view and a row": (lambda t: t.view(2, 2, 4, 3)[:, 0], lambda t: t[1], False),
    "every other row": (lambda t: t[::2], lambda t: t[1::2], False),
    "columns that share one": (lambda t: t[:, :3], lambda t: t[:, 2:], True),
    "the whole and a part": (lambda t: t, lambda t: t[2, 1:], True),
    "a transposed whole and a part": (lambda t: t.transpose(0, 2), lambda t: t[3, 3, 2:], True),
}
"""Two parts of a tensor, and whether they have elements in common."""


@pytest.mark.parametrize("parts", PARTS)
def test_parts_of_a_tensor_share_memory_only_where_they_have_elements_in_common(parts):
    whole = torch.zeros(4, 4, 3)
    one, other, share = (*(part(whole) for part in PARTS[parts][:2]), PARTS[parts][2])
    assert region_of(one).overlaps(region_of(other)) == region_of(other).overlaps(region_of(one)) == share
    assert region_of(whole).covers(region_of(one))
    assert region_of(one).covers(region_of(one))
    table, first, second = Table(), frozenset({("M", 1)}), frozenset({("M", 2)})
    table.put(one, first)
    assert table.get(other) == (first if share else NONE)
    table.put(other, second)
    assert table.get(whole) == ({*second} if region_of(other).covers(region_of(one)) else {*first, *second})
    table.put(whole, NONE)
    assert table.get(one) == table.get(other) == NONE


def test_a_part_of_a_buffer_that_nothing_was_received_into_is_no_activation():
    """Rank 1 receives both microbatches into the first part of its buffer; the forward of the second gets zeros."""

    def body(rank):
        stage, buffer, kept = nn.Linear(4, 4), torch.zeros(2, *SHAPE), []
        for mb in range(2):
            if rank == 0:
                y = stage(torch.randn(SHAPE))
                dist.send(y.detach(), 1)
                kept.append((None, y))
            else:
                dist.recv(buffer[0], 0)
                x = buffer[mb].clone().requires_grad_()
                kept.append((x, stage(x)))
        for x, y in kept:
            if rank == 0:
                y.backward(receive(1))
            else:
                y.sum().backward()
                dist.send(x.grad, 0)

    recording = record_ranks(2, body)
    assert text(recording, 1).startswith("1RF0>@0 1F0> 1RF1>@0 1F1> 1B0>+1W0> 1SB0>@0 1B1>")
    assert any("does not take the activation of stage 0; it is named 1F1> by its order" in n for n in recording.notes)
    assert "1 receive has a tensor that no observed forward or backward uses" in recording.caveats


def test_a_receive_whose_tensor_gets_another_storage_before_the_wait_is_still_the_input():
    """Nothing that arrives is used, and yet the stage is that of the other one."""

    def swapped(peer):
        x = torch.zeros(SHAPE)
        work = dist.irecv(x, peer)
        x.data = torch.zeros(SHAPE)
        work.wait()
        return x

    recording = record_ranks(2, lambda rank: train(rank, nn.Linear(4, 4), take=swapped))
    assert recording.schedule.routes == {">": (0, 1)}
    first = "rank 1 frees or resizes the tensor of the activation of microbatch 0 of lane > (stage 0 to stage 1) while"
    assert stories(recording, 1)[0].startswith(first)
