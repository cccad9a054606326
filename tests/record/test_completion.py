"""A message completes when the program waits for it, polls it, or synchronizes the device; and from any thread."""

import queue
import threading
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from dualpipe.schedule import show_slot
from dualpipe.testing import record_ranks
from proofs.prove import prove
from proofs.verdict import Proved
from tests.record.two_ranks import SHAPE, train


def finish(how, work, device):
    """Complete a message without a wait for its work."""
    if how == "poll":
        while not work.is_completed():
            pass
    else:
        torch.cuda.synchronize()
        assert torch.Event(device=device).query()
        assert isinstance(torch.Stream(device="cuda"), torch.Stream)


def gpipe(how):
    def body(rank):
        group, device = dist.new_group([0, 1], backend="nccl"), torch.device("cuda", rank)
        stage = nn.Linear(4, 4).to(device)
        if rank == 0:
            y = stage(torch.randn(SHAPE))
            finish(how, dist.isend(y.detach(), 1, group), device)
            gradient = torch.empty(SHAPE, device=device)
            finish(how, dist.irecv(gradient, 1, group), device)
            y.backward(gradient)
        else:
            x = torch.empty(SHAPE, device=device)
            finish(how, dist.irecv(x, 0, group), device)
            stage(x.requires_grad_()).sum().backward()
            finish(how, dist.isend(x.grad, 0, group), device)

    return body


def test_polling_ends_and_completes_a_message():
    recording = record_ranks(2, gpipe("poll"), cuda_on_cpu=True)
    assert prove(recording.schedule, smt=False).verdict == "proved"
    assert recording.ended == (True, True)


def test_synchronizing_the_device_completes_all_messages():
    report = prove(record_ranks(2, gpipe("synchronize"), cuda_on_cpu=True).schedule, smt=False)
    assert report.verdict == "proved"
    assert report.checks["buffers"].verdict == Proved()


def test_a_program_that_polls_for_ever_hangs():
    def body(rank):
        stage, x = nn.Linear(4, 4), torch.empty(SHAPE)
        if rank:
            work = dist.irecv(x, 0)
            while not work.is_completed():
                pass
            stage(x).sum().backward()
        else:
            dist.recv(x, 1)

    recording = record_ranks(2, body, check=False, stall=1.0)
    assert [failure.what.startswith("waited for ") for failure in recording.schedule.failures] == [True, True]


def test_single_messages_in_a_coalescing_manager_are_one_slot():
    from torch.distributed.distributed_c10d import _coalescing_manager

    def body(rank):
        group, device = dist.new_group([0, 1], backend="nccl"), torch.device("cuda", rank)
        first, last = nn.Linear(4, 4), nn.Linear(4, 4)

        def exchange(tensor):
            other = torch.empty(SHAPE)
            with _coalescing_manager(group, device, async_ops=True) as manager:
                dist.isend(tensor, 1 - rank, group)
                dist.irecv(other, 1 - rank, group)
            manager.wait()
            return other

        y = first(torch.randn(SHAPE))
        x = exchange(y.detach()).requires_grad_()
        last(x).sum().backward()
        y.backward(exchange(x.grad))

    schedule = record_ranks(2, body, cuda_on_cpu=True).schedule
    assert prove(schedule, smt=False).verdict == "proved"
    assert show_slot(schedule.programs[0][1]) == "0SF0>@1+1RF0<@1"


def test_messages_that_a_thread_sends_while_another_one_receives_are_recorded():
    def body(rank):
        jobs = queue.Queue()

        def work():
            while (job := jobs.get()) is not None:
                dist.send(*job)

        thread = threading.Thread(target=work)
        thread.start()
        train(rank, nn.Linear(4, 4), send=lambda *job: jobs.put(job))
        jobs.put(None)
        thread.join()

    recording = record_ranks(2, body)
    assert prove(recording.schedule, smt=False).verdict == "proved"
    assert sum(len(slot) for program in recording.schedule.programs for slot in program) == 20


def test_two_tensors_of_a_boundary_sent_singly_in_turn_with_others_are_one_message():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x, y):
            return self.layer(x), self.layer(y)

    def body(rank):
        first, last = Pair(), Pair()
        ours = first(torch.randn(SHAPE), torch.randn(SHAPE))
        theirs = [torch.empty(SHAPE) for _ in range(2)]
        for out, into in zip(ours, theirs, strict=True):
            ends = [lambda out=out: dist.isend(out.detach(), 1 - rank), lambda into=into: dist.irecv(into, 1 - rank)]
            for work in [end() for end in (ends if rank == 0 else reversed(ends))]:
                work.wait()
        for tensor in theirs:
            tensor.requires_grad_()
        sum(t.sum() for t in last(*theirs)).backward()
        back = [torch.empty(SHAPE) for _ in range(2)]
        for tensor, into in zip(theirs, back, strict=True):
            ends = [lambda t=tensor: dist.isend(t.grad, 1 - rank), lambda into=into: dist.irecv(into, 1 - rank)]
            for work in [end() for end in (ends if rank == 0 else reversed(ends))]:
                work.wait()
        torch.autograd.backward(ours, back)

    recording = record_ranks(2, body)
    assert prove(recording.schedule, smt=False).verdict == "proved"
    assert [show_slot(slot) for slot in recording.schedule.programs[0]][1:3] == ["0SF0>@1", "1RF0<@1"]


def test_what_one_call_of_a_named_function_computes_is_one_slot_wherever_it_is_defined():
    def body(rank):
        stage = nn.Linear(4, 4)

        class Schedule:  # no module
            def overlapped_forward_backward(self, x, loss):
                y = stage(x)
                loss.backward()
                return y

        schedule, loss = Schedule(), None
        for count in range(3):
            if rank == 0:
                y = stage(torch.randn(SHAPE))
                dist.send(y.detach(), 1)
                continue
            x = torch.empty(SHAPE)
            dist.recv(x, 0)
            loss = (schedule.overlapped_forward_backward(x, loss) if count else stage(x)).sum()
        if loss is not None:
            loss.backward()

    slots = [show_slot(slot) for slot in record_ranks(2, body).schedule.programs[1]]
    assert slots[3] == "1F1>+1B0>+1W0>"
    assert slots[5] == "1F2>+1B1>+1W1>"


def test_a_message_of_a_batch_is_where_its_part_is_made_and_a_wrong_gradient_fails_in_the_backward():
    def body(rank):
        stage, ops = nn.Linear(4, 4), []

        def post():
            for work in dist.batch_isend_irecv(ops):
                work.wait()
            ops.clear()

        if rank == 0:
            y = stage(torch.randn(SHAPE))
            ops.append(dist.P2POp(dist.isend, y.detach(), 1))  # the line of the send
            post()
            y.backward(torch.ones(1))
        else:
            x = torch.empty(SHAPE)
            ops.append(dist.P2POp(dist.irecv, x, 0))
            post()
            stage(x.requires_grad_()).sum().backward()

    recording = record_ranks(2, body, check=False)
    (failure,) = recording.schedule.failures
    assert "during 0B0>: Mismatch in shape" in failure.what
    source = Path(__file__).read_text().splitlines()
    line = 1 + next(number for number, text in enumerate(source) if text.endswith("# the line of the send"))
    send = next(placed for placed in recording.schedule if placed.op.kind == "SF")
    assert recording.schedule.observed.place(send).startswith(f"{__file__}:{line}")
