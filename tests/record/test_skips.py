"""A tensor that passes through the stage in the middle as it is, beside one that the stage computes."""

from collections import Counter

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dualpipe.schedule import COMPUTE
from dualpipe.testing import record_ranks
from tests.record.two_ranks import receive


class First(nn.Linear):
    def forward(self, x):
        y = super().forward(x).tanh()
        return y, 2 * y


class Middle(nn.Linear):
    def forward(self, x, skipped):
        return super().forward(x).tanh(), skipped


class Last(nn.Linear):
    def forward(self, x, skipped):
        return super().forward(x) + skipped


def train(rank, how):
    """One of three stages; with ``lost`` rank 0 uses the gradient of its first output only."""
    torch.manual_seed(rank)
    stage = (First, Middle, Last)[rank](4, 4)
    optimizer = torch.optim.SGD(stage.parameters(), lr=0.1)
    for _ in range(2):
        inputs = [receive(rank - 1).requires_grad_() for _ in range(2)] if rank else [torch.randn(2, 4)]
        outputs = stage(*inputs)
        if rank == 2:
            outputs.square().mean().backward()
        else:
            for output in outputs:
                dist.send(output.detach(), rank + 1)
            gradients = [receive(rank + 1) for _ in range(2)]
            few = 1 if how == "lost" and rank == 0 else 2
            torch.autograd.backward(outputs[:few], gradients[:few])
        for tensor in inputs if rank else ():
            dist.send(tensor.grad, rank - 1)
    optimizer.step()


@pytest.mark.parametrize(("how", "verdict"), [("through", "equal"), ("lost", "unknown")])
def test_a_tensor_that_passes_through_a_stage_belongs_to_its_boundaries(how, verdict):
    recording = record_ranks(3, lambda rank: train(rank, how), compare=True)
    assert recording.comparison.verdict == verdict, recording.comparison.text()
    lost = "stage 0 of lane > on rank 0: microbatch 0 uses no gradient for an output of which stage 1 has one"
    assert (lost in recording.comparison.text()) == (how == "lost")
    if how == "through":
        ops = Counter(placed.op for placed in recording.schedule if placed.op.kind not in COMPUTE)
        assert set(ops.values()) == {1}
