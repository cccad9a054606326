"""Comparisons of programs like Megatron: groups of one member, random states of their own, a norm of their own."""

import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import distributed_c10d as c10d

from dualpipe.record.child import singles
from dualpipe.testing import record_ranks
from dualpipe.testing.launch import launch
from tests.record.two_ranks import train

CALLS = {
    "all_reduce": lambda x: {"tensor": x},
    "all_gather": lambda x: {"tensor_list": [torch.zeros(4)], "tensor": x},
    "all_gather_into_tensor": lambda x: {"output_tensor": torch.zeros(4), "input_tensor": x},
    "all_gather_object": lambda x: {"object_list": [None], "obj": [x.sum().item()]},
    "all_to_all": lambda x: {"output_tensor_list": [torch.zeros(4)], "input_tensor_list": [x]},
    "all_to_all_single": lambda x: {"output": torch.zeros(4), "input": x},
    "broadcast": lambda x: {"tensor": x, "src": 0},
    "gather": lambda x: {"tensor": x, "gather_list": [torch.zeros(4)]},
    "reduce_scatter": lambda x: {"output": torch.zeros(4), "input_list": [x]},
    "reduce_scatter_tensor": lambda x: {"output": torch.zeros(4), "input": x},
    "scatter": lambda x: {"tensor": torch.zeros(4), "scatter_list": [x]},
    "scatter_object_list": lambda x: {
        "scatter_object_output_list": [None],
        "scatter_object_input_list": [[x.sum().item()]],
    },
}


def test_a_collective_of_one_member_gives_what_torch_gives():
    def body(context):
        found = {}
        for name, arguments in CALLS.items():
            ours, theirs = arguments(torch.arange(4.0)), arguments(torch.arange(4.0))
            assert singles.compute(name, ours) is None
            with warnings.catch_warnings(action="ignore", category=FutureWarning):  # of those with a newer name
                getattr(c10d, name)(**theirs)
            found[name] = repr(ours), repr(theirs)
        assert singles.compute("all_reduce", {"tensor": torch.ones(1), "async_op": True}).wait()
        return found

    (found,) = launch(1, body, timeout=60.0, grace=5.0).values()
    assert found.keys() == CALLS.keys()
    assert [name for name, (ours, theirs) in found.items() if ours != theirs] == []


class Stage(nn.Module):
    """A stage whose forward runs collectives of its group, and draws a dropout mask from a random state of its own."""

    def __init__(self, group):
        super().__init__()
        self.linear, self.group = nn.Linear(4, 4), group
        self.tracker = {"state": torch.get_rng_state()}

    def forward(self, x):
        y = self.linear(x)
        largest = y.detach().amax(0)
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.group)
        gathered = [torch.empty_like(y)]
        dist.all_gather(gathered, y.detach(), group=self.group)
        running = torch.get_rng_state()
        torch.set_rng_state(self.tracker["state"])
        dropped = nn.functional.dropout(y, 0.2)
        self.tracker["state"] = torch.get_rng_state()
        torch.set_rng_state(running)
        return dropped - largest + gathered[0].mean()


def step(counted):
    """A step of two stages that clips by a norm of its own, which counts each gradient ``counted`` times."""

    def body(rank):
        torch.manual_seed(rank)
        groups = [dist.new_group([each]) for each in range(2)]
        stage = Stage(groups[rank])
        optimizer = torch.optim.SGD(stage.parameters(), lr=0.1)
        train(rank, stage)
        gradients = [parameter.grad for parameter in stage.parameters()]
        norm = counted * sum(gradient.square().sum() for gradient in gradients)
        dist.all_reduce(norm)
        norm.sqrt_()
        for gradient in gradients:
            gradient.mul_(0.3 / norm)
        optimizer.step()

    return body


@pytest.mark.parametrize(("counted", "verdict"), [(1, "equal"), (2, "unknown")])
def test_a_stage_with_a_group_of_its_own_is_run_plainly_and_a_right_norm_needs_no_limit(counted, verdict):
    comparison = record_ranks(2, step(counted), compare=True).comparison
    assert comparison.verdict == verdict, comparison.text()
    assert all(each.text().endswith("up to rounding") for each in comparison.chunks)
    clipping = comparison.clipping
    (found,) = clipping.notes or clipping.unknown
    assert (", as every rank computes it, and is 0.3" in found) == (counted == 1)
    assert found.endswith("give the limit with --clip-norm") == (counted == 2)
