"""Messages and computations are not merged or dropped silently: where they are ambiguous, a note says so."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dualpipe.testing import record_ranks
from proofs.prove import prove
from tests.record.two_ranks import SHAPE, assert_plain, receive, text, train


def verdicts(recording) -> dict[str, str]:
    return {name: check["verdict"] for name, check in prove(recording.schedule).as_json()["checks"].items()}


def batch(op, tensors, peer) -> None:
    for work in dist.batch_isend_irecv([dist.P2POp(op, tensor, peer) for tensor in tensors]):
        work.wait()


def both_forwards_first(rank, backward) -> None:
    """GPipe of two microbatches on two ranks; ``backward`` gets the outputs and inputs of a rank."""
    stage = nn.Linear(4, 4)
    if rank == 0:
        outputs = [stage(torch.randn(SHAPE)) for _ in range(2)]
        for y in outputs:
            dist.send(y.detach(), 1)
        backward(outputs, [])
    else:
        inputs = [receive(0).requires_grad_() for _ in range(2)]
        backward([stage(x) for x in inputs], inputs)


def test_two_receives_of_one_batch_matched_with_different_sends_are_two_ops():
    def body(rank):
        def backward(outputs, inputs):
            if rank == 1:
                for y, x in zip(outputs, inputs, strict=True):
                    y.sum().backward()
                    dist.send(x.grad, 0)
            else:
                lost, gradient = torch.empty(SHAPE), torch.empty(SHAPE)
                batch(dist.irecv, [lost, gradient], 1)
                outputs[0].backward(gradient)

        both_forwards_first(rank, backward)

    recording = record_ranks(2, body)
    assert text(recording, 0).endswith("0RB0>@1+0RB0>@1 0B0>+0W0>")
    assert verdicts(recording)["messages"] == "refuted"
    assert recording.caveats == ("1 receive has a tensor that no observed forward or backward uses",)
    unused, repeated = recording.notes
    assert "rank 0: no observed forward or backward uses what it receives from rank 1 at " in unused
    assert unused.endswith("it is named 0RB0>@1 by what was sent")
    assert repeated.startswith("rank 0: 0RB0>@1 occurs 2 times, posted at ")


def test_a_gradient_sent_and_received_twice_is_two_messages():
    def body(rank):
        stage = nn.Linear(4, 4)
        if rank == 0:
            y = stage(torch.randn(SHAPE))
            dist.send(y.detach(), 1)
            gradients = [torch.empty(SHAPE) for _ in range(2)]
            batch(dist.irecv, gradients, 1)
            y.backward(gradients[0])
        else:
            x = receive(0).requires_grad_()
            stage(x).sum().backward()
            batch(dist.isend, [x.grad, x.grad], 0)

    recording = record_ranks(2, body)
    assert text(recording, 1).endswith("1SB0>@0+1SB0>@0")
    assert verdicts(recording)["messages"] == "refuted"


def test_gradients_of_two_microbatches_in_one_run_of_the_engine_are_separate():
    def body(rank):
        def backward(outputs, inputs):
            if rank == 1:
                losses = [y.square().sum() for y in outputs]
                print(sum(loss.detach() for loss in losses))  # must not join the two microbatches
                for loss in losses:
                    loss.backward()
                batch(dist.isend, [x.grad for x in inputs], 0)
            else:
                gradients = [torch.empty(SHAPE) for _ in range(2)]
                batch(dist.irecv, gradients, 1)
                torch.autograd.backward(outputs, gradients)

        both_forwards_first(rank, backward)

    recording = record_ranks(2, body)
    assert text(recording, 0) == "0F0> 0F1> 0SF0>@1 0SF1>@1 0RB0>@1+0RB1>@1 0B0>+0B1>+0W0>+0W1>"
    assert text(recording, 1) == "1RF0>@0 1RF1>@0 1F0> 1F1> 1B0>+1W0> 1B1>+1W1> 1SB0>@0+1SB1>@0"
    assert (set(verdicts(recording).values()), recording.notes) == ({"proved", "skipped"}, ())


def test_a_gradient_that_the_backward_does_not_use_is_noted():
    def body(rank):
        stage = nn.Linear(4, 4)
        if rank == 1:
            train(rank, stage)
            return
        for _ in range(2):
            y = stage(torch.randn(SHAPE))
            dist.send(y.detach(), 1)
            receive(1)
            y.backward(torch.ones(SHAPE))

    recording = record_ranks(2, body)
    assert_plain(recording)
    assert recording.caveats == ("2 receives have tensors that no observed forward or backward uses",)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return x + self.layer(x)


class Cut(nn.Module):
    def forward(self, y):
        return y.detach().requires_grad_()


CUTS = {
    "detach": lambda y: (leaf := y.detach().requires_grad_(), leaf),
    "clone": lambda y: (leaf := y.detach().clone().requires_grad_(), leaf),
    "a view of the leaf": lambda y: (leaf := y.detach().requires_grad_(), leaf.view(SHAPE)),
    "a function of the leaf": lambda y: (leaf := y.detach().requires_grad_(), leaf * 2),
    "a copy": lambda y: (leaf := torch.empty(SHAPE).copy_(y.detach()).requires_grad_(), leaf),
    "a module": lambda y: (leaf := Cut()(y), leaf),
}
"""How a stage's output becomes the input of the next one on the same rank: the leaf, and what the stage gets."""


