"""Messages and computations other than activations and ``.grad``: labels, masks, evaluations, separate buffers."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional

from dualpipe.testing import record_ranks
from proofs.prove import prove
from tests.record.two_ranks import PLAIN, SHAPE, assert_plain, receive, text, train


def verdict(recording) -> str:
    return prove(recording.schedule).as_json()["verdict"]


LOSSES = {
    "functional": lambda y, labels: functional.mse_loss(y, labels),
    "a module": lambda y, labels: nn.MSELoss()(y, labels),
    "a scaled one": lambda y, labels: functional.mse_loss(y, labels) * labels.mean(),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_labels_sent_by_the_first_rank_are_neither_activation_nor_gradient(loss):
    def body(rank):
        stage = nn.Linear(4, 4)
        for _ in range(2):
            if rank == 0:
                y = stage(torch.randn(SHAPE))
                dist.send(torch.randn(SHAPE), 1)
                dist.send(y.detach(), 1)
                y.backward(receive(1))
            else:
                labels = receive(0)
                x = receive(0).requires_grad_()
                LOSSES[loss](stage(x), labels).backward()
                dist.send(x.grad, 0)

    recording = record_ranks(2, body)
    assert_plain(recording)
    assert recording.caveats == ("4 message ends are left out as control data",)


def test_a_mask_that_a_stage_also_takes_is_data():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x, mask):
            return self.layer(x) * mask

    def body(rank):
        stage = Masked()
        for _ in range(2):
            if rank == 0:
                mask = torch.ones(SHAPE)
                y = stage(torch.randn(SHAPE), mask)
                dist.send(mask, 1)
                dist.send(y.detach(), 1)
                y.backward(receive(1))
            else:
                mask = receive(0)
                x = receive(0).requires_grad_()
                stage(x, mask).sum().backward()
                dist.send(x.grad, 0)

    recording = record_ranks(2, body)
    assert_plain(recording)
    assert "to a forward of rank 1; it is taken for data" in recording.notes[0]


def test_the_first_stage_may_receive_its_data():
    def body(rank):
        stage = nn.Linear(4, 4)
        for _ in range(2):
            if rank == 0:
                y = stage(receive(1))
                dist.send(y.detach(), 1)
                y.backward(receive(1))
            else:
                dist.send(torch.randn(SHAPE), 0)
                x = receive(0).requires_grad_()
                stage(x).sum().backward()
                dist.send(x.grad, 0)

    recording = record_ranks(2, body)
    assert_plain(recording)
    assert "what rank 1 sends at" in recording.notes[0]


def test_forwards_without_gradients_that_are_computed_again_are_one_forward():
    def body(rank):
        stage, kept = nn.Linear(4, 4), []
        for _ in range(2):
            x = receive(0) if rank else torch.randn(SHAPE)
            with torch.no_grad():
                y = stage(x)
            if rank == 0:
                dist.send(y, 1)
            kept.append(x)
        for x in kept:
            y = stage(x.requires_grad_(rank == 1))
            if rank == 0:
                y.backward(receive(1))
            else:
                y.sum().backward()
                dist.send(x.grad, 0)

    recording = record_ranks(2, body)
    assert text(recording, 0) == "0F0> 0SF0>@1 0F1> 0SF1>@1 0RB0>@1 0B0>+0W0> 0RB1>@1 0B1>+0W1>"
    assert text(recording, 1) == "1RF0>@0 1F0> 1RF1>@0 1F1> 1B0>+1W0> 1SB0>@0 1B1>+1W1> 1SB1>@0"
    assert recording.notes == ()


@pytest.mark.parametrize("same_buffer", [False, True])
@pytest.mark.parametrize("same_data", [False, True])
def test_an_evaluation_before_the_first_step_is_left_out(same_data, same_buffer):
    def body(rank):
        stage, data, buffer = nn.Linear(4, 4), torch.randn(SHAPE), torch.empty(SHAPE)

        def receive(peer):
            tensor = buffer.detach() if same_buffer else torch.empty(SHAPE)
            dist.recv(tensor, peer)
            return tensor

        def pick():
            return data if same_data else torch.randn(SHAPE)

        with torch.no_grad():
            for _ in range(2):
                if rank == 0:
                    dist.send(stage(pick()), 1)
                else:
                    stage(receive(0))
        for _ in range(2):
            if rank == 0:
                y = stage(pick())
                dist.send(y.detach(), 1)
                y.backward(receive(1))
            else:
                x = receive(0).requires_grad_()
                stage(x).square().sum().backward()
                dist.send(x.grad, 0)

    recording = record_ranks(2, body)
    assert_plain(recording)
    assert "2 microbatches ran without gradients, an evaluation, and are left out" in recording.notes


def test_inference_is_recorded_and_noted():
    def body(rank):
        stage = nn.Linear(4, 4)
        with torch.no_grad():
            for _ in range(2):
                if rank == 0:
                    dist.send(stage(torch.randn(SHAPE)), 1)
                else:
                    stage(receive(0))

    recording = record_ranks(2, body)
    assert text(recording, 0) == "0F0> 0SF0>@1 0F1> 0SF1>@1"
    assert [n.partition(" at ")[0] for n in recording.notes] == ["2 forwards", "2 forwards"]
    assert all(note.endswith("ran without gradients and have no backward") for note in recording.notes)


def test_weight_gradients_in_the_programs_own_buffers_are_written_where_they_are_computed():
    def body(rank):
        stage = nn.Linear(4, 4)
        weights = list(stage.parameters())
        buffers = [torch.zeros_like(weight) for weight in weights]
        for _ in range(2):
            if rank == 0:
                y = stage(torch.randn(SHAPE))
                dist.send(y.detach(), 1)
                found = torch.autograd.grad(y, weights, receive(1))
            else:
                x = receive(0).requires_grad_()
                gradient, *found = torch.autograd.grad(stage(x).sum(), [x, *weights])
                dist.send(gradient, 0)
            for buffer, more in zip(buffers, found, strict=True):
                buffer.add_(more)

    recording = record_ranks(2, body)
    assert_plain(recording)
    assert verdict(recording) == "proved"
    assert all("reach no .grad; their W is there (2 times)" in note for note in recording.notes)
    assert len(recording.notes) == 2


def test_a_stage_without_parameters_has_its_weight_gradient_with_its_backward():
    def body(rank):
        train(rank, nn.Linear(4, 4) if rank == 0 else nn.Tanh())

    recording = record_ranks(2, body)
    assert_plain(recording)
    assert recording.notes == (
        "rank 1: no module of stage 1 has a parameter to train; its W is written with its B (2 times)",
    )


def in_place_of_a_gradient(make):
    """The recording of a program that sends back what ``make`` makes of its stage."""

    def body(rank):
        stage = nn.Linear(4, 4)

        def send(tensor, peer):
            dist.send(make(stage) if rank == 1 else tensor, peer)

        train(rank, stage, send=send)

    recording = record_ranks(2, body, compare=True)
    assert_plain(recording)
    return recording


def test_another_tensor_in_place_of_a_gradient_is_noted():
    recording = in_place_of_a_gradient(lambda stage: torch.zeros(SHAPE))
    assert recording.caveats == ("2 sends have tensors that no observed forward or backward made",)
    assert recording.notes[0].startswith("rank 1: no observed forward or backward made what it sends at ")
    assert recording.comparison.verdict == "unknown"


def test_the_gradient_of_a_weight_in_place_of_that_of_the_input_is_noted():
    recording = in_place_of_a_gradient(lambda stage: stage.weight.grad[:2])
    assert recording.caveats == ("2 sends have the gradient of a parameter, where a stage takes that of its output",)
    assert " is the gradient of weight, where a stage takes that of its output" in recording.notes[0]
    assert recording.comparison.verdict == "different"
    assert "microbatch 0 does not take the gradient that stage 1 has for it" in recording.comparison.text()


def test_weight_gradients_that_replicas_exchange_are_control_data():
    def body(rank):
        stage = nn.Linear(4, 4)
        train(rank, stage)
        for end in (dist.send, dist.recv)[:: 1 if rank else -1]:
            end(stage.weight.grad, 1 - rank)

    recording = record_ranks(2, body)
    assert_plain(recording)
    assert recording.caveats == ("4 message ends are left out as control data",)


def test_a_backward_that_changes_no_weight_gradient_is_noted():
    def body(rank):
        stage = nn.Linear(4, 4)
        if rank == 0:
            train(rank, stage)
            return
        for _ in range(2):
            x = receive(0).requires_grad_()
            (gradient,) = torch.autograd.grad(stage(x).sum(), [x])
            dist.send(gradient, 0)

    recording = record_ranks(2, body)
    assert text(recording, 0) == PLAIN[0]
    assert text(recording, 1) == PLAIN[1].replace("+1W0>", "").replace("+1W1>", "")
    (note,) = recording.notes
    assert note.startswith("rank 1: a backward from the forward at ")
    assert note.endswith("changed no .grad: it has no W (2 times)")


def keep_elsewhere(parameter, how: str) -> object:
    """Move every gradient of the parameter to another tensor while the engine runs, as Megatron's DDP does."""
    parameter.main_grad = torch.zeros_like(parameter)
    own = torch.zeros_like(parameter)

    def move(*_):
        (own if how == "a tensor of its own" else parameter.main_grad).add_(parameter.grad)
        parameter.grad = None

    if how == "fused":
        return own
    if how == "a hook of the parameter":
        parameter.register_post_accumulate_grad_hook(move)
        return own
    node = parameter.expand_as(parameter).grad_fn.next_functions[0][0]
    node.register_hook(move)
    return node


class FusedLinear(torch.autograd.Function):
    """Adds the weight gradient to ``main_grad`` in its backward, and gives the engine none."""

    @staticmethod
    def forward(context, x, weight):
        context.kept = x.detach(), weight
        return x @ weight

    @staticmethod
    def backward(context, gradient):
        x, weight = context.kept
        weight.main_grad.add_(x.T @ gradient)
        return gradient @ weight.T, None


class Fused(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        return FusedLinear.apply(x, self.weight)


@pytest.mark.parametrize("how", ["a hook of the node", "a hook of the parameter", "a tensor of its own", "fused"])
def test_weight_gradients_that_are_moved_while_the_engine_runs_are_w(how):
    def body(rank):
        stage = Fused() if how == "fused" else nn.Linear(4, 4)
        kept = [keep_elsewhere(parameter, how) for parameter in stage.parameters()]
        train(rank, stage)
        del kept

    recording = record_ranks(2, body)
    assert_plain(recording)
    assert (recording.notes, recording.caveats) == ((), ())
