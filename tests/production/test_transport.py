"""What the transport does for a GPU, on tensors of the CPU: staged copies, and works that end in stream order."""

from __future__ import annotations

import time

import pytest
import torch

from dualpipe.errors import StageError
from dualpipe.runtime.process_group import ProcessGroupTransport
from dualpipe.runtime.transport import Message, SpoiledError
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
            transport.stream_ordered = True
            receive = Message("1RF0>", 1, sends=False, works=[Noted()], posted=True, tensors=[value])
            received = transport.wait(receive)
            late = Message("1SB0>", 1, sends=True, works=[Noted(polls=2)], posted=True)
            transport._outstanding = [late]
            transport.drain()
            written = Message("1SB1>", 1, sends=True, works=[Noted()], posted=True, tensors=[value], versions=(0,))
            transport._outstanding = [written]
            value.add_(1)
            with pytest.raises(StageError, match="written to while it was sent"):
                transport.drain()
            return staged, receive.works[0].waits, torch.equal(received[0], value), late.works[0].polls

    (found,) = launch(1, body, timeout=30).values()
    assert found == ((True, True, True), [()], True, -1)


def test_only_the_first_failure_is_announced_and_closing_waits_for_every_thread_once():
    def body(context):
        transport, announced, disconnected = ProcessGroupTransport(timeout=5.0), [], []
        peers = transport._open()
        peers._notify, peers._disconnect = announced.append, lambda: disconnected.append(True)
        peers.fail("the first reason")
        peers.fail("another")
        with pytest.raises(SpoiledError, match="the first reason"), transport.phase("step"):
            pass  # as where another rank has failed between two calls
        peers.helper("late").submit(time.sleep, 0.2)
        transport.close()
        peers.close()
        running = [helper.thread.name for helper in peers._helpers if helper.thread.is_alive()]
        return peers.failure, len(announced), len(disconnected), running

    (found,) = launch(1, body, timeout=30).values()
    assert found == ("the first reason", 1, 2, [])
