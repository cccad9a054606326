"""Module calls that a plain run repeats one by one, as of a stage whose ``forward`` is called by its name."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.func import functional_call, vjp

from dualpipe.record.child.ends import run_backward
from dualpipe.record.child.forwards import Trials
from dualpipe.record.child.kept import Kept
from dualpipe.record.child.marks import Table
from dualpipe.record.child.regions import copied, is_readable
from dualpipe.record.child.replay import refusal
from dualpipe.testing import record_ranks
from tests.record.two_ranks import receive
from tests.record.two_ranks import train as train_two


class Stage(nn.Module):
    """Parts that return their input, or change it in place, and functions between parts."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(4, 4) for _ in range(3))
        self.relu, self.same = nn.ReLU(inplace=True), nn.Identity()

    def forward(self, x):
        hidden = self.relu(self.first(self.same(x)))
        hidden = self.second(hidden)
        memory = hidden.untyped_storage()._cdata
        for _ in range(100):
            hidden = hidden + 1
            if hidden.untyped_storage()._cdata == memory:  # in that of what ``second`` returned, which is free again
                break
        return self.same(self.third(hidden))


def train(rank):
    torch.manual_seed(rank)
    stage = Stage()
    optimizer = torch.optim.SGD(stage.parameters(), lr=0.1)
    for _ in range(2):
        x = torch.randn(2, 4)
        if rank == 0:
            y = stage.forward(x)
            dist.send(y.detach(), 1)
            gradient = torch.empty(2, 4)
            dist.recv(gradient, 1)
            y.backward(gradient)
        else:
            dist.recv(x, 0)
            stage.forward(x.requires_grad_()).square().mean().backward()
            dist.send(x.grad, 0)
    optimizer.step()


def test_parts_of_a_stage_are_run_one_by_one_and_their_tensors_are_not_taken_for_each_other(monkeypatch):
    put = Table.put

    def put_and_forget(table, tensor, marks):
        table._sweep_at = 0  # as in a program with thousands of tensors
        put(table, tensor, marks)
        table._sweep_at = 0

    monkeypatch.setattr(Table, "put", put_and_forget)
    comparison = record_ranks(2, train, compare=True).comparison
    assert comparison.verdict == "equal", comparison.text()
    assert [chunk.notes for chunk in comparison.chunks] == [(), ()]


def functional(rank):
    """A stage as a function of its weights, and its backward by ``vjp``."""
    torch.manual_seed(rank)
    stage = nn.Linear(4, 4)
    weights = {name: weight.detach() for name, weight in stage.named_parameters()}
    x = receive(0) if rank else torch.randn(2, 4)
    y, backward = vjp(lambda weights, x: functional_call(stage, weights, (x,)), weights, x)
    if rank == 0:
        dist.send(y.detach(), 1)
        backward(receive(1))
    else:
        dist.send(backward(2 * y.detach())[1], 0)


def test_a_module_with_other_weights_than_its_own_is_not_run_plainly():
    comparison = record_ranks(2, functional, compare=True, timeout=30).comparison
    assert comparison.verdict == "unknown"


def test_why_a_module_is_not_run_plainly():
    module = nn.Linear(2, 2)
    assert refusal(module) == ""
    module._parameters["weight"] = torch.ones(2, 2)
    assert refusal(module) == "it is called with other weights than its own (torch.func.functional_call)"


class Cell(nn.Module):
    """Returns two tensors, one of which is computed from the other."""

    def __init__(self):
        super().__init__()
        self.gate, self.state = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, hidden, state):
        state = torch.sigmoid(self.gate(hidden)) * state + self.state(hidden)
        return torch.tanh(state), state


def two_outputs(rank, swapped):
    torch.manual_seed(rank)
    cell = Cell()
    optimizer = torch.optim.SGD(cell.parameters(), lr=0.1)
    for _ in range(2):
        if rank == 0:
            outputs = cell(torch.randn(2, 4), torch.randn(2, 4))
            for output in outputs:
                dist.send(output.detach(), 1)
            gradients = [receive(1), receive(1)]
            torch.autograd.backward(outputs, gradients[::-1] if swapped else gradients)
        else:
            inputs = [receive(0).requires_grad_(), receive(0).requires_grad_()]
            hidden, state = cell(*inputs)
            (hidden.square().mean() + state.mean()).backward()
            for tensor in inputs:
                dist.send(tensor.grad, 0)
    optimizer.step()


