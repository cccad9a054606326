"""The transport by itself: staged copies, works that end in stream order, peers that end first, and its set-up."""

from __future__ import annotations

import threading
import time

import pytest
import torch
import torch.distributed as dist

from dualpipe.errors import RuleError, StageError
from dualpipe.runtime.outstanding import Outstanding
from dualpipe.runtime.process_group import ProcessGroupTransport
from dualpipe.runtime.rendezvous import Rendezvous
from dualpipe.runtime.transport import DisagreementError, Message, MessageError, SpoiledError, TensorSpec
from dualpipe.testing.launch import launch


class Noted:
    """A work that notes how it was waited for."""

    def __init__(self, polls: int = 0) -> None:
        self.waits: list[tuple] = []
        self.polls = polls  # how often it is asked before it is completed

    def wait(self, *arguments):
        self.waits.append(arguments)

    def is_completed(self):
        self.polls -= 1
        return self.polls < 0


def test_a_staged_send_is_a_copy_and_works_in_stream_order_are_awaited_by_the_stream_and_polled_at_the_end():
    def body(context):
        with ProcessGroupTransport(staged=True, timeout=5.0) as transport:
            value = torch.arange(6.0).view(2, 3).t()
            send = Message("0SF0>", 1, sends=True, tensors=[value])
            transport._allocate(send)
            (copied,) = send.tensors
            staged = copied.data_ptr() != value.data_ptr(), copied.is_contiguous(), torch.equal(copied, value)
            messages = Outstanding(transport._open(), 5.0, in_stream_order=True)
            receive = Message("1RF0>", 1, sends=False, works=[Noted()], posted=True, tensors=[value])
            messages.wait(receive)
            late = Message("1SB0>", 1, sends=True, works=[Noted(polls=2)], posted=True)
            messages.add([late])
            messages.drain()
            written = Message("1SB1>", 1, sends=True, works=[Noted()], posted=True, tensors=[value], versions=(0,))
            messages.add([written])
            value.add_(1)
            with pytest.raises(StageError, match="written to while it was sent"):
                messages.drain()
            return staged, receive.works[0].waits, receive.completed, late.works[0].polls

    (found,) = launch(1, body, timeout=30).values()
    assert found == ((True, True, True), [()], True, -1)


def test_a_wait_that_gloo_never_ends_stops_soon_after_the_pipeline_has_failed():
    """gloo can miss a message that is posted while a failure closes its connection."""

    def body(context):
        class Stuck(Noted):
            def wait(self, *arguments):
                ended.wait(60)

        ended = threading.Event()
        with ProcessGroupTransport(timeout=60.0) as transport:
            peers = transport._open()
            messages = Outstanding(peers, 60.0, in_stream_order=False)
            receive = Message("1RF0>", 0, sends=False, works=[Stuck()], posted=True)
            messages.add([receive])
            peers.failure = "rank 3 failed"
            with pytest.raises(MessageError, match=r"receive 1RF0> from rank 0 failed after .* s: rank 3 failed"):
                messages.wait(receive)
            ended.set()
            return True

    launch(1, body, timeout=30).values()


def test_only_the_first_failure_is_announced_and_closing_waits_for_every_thread_once():
    def body(context):
        transport, announced, disconnected = ProcessGroupTransport(timeout=5.0), [], []
        peers = transport._open()
        peers._notify, peers._disconnect = announced.append, lambda: disconnected.append(True)
        peers.fail("the first reason")
        peers.fail("another")
        with pytest.raises(SpoiledError, match="the first reason"), transport.phase("step"):
            pass  # entering is enough: another rank has failed between two calls
        peers.helper("late").submit(time.sleep, 0.2)
        transport.close()
        peers.close()
        running = [helper.thread.name for helper in peers._helpers if helper.thread.is_alive()]
        return peers.failure, len(announced), len(disconnected), running

    (found,) = launch(1, body, timeout=30).values()
    assert found == ("the first reason", 1, 2, [])


def test_a_rank_that_has_ended_well_fails_no_send_to_it():
    """Its connections close before a slower thread here has seen its last send complete."""

    class Late:
        def __init__(self, work, peers):
            self.work, self.peers = work, peers

        def wait(self, *arguments):
            self.work.wait(*arguments)
            self.peers.reason(1)  # until the connection is closed
            raise RuntimeError("Connection closed by peer")

    def body(context):
        transport = ProcessGroupTransport(timeout=10.0)
        with transport, transport.phase("step"):
            spec = TensorSpec((2,), torch.float32)
            message = Message("0SF0>", 1 - context.rank, context.rank == 0, [torch.ones(2)], [spec])
            transport.post([message])
            if context.rank == 0:
                message.works[:] = [Late(work, transport._peers) for work in message.works]
            transport.wait(message)
        return True

    assert all(launch(2, body, timeout=30).values())


def test_arguments_that_no_transport_can_have_are_refused():
    def body(context):
        for timeout in (0, -1.0, float("nan"), float("inf"), "10", None, True):
            with pytest.raises(RuleError, match="a timeout must be a positive number of seconds"):
                ProcessGroupTransport(timeout=timeout)
        with pytest.raises(RuleError, match="backend for the device of the messages, meta: it has gloo for cpu"):
            ProcessGroupTransport(device="meta")
        alone = dist.new_group([0])
        if context.rank == 1:
            with pytest.raises(RuleError, match="on the ranks of its group alone: rank 1 is not in it"):
                ProcessGroupTransport(alone)

    launch(2, body, timeout=30).values()


def test_set_ups_of_any_length_are_compared_and_a_rank_that_does_not_arrive_is_named():
    def body(context):
        same = "x" * 100_000
        ProcessGroupTransport(timeout=10.0).agree({"shapes": same})
        with pytest.raises(DisagreementError) as differing:
            ProcessGroupTransport(timeout=10.0).agree({"shapes": same + str(context.rank) + same})
        late = ProcessGroupTransport(timeout=0.5)
        if context.rank == 1:
            late.close()
        with pytest.raises((DisagreementError, SpoiledError)) as missing:
            late.agree({})
        unconnected = r"waited 3 s for all of them \(one of them has not connected\)"
        with pytest.raises(DisagreementError, match=unconnected), Rendezvous(late.group, late.order, 3.0):
            raise TimeoutError
        dist.barrier()
        ProcessGroupTransport(timeout=10.0).agree({})
        return str(differing.value), str(missing.value)

    (differing, missing), _ = launch(2, body, timeout=60).values()
    assert "rank 0 has ... x" in differing
    assert "rank 1 has ... x" in differing
    assert len(differing) < 1500
    assert "rank 0 waited 0.5 s for all of them (rank 1 of the group did not arrive)" in missing