def residual_v(rank, cut, stages, call=lambda stage, x, *more: stage(x)) -> None:
    """Rank 0 holds stages 0 and 3, rank 1 stages 1 and 2; ``call`` gets the input of stage 1 as well for stage 2."""
    first, last = stages
    for _ in range(2):
        if rank == 0:
            y = call(first, torch.randn(SHAPE))
            dist.send(y.detach(), 1)
            x = receive(1).requires_grad_()
            call(last, x).sum().backward()
            dist.send(x.grad, 1)
            y.backward(receive(1))
        else:
            x = receive(0).requires_grad_()
            y = call(first, x)
            leaf, given = cut(y)
            z = call(last, given, x, y)
            dist.send(z.detach(), 0)
            z.backward(receive(0))
            y.backward(leaf.grad)
            dist.send(x.grad, 0)


class Fed(nn.Module):
    """Gets its input as an attribute; its forward has no arguments."""

    def __init__(self):
        super().__init__()
        self.layer, self.given = nn.Linear(4, 4), None

    def forward(self):
        return self.given + self.layer(self.given)


class Skipping(Residual):
    """Also takes the input of the stage before."""

    def forward(self, x, skip=None):
        return super().forward(x if skip is None else x + skip)


def feed(stage, x, *more):
    stage.given = x
    return stage()


def skip(stage, x, before=None, y=None):
    return stage(x, None if before is None else before.detach())


def log_both(stage, x, before=None, y=None):
    z = stage(x)
    if y is not None:
        (y + z).mean()  # a function of both outputs, with a graph, for the log
    return z


CALLS = {"a setter": (Fed, feed), "a skip": (Skipping, skip), "a log of both outputs": (Residual, log_both)}


@pytest.mark.parametrize(("cut", "between"), [*((cut, None) for cut in CUTS), *(("detach", call) for call in CALLS)])
def test_two_stages_back_to_back_on_one_rank_are_two(cut, between):
    stage, *call = CALLS[between] if between else [Residual]
    recording = record_ranks(2, lambda rank: residual_v(rank, CUTS[cut], (stage(), stage()), *call))
    assert recording.schedule.routes == {">": (0, 1, 1, 0)}
    assert text(recording, 1).startswith(
        "1RF0>@0 1F0> 2F0> 2SF0>@0 2RB0>@0 2B0>+2W0> 1B0>+1W0> 1SB0>@0 1RF1>@0 1F1> 2F1>"
    )
    assert set(verdicts(recording).values()) == {"proved", "skipped"}
    assert (recording.notes, recording.caveats) == ((), ())


def test_microbatches_of_data_whose_outputs_are_logged_together_are_two():
    def body(rank):
        stage = nn.Linear(4, 4)
        if rank == 0:
            outputs = [stage(torch.randn(SHAPE)) for _ in range(2)]
            sum(y.mean() for y in outputs)  # with a graph, for the log
            for y in outputs:
                dist.send(y.detach(), 1)
            for y in outputs:
                y.backward(receive(1))
        else:
            for x in [receive(0).requires_grad_() for _ in range(2)]:
                stage(x).sum().backward()
                dist.send(x.grad, 0)

    assert text(record_ranks(2, body), 0).startswith("0F0> 0F1> 0SF0>@1 0SF1>@1 ")


class Reading(nn.Module):
    """Reads its input from ``box``, in one of several ways; ``how`` is applied to it."""

    def __init__(self, box, how) -> None:
        super().__init__()
        self.weight, self.box, self.how = nn.Parameter(torch.randn(4, 4)), box, how

    def forward(self, *arguments):
        return self.how(self.box[0]) @ self.weight


