"""What the transport does for a GPU, on tensors of the CPU: staged copies, and works that end in stream order."""

from __future__ import annotations

import time

import torch

from dualpipe.transport import Message, ProcessGroupTransport
from reference.launch import launch


class Noted:
    """A work that notes with what it was waited for."""

    def __init__(self) -> None:
        self.waits: list[tuple] = []

    def wait(self, *arguments):
        self.waits.append(arguments)

    def is_completed(self):
        return True


def test_a_staged_send_is_a_contiguous_copy_and_a_work_in_stream_order_is_waited_for_without_the_host():
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
            return staged, receive.works[0].waits, torch.equal(received[0], value)

    (found,) = launch(1, body, timeout=30).values()
    assert found == ((True, True, True), [()], True)


def test_only_the_first_failure_is_announced_and_closing_waits_for_every_thread_once():
    def body(context):
        transport, announced, disconnected = ProcessGroupTransport(timeout=5.0), [], []
        peers = transport._open()
        peers._tell, peers._disconnect = announced.append, lambda: disconnected.append(True)
        peers.fail("the first reason")
        peers.fail("another")
        peers.finisher("late").submit(time.sleep, 0.2)
        transport.close()
        peers.close()
        running = [helper.thread.name for helper in peers._finishers if helper.thread.is_alive()]
        return peers.failure, len(announced), len(disconnected), running

    (found,) = launch(1, body, timeout=30).values()
    assert found == ("the first reason", 1, 2, [])
