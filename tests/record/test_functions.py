"""Functions of the program that communicate in their forward and in their backward, within a run of the engine."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dualpipe.testing import record_ranks
from proofs.prove import prove
from tests.record.two_ranks import SHAPE, assert_plain, receive, text, train


class Send(torch.autograd.Function):
    """Sends an activation; its backward receives the gradient and scales it."""

    @staticmethod
    def forward(context, y, peer, scale=1):
        context.peer, context.scale = peer, scale
        dist.send(y.detach(), peer)
        return y.new_zeros(())

    @staticmethod
    def backward(context, nothing):
        gradient = torch.empty(SHAPE)
        dist.recv(gradient, context.peer)
        return gradient if context.scale == 1 else gradient * context.scale, None, None


class Receive(torch.autograd.Function):
    """Receives an activation; its backward sends the gradient."""

    @staticmethod
    def forward(context, token, peer):
        context.peer = peer
        x = torch.empty(SHAPE)
        dist.recv(x, peer)
        return x

    @staticmethod
    def backward(context, gradient):
        dist.send(gradient.contiguous(), context.peer)
        return torch.zeros(()), None


def token() -> torch.Tensor:
    return torch.zeros((), requires_grad=True)


def roots(rank, ranks, scale) -> list[torch.Tensor]:
    """The forwards of two microbatches; returns what their backwards start from."""
    stage = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    found = []
    for _ in range(2):
        y = stage(Receive.apply(token(), rank - 1) if rank else torch.randn(SHAPE))
        found.append(Send.apply(y, rank + 1, scale) if rank < ranks - 1 else y.square().sum())
    return found


@pytest.mark.parametrize("scale", [1, 2])
def test_messages_of_a_backward_are_recorded(scale):
    def body(rank):
        for root in roots(rank, 3, scale):
            root.backward()

    recording = record_ranks(3, body)
    assert [text(recording, rank) for rank in range(3)] == [
        "0F0> 0SF0>@1 0F1> 0SF1>@1 0RB0>@1 0B0>+0W0> 0RB1>@1 0B1>+0W1>",
        "1RF0>@0 1F0> 1SF0>@2 1RF1>@0 1F1> 1SF1>@2 1RB0>@2 1B0>+1W0> 1SB0>@0 1RB1>@2 1B1>+1W1> 1SB1>@0",
        "2RF0>@1 2F0> 2RF1>@1 2F1> 2B0>+2W0> 2SB0>@1 2B1>+2W1> 2SB1>@1",
    ]
    assert prove(recording.schedule, smt=False).verdict == "proved"
    assert (recording.notes, recording.caveats) == ((), ())


def test_the_microbatches_of_one_run_of_the_engine_are_in_the_order_in_which_it_takes_them():
    """The engine begins with the last one, so the gradients are summed in reverse order."""
    recording = record_ranks(2, lambda rank: sum(roots(rank, 2, 1)).backward())
    assert text(recording, 0).endswith("0RB1>@1 0B1>+0W1> 0RB0>@1 0B0>+0W0>")
    assert text(recording, 1).endswith("1B1>+1W1> 1SB1>@0 1B0>+1W0> 1SB0>@0")
    checks = prove(recording.schedule, smt=False).as_json()["checks"]
    assert [name for name, check in checks.items() if check["verdict"] == "refuted"] == ["accumulation"]


def test_two_stages_of_one_rank_in_one_run_of_the_engine():
    def body(rank):
        first, last = nn.Linear(4, 4), nn.Linear(4, 4)
        for _ in range(2):
            if rank == 0:
                sent = Send.apply(first(torch.randn(SHAPE)), 1)
                last(Receive.apply(sent, 1)).sum().backward()
            else:
                Send.apply(first(Receive.apply(token(), 0)), 0).backward()

    recording = record_ranks(2, body)
    assert recording.schedule.routes == {">": (0, 1, 0)}
    assert text(recording, 0).startswith(
        "0F0> 0SF0>@1 2RF0>@1 2F0> 2B0>+2W0> 2SB0>@1 0RB0>@1 0B0>+0W0> 0F1> 0SF1>@1 2RF1>@1 2F1>"
    )
    assert prove(recording.schedule, smt=False).verdict == "proved"


class Queue(nn.Module):
    """A stage that puts its output into a queue and returns none; its root is a constant without a forward's marks."""

    class Put(torch.autograd.Function):
        @staticmethod
        def forward(context, y, due):
            due.append(y)
            return torch.tensor(1.0, requires_grad=True)

        @staticmethod
        def backward(context, nothing):
            return receive(1), None

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.due, self.roots = nn.Sequential(nn.Linear(4, 4), nn.Tanh()), [], []

    def forward(self, x):
        self.roots.append(self.Put.apply(self.layers(x), self.due))


def test_a_backward_is_known_by_what_was_sent_if_the_module_returned_nothing():
    def body(rank):
        if rank:
            train(rank, nn.Linear(4, 4))
            return
        stage = Queue()
        for _ in range(2):
            stage(torch.randn(SHAPE))
            dist.send(stage.due.pop(), 1)
            sum(stage.roots[-1:]).backward()

    recording = record_ranks(2, body, compare=True)
    assert_plain(recording)
    assert recording.comparison.verdict == "unknown"
    assert "microbatch 0 cannot be run plainly: its module takes or returns no tensor" in recording.comparison.text()


class Announce(torch.autograd.Function):
    """Its backward sends the shape of an activation and the activation, and then receives its own gradient."""

    @staticmethod
    def forward(context, y, due):
        context.due = due
        return y.new_zeros(())

    @staticmethod
    def backward(context, nothing):
        dist.send(torch.empty(2, dtype=torch.int64).copy_(torch.tensor(SHAPE)), 2)
        dist.send(context.due, 2)
        gradient = torch.empty(SHAPE)
        dist.recv(gradient, 2)
        return gradient, None


def announced(rank: int) -> None:
    """1F1B of two microbatches; a backward of rank 1 makes the shape that goes before an activation."""
    stage = nn.Linear(4, 4)
    inputs, outputs = [], []
    for mb in range(2):
        if rank == 2 and mb:
            dist.recv(torch.empty(2, dtype=torch.int64), 1)
        received = torch.empty(SHAPE)
        if rank:
            dist.recv(received, rank - 1)
        x = received.requires_grad_()
        y = stage(x)
        inputs.append(x)
        outputs.append(y)
        if rank == 0 or (rank == 1 and mb == 0):
            dist.send(y.detach(), rank + 1)
        if rank == 2:
            y.square().sum().backward()
            if mb:
                dist.send(inputs[0].grad, 1)
                dist.send(x.grad, 1)
    for mb in range(2) if rank < 2 else ():
        if rank == 1 and mb == 0:
            Announce.apply(outputs[0], outputs[1].detach()).backward()
        else:
            gradient = torch.empty(SHAPE)
            dist.recv(gradient, rank + 1)
            outputs[mb].backward(gradient)
        if rank:
            dist.send(inputs[mb].grad, 0)


def test_integers_that_a_backward_makes_and_sends_are_no_gradient():
    """As in nanotron, which sends shapes before a tensor, at times from within a backward."""
    recording = record_ranks(3, announced)
    assert prove(recording.schedule, smt=False).as_json()["checks"]["messages"]["verdict"] == "proved"
    assert text(recording, 1) == (
        "1RF0>@0 1F0> 1SF0>@2 1RF1>@0 1F1> 1SF1>@2 1RB0>@2 1B0>+1W0> 1SB0>@0 1RB1>@2 1B1>+1W1> 1SB1>@0"
    )