@pytest.mark.parametrize("swapped", [False, True])
def test_an_output_from_which_another_is_computed_has_its_own_gradient(swapped):
    first, last = record_ranks(2, lambda rank: two_outputs(rank, swapped), compare=True).comparison.chunks
    assert (last.text(), last.faults) == (f"{last.chunk} on rank 1: outputs and gradients equal", ())
    assert first.notes == ()
    says = "microbatch 0 uses the gradient that stage 1 has for one output for another one"
    assert [fault.startswith(says) for fault in first.faults[:1]] == [True] * swapped


def test_the_backward_runs_from_an_output_to_which_another_one_gives_no_gradient():
    weight = torch.ones(2, requires_grad=True)
    hidden = weight * 3
    output = Blind.apply(hidden)
    gradient = torch.full((2,), 5.0)
    outside = run_backward([(output, torch.ones(2)), (hidden, gradient)])
    assert outside == {id(gradient): gradient}
    assert weight.grad.tolist() == [15.0, 15.0]


class Blind(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return None


@torch.no_grad()
def test_a_forward_with_an_input_in_the_memory_of_a_freed_one_repeats_none():
    trials, kept, freed = Trials(), torch.ones(2), torch.ones(3)
    assert trials.earlier(0, [kept, freed], 1) is None
    with torch.enable_grad():
        assert trials.earlier(0, [kept, freed], 2) == 1
    for _ in range(100):
        trials.earlier(0, [kept, freed], 1)
        freed = torch.ones(4)
        with torch.enable_grad():
            assert trials.earlier(0, [kept, freed], 2) is None


def test_an_output_whose_memory_is_freed_after_its_send_is_compared_by_its_value_at_the_call():
    """As zero-bubble schedules do, which keep the output only for its graph."""

    def body(rank):
        torch.manual_seed(rank)
        stage = nn.Linear(4, 4)
        optimizer = torch.optim.SGD(stage.parameters(), lr=0.1)
        x = torch.randn(2, 4) if rank == 0 else receive(0).requires_grad_()
        y = stage(x)
        if rank == 0:
            dist.send(y.detach(), 1)
            y.untyped_storage().resize_(0)
            y.backward(receive(1))
        else:
            gradient = 2 * y.detach()
            y.untyped_storage().resize_(0)
            y.backward(gradient)
            dist.send(x.grad, 0)
        optimizer.step()

    comparison = record_ranks(2, body, compare=True).comparison
    assert comparison.verdict == "equal", comparison.text()


def test_what_has_no_memory_is_not_read():
    linear = nn.Linear(4, 4)
    linear.weight.untyped_storage().resize_(0)
    assert not is_readable(linear.weight)
    assert copied(linear.weight).numel() == 0
    assert is_readable(linear.weight[4:])
    assert refusal(linear) == "the memory of its weights is freed when it is called"


class Fused(torch.autograd.Function):
    """A product whose backward adds the weight gradient to ``main_grad``, as Megatron's fused accumulation does."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        weight.main_grad.add_(gradient.t() @ x)
        return gradient @ weight, None


def test_a_backward_that_adds_to_main_grad_by_itself_is_run_plainly():
    def body(rank):
        torch.manual_seed(rank)
        stage = nn.Linear(4, 4, bias=False)
        stage.weight.main_grad = torch.zeros(4, 4)
        stage.forward = lambda x: torch.tanh(Fused.apply(x, stage.weight))
        optimizer = torch.optim.SGD(stage.parameters(), lr=0.1)
        train_two(rank, stage)
        stage.weight.grad = stage.weight.main_grad
        optimizer.step()

    comparison = record_ranks(2, body, compare=True).comparison
    assert comparison.verdict == "equal", comparison.text()


def test_a_parameter_that_takes_the_place_of_another_one_before_the_backward_is_not_kept():
    kept, linear = Kept(), nn.Linear(2, 2)
    kept.module_runs(linear)
    linear.weight = nn.Parameter(torch.ones(2, 2))  # as ``fully_shard`` does for the time of a call
    kept.engine_runs(linear)
    assert [name for name, _ in kept.named] == ["weight", "bias"]
