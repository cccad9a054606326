"""Module calls that a plain run repeats one by one, as of a stage whose ``forward`` is called by its name."""

import torch
import torch.distributed as dist
from torch import nn

from dualpipe.record.child.forwards import Trials
from dualpipe.record.child.marks import Table
from dualpipe.testing import record_ranks


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