READ = {
    "an operator": lambda x: x * 2,
    "a copy into a buffer": lambda x: torch.zeros(SHAPE).copy_(x),
    "an addition in place": lambda x: torch.zeros(SHAPE).add_(x),
    "a view": lambda x: x.view(SHAPE),
}


@pytest.mark.parametrize(
    ("how", "argument"),
    [*((how, "nothing") for how in READ), ("a copy into a buffer", "an object"), ("a copy into a buffer", "tokens")],
)
def test_an_input_that_is_no_argument_is_an_input_of_the_stage(how, argument):
    def body(rank):
        box = [None]
        stage = Reading(box, READ[how])
        arguments = {"nothing": (), "an object": (object(),), "tokens": (torch.arange(3),)}[argument]

        def call(x):
            box[0] = x
            return stage(*arguments)

        train(rank, call)

    recording = record_ranks(2, body)
    assert_plain(recording)
    assert (recording.notes, recording.caveats) == ((), ())


def test_the_sum_of_three_microbatches_in_one_run_of_the_engine_has_an_order_of_its_own():
    def body(rank):
        stage = nn.Linear(4, 4)
        if rank == 0:
            outputs = [stage(torch.randn(SHAPE)) for _ in range(3)]
            for y in outputs:
                dist.send(y.detach(), 1)
            torch.autograd.backward(outputs, [receive(1) for _ in outputs])
        else:
            for x in [receive(0).requires_grad_() for _ in range(3)]:
                stage(x).sum().backward()
                dist.send(x.grad, 0)

    recording = record_ranks(2, body)
    assert text(recording, 0).endswith("0B0>+0B1>+0B2>+0W0>+0W1>+0W2>")
    assert recording.caveats == (
        "1 run of the engine sums gradients of several microbatches in an order that could not be determined",
    )


DOUBTS = {
    "a stage that takes a detached tensor": (
        lambda first, second, x: second(first(x).detach()).sum().backward(),
        "takes a detached tensor of 1F0> without requires_grad; whether it is a stage of its own could not be",
        "2 calls have a stage boundary that could not be determined",
    ),
    "a forward called twice": (
        lambda first, second, x: (first(x), first(x))[1].sum().backward(),
        "had been called on the same tensors for 1F0>; the file has that forward once (2 times)",
        "2 forwards ran more than once and are written once",
    ),
    "a backward run twice": (
        lambda first, second, x: [y.backward(torch.ones(SHAPE), retain_graph=True) for y in [first(x)] * 2],
        "from a tensor of 1F0> from which it had run before; the file has that backward once (2 times)",
        "2 backwards ran more than once and are written once",
    ),
}


@pytest.mark.parametrize("doubt", DOUBTS)
def test_what_a_schedule_cannot_express_is_a_note_and_a_caveat(doubt):
    run, note, caveat = DOUBTS[doubt]

    def body(rank):
        first, second = nn.Linear(4, 4), nn.Linear(4, 4)
        if rank == 0:
            train(rank, first)
            return
        for _ in range(2):
            x = receive(0).requires_grad_()
            run(first, second, x)
            dist.send(torch.zeros(SHAPE) if x.grad is None else x.grad, 0)

    recording = record_ranks(2, body)
    assert any(note in other for other in recording.notes), recording.notes
    assert caveat in recording.caveats


@pytest.mark.parametrize("overtake", [False, True])
def test_messages_that_overtake_those_of_another_process_group_are_noted(overtake):
    """Messages of two groups are matched in each group by itself; only if their orders differ is there a caveat."""

    def body(rank):
        groups = [dist.new_group([0, 1]) for _ in range(2)]
        stage, works = nn.Linear(4, 4), []
        for number in [1, 0] if rank == 1 and overtake else [0, 1]:
            if rank == 0:
                works.append(dist.isend(stage(torch.randn(SHAPE)).detach(), 1, group=groups[number]))
            else:
                x = torch.empty(SHAPE)
                dist.recv(x, 0, group=groups[number])
                stage(x.requires_grad_())
        for work in works:
            work.wait()

    recording = record_ranks(2, body)
    caveat = "2 messages overtake messages of another process group, which a schedule file cannot express"
    assert (caveat in recording.caveats) == overtake
    assert ("is received in another order than it was posted" in " ".join(recording.notes)) == overtake
